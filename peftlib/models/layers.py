"""How layers run in training: fused 4-bit adapters, fp16's guarded MLP, and activation checkpointing."""

import functools
import types

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlib.core.errors import ConfigError
from peftlib.models.inspect import core, is_four_bit

_FP16_PRODUCT = 1024.0  # largest MLP product that enters down_proj in fp16: leaves a factor 64 for the sum over it


def fuse_adapters(model):
    """Let linear layers with one plain adapter run as one operator, `peftlib::adapted_product`; returns how many.

    PEFT and bitsandbytes repeat their checks at every call, copy the product, and cannot be compiled in one piece. The
    result is PEFT's, and parameters, their names and saved files stay PEFT's. Layers with DoRA or several adapters keep
    PEFT's forward.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    fused = 0
    for module in model.modules():
        if isinstance(module, Linear | Linear4bit) and list(module.lora_A) == ["default"]:
            if module.lora_variant or module.base_layer.bias is not None:
                continue
            _fuse(module)
            fused += 1
    return fused


def _fuse(module):
    from bitsandbytes.functional import dequantize_blockwise

    weight = module.base_layer.weight
    module.frozen, module.frozen_scales, module.frozen_format = None, None, (0, "", *weight.shape)
    module.compute_dtype = getattr(module.base_layer, "compute_dtype", weight.dtype)
    if is_four_bit(weight):
        state = weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2).float() + state.offset
        # Plain tensors beside the parameter, which is a subclass that compilers stop at; they share its memory.
        module.frozen, module.frozen_scales = weight.data.as_subclass(torch.Tensor), scales
        module.frozen_format = (state.blocksize, state.quant_type, *state.shape)
    module.forward = types.MethodType(_adapted_forward, module)


def _adapted_forward(self, x):
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x)
    is_mixed = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_mixed else self.compute_dtype
    inputs = x.to(dtype)
    dropout = self.lora_dropout["default"]
    dropped = dropout(inputs) if self.training and isinstance(dropout, torch.nn.Dropout) else None
    down = self.lora_A["default"].weight.to(dtype)
    up = (self.lora_B["default"].weight * self.scaling["default"]).to(dtype)
    frozen = self.base_layer.weight.to(dtype) if self.frozen is None else self.frozen
    product, _ = torch.ops.peftlib.adapted_product(
        inputs, dropped, frozen, self.frozen_scales, down, up, *self.frozen_format
    )
    return product if is_mixed else product.to(x.dtype)


@torch.library.custom_op("peftlib::adapted_product", mutates_args=())
def adapted_product(
    x: Tensor,
    dropped: Tensor | None,
    frozen: Tensor,
    scales: Tensor | None,
    down: Tensor,
    up: Tensor,
    blocksize: int,
    quant_type: str,
    out: int,
    inner: int,
) -> tuple[Tensor, Tensor]:
    """(x W^T + (x down^T) up^T, x down^T) for a frozen W (out, inner), which is dequantized again for the gradients.

    x: (..., inner); dropped: what the adapter gets in place of x, or None. frozen: W, or its packed uint8 with scales:
    (blocks,) float32. down: (r, inner), up: (out, r), scaled. The second result is (tokens, r). Opaque to
    torch.compile, which would trace the dequantization of every layer anew.
    """
    flat = x.flatten(0, -2)
    low = (flat if dropped is None else dropped.flatten(0, -2)) @ down.T
    product = F.linear(flat, _weight(frozen, scales, blocksize, quant_type, out, inner, x.dtype))
    product.addmm_(low, up.T)  # in place: the product is large, and a sum beside it would be a copy
    return product.view(*x.shape[:-1], out), low


@adapted_product.register_fake
def _(x, dropped, frozen, scales, down, up, blocksize, quant_type, out, inner):
    return x.new_empty((*x.shape[:-1], out)), x.new_empty((x.numel() // inner, down.shape[0]))


@torch.library.custom_op("peftlib::adapted_product_backward", mutates_args=())
def adapted_product_backward(
    grad: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    low: Tensor,
    frozen: Tensor,
    scales: Tensor | None,
    down: Tensor,
    up: Tensor,
    blocksize: int,
    quant_type: str,
    out: int,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dropped (empty where it is None), down and up."""
    flat = grad.flatten(0, -2)
    grad_low = flat @ up
    grad_x = flat @ _weight(frozen, scales, blocksize, quant_type, out, inner, grad.dtype)
    given, grad_dropped = (x, grad_x.new_empty(0)) if dropped is None else (dropped, grad_low @ down)
    if dropped is None:
        grad_x.addmm_(grad_low, down)
    else:
        grad_dropped = grad_dropped.view(x.shape)
    return grad_x.view(x.shape), grad_dropped, grad_low.T @ given.flatten(0, -2), flat.T @ low


