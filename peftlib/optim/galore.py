"""GaLore: Adam's moments are kept in a rank-r projection of each gradient (Zhao et al. 2024, arXiv:2403.03507).

A projected weight's gradient is transposed if needed so that its shorter side comes first: G is (m, n), m <= n. A basis
P (m, r) with orthonormal columns is used for `update_gap` steps; Adam gets R = P^T G (r, n), and the weight moves by
scale * P @ adam(R). The projection is linear, so micro-batches are accumulated as R, and each full gradient is freed in
its backward pass. A weight whose basis is due for a refresh keeps its accumulated G until finish_accumulation.
"""

import torch

from peftlib.core.env import require_bitsandbytes
from peftlib.core.errors import ConfigError
from peftlib.optim import moments
from peftlib.optim.moments import parts_within
from peftlib.optim.subspace import (
    COLD_ITERATIONS,
    WARM_ITERATIONS,
    fit_basis_by_svd,
    gram,
    is_turned,
    leading_space,
    random_start,
    tensor_cores,
    turned,
)
from peftlib.optim.sums import SummedProjections

NUMBERS_AT_ONCE = 1 << 24  # limit for the foreach update's temporaries
_FITTED_AT_ONCE = 24  # bases of one shape; 0.2 GiB for the 1B


def state_numbers(shapes, rank) -> tuple[int, int]:
    """(GaLore's, Adam's) number of optimizer state elements for 2-D weights of these shapes: basis and two moments,
    versus two moments of the weight's size."""
    galore = sum(min(shape) * rank + 2 * rank * max(shape) for shape in shapes)
    return galore, sum(2 * shape[0] * shape[1] for shape in shapes)


