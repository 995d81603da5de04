"""Child processes side by side, each on a worker (a GPU or a share of one), their output line by line."""

import collections
import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field

HEARTBEAT_S = 30.0  # seconds without a line after which one is printed here
GRACE_S = 45.0  # seconds that children get for saving before they are killed
_LAST_LINES = 15  # of a child that died, to tell why


@dataclass(frozen=True)
class Task:
    """name: printed before each of its lines. argv: of the process. env: added to this process's environment."""

    name: str
    argv: tuple
    env: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Ending:
    """code: exit code, negative for a signal. is_cut: it was asked to stop. tail: its last lines. seconds: it ran."""

    task: Task
    code: int
    is_cut: bool
    tail: str
    seconds: float


def run(next_task, ended, *, workers, why_stop, log, grace_s=GRACE_S, heartbeat_s=HEARTBEAT_S):
    """Keep every worker busy until there is nothing to do or a reason to stop; returns that reason, or None.

    next_task() -> a Task, or None while there is none to start. ended(Ending): called in this thread.
    workers: [{variable: value}, ...], the environment of each. why_stop() -> None, or why to stop: then each child gets
    SIGTERM, and SIGKILL after grace_s. log: gets a line, one call at a time. However this ends, no child is left.
    """
    free, running = list(workers), {}
    reason, kill_at = None, math.inf
    printing, printed_at = threading.Lock(), [time.monotonic()]

    def say(line):
        with printing:
            printed_at[0] = time.monotonic()
            log(line)

    try:
        while True:
            if reason is None and (reason := why_stop()):
                say(f"stopping ({reason}): {_named(running)}")
                kill_at = time.monotonic() + grace_s
                for child in running.values():
                    child.process.terminate()
            while reason is None and free and (task := next_task()) is not None:
                say(f"{task.name} starts")
                running[task.name] = _Child(task, free.pop(0), say)
            if not running:
                return reason
            time.sleep(0.2)
            if time.monotonic() - printed_at[0] > heartbeat_s:
                say(f"at work: {_named(running)}")
            if time.monotonic() > kill_at:
                for child in running.values():
                    child.kill()
            for name, child in list(running.items()):
                if child.process.poll() is not None:
                    del running[name]
                    free.append(child.worker)
                    ended(child.ending(is_cut=reason is not None))
    finally:
        for child in running.values():
            child.kill()


class _Child:
    """A process that runs, and the thread that passes its lines on."""

    def __init__(self, task, worker, say):
        self.task, self.worker = task, worker
        self.started = time.monotonic()
        self._tail = collections.deque(maxlen=_LAST_LINES)
        self.process = subprocess.Popen(
            task.argv,
            env={**os.environ, **task.env, **worker, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the children
        )
        self._reader = threading.Thread(target=self._read, args=(say,), daemon=True)
        self._reader.start()

    def _read(self, say):
        with self.process.stdout as lines:
            for raw in lines:
                line = raw.decode("utf-8", errors="replace").rstrip()
                if line:
                    self._tail.append(line)
                    say(f"{self.task.name} | {line}")

    def ending(self, *, is_cut):
        self._reader.join(timeout=5.0)
        seconds = time.monotonic() - self.started
        return Ending(self.task, self.process.returncode, is_cut, "\n".join(self._tail), seconds)

    def kill(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the compiler's helpers too
        self.process.wait()


def _named(running):
    return ", ".join(f"{n} ({time.monotonic() - c.started:.0f} s)" for n, c in running.items()) or "nothing is at work"
