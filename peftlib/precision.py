"""Loss scaling for fp16 that covers gradients outside `.grad`."""

import torch


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