class GaLoreAdamW(SummedProjections):
    """AdamW with projected gradients for groups with a "rank"; other groups use plain AdamW.

    params: groups; a projected one has 2-D weights and {"rank": r, "update_gap": steps, "scale": factor}.
    on_refresh: what happens to the moments when a basis changes. "keep" leaves them (GaLore), "project" maps them
        into the new basis (LDAdam, Robert et al. 2024, arXiv:2410.16103: M' = C M with C = P_new^T P_old; the second
        moment by the squares of C, which drops its cross terms).
    moment_bits: 32, or 8 for bitsandbytes' blockwise quantization of the projected moments.
    reference: galore_torch 1.0's arithmetic: SVD bases, eps added before bias correction, decay after the update.
    stagger: spread the refreshes of the weights over the gap, so that few full gradients are in memory at once. The
        first step still fits every basis.
    whole_gradient_bytes: limit for the accumulated full gradients of a step. If the due weights need more (in the
        first step), basis_passes() requests extra backward passes over the same rows, each for a part of the weights;
        the bases still come from the full step's gradients.
    seed: for the random columns that initial bases start from, and for stochastic rounding.
    bfloat16 weights are rounded stochastically; float16 weights are rejected, because their range is too small.
    Clipping uses the norm of projected and plain gradients together, which is below the full norm.
    State contains only tensors. State dicts load with torch.load(weights_only=True).

    ConfigError: rank larger than a weight's shorter side, or a projected weight that is not 2-D or is float16.
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
        self.on_refresh, self.moment_bits, self.reference = on_refresh, moment_bits, reference
        how = {"is_spread": stagger and not reference, "whole_gradient_bytes": whole_gradient_bytes}
        super().__init__(params, rank_field="galore_rank", seed=seed, **how, **settings)

    def load_state_dict(self, state_dict):
        """Load a saved state, each tensor in the dtype it was saved in."""
        super().load_state_dict(state_dict)
        self._index_groups()  # torch has replaced the group dicts
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(order, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                # torch casts float state to the weight's dtype, which would round bases and moments of bf16 weights
                self.state[p][name] = value.to(device="cpu" if name == "step" else p.device, copy=True)
            if p in self._views and "basis" in self.state[p]:
                self.state[p]["basis"] = self._views[p].adopt(self.state[p]["basis"])

    def _accumulated(self):
        self._gather()
        whole = dict(self._full)
        self._fit_due()
        for p, grad in whole.items():
            low = self._pending[p].T @ grad
            self._low[p] = self._low[p].copy_(low) if p in self._low else low
        self._full.clear()
        plain = [(p, p.grad) for group in self.param_groups if "rank" not in group for p in group["params"]]
        return [*self._low.items(), *((p, grad) for p, grad in plain if grad is not None)]

    def _state_shapes(self, p, group):
        basis = {"basis": (min(p.shape), group["rank"])} if "rank" in group else {}
        return {**super()._state_shapes(p, group), **basis}

    @torch.no_grad()
    def _fit_due(self):
        """Fit pending bases to the accumulated full gradients, batched by shape and age."""
        alike = {}
        if self._full:
            norms = torch._foreach_norm(list(self._full.values()), 2, dtype=torch.float32)
            self._fit_norms.update(zip(self._full, norms, strict=True))
        for p, grad in self._full.items():
            rank = self._group_of[p]["rank"]
            if self.reference:
                self._pending[p] = fit_basis_by_svd(_finite(grad), rank, is_turned=is_turned(p))
            else:
                alike.setdefault((grad.shape[0], rank, not self.state[p]), []).append(p)
        for (m, rank, is_cold), members in alike.items():
            steps = COLD_ITERATIONS if is_cold else WARM_ITERATIONS
            for first in range(0, len(members), _FITTED_AT_ONCE):
                params = members[first : first + _FITTED_AT_ONCE]
                if is_cold:
                    starts = [random_start(m, rank, seed=self._seed_of(p), device=p.device) for p in params]
                else:
                    starts = [self.state[p]["basis"] for p in params]
                grams = torch.stack([gram(_finite(self._full[p])) for p in params])
                bases = leading_space(grams, torch.stack(starts), steps)
                self._pending.update((p, basis.clone()) for p, basis in zip(params, bases, strict=True))
        if self._full and self.processes:  # different GPUs would fit bases that differ by rounding
            self.processes.broadcast_([self._pending[p] for p, _ in self._projected if p in self._full])

    def begin_step(self):
        """Create missing states, adopt the pending bases, and count the step."""
        super().begin_step()
        for p, basis in self._pending.items():
            self._adopt(self.state[p], basis)
            if p in self._views:
                self.state[p]["basis"] = self._views[p].adopt(self.state[p]["basis"])

    def _with_gradient(self, group):
        if "rank" not in group:
            return super()._with_gradient(group)
        return [p for p in group["params"] if p in self._low]

    def _new_state(self, p, group):
        if "rank" not in group:
            return super()._new_state(p, group)
        return moments.fresh(self.state[p], self._low[p], bits=self.moment_bits)

    def _adopt(self, state, basis):
        if "basis" not in state:
            state["basis"] = basis
            return
        if self.on_refresh == "project" and "exp_avg" in state:
            turn = basis.T @ state["basis"]
            moments.write(state, "exp_avg", turn @ moments.read(state, "exp_avg"))
            moments.write(state, "exp_avg_sq", turn.square() @ moments.read(state, "exp_avg_sq"))
        state["basis"].copy_(basis)

    def rates_of(self, group, count):
        """As for AdamW; in reference mode eps is added before the bias correction."""
        rates = super().rates_of(group, count)
        if self.reference:
            rates[:2] = torch.stack((torch.ones(()), rates[1] / rates[0]))
        return rates

    def can_capture(self):
        """Not with stochastic rounding, which uses a generator per step."""
        return super().can_capture() and all(p.dtype == torch.float32 for p, _ in self._projected)

    def move(self, group, members, rates):
        """weight = decay * weight - size * scale * basis @ update; in reference mode, decay comes last."""
        if "rank" not in group:
            self._move_plain(group, members, rates)
            return
        for part in parts_within(members, NUMBERS_AT_ONCE, size=lambda p: self._low[p].numel()):
            updates = self._adam([self.state[p] for p in part], [self._low[p] for p in part], group, rates[0])
            torch._foreach_mul_(updates, rates[1])
            for p, update in zip(part, updates, strict=True):
                self._move_projected(p, update, group, rates[2])

    def _move_projected(self, p, update, group, decay):
        exact = turned(p if p.dtype == torch.float32 else p.float())
        if group["weight_decay"] and not self.reference:
            exact.mul_(decay)
        with tensor_cores(is_on=not self.reference):
            exact.addmm_(self.state[p]["basis"], update, alpha=group["scale"])
        if group["weight_decay"] and self.reference:
            exact.mul_(decay)
        if p.dtype != torch.float32:
            # A generator that depends only on seed, weight and step, so that it needs no saved state.
            noise = torch.Generator(p.device).manual_seed(self._seed_of(p, int(self.state[p]["step"])))
            turned(p).copy_(moments.round_stochastically(exact, noise))

    def _move_plain(self, group, members, rates):
        if not self.reference:
            super().move(group, members, rates)
            return
        updates = self._adam([self.state[p] for p in members], [p.grad for p in members], group, rates[0])
        torch._foreach_mul_(updates, rates[1])
        torch._foreach_add_(members, updates)
        torch._foreach_mul_(members, rates[2])


def _finite(grad):
    """Replace inf and nan for the fit; because of the norm, the caller skips the step anyway."""
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