@adapted_product_backward.register_fake
def _(grad, x, dropped, low, frozen, scales, down, up, blocksize, quant_type, out, inner):
    grad_dropped = x.new_empty(0) if dropped is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), grad_dropped, torch.empty_like(down), torch.empty_like(up)


def _keep(ctx, inputs, output):
    x, dropped, frozen, scales, down, up, *ctx.format = inputs
    ctx.save_for_backward(x, dropped, output[1], frozen, scales, down, up)


def _gradients(ctx, grad, _):
    saved = ctx.saved_tensors  # checkpointing lets them be read once
    grads = torch.ops.peftlib.adapted_product_backward(grad, *saved, *ctx.format)
    return (grads[0], None if saved[1] is None else grads[1], None, None, grads[2], grads[3], None, None, None, None)


adapted_product.register_autograd(_gradients, setup_context=_keep)


def _weight(frozen, scales, blocksize, quant_type, out, inner, dtype):
    if scales is None:
        return frozen
    return torch.ops.bitsandbytes.dequantize_4bit(frozen, scales, blocksize, quant_type, [out, inner], dtype)


def guard_products(model):
    """Keep what fp16 cannot hold out of it: the MLP's product, and what a block adds to the residual.

    act(gate) * up is made in float32 and each token's row divided by a power of two before down_proj, which is
    linear, and multiplied by it after; rows below the limit pass unchanged. The norms after attention and MLP get
    float32, so that they give it: their weights alone can pass 65,504.
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
    """Let a model of fp16 matrices carry its residual stream in float32 and guard the MLP's product."""
    model.get_input_embeddings().register_forward_hook(_to_float32)
    guard_products(model)


def _to_float32(module, args, output):
    return output.float()


def checkpoint_layers(model, cfg, count=None):
    """Activation checkpointing as the config asks: each decoder layer keeps its input alone and recomputes the rest.

    cfg.activation_checkpointing: 'off', 'on' (inputs stay on the device) or 'offload' (they go to the host's memory).
    count: how many layers do, the first ones; None: all. ConfigError: offloading with dropout, whose random numbers it
    would not draw again.
    """
    if cfg.activation_checkpointing == "off":
        return
    if cfg.activation_checkpointing == "offload" and cfg.lora_dropout > 0:
        raise ConfigError(
            f"activation_checkpointing='offload' with lora_dropout={cfg.lora_dropout:g}: use "
            "activation_checkpointing='on', or no dropout"
        )
    # Keeping the random state would wait for the device at every layer; only dropout draws from it.
    keeps_random_state = cfg.lora_dropout > 0
    settings = {"use_reentrant": False, "preserve_rng_state": keeps_random_state, "determinism_check": "none"}
    newer = getattr(model, "activation_checkpointing_enable", None)  # the newer transformers' name
    (newer or model.gradient_checkpointing_enable)(settings)
    layers = core(model).model.layers
    for layer in layers[len(layers) if count is None else count :]:
        layer.gradient_checkpointing = False
    if cfg.activation_checkpointing == "offload":
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = offloaded


def offloaded(layer, hidden, **inputs):
    """layer(hidden, **inputs), its activations recomputed from a copy of `hidden` in the host's pinned memory.

    As in Unsloth's gradient checkpointing. The weights inside `layer` get their gradients in the backward pass, hooks
    included; `inputs` get none.
    """
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # else nothing would call the backward pass
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
