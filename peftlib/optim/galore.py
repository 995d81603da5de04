"""GaLore: Adam's moments live in a rank-r view of each weight's gradient (Zhao et al. 2024, arXiv:2403.03507).

A projected weight's gradient is turned so that its shorter side comes first: G is (m, n), m <= n. A basis P (m, r)
with orthonormal columns holds for `update_gap` steps; R = P^T G (r, n) is what Adam sees, and the weight moves by
scale * P @ adam(R). The projection is linear, so micro-batches are summed as R and each whole gradient is freed in
the backward pass that made it. A weight whose basis is due keeps its summed G until finish_accumulation.
"""

import torch

from peftlib.core.env import require_bitsandbytes
from peftlib.core.errors import ConfigError
from peftlib.optim import moments
from peftlib.optim.adamw import ProjectedAdamW
from peftlib.optim.subspace import (
    COLD_ITERATIONS,
    WARM_ITERATIONS,
    fit_basis_by_svd,
    gram,
    is_turned,
    leading_space,
    random_start,
    turned,
)

_NUMBERS_AT_ONCE = 1 << 24  # of the foreach update's temporaries


def state_numbers(shapes, rank) -> tuple[int, int]:
    """(GaLore's, Adam's) count of optimizer numbers for 2-D weights of these shapes: basis and two moments, against two
    moments of the weight's own size."""
    galore = sum(min(shape) * rank + 2 * rank * max(shape) for shape in shapes)
    return galore, sum(2 * shape[0] * shape[1] for shape in shapes)


