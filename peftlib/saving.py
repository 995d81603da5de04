"""When a run saves, and how little training waits for it."""

import threading
import time

import torch
from torch.utils._pytree import tree_map

from peftlib.checkpoint import Checkpoint
from peftlib.errors import CheckpointError


class Saver:
    """Saves checkpoints into a CheckpointDir.

    every: steps between two saves, at least. stall_share: share of the wall clock that saving may hold up training:
    after a save that took s seconds of training's time, the next waits s / stall_share; 0 saves every `every` steps.
    is_background: copy the tensors to the host and write them in a thread while training goes on (for GPUs; on a CPU
    the copy would cost memory that the method is measured by, and the thread the processor).
    `saves`, `stall_seconds`: how many, and what they have cost training so far.
    """

    def __init__(self, checkpoints, *, every, stall_share, is_background, log):
        self.checkpoints, self.every, self.stall_share = checkpoints, every, stall_share
        self.is_background, self.log = is_background, log
        self.saves, self.stall_seconds = 0, 0.0
        self._last_step, self._next_at = 0, 0.0
        self._writing = None
        self._error = None

    def start(self, step):
        """Count from here: the step that a resumed run stands at."""
        self._last_step = step

    def is_due(self, step):
        """Whether to save now."""
        return step - self._last_step >= self.every and time.monotonic() >= self._next_at

    def save(self, step, checkpoint, *, must=False):
        """Write a checkpoint. A disk that refuses is said, and training goes on with the older one.

        must: wait until it is written. CheckpointError: `must`, and it could not be written.
        """
        started = time.monotonic()
        self.wait()
        self._last_step = step
        if self.is_background:
            snapshot = _on_host(checkpoint)
            self._writing = threading.Thread(target=self._write, args=(step, snapshot))
            self._writing.start()
        else:
            self._write(step, checkpoint)
        if must:
            self.wait()
        stall = time.monotonic() - started
        self.saves += 1
        self.stall_seconds += stall
        self._next_at = time.monotonic() + (stall / self.stall_share if self.stall_share else 0.0)
        error, self._error = self._error, None
        if error is not None:
            if must:
                raise error
            self.log(f"{error}; training goes on and tries again")

    def is_writing(self):
        """Whether a thread is writing a checkpoint at the moment."""
        return self._writing is not None and self._writing.is_alive()

    def wait(self):
        """Return once nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(self, step, checkpoint):
        try:
            self.checkpoints.save(step, checkpoint)
        except CheckpointError as error:
            self._error = error


def _on_host(checkpoint):
    """A copy of a checkpoint that training does not change."""

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone() if value.device.type == "cpu" else value.detach().to("cpu")

    return Checkpoint(*(tree_map(copy, part) for part in vars(checkpoint).values()))
