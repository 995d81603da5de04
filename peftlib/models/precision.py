"""Mixed precision: autocast per device, and loss scaling for fp16 that covers gradients outside `.grad`."""

import contextlib
import functools
from typing import NamedTuple

import torch

from peftlib.core.errors import NonFiniteLossError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # for a config's `precision`
_SMALLEST_SCALE = 1e-4  # smallest fp16 loss scale


def autocast(device, precision):
    """Context in which matrix products run in `precision`; a no-op for float32.

    We do not use accelerate's, whose fp16 silently does nothing on CPUs.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device, DTYPES[precision])


def run_in_autocast(model, device, precision):
    """Make `model` always run forward under autocast, so that calls and generate() work with mixed dtypes.

    As accelerate does for a prepared model, but with our autocast. Returns the model.
    """
    forward = model.forward

    @functools.wraps(forward)
    def mixed(*args, **kwargs):
        with autocast(device, precision):
            return forward(*args, **kwargs)

    model.forward = mixed
    model.running_precision = functools.partial(autocast, device, precision)  # for callers of its submodules
    return model


class LossScaler(torch.amp.GradScaler):
    """GradScaler that leaves unscaling and the search for infs to optimizer.finish_accumulation.

    torch's own looks only at `.grad`: it fails an assertion if every gradient was freed in the backward pass (GaLore)
    and misses an inf in a projected buffer (the hybrid). Per step: scale(loss).backward(), unscale_(optimizer),
    step(optimizer), update(). `grad_norm` is the last norm before clipping, `found_inf` whether anything was not
    finite, both 0-dim tensors. `loss`: the step's loss, if it has to be finite too.
    """

    loss = grad_norm = found_inf = None

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        self.finish(optimizer, inv_scale)
        return {self.found_inf.device: self.found_inf}

    def finish(self, optimizer, scale):
        """End the optimizer's accumulation; a loss that is not finite counts as found_inf too."""
        self.grad_norm, self.found_inf = optimizer.finish_accumulation(scale)
        if self.loss is not None:
            self.found_inf = torch.maximum(self.found_inf, (~torch.isfinite(self.loss)).float())


def loss_scaler(device, precision):
    """A LossScaler, enabled only for fp16."""
    return LossScaler(device, enabled=precision == "fp16")


class Applied(NamedTuple):
    """A step's outcome. grad_norm: before clipping. is_applied: False if the loss, a gradient or the norm was not
    finite; then weights and optimizer are unchanged."""

    loss: float
    grad_norm: float
    is_applied: bool


def apply_step(optimizer, scaler, loss):
    """End an accumulation and update, unless something is inf or nan; returns an Applied.

    loss: the step's, a 0-dim float32 tensor. Synchronises with the device once: most optimizer kernels cannot skip the
    update based on a device flag, so the host has to know before it launches the first of them.
    NonFiniteLossError: the fp16 loss scale has reached its minimum, so scaling cannot fix the overflow.
    """
    scaler.loss = loss
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    else:
        scaler.finish(optimizer, 1.0)
    loss, grad_norm, found_inf = torch.stack((loss, scaler.grad_norm, scaler.found_inf)).tolist()
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
        if found_inf and scaler.get_scale() < _SMALLEST_SCALE:
            raise NonFiniteLossError("fp16 overflows at every loss scale")
    elif not found_inf:
        optimizer.step()
    optimizer.zero_grad()
    return Applied(loss, grad_norm, not found_inf)
