"""GaLore: Adam's moments live in a rank-r view of each weight's gradient (Zhao et al. 2024, arXiv:2403.03507).

A projected weight's gradient is turned so that its shorter side comes first: G is (m, n), m <= n. A basis P (m, r)
with orthonormal columns holds for `update_gap` steps; R = P^T G (r, n) is what Adam sees, and the weight moves by
scale * P @ adam(R). The projection is linear, so micro-batches are summed as R and each whole gradient is freed in
the backward pass that made it. A weight whose basis is due keeps its summed G until finish_accumulation.
"""

import torch
from torch import Tensor

from peftlib.errors import ConfigError
from peftlib.optim.adamw import AccumulatingAdamW, fresh_state


def fit_basis(grad: Tensor, rank: int) -> Tensor:
    """Leading left singular directions of a gradient.

    grad: (m, n), m <= n, finite, any float dtype; worked in float32. Returns (m, rank) float32, orthonormal columns.
    They are the eigenvectors of the Gram matrix G G^T (m, m), which needs no SVD of the wide matrix.
    """
    wide = grad.float()
    # Squaring would overflow or vanish for extreme gradients; a basis does not depend on their size.
    wide = wide / wide.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.eigh(wide @ wide.T)[1][:, -rank:].flip(1).contiguous()  # strongest column first


def kept_energy(grad: Tensor, rank: int) -> float:
    """Share of ||G||^2 that the best rank-r basis keeps, 0 to 1. grad: (m, n) in either orientation."""
    wide = _turned(grad).float()
    return float((fit_basis(wide, rank).T @ wide).square().sum() / wide.square().sum())


def state_numbers(shapes, rank) -> tuple[int, int]:
    """(GaLore's, Adam's) count of optimizer numbers for 2-D weights of these shapes: basis and two moments, against two
    moments of the weight's own size."""
    galore = sum(min(shape) * rank + 2 * rank * max(shape) for shape in shapes)
    return galore, sum(2 * shape[0] * shape[1] for shape in shapes)


def fit_basis_by_svd(grad: Tensor, rank: int, *, is_turned: bool) -> Tensor:
    """The same space by the SVD that galore_torch runs, with its signs.

    is_turned: `grad` (m, n) is the transpose of the weight's gradient. The SVD then runs on that gradient itself, for
    the sign of each column differs between a matrix and its transpose, and moments kept over a refresh feel it.
    """
    if is_turned:
        return torch.linalg.svd(grad.float().T, full_matrices=False)[2][:rank].T.contiguous()
    return torch.linalg.svd(grad.float(), full_matrices=False)[0][:, :rank].contiguous()


