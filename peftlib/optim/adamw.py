"""AdamW that owns the end of an accumulation: unscale, norm, infs, clipping."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from peftlib.env import require_bitsandbytes


class Accumulating:
    """What every optimizer of peftlib adds to torch's: the end of an accumulation. Mixed in before an Optimizer.

    One step of training is
        for _ in optimizer.basis_passes(): backward over all micro-batches    # most optimizers need none
        for each micro-batch: (scale * loss).backward()
        grad_norm, found_inf = optimizer.finish_accumulation(1 / scale)
        optimizer.step(); optimizer.zero_grad()     # or only zero_grad() where found_inf is not 0
    Nothing of weights or state changes before step().

    max_grad_norm: L2 norm, over all groups, to which the gradients are clipped; 0 is no clipping.
    """

    max_grad_norm = 0.0

    def basis_passes(self):
        """Yields once for each backward pass over the whole step that has to come before the real one."""
        return iter(())

    @torch.no_grad()
    def finish_accumulation(self, scale=1.0) -> tuple[Tensor, Tensor]:
        """Multiply the summed gradients by `scale` (a number or 0-dim tensor), then clip them.

        Returns (grad_norm, found_inf), 0-dim float32 tensors: the L2 norm before clipping of all that step() will
        apply, and 1.0 if any of it is inf or nan, else 0.0. Call it once per step. No host synchronisation.
        """
        grads = self._accumulated()
        if not grads:
            raise RuntimeError("no gradient was accumulated: call backward() on a loss that reaches a trained weight")
        torch._foreach_mul_(grads, scale)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
        found_inf = (~torch.isfinite(norm)).float()
        if self.max_grad_norm > 0:
            # The small constant is torch.nn.utils.clip_grad_norm_'s.
            torch._foreach_mul_(grads, torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0))
        return norm, found_inf

    def _accumulated(self):
        """The tensors that step() applies, to be scaled in place."""
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


class AccumulatingAdamW(Accumulating, torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over gradients summed by several backward passes."""

    def __init__(self, params, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure=None):
        """One AdamW update from the gradients that finish_accumulation left."""
        for group in self.param_groups:
            self._step_plain(group)

    def _step_plain(self, group):
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                fresh_state(self.state[p], p)
        if not params:
            return
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def adamw_8bit(params, *, lr, weight_decay=0.0, max_grad_norm=0.0):
    """bitsandbytes' AdamW with moments in blockwise 8 bits (Dettmers et al. 2022, arXiv:2110.02861), accumulating.

    A tensor below 4,096 numbers keeps float32 moments, as bitsandbytes does. ModelError: bitsandbytes is not there.
    """
    require_bitsandbytes("8-bit moments")
    from bitsandbytes.optim import AdamW8bit

    class AccumulatingAdamW8bit(Accumulating, AdamW8bit):
        pass

    optimizer = AccumulatingAdamW8bit(params, lr=lr, weight_decay=weight_decay)
    optimizer.max_grad_norm = max_grad_norm
    return optimizer


def fresh_state(state, like):
    """Fill an empty per-weight state with Adam's step count and zero moments of the shape of `like`; returns it."""
    state["step"] = torch.zeros((), dtype=torch.float32)
    state["exp_avg"] = torch.zeros_like(like)
    state["exp_avg_sq"] = torch.zeros_like(like)
    return state
