"""Accumulate the gradients of projected weights: at rank r, or in full if a basis is due for a refresh.

Projection is linear, so micro-batches and processes are summed as R = P^T G, each as soon as its layer's backward pass
has computed it.
"""

import torch

from peftlib.optim.adamw import ProjectedAdamW
from peftlib.optim.moments import parts_within
from peftlib.optim.subspace import low_gradient, product_in_float32, tensor_cores, turned

GATHERED, _STEPS_BETWEEN = 1 << 29, 25  # bytes of full gradients in a step that refreshes; steps between such steps


class SummedProjections(ProjectedAdamW):
    """The sums of an optimizer that projects with bases refreshed every `update_gap` steps of a group.

    is_spread: refresh different weights in different steps. whole_gradient_bytes: as in GaLoreAdamW.
    Subclasses fit `_pending` bases to the full sums `_full` in _fit_due().
    """

    reference = False

    def __init__(self, params, *, is_spread, whole_gradient_bytes, **settings):
        super().__init__(params, **settings)
        self.whole_gradient_bytes = whole_gradient_bytes
        count = len(self._projected)
        self._is_spread = is_spread
        self._phase = {  # weight -> the step of its gap in which its basis is due
            p: i * group["update_gap"] // count if self._is_spread else 0
            for i, (p, group) in enumerate(self._projected)
        }
        self._full = {}  # weight -> summed (m, n) gradient, if a basis is due
        self._low = {}  # weight -> summed (r, n) gradient
        self._pending = {}  # weight -> basis that step() will adopt
        self._fit_norms = {}  # weight -> norm of the full gradient that its pending basis is fitted to
        self._held = None  # in a basis pass: the weights whose gradients it accumulates
        self._hooks = {p: p.register_post_accumulate_grad_hook(self._absorb) for p, _ in self._projected}
        self._views = {}

    def see_through(self, views):
        """Use the projected gradients that layers compute themselves. views: {weight: kernels.projections.View}."""
        self._views, self._weights = views, {view: p for p, view in views.items()}
        for p, view in views.items():
            view.give_to(self._take)
            self._hooks.pop(p).remove()  # autograd would call it without a gradient

    def detach(self):
        """Remove the backward hooks; the optimizer cannot be used afterwards."""
        for hook in self._hooks.values():
            hook.remove()

    def basis_passes(self):
        """Yield once for each extra backward pass over the step that due bases need; see whole_gradient_bytes."""
        parts = parts_within([p for p, group in self._projected if self._is_due(p, group)], self.whole_gradient_bytes)
        if len(parts) < 2:
            return
        for part in parts:
            self._held = set(part)
            yield
            self._fit_due()
            self.drop_gradients()
        self._held = None

    def _is_due(self, p, group):
        return not self.state[p] or int(self.state[p]["step"]) % group["update_gap"] == self._phase[p]

    @torch.no_grad()
    def _absorb(self, p):
        """Accumulate a weight's gradient as soon as it is computed, and free it."""
        grad = turned(p.grad)
        p.grad = None
        if self._held is not None and p not in self._held:
            return
        if p in self._full:
            self._full[p].add_(grad)
            return
        basis = self._pending.get(p)
        if basis is None and (self._held is not None or self._is_due(p, self._group_of[p])):
            self._full[p] = grad.to(torch.float32, copy=True)
            return
        basis = self.state[p]["basis"] if basis is None else basis
        with tensor_cores(is_on=not self.reference):
            if p in self._low:
                self._low[p].addmm_(basis.T, grad.float())
            else:
                self._low[p] = basis.T @ grad.float()

    @torch.no_grad()
    def _take(self, view, g, x):
        """R of a layer with a View, if it is not the plain projection by its basis; the gradient is g^T x."""
        p = self._weights[view]
        is_left_out = self._held is not None and p not in self._held
        basis = self._pending.get(p)
        is_whole = basis is None and (self._held is not None or self._is_due(p, self._group_of[p]))
        if not is_left_out and not is_whole:
            return None if basis is None else low_gradient(g, x, basis)
        if not is_left_out:
            grad = turned(product_in_float32(g.T, x))
            self._full[p] = self._full[p].add_(grad) if p in self._full else grad
        return torch.zeros(view.gradient.shape, device=g.device)

    def leaves(self):
        """The tensors in whose `grad` autograd accumulates: the weights, or their stand-ins in a View."""
        return [self._views[p].gradient if p in self._views else p for p in super().leaves()]

    def _gather(self):
        """Collect autograd's sums of projected gradients."""
        for p, view in self._views.items():
            if view.gradient.grad is not None:
                self._low[p] = view.gradient.grad

    def _sums(self):
        shapes = dict(super()._sums())
        low = [(p, torch.Size((group["rank"], max(p.shape)))) for p, group in self._projected]
        return [*low, *((p, shape) for p, shape in shapes.items() if p not in self._group_of)]

    def _put_sum(self, p, zeros):
        if p in self._group_of:
            self._low[p] = zeros
            if p in self._views:
                self._views[p].gradient.grad = zeros
        else:
            super()._put_sum(p, zeros)

    def whole_sums(self):
        """The full gradients, (m, n) each, of the weights whose bases come from this pass."""
        due = [p for p, group in self._projected if p not in self._pending and self._is_due(p, group)]
        due = due if self._held is None else [p for p, _ in self._projected if p in self._held]
        for p in due:
            if p not in self._full:
                # In the gradient's memory layout, because processes sum raw memory.
                self._full[p] = torch.zeros_like(turned(p), dtype=torch.float32)
        return [self._full[p] for p in due]

    def gather_refreshes(self):
        """Refresh in as few steps of a gap as the full gradients allow, so that all others are alike (`is_steady`)."""
        parts = parts_within([p for p, _ in self._projected], GATHERED) if self._is_spread else []
        for i, part in enumerate(parts):
            for p in part:
                gap = self._group_of[p]["update_gap"]
                self._phase[p] = i * gap // len(parts) if gap >= _STEPS_BETWEEN * len(parts) else 0

    def is_steady(self):
        """False if a basis is due, because its weight keeps its full gradient."""
        return all(p in self._low and not self._is_due(p, group) for p, group in self._projected)

    def drop_gradients(self):
        """Drop one accumulation; bases of earlier passes stay."""
        super().zero_grad(True)
        self._full.clear()
        self._gather()  # sums of the abandoned pass
        if self.keeps_buffers and self._low:
            torch._foreach_zero_(list(self._low.values()))
        else:
            self._low.clear()
            for view in self._views.values():
                view.gradient.grad = None

    def zero_grad(self, set_to_none=True):
        """Drop all accumulated gradients, plain and projected, and bases not yet adopted."""
        self.drop_gradients()
        self._pending.clear()
        self._fit_norms.clear()
        self._held = None
