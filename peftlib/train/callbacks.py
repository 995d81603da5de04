"""What a run shows while it trains: its log line, and the Snapshot for callbacks, which may ask it to stop."""

import contextlib
import math
import time
from dataclasses import dataclass

import torch

from peftlib.storage.mirror import running
from peftlib.train.placement import memory_limit

_RECENT = 20  # steps over which speed is averaged
_COPY_EVERY_S = 5.0  # seconds between checks of the copy, which read every file's state


@dataclass(frozen=True)
class Snapshot:
    """A run after a step. Unknown values are None."""

    status: str  # running, or at the end the record's status: ok, stopped or failed
    method: str
    seed: int
    step: int  # steps done
    planned_steps: int
    history: tuple  # the record's history so far
    valid_history: tuple
    tokens_per_second: float | None  # without padding, over the last steps
    seconds_left: float | None  # of training at that speed
    skipped_steps: int  # because of fp16 overflows
    memory_bytes: int  # current: allocated on the GPU; on a CPU, resident memory of the process tree
    reserved_bytes: int | None  # current: reserved from the GPU's driver
    peak_memory_bytes: int  # as in the record; on a CPU, the increase since model loading began
    memory_limit_bytes: int  # the GPU's memory, or memory_gib; on a CPU, the machine's memory
    saved_step: int | None  # step of the newest checkpoint
    saved_at: float | None  # its time.time(), if this session wrote it
    is_saving: bool
    copy: str | None  # state of the study's copy elsewhere, as text; None: there is no copy
    device: str
    precision: str

    @property
    def is_over(self):
        """Whether this is the last snapshot."""
        return self.status != "running"


class Callback:
    """Watches a run while it trains. A callback that raises is dropped, and training continues."""

    is_dropped = False  # True once it has raised; it is not called again

    def wants_numbers(self):
        """Whether to call show() after this step; asked after each step."""
        return False

    def show(self, snapshot):
        """Receive a Snapshot: the wanted ones, and those with the numbers of a log line; the last one is_over."""

    def stop_asked(self):
        """Whether to save and stop; asked after each step."""
        return False


class CallbackList:
    """Calls the callbacks of a TrainingRun; a callback that raises is logged and dropped."""

    def __init__(self, run, callbacks):
        self._run, self._callbacks = run, list(callbacks)
        self._copy, self._copy_at = None, -math.inf

    def any(self, question):
        """Whether any callback answers yes to 'wants_numbers' or 'stop_asked'."""
        return any(self._call(question))

    def show(self, status="running"):
        """Show the run to all callbacks."""
        if self._callbacks:
            self._call("show", self._snapshot(status))

    def _call(self, name, *args):
        answers = []
        for callback in list(self._callbacks):
            try:
                answers.append(getattr(callback, name)(*args))
            except Exception as error:  # noqa: BLE001 - whatever a callback raises must not end training
                self._callbacks.remove(callback)
                callback.is_dropped = True
                kind = type(callback).__name__
                self._run.log(f"{kind} failed ({type(error).__name__}: {error}) and was disabled; training continues")
        return answers

    def _snapshot(self, status):
        run, progress, saved = self._run, self._run.progress, self._run.saver.saved
        history = tuple(run.record["history"])
        memory, reserved, peak = run.memory.now()
        return Snapshot(
            status=status,
            method=run.name,
            seed=run.cfg.seed,
            step=progress.step,
            planned_steps=run.plan.steps,
            history=history,
            valid_history=tuple(run.record["valid_history"]),
            **pace(history, run.plan.steps - progress.step),
            skipped_steps=progress.skipped_steps,
            memory_bytes=memory,
            reserved_bytes=reserved,
            peak_memory_bytes=max(progress.peak_memory_bytes, peak),
            memory_limit_bytes=memory_limit(run.cfg, run.device),
            saved_step=saved.step,
            saved_at=saved.at,
            is_saving=run.saver.is_writing(),
            copy=self._state_of_copy(is_last=status != "running"),
            device=run.record["device"],
            precision=run.precision,
        )

    def _state_of_copy(self, *, is_last):
        mirror = running(self._run.study.folder)
        if mirror is not None and (is_last or time.monotonic() - self._copy_at > _COPY_EVERY_S):
            self._copy = f"copying {mirror.busy_with} to {mirror.remote}" if mirror.busy_with else mirror.state()
            self._copy_at = time.monotonic()
        return self._copy


class Stopwatch:
    """Measures step times: all time from lap to lap, including waits of the host or the device.

    Time spent `aside`, as for log lines, does not count to the extent that it kept the device idle; kernels of a step
    that run in the meantime do count. So the sum does not depend on the number of log lines.
    """

    def __init__(self, device):
        self._is_cuda = device == "cuda"
        self.start()

    def start(self):
        """Start counting now; the time since the last lap is not counted."""
        self._since, self._aside_s, self._marks = time.monotonic(), 0.0, []

    @contextlib.contextmanager
    def aside(self):
        """Context for work that belongs to no step, between a lap and the next launch."""
        if not self._marks:
            self._mark()
        began = time.monotonic()
        yield
        self._aside_s += time.monotonic() - began

    def launch(self):
        """Mark that the host is about to launch the first work of a step."""
        if len(self._marks) == 1:
            self._mark()

    def _mark(self):
        """Record an event on the device."""
        self._marks.append(torch.cuda.Event(enable_timing=True) if self._is_cuda else None)
        if self._is_cuda:
            self._marks[-1].record()

    def lap(self, *, waits=False):
        """Seconds since the start or the last lap. waits: synchronise with the device first; else the host must have
        waited for work launched since then."""
        if waits and self._is_cuda:
            self.launch()
            torch.cuda.synchronize()
        since, lost = self._since, self._aside_s
        if self._marks and self._is_cuda:
            lost = min(lost, self._marks[0].elapsed_time(self._marks[-1]) / 1000)
        self.start()
        return self._since - since - lost


def pace(history, steps_left):
    """{'tokens_per_second', 'seconds_left'} from the last steps of a history; both None before the first step."""
    recent = history[-_RECENT:]
    seconds = sum(entry["seconds"] for entry in recent)
    if not recent or seconds <= 0:
        return {"tokens_per_second": None, "seconds_left": None}
    tokens = sum(entry["tokens"] for entry in recent)
    return {"tokens_per_second": tokens / seconds, "seconds_left": seconds / len(recent) * steps_left}


def log_line(record, progress, planned_steps):
    """The log line of a run's last step. progress: run_state.Progress. The record's history must not be empty."""
    entry, now = record["history"][-1], pace(record["history"], planned_steps - progress.step)
    skipped = f"  skipped {progress.skipped_steps}" if progress.skipped_steps else ""
    loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"  # a skipped step
    return (
        f"step {progress.step}/{planned_steps}  loss {loss}  lr {entry['learning_rate']:.2e}  "
        f"{now['tokens_per_second'] or 0:,.0f} tok/s  ETA {clock(now['seconds_left'] or 0)}{skipped}"
    )


def clock(seconds):
    """Minutes and seconds, as 75:03."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
