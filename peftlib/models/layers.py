"""Layers in training: fp16 overflow protection of the MLP, gradients of norms, and activation checkpointing."""

import functools
import types

import torch
from torch.utils.checkpoint import checkpoint

from peftlib.core.errors import ConfigError
from peftlib.models.inspect import core, has_dropout

_FP16_PRODUCT = 1024.0  # largest MLP product that enters down_proj in fp16: leaves a factor of 64 for the sum over it


def guard_products(model):
    """Avoid fp16 overflows of the MLP's product and of what a block adds to the residual.

    act(gate) * up is computed in float32, and each token's row is divided by a power of two before down_proj, which
    is linear, and multiplied by it afterwards; rows below the limit are unchanged. The norms after attention and MLP
    get float32 inputs, so that their outputs are float32: their weights alone can exceed 65,504.
    """
    for name, module in model.named_modules():
        if name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            module.register_forward_pre_hook(_in_float32)
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            module.forward = types.MethodType(_guarded_mlp, module)


def _in_float32(module, args):
    return (args[0].float(),)


def _guarded_mlp(self, x):
    product = self.act_fn(self.gate_proj(x)).float() * self.up_proj(x).float()
    largest = product.detach().abs().amax(-1, keepdim=True)
    lift = torch.exp2(torch.ceil(torch.log2((largest / _FP16_PRODUCT).clamp_min(1.0))))
    return self.down_proj(product / lift).float() * lift


def keep_residual_in_float32(model):
    """Keep the residual stream of a model with fp16 matrices in float32, and guard the MLP's product."""
    model.get_input_embeddings().register_forward_hook(_to_float32)
    guard_products(model)


def _to_float32(module, args, output):
    return output.float()


def checkpoint_layers(model, cfg, count=None):
    """Activation checkpointing according to the config: decoder layers keep only their input and recompute the rest.

    cfg.activation_checkpointing: 'off', 'on' (inputs stay on the device) or 'offload' (inputs move to host memory).
    count: number of layers that do so, from the first; None: all. ConfigError: offloading with dropout, whose random
    numbers it cannot reproduce.
    """
    if cfg.activation_checkpointing == "off":
        return
    # Saving the random state would synchronise at every layer; only dropout needs it.
    keeps_random_state = cfg.lora_dropout > 0 or has_dropout(model)
    if cfg.activation_checkpointing == "offload" and keeps_random_state:
        what = f"lora_dropout={cfg.lora_dropout:g}" if cfg.lora_dropout else "dropout in the adapter"
        raise ConfigError(
            f"activation_checkpointing='offload' with {what}: use activation_checkpointing='on', or no dropout"
        )
    settings = {"use_reentrant": False, "preserve_rng_state": keeps_random_state, "determinism_check": "none"}
    recomputed = functools.partial(checkpoint, **settings)
    for n, layer in enumerate(core(model).model.layers):
        if not hasattr(layer, "recomputed"):
            layer.__class__ = _recomputing(type(layer))
        is_kept = count is not None and n >= count
        layer.recomputed = None if is_kept else offloaded if cfg.activation_checkpointing == "offload" else recomputed


@functools.cache
def _recomputing(cls):
    """A subclass of a decoder layer's class whose calls go through the layer's `recomputed` in training, if it has one.

    transformers' own checkpointing is inside `forward` since 5.23, and so inside a compiled layer, where it ends
    compiling ("offload", adapters) or leaves the choice of what is kept to the compiler.
    """

    def call(self, hidden, **inputs):
        plain = super(made, self).__call__
        if self.recomputed is None or not self.training:
            return plain(hidden, **inputs)
        return self.recomputed(functools.partial(plain, **inputs), hidden)

    made = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
    return made


def offloaded(layer, hidden, **inputs):
    """layer(hidden, **inputs), with activations recomputed from a copy of `hidden` in pinned host memory.

    As in Unsloth's gradient checkpointing. The weights inside `layer` get gradients in the backward pass, and their
    hooks run; `inputs` get none.
    """
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # otherwise backward would not be called
    return _Offloaded.apply(functools.partial(layer, **inputs), hidden)


class _Offloaded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, hidden):
        kind = hidden.device.type
        ctx.layer, ctx.device = layer, hidden.device
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.kept = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=kind == "cuda")
        ctx.kept.copy_(hidden, non_blocking=True)
        with torch.no_grad():
            return layer(hidden)

    @staticmethod
    def backward(ctx, grad):
        hidden = ctx.kept.to(ctx.device, non_blocking=True).requires_grad_()
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device.type, dtype, enabled=enabled):
            made = ctx.layer(hidden)
        torch.autograd.backward(made, grad)
        return None, hidden.grad


def sum_norm_gradients(model):
    """Sum the gradients of trained norms in a separate kernel: a compiled layer would use one thread per column."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("RMSNorm") and weight is not None and weight.requires_grad:
            module.forward = types.MethodType(_norm_forward, module)


def _norm_forward(self, x):
    return _Scaled.apply(self._norm(x.float()), 1.0 + self.weight.float()).type_as(x)


class _Scaled(torch.autograd.Function):
    """normed * scale, over the last dimension."""

    @staticmethod
    def forward(ctx, normed, scale):
        ctx.save_for_backward(normed, scale)
        return normed * scale

    @staticmethod
    def backward(ctx, grad):
        normed, scale = ctx.saved_tensors
        return grad * scale, torch.ops.peftlib.column_sum((grad * normed).flatten(0, -2))


@torch.library.custom_op("peftlib::column_sum", mutates_args=())
def column_sum(x: torch.Tensor) -> torch.Tensor:
    """(D,) sums over the rows of (N, D)."""
    return x.sum(0)


@column_sum.register_fake
def _(x):
    return x.new_empty(x.shape[1])
