"""AdamW that owns the end of an accumulation: unscale, norm, infs, clipping."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from peftlib.core.env import seed_of
from peftlib.core.errors import CheckpointError, ConfigError
from peftlib.optim import moments

_ALIGNED = 64  # numbers, to which the parts of a flat buffer are aligned


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
    keeps_buffers = False  # zero gradients in place: captured kernels find them where they were
    # {weight: norm of a gradient that step() does not apply but a basis rests on}
    _fit_norms: Mapping[Tensor, Tensor] = MappingProxyType({})
    # The weights of the last accumulation, and the norms of what was summed for each.
    last_norms: tuple[Sequence[Tensor], Tensor | None] = ((), None)
    processes = None  # that sum a step together (train/parallel), where there are several

    def basis_passes(self):
        """Yields once for each backward pass over the whole step that has to come before the real one."""
        return iter(())

    def gather_refreshes(self):
        """Have as few kinds of steps as the optimizer can; most have one."""

    def leaves(self):
        """The tensors in whose `grad` autograd sums."""
        return [p for group in self.param_groups for p in group["params"]]

    def can_capture(self):
        """Whether the whole update is device work that `rates_of` alone changes from step to step."""
        return False

    def use_flat_buffer(self, extra):
        """Lay all sums of a step side by side in one buffer, which processes exchange as it is; returns it.

        (N,) float32; its first `extra` numbers are the caller's. ConfigError: a plain weight is not float32.
        """
        self.keeps_buffers = True
        shapes = self._sums()
        edges = [_ALIGNED]
        for p, shape in shapes:
            if shape == p.shape and p.dtype != torch.float32:
                raise ConfigError(f"a weight in {p.dtype} cannot train on several processes: hold it in float32")
            edges.append(edges[-1] + -(-math.prod(shape) // _ALIGNED) * _ALIGNED)
        flat = torch.zeros(edges[-1], device=shapes[0][0].device)
        for (p, shape), start in zip(shapes, edges, strict=False):
            self._put_sum(p, flat[start : start + math.prod(shape)].view(shape))
        return flat

    def _sums(self):
        """[(weight, shape of what is summed for it), ...]."""
        return [(p, p.shape) for p in Accumulating.leaves(self)]

    def _put_sum(self, p, zeros):
        """Sum into `zeros` from now on."""
        p.grad = zeros

    def whole_sums(self):
        """The sums outside of the flat buffer, in an order that every process has; those not begun are made."""
        return []

    def shares_state(self):
        """Whether parts of the state are with other processes, so that all have to join in whole_state_dict()."""
        return False

    def whole_state_dict(self):
        """state_dict() with what other processes hold of the state; it is whole in the main one."""
        return self.state_dict()

    def drop_gradients(self):
        """Forget one accumulation, within a step; what earlier passes of the step have found stays."""
        self.zero_grad()

    def is_steady(self):
        """Whether the next backward pass does what every one does, so that it can be captured."""
        return True

    def zero_grad(self, set_to_none=True):
        """Drop the gradients, or zero them where `keeps_buffers`."""
        if not self.keeps_buffers:
            super().zero_grad(set_to_none)
            return
        if grads := [p.grad for p in Accumulating.leaves(self) if p.grad is not None]:
            torch._foreach_zero_(grads)

    @torch.no_grad()
    def finish_accumulation(self, scale=1.0) -> tuple[Tensor, Tensor]:
        """Multiply the summed gradients by `scale` (a number or 0-dim tensor), then clip them.

        Returns (grad_norm, found_inf), 0-dim float32 tensors: the L2 norm before clipping of all that step() will
        apply, and 1.0 if any of it, or of what a basis was fitted to, is inf or nan, else 0.0. Call it once per step.
        No host synchronisation, except where a basis is fitted.
        """
        summed = self._accumulated()
        if not summed:
            raise RuntimeError("no gradient was accumulated: call backward() on a loss that reaches a trained weight")
        grads = [grad for _, grad in summed]
        torch._foreach_mul_(grads, scale)
        norms = torch.stack([*torch._foreach_norm(grads, 2, dtype=torch.float32), *self._fit_norms.values()])
        norm = torch.linalg.vector_norm(norms[: len(grads)])
        # Kept from before the clipping, which turns every gradient into nan where one is.
        self.last_norms = ([*(p for p, _ in summed), *self._fit_norms], norms)
        found_inf = (~(torch.isfinite(norm) & torch.isfinite(norms).all())).float()
        if self.max_grad_norm > 0:  # the small constant is torch.nn.utils.clip_grad_norm_'s
            torch._foreach_mul_(grads, torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0))
        return norm, found_inf

    def nonfinite_weights(self):
        """Weights whose gradient was inf or nan at the last finish_accumulation, a list. Waits for the device."""
        params, norms = self.last_norms
        is_finite = torch.isfinite(norms).tolist() if params else []
        return list(dict.fromkeys(p for p, fine in zip(params, is_finite, strict=True) if not fine))

    def require_state(self, state_dict):
        """CheckpointError unless a saved state has the groups, names and shapes that load_state_dict relies on."""
        groups, saved = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group.get("params", ())) if isinstance(group, dict) else None for group in groups] != sizes:
            raise CheckpointError(f"the optimizer's groups are not of {sizes} weights")
        for group, kept in zip(self.param_groups, groups, strict=True):
            for p, number in zip(group["params"], kept["params"], strict=True):
                if not saved.get(number):
                    continue  # this weight has not been updated yet
                tensors = _flat(saved[number])
                for name, shape in self._state_shapes(p, group).items():
                    found = tensors.get(name)
                    if not isinstance(found, Tensor) or found.shape != torch.Size(shape):
                        raise CheckpointError(
                            f"the optimizer's {name} of weight {number} should have the shape {tuple(shape)}, it is "
                            f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
                        )

    def _accumulated(self):
        """[(weight, tensor), ...]: what step() applies to each weight, to be scaled in place."""
        return [(p, p.grad) for p in Accumulating.leaves(self) if p.grad is not None]

    def _state_shapes(self, p, group):
        """{name: shape} of the tensors that a weight's state always has."""
        return {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}


