"""Activations recomputed in the backward pass: kept as layer inputs on the device, or in the host's memory."""

import functools

import torch

from peftlib.core.errors import ConfigError


def checkpoint_layers(model, cfg):
    """Let each decoder layer keep nothing but its input, as cfg.activation_checkpointing says ('off' leaves the model alone).

    ConfigError: offloading with dropout, whose random numbers it would not draw again.
    """
    if cfg.activation_checkpointing == "off":
        return
    if cfg.activation_checkpointing == "offload" and cfg.lora_dropout > 0:
        raise ConfigError(
            f"activation_checkpointing='offload' with lora_dropout={cfg.lora_dropout:g}: use activation_checkpointing='on', or no dropout"
        )
    # Keeping the random state would wait for the device at every layer; only dropout draws from it.
    settings = {
        "use_reentrant": False,
        "preserve_rng_state": cfg.lora_dropout > 0,
        "determinism_check": "none",
    }
    if hasattr(model, "activation_checkpointing_enable"):  # the newer transformers' name
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)
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