class GaLoreAdamW(ProjectedAdamW):
    """AdamW in which groups with a "rank" are projected; the other groups are plain AdamW.

    params: groups; a projected one has 2-D weights and {"rank": r, "update_gap": steps, "scale": factor}.
    on_refresh: what becomes of the moments when a basis changes. "keep" leaves them (GaLore), "project" turns them
        into the new basis (LDAdam, Robert et al. 2024, arXiv:2410.16103: M' = C M with C = P_new^T P_old; the second
        moment by the squares of C, which drops its cross terms).
    moment_bits: 32, or 8 for bitsandbytes' blockwise quantization of the projected moments.
    reference: galore_torch 1.0's arithmetic: SVD bases, eps added before bias correction, decay after the update.
    stagger: spread the refreshes of the weights over the gap, so that few whole gradients are held at once. The first
        step still fits every basis.
    whole_gradient_bytes: what the summed whole gradients of a step may take. Where the due weights need more (the
        first step), basis_passes() asks for backward passes over the same rows, each of which holds a part of them;
        the bases then come from the whole step's gradients all the same.
    seed: of the random columns that first bases start from and of stochastic rounding.
    A bfloat16 weight is rounded stochastically; float16 ones are refused, for their range is too short.
    The clipped norm is that of the projected gradients and the plain ones together, which is below the full norm.
    State is tensors only. State dicts load under torch.load(weights_only=True).

    ConfigError: rank larger than a weight's shorter side, or a projected weight that is not 2-D or float16.
    """

    def __init__(
        self,
        params,
        *,
        on_refresh="keep",
        moment_bits=32,
        reference=False,
        stagger=True,
        whole_gradient_bytes=1 << 30,
        seed=0,
        **settings,
    ):
        if on_refresh not in ("keep", "project"):
            raise ConfigError(f"on_refresh={on_refresh!r} is not allowed: use keep, project")
        if moment_bits not in (8, 32):
            raise ConfigError(f"moment_bits={moment_bits!r} is not allowed: use 8, 32")
        if moment_bits == 8:
            require_bitsandbytes("moment_bits=8")
        super().__init__(params, rank_field="galore_rank", seed=seed, **settings)
        self.on_refresh, self.moment_bits, self.reference = on_refresh, moment_bits, reference
        self.whole_gradient_bytes = whole_gradient_bytes
        count = len(self._projected)
        is_spread = stagger and not reference
        self._phase = {  # weight -> the step of its gap at which its basis is due
            p: i * group["update_gap"] // count if is_spread else 0 for i, (p, group) in enumerate(self._projected)
        }
        self._full = {}  # weight -> summed (m, n) gradient, where a basis is due
        self._low = {}  # weight -> summed (r, n) gradient
        self._pending = {}  # weight -> basis that step() will adopt
        self._fit_norms = {}  # weight -> norm of the whole gradient that its pending basis comes from
        self._held = None  # in a basis pass: the weights whose gradients it is for
        self._hooks = [p.register_post_accumulate_grad_hook(self._absorb) for p, _ in self._projected]

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

    def basis_passes(self):
        """Yields once for each extra backward pass over the step that due bases need; see whole_gradient_bytes."""
        parts = _parts([p for p, group in self._projected if self._is_due(p, group)], self.whole_gradient_bytes)
        if len(parts) < 2:
            return
        for part in parts:
            self._held = set(part)
            yield
            self._fit_due()
            self._drop_gradients()
        self._held = None

    def _is_due(self, p, group):
        return not self.state[p] or int(self.state[p]["step"]) % group["update_gap"] == self._phase[p]

    @torch.no_grad()
    def _absorb(self, p):
        """Take a weight's gradient as soon as it is made, and free it."""
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
        if p in self._low:
            self._low[p].addmm_(basis.T, grad.float())
        else:
            self._low[p] = basis.T @ grad.float()

    def _accumulated(self):
        whole = dict(self._full)
        self._fit_due()
        for p, grad in whole.items():
            self._low[p] = self._pending[p].T @ grad
        self._full.clear()
        plain = [(p, p.grad) for group in self.param_groups if "rank" not in group for p in group["params"]]
        return [*self._low.items(), *((p, grad) for p, grad in plain if grad is not None)]

    def _state_shapes(self, p, group):
        basis = {"basis": (min(p.shape), group["rank"])} if "rank" in group else {}
        return {**super()._state_shapes(p, group), **basis}

    @torch.no_grad()
    def _fit_due(self):
        """Pending bases from the whole gradients at hand, those of one shape and age together."""
        alike = {}
        if self._full:
            norms = torch._foreach_norm(list(self._full.values()), 2, dtype=torch.float32)
            self._fit_norms.update(zip(self._full, norms, strict=True))
        for p, grad in self._full.items():
            # The fit needs finite numbers; its norm tells the caller to throw a step with an inf away whole.
            finite = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
            rank = self._group_of[p]["rank"]
            if self.reference:
                self._pending[p] = fit_basis_by_svd(finite, rank, is_turned=is_turned(p))
            else:
                alike.setdefault((finite.shape[0], rank, not self.state[p]), []).append((p, gram(finite)))
        for (m, rank, is_cold), members in alike.items():
            params, grams = zip(*members, strict=True)
            if is_cold:
                starts = [random_start(m, rank, seed=self._seed_of(p), device=p.device) for p in params]
            else:
                starts = [self.state[p]["basis"] for p in params]
            steps = COLD_ITERATIONS if is_cold else WARM_ITERATIONS
            bases = leading_space(torch.stack(grams), torch.stack(starts), steps)
            self._pending.update((p, basis.clone()) for p, basis in zip(params, bases, strict=True))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from what finish_accumulation left; adopts the pending bases."""
        for group in self.param_groups:
            if "rank" not in group:
                self._step_plain(group)
                continue
            ready = [p for p in group["params"] if p in self._low]
            for p in ready:
                if p in self._pending:
                    self._adopt(self.state[p], self._pending[p], self._low[p])
            for part in _parts(ready, _NUMBERS_AT_ONCE, size=lambda p: self._low[p].numel()):
                self._step_projected(part, group)

    def _step_projected(self, params, group):
        """weight = decay * weight - size * scale * basis @ update; in reference mode the decay comes last."""
        updates, sizes = self._adam([self.state[p] for p in params], [self._low[p] for p in params], group)
        decay = 1 - group["lr"] * group["weight_decay"]
        before, after = (1.0, decay) if self.reference else (decay, 1.0)
        for p, update, size in zip(params, updates, sizes, strict=True):
            weight, basis, alpha = turned(p), self.state[p]["basis"], -size * group["scale"]
            if p.dtype == torch.float32:
                weight.addmm_(basis, update, beta=before, alpha=alpha)
                if after != 1.0:
                    weight.mul_(after)
            else:
                exact = torch.addmm(weight.float(), basis, update, beta=before, alpha=alpha).mul_(after)
                # A generator that depends on seed, weight and step alone, so that it needs no saved state.
                noise = torch.Generator(p.device).manual_seed(self._seed_of(p, int(self.state[p]["step"])))
                weight.copy_(moments.round_stochastically(exact, noise))

    def _adam(self, states, grads, group):
        """(directions, step sizes) of Adam, lists; the moments of `states` move on by `grads`."""
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        counts = [int(state["step"]) for state in states]
        debias = [(1 - beta2**t) ** 0.5 for t in counts]
        means = [moments.read(state, "exp_avg") for state in states]
        squares = [moments.read(state, "exp_avg_sq") for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        for state, mean, square in zip(states, means, squares, strict=True):
            moments.write(state, "exp_avg", mean)
            moments.write(state, "exp_avg_sq", square)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, [group["eps"] * (1.0 if self.reference else d) for d in debias])
        directions = torch._foreach_div(means, roots)
        return directions, [group["lr"] * d / (1 - beta1**t) for d, t in zip(debias, counts, strict=True)]

    def _step_plain(self, group):
        if not self.reference:
            super()._step_plain(group)
            return
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p] or moments.fresh(self.state[p], p.grad, bits=32)
                (update,), (size,) = self._adam([state], [p.grad], group)
                p.sub_(update, alpha=size).mul_(1 - group["lr"] * group["weight_decay"])

    def _adopt(self, state, basis, low):
        if not state:
            moments.fresh(state, low, bits=self.moment_bits)
        elif self.on_refresh == "project":
            turn = basis.T @ state["basis"]
            moments.write(state, "exp_avg", turn @ moments.read(state, "exp_avg"))
            moments.write(state, "exp_avg_sq", turn.square() @ moments.read(state, "exp_avg_sq"))
        state["basis"] = basis

    def _drop_gradients(self):
        super().zero_grad(True)
        self._full.clear()
        self._low.clear()

    def zero_grad(self, set_to_none=True):
        """Drop what was accumulated, plain and projected, and bases not yet adopted."""
        self._drop_gradients()
        self._pending.clear()
        self._fit_norms.clear()
        self._held = None


def _parts(items, limit, *, size=lambda p: 4 * p.numel()):
    """Runs of `items` whose summed sizes stay within `limit`; a larger item stands alone."""
    parts, room = [], 0
    for item in items:
        if size(item) > room or not parts:
            parts.append([])
            room = limit
        parts[-1].append(item)
        room -= size(item)
    return parts
