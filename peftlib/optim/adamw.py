"""AdamW that finishes gradient accumulation itself: unscaling, norm, infs, clipping."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from peftlib.core.env import seed_of
from peftlib.core.errors import CheckpointError, ConfigError
from peftlib.optim import moments

_ALIGNED = 64  # alignment, in elements, of the parts of a flat buffer


class Accumulating:
    """Mixin, to be listed before an Optimizer, that adds the end of an accumulation to it.

    A training step is
        for _ in optimizer.basis_passes(): backward over all micro-batches    # most optimizers need none
        for each micro-batch: (scale * loss).backward()
        grad_norm, found_inf = optimizer.finish_accumulation(1 / scale)
        optimizer.step(); optimizer.zero_grad()     # or only zero_grad() where found_inf is not 0
    Weights and state do not change before step().

    max_grad_norm: L2 norm, over all groups, to which gradients are clipped; 0: no clipping.
    """

    max_grad_norm = 0.0
    keeps_buffers = False  # zero gradients in place, because captured kernels need fixed addresses
    # {weight: norm of a gradient that step() does not apply but that a basis is fitted to}
    _fit_norms: Mapping[Tensor, Tensor] = MappingProxyType({})
    # The weights of the last accumulation, and the norm of each one's sum.
    last_norms: tuple[Sequence[Tensor], Tensor | None] = ((), None)
    processes = None  # processes that share a step (train/parallel), if there are several

    def basis_passes(self):
        """Yield once for each extra backward pass over the step that must come before the actual one."""
        return iter(())

    def gather_refreshes(self):
        """Reduce the number of different kinds of steps; most optimizers have one."""

    def leaves(self):
        """The tensors in whose `grad` autograd accumulates."""
        return [p for group in self.param_groups for p in group["params"]]

    def can_capture(self):
        """Whether the update runs entirely on the device, with only `rates_of` changing between steps."""
        return False

    def use_flat_buffer(self, extra):
        """Place all sums of a step in one buffer, which processes can reduce in place; returns the buffer.

        (N,) float32; its first `extra` elements are the caller's. ConfigError: a plain weight is not float32.
        """
        self.keeps_buffers = True
        shapes = self._sums()
        edges = [_ALIGNED]
        for p, shape in shapes:
            if shape == p.shape and p.dtype != torch.float32:
                raise ConfigError(f"a {p.dtype} weight cannot train on several processes: keep it in float32")
            edges.append(edges[-1] + -(-math.prod(shape) // _ALIGNED) * _ALIGNED)
        flat = torch.zeros(edges[-1], device=shapes[0][0].device)
        for (p, shape), start in zip(shapes, edges, strict=False):
            self._put_sum(p, flat[start : start + math.prod(shape)].view(shape))
        return flat

    def _sums(self):
        """[(weight, shape of its sum), ...]."""
        return [(p, p.shape) for p in Accumulating.leaves(self)]

    def _put_sum(self, p, zeros):
        """Accumulate into `zeros` from now on."""
        p.grad = zeros

    def whole_sums(self):
        """The sums outside the flat buffer, in the same order on every process; creates missing ones."""
        return []

    def shares_state(self):
        """Whether other processes hold parts of the state, so that all must call whole_state_dict()."""
        return False

    def whole_state_dict(self):
        """state_dict() including the state that other processes hold; complete only in the main process."""
        return self.state_dict()

    def drop_gradients(self):
        """Drop one accumulation within a step; results of the step's earlier passes stay."""
        self.zero_grad()

    def is_steady(self):
        """Whether the next backward pass is like every other one, so that it can be captured."""
        return True

    def zero_grad(self, set_to_none=True):
        """Drop the gradients, or zero them if `keeps_buffers`."""
        if not self.keeps_buffers:
            super().zero_grad(set_to_none)
            return
        if grads := [p.grad for p in Accumulating.leaves(self) if p.grad is not None]:
            torch._foreach_zero_(grads)

    @torch.no_grad()
    def finish_accumulation(self, scale=1.0) -> tuple[Tensor, Tensor]:
        """Multiply the summed gradients by `scale` (a number or 0-dim tensor), then clip them.

        Returns (grad_norm, found_inf), 0-dim float32 tensors: the L2 norm before clipping of everything that step()
        will apply, and 1.0 if any of it, or of what a basis was fitted to, is inf or nan, else 0.0. Call it once per
        step. It does not synchronise with the host unless a basis is fitted.
        """
        summed = self._accumulated()
        if not summed:
            raise RuntimeError("no gradient was accumulated: call backward() on a loss that reaches a trained weight")
        grads = [grad for _, grad in summed]
        torch._foreach_mul_(grads, scale)
        norms = torch.stack([*torch._foreach_norm(grads, 2, dtype=torch.float32), *self._fit_norms.values()])
        norm = torch.linalg.vector_norm(norms[: len(grads)])
        # Saved before clipping, which turns every gradient into nan if one is.
        self.last_norms = ([*(p for p, _ in summed), *self._fit_norms], norms)
        found_inf = (~(torch.isfinite(norm) & torch.isfinite(norms).all())).float()
        if self.max_grad_norm > 0:  # same epsilon as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_(grads, torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0))
        return norm, found_inf

    def nonfinite_weights(self):
        """List of weights whose gradient was inf or nan in the last finish_accumulation. Synchronises."""
        params, norms = self.last_norms
        is_finite = torch.isfinite(norms).tolist() if params else []
        return list(dict.fromkeys(p for p, fine in zip(params, is_finite, strict=True) if not fine))

    def require_state(self, state_dict):
        """CheckpointError unless a saved state has the groups, names and shapes that load_state_dict expects."""
        groups, saved = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group.get("params", ())) if isinstance(group, dict) else None for group in groups] != sizes:
            raise CheckpointError(f"the optimizer's groups do not have {sizes} weights")
        for group, kept in zip(self.param_groups, groups, strict=True):
            for p, number in zip(group["params"], kept["params"], strict=True):
                if not saved.get(number):
                    continue  # not updated yet
                tensors = _flat(saved[number])
                for name, shape in self._state_shapes(p, group).items():
                    found = tensors.get(name)
                    if not isinstance(found, Tensor) or found.shape != torch.Size(shape):
                        raise CheckpointError(
                            f"the optimizer's {name} of weight {number} should have the shape {tuple(shape)}, but is "
                            f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
                        )

    def _accumulated(self):
        """[(weight, tensor), ...]: what step() will apply to each weight; scaled in place."""
        return [(p, p.grad) for p in Accumulating.leaves(self) if p.grad is not None]

    def _state_shapes(self, p, group):
        """{name: shape} of the tensors that are always in a weight's state."""
        return {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}


