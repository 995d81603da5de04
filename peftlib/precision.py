"""Mixed precision: autocast per device, and loss scaling for fp16 that covers gradients outside `.grad`."""

import contextlib
import functools

import torch

from peftlib.errors import NonFiniteLossError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """Context in which matrix products run in `precision`; float32 products need none.

    Our own and not accelerate's, whose fp16 silently does nothing on CPUs.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device, _AUTOCAST[precision])


def run_in_autocast(model, device, precision):
    """Give `model` a forward that always runs under autocast, so that calls and generate() work on mixed weights.

    What accelerate does to a prepared model, but with our autocast. Returns the model.
    """
    forward = model.forward

    @functools.wraps(forward)
    def mixed(*args, **kwargs):
        with autocast(device, precision):
            return forward(*args, **kwargs)

    model.forward = mixed
    model.running_precision = functools.partial(autocast, device, precision)  # for who calls its parts
    return model


class LossScaler(torch.amp.GradScaler):
    """GradScaler that leaves unscaling and the search for infs to optimizer.finish_accumulation.

    torch's own looks at `.grad` alone: it asserts where every gradient was freed in the backward pass (GaLore) and
    misses an inf in a projected buffer (the hybrid). Per step: scale(loss).backward(), unscale_(optimizer),
    step(optimizer), update(). `grad_norm` is the last norm before clipping, a 0-dim tensor.
    """

    grad_norm = None

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        self.grad_norm, found = optimizer.finish_accumulation(inv_scale)
        return {found.device: found}


def loss_scaler(device, precision):
    """A LossScaler, switched on for fp16 alone."""
    return LossScaler(device, enabled=precision == "fp16")


def apply_step(optimizer, scaler):
    """End an accumulation and update. Returns (grad_norm before clipping, 0-dim tensor; is_skipped).

    is_skipped: an fp16 overflow left weights and state as they were; the scale is then lower.
    NonFiniteLossError: the scale has shrunk to nothing, so the overflow is not one that scaling can cure.
    """
    if scaler.is_enabled():
        before = scaler.get_scale()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        grad_norm, is_skipped = scaler.grad_norm, scaler.get_scale() < before
        if scaler.get_scale() < 1e-4:
            raise NonFiniteLossError(
                "fp16 overflows at every loss scale: use precision='bf16' or 'fp32'; the last checkpoint is kept"
            )
    else:
        (grad_norm, _), is_skipped = optimizer.finish_accumulation(), False
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm, is_skipped