class GaLoreAdamW(AccumulatingAdamW):
    """AdamW in which groups with a "rank" are projected; the other groups are plain AdamW.

    params: groups; a projected one has 2-D weights and {"rank": r, "update_gap": steps, "scale": factor}.
    moments: what becomes of the moments when a basis changes. "keep" leaves them (GaLore), "project" turns them into
        the new basis (LDAdam, Robert et al. 2024, arXiv:2410.16103: M' = C M with C = P_new^T P_old; the second
        moment by the squares of C, which drops its cross terms).
    reference: galore_torch 1.0's arithmetic: SVD bases, eps added before bias correction, decay after the update.
    stagger: spread the refreshes of the weights over the gap, so that few whole gradients are held at once. The first
        step still fits every basis.
    The clipped norm is that of the projected gradients and the plain ones together, which is below the full norm.
    State is tensors only. State dicts load under torch.load(weights_only=True).

    ConfigError: rank larger than a weight's shorter side, or a projected weight that is not 2-D.
    """

    def __init__(self, params, *, moments="keep", reference=False, stagger=True, **settings):
        if moments not in ("keep", "project"):
            raise ConfigError(f"moments={moments!r} is not allowed: use keep, project")
        super().__init__(params, **settings)
        self.moments = moments
        self.reference = reference
        self._index_groups()
        _check_projected(self._projected)
        self._phase = {}
        for i, (p, group) in enumerate(self._projected):
            spread = stagger and not reference
            self._phase[p] = i * group["update_gap"] // len(self._projected) if spread else 0
        self._full = {}  # weight -> summed (m, n) gradient, where a basis is due
        self._low = {}  # weight -> summed (r, n) gradient
        self._pending = {}  # weight -> basis that step() will adopt
        self._hooks = [p.register_post_accumulate_grad_hook(self._absorb) for p, _ in self._projected]

    def _index_groups(self):
        self._projected = [(p, group) for group in self.param_groups if "rank" in group for p in group["params"]]
        self._group_of = dict(self._projected)

    def load_state_dict(self, state_dict):
        """Take over a saved state, each tensor in the dtype it was saved in."""
        super().load_state_dict(state_dict)
        self._index_groups()  # torch has put new group dicts in place of the old
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(order, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                # torch casts float state to the weight's dtype, which would round bases and moments of bf16 weights
                self.state[p][name] = value.to(device="cpu" if name == "step" else p.device, copy=True)

    def detach(self):
        """Remove the backward hooks; the optimizer is of no use after it."""
        for hook in self._hooks:
            hook.remove()

    def _is_due(self, p, group):
        if not self.state[p]:
            return True
        return int(self.state[p]["step"]) % group["update_gap"] == self._phase[p]

    @torch.no_grad()
    def _absorb(self, p):
        """Take a weight's gradient as soon as it is made, and free it."""
        grad = _turned(p.grad)
        p.grad = None
        state = self.state[p]
        if p in self._full:
            self._full[p].add_(grad)
        elif p in self._low:
            self._low[p].addmm_(state["basis"].T, grad.float())
        elif self._is_due(p, self._group_of[p]):
            self._full[p] = grad.float().clone()
        else:
            self._low[p] = state["basis"].T @ grad.float()

    def _accumulated(self, scale):
        for p, grad in self._full.items():
            group = self._group_of[p]
            # The fit needs finite numbers; a step with an inf is thrown away whole by the caller.
            finite = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
            if self.reference:
                self._pending[p] = fit_basis_by_svd(finite, group["rank"], is_turned=_is_turned(p))
            else:
                self._pending[p] = fit_basis(finite, group["rank"])
            self._low[p] = self._pending[p].T @ grad
        self._full.clear()
        plain = [p.grad for group in self.param_groups if "rank" not in group for p in group["params"]]
        return [*self._low.values(), *(grad for grad in plain if grad is not None)]

    @torch.no_grad()
    def step(self, closure=None):
        """One update from what finish_accumulation left; adopts the pending bases."""
        for p, group in self._projected:
            if p in self._low:
                self._step_projected(p, group, self._low[p])
        for group in self.param_groups:
            if "rank" not in group:
                self._step_plain(group)

    def _step_projected(self, p, group, low):
        state = self.state[p]
        if p in self._pending:
            self._adopt(state, self._pending[p], low)
        weight = _turned(p)
        decay = 1 - group["lr"] * group["weight_decay"]
        update, size = self._adam(state, low, group)
        if not self.reference:
            weight.mul_(decay)
        weight.sub_((state["basis"] @ update).to(weight.dtype), alpha=size * group["scale"])
        if self.reference:
            weight.mul_(decay)

    def _adam(self, state, grad, group):
        """(direction, step size) of Adam, its moments in `state` moved on by `grad`."""
        beta1, beta2 = group["betas"]
        state["step"] += 1
        t = int(state["step"])
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        debias = (1 - beta2**t) ** 0.5
        eps = group["eps"] if self.reference else group["eps"] * debias
        return mean / square.sqrt().add_(eps), group["lr"] * debias / (1 - beta1**t)

    def _step_plain(self, group):
        if not self.reference:
            super()._step_plain(group)
            return
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p] or fresh_state(self.state[p], p.grad)
                update, size = self._adam(state, p.grad, group)
                p.sub_(update, alpha=size).mul_(1 - group["lr"] * group["weight_decay"])

    def _adopt(self, state, basis, low):
        if not state:
            fresh_state(state, low)
        elif self.moments == "project":
            turn = basis.T @ state["basis"]
            state["exp_avg"] = turn @ state["exp_avg"]
            state["exp_avg_sq"] = turn.square() @ state["exp_avg_sq"]
        state["basis"] = basis

    def zero_grad(self, set_to_none=True):
        """Drop what was accumulated, plain and projected, and bases not yet adopted."""
        super().zero_grad(set_to_none)
        for kept in (self._full, self._low, self._pending):
            kept.clear()


def _is_turned(matrix):
    """Square ones are turned too, as galore_torch projects them from the right."""
    return matrix.shape[0] >= matrix.shape[1]


def _turned(matrix):
    """A view with the shorter side first."""
    return matrix.T if _is_turned(matrix) else matrix


def _check_projected(projected):
    for p, _ in projected:
        if p.ndim != 2:
            raise ConfigError(f"a weight of shape {tuple(p.shape)} cannot be projected: only 2-D weights have a basis")
    smallest = min((p for p, _ in projected), key=lambda p: min(p.shape), default=None)
    for _, group in projected:
        if not 1 <= group["rank"] <= min(smallest.shape):
            raise ConfigError(
                f"galore_rank={group['rank']}, weight {tuple(smallest.shape)}: use 1..{min(smallest.shape)}"
            )
