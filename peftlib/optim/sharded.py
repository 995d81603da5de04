"""GaLore with each projected weight's moments on only one process (ZeRO stage 1 for GaLore's state).

Rajbhandari et al. 2020, arXiv:1910.02054. Every process keeps all bases, because each projects its own gradients; the
owner of a weight's moments sends Adam's rank-r update to the others, as many elements as were summed.
"""

import torch

from peftlib.optim import moments
from peftlib.optim.galore import NUMBERS_AT_ONCE, GaLoreAdamW


class ShardedGaLoreAdamW(GaLoreAdamW):
    """GaLoreAdamW with moments divided among `processes`; the same as GaLoreAdamW in one process."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._owner = {}  # weight -> process that has its moments

    def use_flat_buffer(self, extra):
        """As for any optimizer, but the sums of one owner's weights are contiguous."""
        loads = [0] * self.processes.world
        for p, group in sorted(self._projected, key=lambda pair: -pair[1]["rank"] * max(pair[0].shape)):
            self._owner[p] = loads.index(min(loads))
            loads[self._owner[p]] += group["rank"] * max(p.shape)
        flat = super().use_flat_buffer(extra)
        self._segments = {}  # owner -> the part of the buffer for its updates
        for owner in range(self.processes.world):
            lows = [self._low[p] for p, _ in self._projected if self._owner[p] == owner]
            if lows:
                edges = [(low.storage_offset(), low.storage_offset() + low.numel()) for low in lows]
                self._segments[owner] = flat[min(start for start, _ in edges) : max(end for _, end in edges)]
        return flat

    def _sums(self):
        low = [(p, shape) for p, shape in super()._sums() if p in self._group_of]
        plain = [(p, shape) for p, shape in super()._sums() if p not in self._group_of]
        return [*sorted(low, key=lambda pair: self._owner[pair[0]]), *plain]

    def _is_mine(self, p):
        return not self._owner or self._owner[p] == self.processes.rank

    def shares_state(self):
        """Whether there are other processes."""
        return bool(self._owner)

    def can_capture(self):
        """Not with several processes: the exchange of updates stays outside CUDA graphs."""
        return not self._owner and super().can_capture()

    def _new_state(self, p, group):
        if "rank" not in group or self._is_mine(p):
            return super()._new_state(p, group)
        self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
        return self.state[p]

    def move(self, group, members, rates):
        """As GaLoreAdamW; the owners' updates overwrite the sums, which are no longer needed."""
        if "rank" not in group or not self._owner:
            super().move(group, members, rates)
            return
        mine = [p for p in members if self._is_mine(p)]
        for part in moments.parts_within(mine, NUMBERS_AT_ONCE, size=lambda p: self._low[p].numel()):
            updates = self._adam([self.state[p] for p in part], [self._low[p] for p in part], group, rates[0])
            torch._foreach_mul_(updates, rates[1])
            torch._foreach_copy_([self._low[p] for p in part], updates)
        for owner, segment in self._segments.items():
            self.processes.broadcast_([segment], owner)
        for p in members:
            self._move_projected(p, self._low[p], group, rates[2])

    def whole_state_dict(self):
        """state_dict() with the moments of all owners, others' moments on the host; complete in the main process."""
        found = self.state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(params):
            if p in self._owner and self.state[p]:
                is_mine = self._is_mine(p)
                kept = self.state[p] if is_mine else moments.fresh({}, self._low[p], bits=self.moment_bits)
                parts = {name: kept[name] for name in kept if name not in ("step", "basis")}
                for tensor in parts.values():
                    self.processes.broadcast_([tensor], self._owner[p])
                if not is_mine and self.processes.is_main:
                    others = {name: tensor.cpu() for name, tensor in parts.items()}
                    found["state"][number] = found["state"][number] | others  # a new dict: `state` has the old one
        return found

    def load_state_dict(self, state_dict):
        """Load a saved state, and keep only this process's moments."""
        super().load_state_dict(state_dict)
        for p in self._owner:
            if not self._is_mine(p):
                self.state[p] = {name: part for name, part in self.state[p].items() if name in ("step", "basis")}
