"""Muon for matrices and AdamW for vectors (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

import torch

from peftlib.optim.adamw import AccumulatingAdamW


class MuonAdamW(AccumulatingAdamW):
    """torch.optim.Muon over `matrices` and AdamW over `vectors`, with the same rate, clipping and accumulation.

    Matrices are updated by their Nesterov momentum, orthogonalized by five Newton-Schulz steps in bfloat16 and scaled
    to the size of AdamW's steps (Liu et al. 2025, arXiv:2502.16982). weight_decay: only for matrices.
    State of a matrix: its momentum, float32.
    """

    def __init__(self, matrices, vectors, *, lr, weight_decay=0.0, max_grad_norm=0.0):
        self._muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [dict(self._muon.param_groups[0]), {"params": vectors, "weight_decay": 0.0}]
        super().__init__(groups, lr=lr, max_grad_norm=max_grad_norm)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of both from the gradients after finish_accumulation."""
        super().step()
        # Read each time, because loading a state replaces both.
        self._muon.param_groups, self._muon.state = self.param_groups[:1], self.state
        self._muon.step()

    def can_capture(self):
        """Not possible: the matrices' step sizes are numbers on the host."""
        return False

    def _with_gradient(self, group):
        return [] if "momentum" in group else super()._with_gradient(group)

    def _state_shapes(self, p, group):
        return {"momentum_buffer": p.shape} if "momentum" in group else super()._state_shapes(p, group)
