"""How layers run in training: fused 4-bit adapters, fp16's guarded MLP, and activation checkpointing."""

import functools
import types

import torch
import torch.nn.functional as F

from peftlib.core.errors import ConfigError

_FP16_PRODUCT = 1024.0  # largest MLP product that enters down_proj in fp16: leaves a factor 64 for the sum over it


def fuse_adapters(model):
    """Let 4-bit layers with one plain adapter run as straight tensor code; returns how many. The result is PEFT's.

    PEFT and bitsandbytes repeat their checks at every call, copy the product, and cannot be compiled in one piece.
    Parameters, their names and saved files stay PEFT's. Layers with DoRA or several adapters keep PEFT's forward.
    """
    from peft.tuners.lora.bnb import Linear4bit

    fused = 0
    for module in model.modules():
        if isinstance(module, Linear4bit) and list(module.lora_A) == ["default"] and not module.lora_variant:
            _fuse(module)
            fused += 1
    return fused


def _fuse(module):
    from bitsandbytes.functional import dequantize_blockwise

    base = module.base_layer
    state = base.weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2).float() + state.offset
    # Plain tensors beside the parameter, which is a subclass that compilers stop at; they share its memory.
    module.packed = base.weight.data.as_subclass(torch.Tensor)
    module.packed_scales = scales
    module.packed_format = (state.blocksize, state.quant_type, list(state.shape))
    module.compute_dtype = base.compute_dtype
    module.forward = types.MethodType(_four_bit_with_adapter, module)


def _four_bit_with_adapter(self, x):
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x)
    inputs = x.to(self.compute_dtype)
    product = FourBitProduct.apply(inputs, self.packed, self.packed_scales, *self.packed_format)
    down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
    if not torch.is_autocast_enabled(x.device.type):
        low = F.linear(self.lora_dropout["default"](x.to(down.dtype)), down)
        return (product + F.linear(low, up) * self.scaling["default"]).to(x.dtype)
    low = F.linear(self.lora_dropout["default"](inputs), down)
    # One product that adds to the other, for else both would be kept for the backward pass.
    scaled = (up * self.scaling["default"]).to(product.dtype)
    return torch.addmm(product.flatten(0, -2), low.flatten(0, -2), scaled.T).view(product.shape)


class FourBitProduct(torch.autograd.Function):
    """x W^T for a frozen 4-bit W, dequantized anew in the backward pass.

    x: (..., in); packed: uint8; scales: (blocks,) float32; shape: [out, in]. The gradient is that of x alone.
    """

    @staticmethod
    def forward(ctx, x, packed, scales, blocksize, quant_type, shape):
        ctx.save_for_backward(packed, scales)
        ctx.format = (blocksize, quant_type, shape)
        return F.linear(x, _dequantized(packed, scales, ctx.format, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        weight = _dequantized(*ctx.saved_tensors, ctx.format, grad.dtype)
        return grad @ weight, None, None, None, None, None


def _dequantized(packed, scales, form, dtype):
    blocksize, quant_type, shape = form
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, blocksize, quant_type, shape, dtype)


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


def checkpoint_layers(model, cfg):
    """Activation checkpointing as the config asks: each decoder layer keeps its input alone and recomputes the rest.

    cfg.activation_checkpointing: 'off', 'on' (inputs stay on the device) or 'offload' (they go to the host's memory).
    ConfigError: offloading with dropout, whose random numbers it would not draw again.
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
