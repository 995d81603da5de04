"""What processes sum in a step: gradients, the loss, and whether one of them was asked to stop.

They exchange what optimizers sum: full gradients of adapters and norms, rank-r projections for GaLore's weights
(projecting is linear, so the sum of projections is the projection of the sum), and full gradients only if a basis is
due for a refresh. The optimizer's sums share one buffer, so they are reduced in place, once per step.
"""

import torch

_EXTRAS = 3  # loss, stop, save


def divide(numbers, lengths, parts):
    """Divide rows among `parts` processes by tokens: [[row, ...], ...], longest first, to the least loaded process.

    The result is the same on every process. A part may be empty.
    """
    shares, loads = [[] for _ in range(parts)], [0] * parts
    for row in sorted(numbers, key=lambda row: (-lengths[row], row)):
        least = loads.index(min(loads))
        shares[least].append(row)
        loads[least] += int(lengths[row])
    return shares


class Exchange:
    """Sums a step's accumulated gradients over the processes of a run, in place.

    ask(): (stop, save), what this process wants after the step. told: what any process wants, valid once the step's
    update has waited for the device.
    """

    def __init__(self, processes, optimizer):
        self._processes, self._optimizer = processes, optimizer
        self.ask, self._flat = lambda: (False, False), None
        if processes.world > 1:
            optimizer.processes = processes
            self._flat = optimizer.use_flat_buffer(_EXTRAS)
            self._told = torch.zeros(2, pin_memory=self._flat.is_cuda)

    @property
    def bytes_a_step(self):
        """Bytes that each process sends in a step without a basis refresh."""
        return 0 if self._flat is None else self._flat.numel() * self._flat.element_size()

    @property
    def told(self):
        """(stop, save): whether any process asked for it."""
        return tuple(number > 0 for number in self._told.tolist())

    def whole_gradients(self):
        """Sum the full gradients for new bases."""
        if self._flat is not None:
            for total in self._optimizer.whole_sums():
                self._processes.sum_(total)

    def gradients(self, loss):
        """Sum everything else; returns the loss over all rows. loss: over this process's rows, 0-dim."""
        if self._flat is None:
            return loss
        self.whole_gradients()
        self._flat[0].copy_(loss)
        self._flat[1:_EXTRAS].copy_(torch.tensor([float(bool(each)) for each in self.ask()]))
        self._processes.sum_(self._flat)
        self._told.copy_(self._flat[1:_EXTRAS], non_blocking=True)
        return self._flat[0].clone()