class AccumulatingAdamW(Accumulating, torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over gradients accumulated by several backward passes."""

    def __init__(self, params, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure=None):
        """One AdamW update from the gradients after finish_accumulation."""
        self.begin_step()
        for group in self.param_groups:
            for members in self._of_one_age(group):
                rates = self.rates_of(group, self.count_of(members[0]))
                self.move(group, members, rates.to(members[0].device))

    def begin_step(self):
        """Create missing states, and count the step."""
        moved = [(p, group) for group in self.param_groups for p in self._with_gradient(group)]
        torch._foreach_add_([(self.state[p] or self._new_state(p, group))["step"] for p, group in moved], 1)

    def _with_gradient(self, group):
        return [p for p in group["params"] if p.grad is not None]

    def _new_state(self, p, group):
        return moments.fresh(self.state[p], p, bits=32)

    def _of_one_age(self, group):
        """The weights of a group that have a gradient, in lists with the same step count: usually one list."""
        ages = {}
        for p in self._with_gradient(group):
            ages.setdefault(self.count_of(p), []).append(p)
        return ages.values()

    def count_of(self, p):
        """Number of updates of a weight so far."""
        return int(self.state[p]["step"])

    def rates_of(self, group, count):
        """(3,) float32: factor on the root of the second moment, negative step size, weight decay factor.

        Includes the bias correction of Adam's update number `count`.
        """
        beta1, beta2 = group["betas"]
        factor, size = (1 - beta2**count) ** -0.5, group["lr"] / (1 - beta1**count)
        return torch.tensor([factor, -size, 1 - group["lr"] * group["weight_decay"]])

    def can_capture(self):
        """Whether every weight has a state, with the same age within a group."""
        return all(
            all(map(self.state.get, group["params"])) and len(self._of_one_age(group)) == 1
            for group in self.param_groups
        )

    def move(self, group, members, rates):
        """Update `members` of a group, whose states exist, from their gradients. rates: `rates_of`, on their device."""
        directions = self._adam([self.state[p] for p in members], [p.grad for p in members], group, rates[0])
        if group["weight_decay"]:
            torch._foreach_mul_(members, rates[2])
        torch._foreach_mul_(directions, rates[1])
        torch._foreach_add_(members, directions)

    def _adam(self, states, grads, group, factor):
        """List of Adam's directions; updates the moments in `states` with `grads`. factor: as in `rates_of`, 0-dim."""
        beta1, beta2 = group["betas"]
        means = [moments.read(state, "exp_avg") for state in states]
        squares = [moments.read(state, "exp_avg_sq") for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        for state, mean, square in zip(states, means, squares, strict=True):
            moments.write(state, "exp_avg", mean)
            moments.write(state, "exp_avg_sq", square)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_mul_(roots, factor)
        torch._foreach_add_(roots, group["eps"])
        return list(torch._foreach_div(means, roots))


class ProjectedAdamW(AccumulatingAdamW):
    """Base of optimizers that project the gradients of groups with a "rank"; other groups use plain AdamW.

    rank_field: the setting's name in errors. seed: for everything random about a weight.
    ConfigError: a projected weight is not 2-D, or is float16, or its shorter side is below the rank.
    """

    def __init__(self, params, *, rank_field, seed, **settings):
        super().__init__(params, **settings)
        self._seed = seed
        self._index_groups()
        self._place = {p: i for i, (p, _) in enumerate(self._projected)}
        # The smallest first: its shape limits the rank.
        for p, group in sorted(self._projected, key=lambda pair: min(pair[0].shape, default=0)):
            if p.ndim != 2:
                raise ConfigError(
                    f"a weight of shape {tuple(p.shape)} cannot be projected: only 2-D weights have a basis"
                )
            if p.dtype == torch.float16:
                raise ConfigError("a float16 weight loses small updates and overflows: keep it in float32 or bfloat16")
            if not 1 <= group["rank"] <= min(p.shape):
                raise ConfigError(f"{rank_field}={group['rank']}, weight {tuple(p.shape)}: use 1..{min(p.shape)}")

    def _index_groups(self):
        self._projected = [(p, group) for group in self.param_groups if "rank" in group for p in group["params"]]
        self._group_of = dict(self._projected)

    def _seed_of(self, p, *numbers):
        """A seed for a weight; needs no saved state."""
        return seed_of(self._seed, self._place[p], *numbers)

    def _state_shapes(self, p, group):
        if "rank" not in group:
            return super()._state_shapes(p, group)
        projected = (group["rank"], max(p.shape))
        return {"step": (), "exp_avg": projected, "exp_avg_sq": projected}


def _flat(state):
    """A weight's saved state without the nested dict that bitsandbytes uses; {} if it is not a state."""
    parts = state if isinstance(state, dict) else {}
    nested = [value for value in parts.values() if isinstance(value, dict)]
    return {**parts, **{name: value for part in nested for name, value in part.items()}}
