"""One notebook executed in a child process: its lines relayed as they come, signals passed on, its end judged."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from peftlib.core import paths as places
from peftlib.core.errors import DiskError, Stopped, StudyError, writing
from peftlib.core.hub_token import without_tokens
from peftlib.core.study import Study
from peftlib.notebook.session import FINISHED, STOPPED, readable_path, state_hash
from peftlib.runner import notebook_io as executed
from peftlib.runner.papermill_worker import CELL_EVENT, DEAD_KERNEL, end_tree

FAILED = "failed"
EXIT_FAILED, EXIT_STOPPED = 1, 3
LINE_LIMIT = 200  # characters relayed of a line: a table of answers is for the executed copy


@dataclass(frozen=True)
class Stage:
    """One notebook of a run: its file, the study that its parameters name, and the parameters to inject."""

    name: str
    source: Path
    study: Study
    parameters: dict

    @property
    def copy(self):
        """Where the executed notebook is kept once it is finished."""
        return self._beside("")

    @property
    def running(self):
        return self._beside(".running")

    @property
    def state(self):
        return state_hash(self.name, self.study.cfg)

    def keep(self, copy, status):
        """Put an executed copy in its place; only a finished one replaces a finished one. Returns the path."""
        target = self.copy if status == FINISHED else self._beside(f".{status}")
        copy["metadata"].setdefault("papermill", {})["output_path"] = target.name
        executed.save(target, copy)
        for mark in (".running", f".{FAILED}", f".{STOPPED}"):
            if self._beside(mark) != target:
                self._beside(mark).unlink(missing_ok=True)
        return target

    def _beside(self, mark):
        seed = self.study.cfg.seed
        return self.study.notebooks_dir / f"{self.name}{f'-s{seed}' if seed else ''}{mark}.ipynb"


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended: 0 if the run may go on, else its exit code and why."""

    code: int
    message: str = ""