class AccumulatingAdamW(Accumulating, torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over gradients summed by several backward passes."""

    def __init__(self, params, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure=None):
        """One AdamW update from the gradients that finish_accumulation left."""
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
        """The weights of a group that have a gradient, in lists of the same step count: mostly one list."""
        ages = {}
        for p in self._with_gradient(group):
            ages.setdefault(self.count_of(p), []).append(p)
        return ages.values()

    def count_of(self, p):
        """How many updates a weight has had."""
        return int(self.state[p]["step"])

    def rates_of(self, group, count):
        """(3,) float32: factor on the root of the second moment, minus the step size, factor of weight decay.

        With the bias correction of Adam's update number `count`.
        """
        beta1, beta2 = group["betas"]
        factor, size = (1 - beta2**count) ** -0.5, group["lr"] / (1 - beta1**count)
        return torch.tensor([factor, -size, 1 - group["lr"] * group["weight_decay"]])

    def can_capture(self):
        """Whether every weight has a state, those of a group of the same age."""
        return all(
            all(map(self.state.get, group["params"])) and len(self._of_one_age(group)) == 1
            for group in self.param_groups
        )

    def move(self, group, members, rates):
        """Move `members` of a group, whose states exist, by their gradients. rates: `rates_of`, on their device."""
        directions = self._adam([self.state[p] for p in members], [p.grad for p in members], group, rates[0])
        if group["weight_decay"]:
            torch._foreach_mul_(members, rates[2])
        torch._foreach_mul_(directions, rates[1])
        torch._foreach_add_(members, directions)

    def _adam(self, states, grads, group, factor):
        """Adam's directions, a list; the moments of `states` move on by `grads`. factor: as in `rates_of`, 0-dim."""
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
    """Base of optimizers that project the gradients of groups with a "rank"; the other groups are plain AdamW.

    rank_field: the setting that errors name. seed: of all that is drawn at random for a weight.
    ConfigError: a projected weight that is not 2-D, or is float16, or whose shorter side is below the rank.
    """

    def __init__(self, params, *, rank_field, seed, **settings):
        super().__init__(params, **settings)
        self._seed = seed
        self._index_groups()
        self._place = {p: i for i, (p, _) in enumerate(self._projected)}
        # The smallest first: what its shape allows is what the rank may be.
        for p, group in sorted(self._projected, key=lambda pair: min(pair[0].shape, default=0)):
            if p.ndim != 2:
                raise ConfigError(
                    f"a weight of shape {tuple(p.shape)} cannot be projected: only 2-D weights have a basis"
                )
            if p.dtype == torch.float16:
                raise ConfigError("a float16 weight loses small updates and overflows: hold it in float32 or bfloat16")
            if not 1 <= group["rank"] <= min(p.shape):
                raise ConfigError(f"{rank_field}={group['rank']}, weight {tuple(p.shape)}: use 1..{min(p.shape)}")

    def _index_groups(self):
        self._projected = [(p, group) for group in self.param_groups if "rank" in group for p in group["params"]]
        self._group_of = dict(self._projected)

    def _seed_of(self, p, *numbers):
        """A seed for a weight that needs no saved state."""
        return seed_of(self._seed, self._place[p], *numbers)

    def _state_shapes(self, p, group):
        if "rank" not in group:
            return super()._state_shapes(p, group)
        projected = (group["rank"], max(p.shape))
        return {"step": (), "exp_avg": projected, "exp_avg_sq": projected}


def _flat(state):
    """A weight's saved state without the dict in which bitsandbytes puts most of its own; {} where it is none."""
    parts = state if isinstance(state, dict) else {}
    nested = [value for value in parts.values() if isinstance(value, dict)]
    return {**parts, **{name: value for part in nested for name, value in part.items()}}
