"""APOLLO: scale each channel of a gradient as Adam would in a random low-rank projection (arXiv:2412.05270).

We do not use apollo-torch 1.0.3: its state contains Python objects (it does not load with weights_only=True), and its
norm limiter synchronises with the host for every weight. Results agree if both draw the same projection.
"""

import torch

from peftlib.optim import moments
from peftlib.optim.adamw import ProjectedAdamW
from peftlib.optim.subspace import turned

_GROWTH = 1.01  # limit on the growth of an update's norm per step (Fira, arXiv:2410.01623)


class ApolloAdamW(ProjectedAdamW):
    """APOLLO for groups with a "rank", AdamW for the others.

    params: groups; a projected one has 2-D weights and {"rank": r, "update_gap": steps, "scale": factor}. With the
    shorter side first the gradient is G (m, n); R = A G with A (r, m) normal with variance 1 / r; Adam's step on R
    gives each of the n channels the factor ||adam(R)|| / ||R||, which scales G. A is resampled every update_gap steps
    from `seed`, the weight's index and the step count, so it is never saved.
    """

    def __init__(self, params, *, seed=0, **settings):
        super().__init__(params, rank_field="apollo_rank", seed=seed, **settings)
        self._drawn = {}  # weight -> (block of steps, its projection)

    def can_capture(self):
        """Not possible: projections are resampled on the host."""
        return False

    def _new_state(self, p, group):
        if "rank" not in group:
            return super()._new_state(p, group)
        low = torch.empty(group["rank"], max(p.shape), device="meta")
        state = moments.fresh(self.state[p], low, bits=32, device=p.device)
        state["update_norm"] = torch.full((), torch.inf, device=p.device)  # no previous norm yet
        return state

    def move(self, group, members, rates):
        """As AdamW for plain groups; a projected weight moves along its gradient, with each channel scaled."""
        if "rank" not in group:
            super().move(group, members, rates)
            return
        for p in members:
            self._move_scaled(p, group, rates)

    def _move_scaled(self, p, group, rates):
        grad, state = turned(p.grad).float(), self.state[p]
        low = self.projection(p, group, int(state["step"]) - 1) @ grad  # (r, n)
        (adam,) = self._adam([state], [low], group, rates[0])
        update = grad * (rates[0] * adam.norm(dim=0) / (low.norm(dim=0) + 1e-8))  # without the bias correction
        norm = update.norm()
        allowed = (norm / (state["update_norm"] + 1e-8) / _GROWTH).clamp_min(1.0)
        state["update_norm"] = norm / allowed
        update.mul_(rates[1] / rates[0] * group["scale"] ** 0.5 / allowed)
        turned(p).mul_(rates[2]).add_(update)

    def _state_shapes(self, p, group):
        return {**super()._state_shapes(p, group), **({"update_norm": ()} if "rank" in group else {})}

    def projection(self, p, group, step):
        """(r, m) projection of a weight at a step counted from 0."""
        m, r = min(p.shape), group["rank"]
        block = step // group["update_gap"]
        if self._drawn.get(p, (None,))[0] != block:
            generator = torch.Generator().manual_seed(self._seed_of(p, block))
            self._drawn[p] = block, (torch.randn(r, m, generator=generator) / r**0.5).to(p.device)
        return self._drawn[p][1]