class Execution:
    """One run of one stage.

    events: the queue.SimpleQueue that receives this process's signals; the child's lines are put there too.
    heartbeat_s: seconds of silence after which a line is printed. save_s: what an interrupted kernel gets for saving.
    """

    def __init__(self, stage, events, heartbeat_s, save_s):
        self.stage = stage
        self.events = events
        self.heartbeat_s = heartbeat_s
        self.save_s = save_s
        self.cells = _with_injected(executed.load(stage.source)["cells"])
        self.cell = 0  # number of the running cell, from 1
        self.cell_started = self.last_line_at = time.monotonic()
        self.last_text = ""
        self.child = None
        self.signal = None
        self.kill_at = None

    def outcome(self):
        """Execute to the end, keep the executed copy, and say how it ended."""
        with writing(self.stage.running):
            self.stage.running.parent.mkdir(parents=True, exist_ok=True)
            self.stage.running.unlink(missing_ok=True)
        with writing(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
            _write_kernel_spec(folder)
            self.child = self._start(folder)
            code = self._follow()
        return self._judge(code)

    def _start(self, kernel_folder):
        parameters = json.dumps(self.stage.parameters)
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "peftlib.runner.papermill_worker",
                self.stage.source,
                self.stage.running,
                parameters,
            ],
            env=environment(kernel_folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C comes to us alone; we interrupt the kernel
        )
        threading.Thread(target=_read_lines, args=(child, self.events), daemon=True).start()
        return child

    def _follow(self):
        """Relay until the child is done; its exit code."""
        while True:
            try:
                event = self.events.get(timeout=0.2)
            except queue.Empty:
                event = ""
            if event is self.child:
                self.child.stdout.close()
                return self.child.wait()
            if isinstance(event, signal.Signals):
                self._on_signal(event)
            elif event:
                self._on_line(event.rstrip("\n"))
            now = time.monotonic()
            if self.kill_at is not None and now > self.kill_at:
                self._kill()
            if now - self.last_line_at >= self.heartbeat_s:
                self._relay(f"... {_duration(now - self.cell_started)} in this cell")

    def _on_line(self, line):
        if line.startswith(CELL_EVENT):
            self.cell = int(line[len(CELL_EVENT) :])
            self.cell_started = time.monotonic()
            if self.kill_at is not None:  # the interrupted cell has saved and come to its end: no need for the rest
                _signal_kernel(self.child, signal.SIGKILL)
            if self.cells[self.cell - 1]["cell_type"] == "code" and not executed.tags_of(self.cells[self.cell - 1]):
                self._relay(f"> {self._code_line(self.cell)}")
            return
        text = without_tokens(line.rpartition("\r")[2]).rstrip()
        if text:
            self.last_text = text
            self._relay(text)

    def _code_line(self, number):
        return executed.first_line(self.cells[number - 1]) if number else "before the first cell"

    def _relay(self, text):
        self.last_line_at = time.monotonic()
        shown = text if len(text) <= LINE_LIMIT else f"{text[:LINE_LIMIT]} ..."
        print(f"{self.stage.name} {self.cell}/{len(self.cells)} | {shown}", flush=True)

    def _on_signal(self, number):
        if self.signal is not None or not _signal_kernel(self.child, signal.SIGINT):
            self._kill()
        else:
            self.kill_at = time.monotonic() + self.save_s
            self._relay(f"{number.name}: the kernel is asked to save and stop; once more ends it at once")
        self.signal = number

    def _kill(self):
        import psutil

        self.kill_at = None
        with contextlib.suppress(psutil.NoSuchProcess):
            end_tree(psutil.Process(self.child.pid))

    def _judge(self, code):
        """Exit code and last line decide, never the status of a cell."""
        copy = self._tidied_copy()
        status, state, _ = (executed.ending(copy) if copy else None) or (None, None, None)
        name = self.stage.name
        if code == 0 and state == self.stage.state and status == FINISHED:
            kept_bytes = self.stage.keep(copy, FINISHED).stat().st_size
            if kept_bytes > executed.SIZE_LIMIT_BYTES:
                print(f"{name}: its executed copy has {kept_bytes // 1000} kB, which is a lot to open")
            if self.signal is not None:
                return Outcome(128 + self.signal, f"{self.signal.name}: {name} is finished, the same command goes on")
            return Outcome(0)
        if code == 0 and state == self.stage.state:
            kept = readable_path(self.stage.keep(copy, STOPPED))
            message = f"{name} stopped at its time limit, the same command goes on from there; so far: {kept}"
            return Outcome(EXIT_STOPPED, message)
        status = FAILED if self.signal is None else STOPPED
        kept = f"executed copy: {readable_path(self.stage.keep(copy, status))}" if copy else "it left no executed copy"
        error = executed.failure(copy) if copy else None
        if error and error[1] == Stopped.__name__:
            return Outcome(EXIT_STOPPED, f"{name} stopped: {error[2]}\n{kept}")
        if self.signal is not None:
            message = f"{name} was interrupted by {self.signal.name}, the same command goes on from there; {kept}"
            return Outcome(128 + self.signal, message)
        return Outcome(EXIT_FAILED, f"FAILED: {name}, {self._reason(code, copy, state)}\n{kept}")

    def _tidied_copy(self):
        """What papermill left, or None if it left nothing that can be read."""
        try:
            copy = executed.load(self.stage.running)
        except (DiskError, StudyError):
            return None
        executed.tidy(copy, self.stage.study.folder.parent)
        return copy

    def _reason(self, code, copy, state):
        """Where and why the notebook failed, in words."""
        error = executed.failure(copy) if copy else None
        number = error[0] if error else self.cell
        place = f"cell {number}/{len(self.cells)} ({self._code_line(number)})"
        if error:
            return f"{place}\n{error[1]}: {error[2]}"
        if code == DEAD_KERNEL or code < 0:
            return f"{place}\nthe kernel died without an error of its own: often out of memory, or it was killed"
        if code:
            return f"{place}\npapermill ended with exit code {code}; its last line: {self.last_text}"
        if state is None:
            return "all cells ran, but its last one did not print the last line of finish()"
        return f"its last line tells of other settings (state {state}) than this run's (state {self.stage.state})"


def environment(kernel_folder=None):
    """A child's environment: this checkout's peftlib, this interpreter's kernel first, no progress bars, no prompts."""
    env = dict(os.environ, PEFTLIB_HEADLESS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
    env |= dict.fromkeys(("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
    env.pop("MPLBACKEND", None)  # a file-only backend would leave the copies without figures
    for name, folder in (("PYTHONPATH", places.checkout()), ("JUPYTER_PATH", kernel_folder)):
        if folder:
            env[name] = os.pathsep.join([str(folder), *filter(None, [env.get(name)])])
    return env


def _with_injected(cells):
    """The cells as papermill will execute them: with ours below the parameters cell, or first where there is none."""
    injected = {"cell_type": "code", "source": "# Parameters", "metadata": {"tags": ["injected-parameters"]}}
    place = next((i + 1 for i, cell in enumerate(cells) if "parameters" in executed.tags_of(cell)), 0)
    return [*cells[:place], injected, *cells[place:]]


def _write_kernel_spec(folder):
    """A kernel `python3` of this very interpreter, whatever kernels a user has by that name."""
    from ipykernel.kernelspec import get_kernel_dict

    spec = Path(folder) / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(get_kernel_dict()))


def _read_lines(child, events):
    for line in child.stdout:
        events.put(line)
    events.put(child)


def _signal_kernel(child, number):
    """Send a signal to the kernel below papermill; False if there is none yet.

    SIGINT raises KeyboardInterrupt in its cell; after SIGKILL papermill still writes the executed copy.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(child.pid).children(recursive=True):
            if "ipykernel_launcher" in process.cmdline():
                process.send_signal(number)
                return True
    return False


def _duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
