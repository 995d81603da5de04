"""What a run shows while it trains: its log line, and the Snapshot that callbacks get, who may ask it to stop."""

import contextlib
import math
import time
from dataclasses import dataclass

import torch

from peftlib.storage.mirror import running
from peftlib.train.placement import memory_limit

_RECENT = 20  # steps over which speed is averaged
_COPY_EVERY_S = 5.0  # seconds between two looks at the copy, which reads the state of every file


@dataclass(frozen=True)
class Snapshot:
    """A run after a step. What is not known is None."""

    status: str  # running; at the end the record's: ok, stopped or failed
    method: str
    seed: int
    step: int  # steps done
    planned_steps: int
    history: tuple  # entries of the record's history so far
    valid_history: tuple
    tokens_per_second: float | None  # unpadded, over the last steps
    seconds_left: float | None  # of training at that pace
    skipped_steps: int  # fp16 overflows
    memory_bytes: int  # now: allocated on the card; on a CPU resident, of the process tree
    reserved_bytes: int | None  # now, from the card's driver
    peak_memory_bytes: int  # as in the record: on a CPU the rise since the model began to load
    memory_limit_bytes: int  # the card's, or memory_gib of it; on a CPU the machine's
    saved_step: int | None  # of the newest checkpoint
    saved_at: float | None  # time.time() of it, where this session wrote it
    is_saving: bool
    copy: str | None  # what of the study is copied elsewhere, in words; None: it is copied nowhere
    device: str
    precision: str

    @property
    def is_over(self):
        """Whether this is the last one."""
        return self.status != "running"


class Callback:
    """Watches a run while it trains. A callback that raises is dropped; training goes on."""

    is_dropped = False  # it has raised, and is called no more

    def wants_numbers(self):
        """Whether to be shown the run after this step; asked after each."""
        return False

    def show(self, snapshot):
        """Take a Snapshot: wanted ones, and all that bring the numbers of a log line; the last one is_over."""

    def stop_asked(self):
        """Whether to save and stop; asked after each step."""
        return False


class CallbackList:
    """Calls the callbacks of a TrainingRun; logs and drops one that raises."""

    def __init__(self, run, callbacks):
        self._run, self._callbacks = run, list(callbacks)
        self._copy, self._copy_at = None, -math.inf

    def any(self, question):
        """Whether one of them answers yes to 'wants_numbers' or 'stop_asked'."""
        return any(self._call(question))

    def show(self, status="running"):
        """Show the run to all."""
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
                self._run.log(f"{kind} failed ({type(error).__name__}: {error}) and is left out; training goes on")
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
    """Seconds of steps: all time from lap to lap, whatever the host or the device waits for.

    What is done `aside`, as log lines are, belongs to no step so far as it kept the device idle; the kernels of a step
    that run meanwhile belong to it. So the sum is the same whether there are many log lines or few.
    """

    def __init__(self, device):
        self._is_cuda = device == "cuda"
        self.start()

    def start(self):
        """Count from now; the time since the last lap belongs to no step."""
        self._since, self._aside_s, self._marks = time.monotonic(), 0.0, []

    @contextlib.contextmanager
    def aside(self):
        """Within it is done what belongs to no step, between a lap and the next launch."""
        if not self._marks:
            self._mark()
        began = time.monotonic()
        yield
        self._aside_s += time.monotonic() - began

    def launch(self):
        """Say that the host is about to give the device the first work of a step."""
        if len(self._marks) == 1:
            self._mark()

    def _mark(self):
        """Have the device note when it gets here."""
        self._marks.append(torch.cuda.Event(enable_timing=True) if self._is_cuda else None)
        if self._is_cuda:
            self._marks[-1].record()

    def lap(self, *, waits=False):
        """Seconds since the start or the last lap. waits: first wait until the device is done; else the host has waited
        for work that was launched since."""
        if waits and self._is_cuda:
            self.launch()
            torch.cuda.synchronize()
        since, lost = self._since, self._aside_s
        if self._marks and self._is_cuda:
            lost = min(lost, self._marks[0].elapsed_time(self._marks[-1]) / 1000)
        self.start()
        return self._since - since - lost


def pace(history, steps_left):
    """{'tokens_per_second', 'seconds_left'} by the last steps of a history; None each before the first."""
    recent = history[-_RECENT:]
    seconds = sum(entry["seconds"] for entry in recent)
    if not recent or seconds <= 0:
        return {"tokens_per_second": None, "seconds_left": None}
    tokens = sum(entry["tokens"] for entry in recent)
    return {"tokens_per_second": tokens / seconds, "seconds_left": seconds / len(recent) * steps_left}


def log_line(record, progress, planned_steps):
    """The log line of a run's last step. progress: run_state.Progress; the record's history is not empty."""
    entry, now = record["history"][-1], pace(record["history"], planned_steps - progress.step)
    skipped = f"  skipped {progress.skipped_steps}" if progress.skipped_steps else ""
    loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"  # of a skipped step
    return (
        f"step {progress.step}/{planned_steps}  loss {loss}  lr {entry['learning_rate']:.2e}  "
        f"{now['tokens_per_second'] or 0:,.0f} tok/s  ETA {clock(now['seconds_left'] or 0)}{skipped}"
    )


def clock(seconds):
    """Minutes and seconds, as 75:03."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
