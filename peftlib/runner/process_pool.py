"""Child processes side by side, each on a worker (a GPU or a share of one), their output line by line."""

import collections
import contextlib
import os
import queue
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
    SIGTERM, and SIGKILL after grace_s. However this ends, no child is left.
    """
    lines = queue.SimpleQueue()
    free, running = list(workers), {}
    reason, kill_at, last_line = None, None, time.monotonic()
    try:
        while True:
            if reason is None:
                reason = why_stop()
                if reason:
                    log(f"stopping ({reason}): {_named(running)}")
                    kill_at = time.monotonic() + grace_s
                    _ask_to_stop(running)
            while reason is None and free and (task := next_task()) is not None:
                running[task.name] = _Child(task, free.pop(0), lines)
                log(f"{task.name} starts")
            if not running:
                return reason
            if _print_lines(lines, log):
                last_line = time.monotonic()
            elif time.monotonic() - last_line > heartbeat_s:
                log(f"at work: {_named(running)}")
                last_line = time.monotonic()
            if kill_at is not None and time.monotonic() > kill_at:
                for child in running.values():
                    child.kill()
            for name in [name for name, child in running.items() if child.process.poll() is not None]:
                child = running.pop(name)
                child.reader.join(timeout=5.0)
                _print_lines(lines, log, wait_s=0.0)
                free.append(child.worker)
                ended(child.ending(is_cut=reason is not None))
    finally:
        for child in running.values():
            child.kill()


class _Child:
    """A process that runs, and the thread that reads its lines."""

    def __init__(self, task, worker, lines):
        self.task, self.worker = task, worker
        self.started = time.monotonic()
        self.tail = collections.deque(maxlen=_LAST_LINES)
        self.process = subprocess.Popen(
            task.argv,
            env={**os.environ, **task.env, **worker, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the children
        )
        self.reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self.reader.start()

    def _read(self, lines):
        for raw in self.process.stdout:
            line = raw.decode("utf-8", errors="replace").rstrip()
            if line:
                self.tail.append(line)
                lines.put(f"{self.task.name} | {line}")
        self.process.stdout.close()

    def ending(self, *, is_cut):
        seconds = time.monotonic() - self.started
        return Ending(self.task, self.process.returncode, is_cut, "\n".join(self.tail), seconds)

    def kill(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the compiler's helpers too
        self.process.wait()


def _ask_to_stop(running):
    for child in running.values():
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(signal.SIGTERM)


def _print_lines(lines, log, wait_s=0.2):
    """Print what has come; whether there was anything."""
    has_any = False
    with contextlib.suppress(queue.Empty):
        while True:
            log(lines.get_nowait() if has_any or not wait_s else lines.get(timeout=wait_s))
            has_any = True
    return has_any


def _named(running):
    return ", ".join(f"{n} ({time.monotonic() - c.started:.0f} s)" for n, c in running.items()) or "nothing is at work"
