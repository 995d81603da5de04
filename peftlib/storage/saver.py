"""When a run saves checkpoints, and how long saving may stall training."""

import threading
import time
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map

from peftlib.core.errors import CheckpointError
from peftlib.core.files import GIB
from peftlib.storage.checkpoint import Checkpoint
from peftlib.storage.mirror import running

# Assumed of a first save: written by a CPU, or copied from a GPU's memory.
_BYTES_PER_SECOND = {False: GIB, True: 4 * GIB}


class Saved(NamedTuple):
    """The newest complete checkpoint: its step, and its time.time() if this session wrote it."""

    step: int | None = None
    at: float | None = None


class Saver:
    """Saves checkpoints into a CheckpointDir.

    every: minimum number of steps between saves. stall_share: maximum share of wall-clock time for which saving may
    stall training: after a stall of s seconds the next save waits s / stall_share; 0 saves every `every` steps.
    expected_bytes: size of a checkpoint, to estimate the first save's stall.
    is_background: copy the tensors to the host and write them in a thread while training continues, for GPUs. On a CPU
    the copy would distort the method's measured memory: there the file is written directly, and the thread
    waits for the disk and reads it back.
    A failed save is logged at the next save or by `close`, and training continues.
    `saves`, `stall_seconds`: number of saves and their total stall. `saved`: the newest checkpoint.
    """

    def __init__(self, checkpoints, *, every, stall_share, is_background, log, expected_bytes=0):
        self.checkpoints, self.every, self.stall_share = checkpoints, every, stall_share
        self.is_background, self.log = is_background, log
        self.saves, self.stall_seconds, self.saved = 0, 0.0, Saved()
        self._last_step, self._expected_bytes, self._next_at = 0, expected_bytes, 0.0
        self._writing = None  # the thread of the newest save
        self._error = None  # CheckpointError of the newest save

    def start(self, step):
        """Start counting at this step, for a resumed run."""
        self._last_step = step
        self.saved = Saved(step or None)
        self._put_off(self._expected_bytes / _BYTES_PER_SECOND[self.is_background])

    def is_due(self, step):
        """Whether to save now."""
        return step - self._last_step >= self.every and time.monotonic() >= self._next_at

    def save(self, step, checkpoint, *, must=False):
        """Write a checkpoint. A failure is logged, and training continues with the older checkpoint.

        must: wait until it is written. CheckpointError: `must`, and this checkpoint could not be written.
        """
        started = time.monotonic()
        self.wait()
        self._tell("training continues and will retry")  # of an earlier save
        self._last_step = step
        try:
            if self.is_background:
                self._start_thread(self.checkpoints.save, step, _on_host(checkpoint))
            else:
                self.checkpoints.begin(step, checkpoint)
                self._start_thread(self.checkpoints.finish, step)
        except Exception as error:  # noqa: BLE001 - no error of a save may end training
            self._keep(step, error)
        stall = time.monotonic() - started
        if must:
            self.wait()  # not counted as a stall: training ends here
        self.saves += 1
        self.stall_seconds += stall
        self._put_off(stall)
        if must and self.saved.step != step:
            kept, self._error = self._error, None
            raise kept or CheckpointError(f"the checkpoint of step {step} was not written; {self.checkpoints.folder}")
        if not self.is_writing():
            self._tell("training continues and will retry")

    def close(self):
        """Wait for a save in progress; a failure is logged."""
        self.wait()
        self._tell("nothing else is affected")

    def is_writing(self):
        """Whether a thread is writing a checkpoint."""
        return self._writing is not None and self._writing.is_alive()

    def wait(self):
        """Return once nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _put_off(self, stall):
        self._next_at = time.monotonic() + (stall / self.stall_share if self.stall_share else 0.0)

    def _start_thread(self, write, step, *args):
        def work():
            try:
                write(step, *args)
                self.saved = Saved(step, time.time())
            except BaseException as error:  # noqa: BLE001 - a thread would lose it
                self._keep(step, error)

        thread = threading.Thread(target=work)
        thread.start()
        self._writing = thread

    def _keep(self, step, error):
        self._error = error
        if not isinstance(error, CheckpointError):
            said = f"{type(error).__name__}: {error}"
            self._error = CheckpointError(f"the checkpoint of step {step} could not be written ({said})")
            self._error.__cause__ = error

    def _tell(self, consequence):
        error, self._error = self._error, None
        if error is not None:
            self.log(f"{error}; {consequence}")


def require_space(checkpoints, study_folder, run, checkpoint_bytes):
    """CheckpointError, with the numbers, unless a run's checkpoints fit on its disk and on the study's remote.

    checkpoints: its CheckpointDir. run: its name there, such as qlora-s0.
    """
    checkpoints.require_space(checkpoint_bytes)
    mirror = running(study_folder)
    if mirror is not None:
        mirror.require_space(run, checkpoint_bytes)


def _on_host(checkpoint):
    """A copy of a checkpoint that training does not change."""

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone() if value.device.type == "cpu" else value.detach().to("cpu")

    return Checkpoint(*(tree_map(copy, part) for part in vars(checkpoint).values()))
