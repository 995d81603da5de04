"""Execute one notebook with papermill: relay its output, forward signals to its kernel, and check how it ended."""

import contextlib
import logging
import os
import re
import signal
import threading
import time

import psutil

from peftlib.core import paths
from peftlib.core.errors import DiskError, Stopped, StudyError, writing
from peftlib.core.files import readable_path
from peftlib.core.hub_token import without_tokens
from peftlib.notebook.session import NO_BARS, STOPPED
from peftlib.runner import notebook_io
from peftlib.runner.console import STOPPED_CODE
from peftlib.runner.notebook_io import FAILED

EXIT_FAILED = 1
SAVE_S = 120.0  # seconds that an interrupted kernel has to save
LINE_LIMIT = 200  # characters relayed per line; the executed copy has the whole line
# What papermill logs about itself. Its inferred parameters are wrong: peftlib.core.config knows them.
_ABOUT_ITSELF = (
    "Input Notebook",
    "Output Notebook",
    "Executing note",
    "Ending Cell",
    "Unable to parse line",
    "Passed unknown param",
    "Kernel died while waiting",  # we log our own message
)
_INLINE_FIGURES = (
    "module://matplotlib_inline.backend_inline"  # with a file-only backend the copies would have no figures
)
_CELL_START = re.compile(r"Executing Cell (\d+)-*$")
_NOT_TEXT = re.compile(r"<[^\n]*>$|[^\n]*\d%\|[^\n]*$")  # the text form of a figure, an HTML table, a progress bar


class Execution:
    """One run of a notebooks.Stage. papermill runs in a thread, so that this one can forward signals.

    signals: a deque that receives this process's signals. heartbeat_s: seconds of silence before a line is printed.
    """

    def __init__(self, stage, signals, heartbeat_s):
        self.stage, self.signals, self.heartbeat_s = stage, signals, heartbeat_s
        self.cells = _with_injected(notebook_io.load(stage.source)["cells"])
        self.cell = 0  # number of the running cell, from 1
        self.cell_started = self.last_line_at = time.monotonic()
        self.kernel = None  # its KernelManager, once it is started
        self.error = self.signal = self.kill_at = None  # error: what papermill raised

    def run(self):
        """Execute to the end and keep the executed copy; returns (exit code, why the run must stop)."""
        with writing(self.stage.running):
            self.stage.running.parent.mkdir(parents=True, exist_ok=True)
            self.stage.running.unlink(missing_ok=True)
        log = logging.getLogger("papermill")
        level_before = log.level
        log.setLevel(logging.INFO)
        log.addFilter(self._on_log)
        try:
            worker = threading.Thread(target=self._execute, daemon=True)
            worker.start()
            while worker.is_alive():
                worker.join(timeout=0.2)
                self._on_time(time.monotonic())
        finally:
            log.removeFilter(self._on_log)
            log.setLevel(level_before)
        return self._judge()

    def _execute(self):
        import papermill
        from traitlets.config import Config

        # Without it newer kernels warn that messages to papermill could be intercepted.
        encrypted = Config({"KernelManager": {"transport_encryption": "auto"}})
        source, target = str(self.stage.source), str(self.stage.running)
        how = {"progress_bar": False, "log_output": True, "kernel_manager_class": self._kernel_class()}
        try:
            with writing(target):
                papermill.execute_notebook(source, target, self.stage.parameters, config=encrypted, **how)
        except Exception as error:  # noqa: BLE001 - judged, with the executed copy, in the main thread
            self.error = error

    def _kernel_class(self):
        """A kernel manager whose kernel runs this interpreter, whatever kernel specs the user has."""
        from ipykernel.kernelspec import get_kernel_dict
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpec

        execution = self

        class Kernel(AsyncKernelManager):
            kernel_spec = KernelSpec(**get_kernel_dict(), env={**environment(), "MPLBACKEND": _INLINE_FIGURES})

            async def start_kernel(self, **settings):
                await super().start_kernel(**settings)
                execution.kernel = self

        return Kernel

    def _on_log(self, record):
        """Handle papermill's log: starting cells and their output. Returns False, so that no other handler gets it."""
        text = record.getMessage()
        start = _CELL_START.match(text)
        if start:
            self._on_cell(int(start[1]))
        elif not text.startswith(_ABOUT_ITSELF) and not _NOT_TEXT.match(text.rstrip("\n")):
            for line in text.split("\n"):
                shown = without_tokens(line.rpartition("\r")[2]).rstrip()
                if shown:
                    self._relay(shown)
        return False

    def _on_cell(self, number):
        self.cell = number
        self.cell_started = time.monotonic()
        if self.signal is not None:  # the interrupted cell has saved and ended: skip the rest
            self._kill()
        cell = self.cells[number - 1]
        if cell["cell_type"] == "code" and not notebook_io.tags_of(cell):
            self._relay(f"> {self._code_line(number)}")

    def _on_time(self, now):
        while self.signals:
            self._on_signal(self.signals.popleft())
        if self.kill_at is not None and now > self.kill_at:
            self._kill()
        if now - self.last_line_at >= self.heartbeat_s:
            minutes, seconds = divmod(int(now - self.cell_started), 60)
            self._relay(f"... {f'{minutes} min ' if minutes else ''}{seconds} s in this cell")

    def _on_signal(self, number):
        process = self._kernel_process()
        if self.signal is not None or process is None:
            self._kill()
        else:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                process.send_signal(signal.SIGINT)  # KeyboardInterrupt in the running cell
            self.kill_at = time.monotonic() + SAVE_S
            self._relay(f"{number.name}: asked the kernel to save and stop; send it again to kill the kernel")
        self.signal = number

    def _kill(self):
        """Kill the kernel and its children; papermill then writes the executed copy and exits."""
        self.kill_at = None
        process = self._kernel_process()
        if process is not None:
            end_tree(process)

    def _kernel_process(self):
        """The kernel's psutil.Process, or None before it starts and after it exits."""
        try:
            return psutil.Process(self.kernel.provisioner.pid) if self.kernel else None
        except (psutil.NoSuchProcess, AttributeError):
            return None

    def _code_line(self, number):
        return notebook_io.first_line(self.cells[number - 1]) if number else "before the first cell"

    def _relay(self, text):
        self.last_line_at = time.monotonic()
        shown = text if len(text) <= LINE_LIMIT else f"{text[:LINE_LIMIT]} ..."
        # A single write, because papermill's thread prints too.
        print(f"{self.stage.name} {self.cell}/{len(self.cells)} | {shown}\n", end="", flush=True)

    def _judge(self):
        """The result of `run`, from papermill's error and the copy's last line; a cell's status is not reliable."""
        name, copy = self.stage.name, self._tidied_copy()
        status, state, _ = (notebook_io.ending(copy) if copy else None) or (None, None, None)
        if self.error is None and state == self.stage.state:
            kept = self.stage.keep(copy, status)
            if status == STOPPED:
                so_far = f"the same command resumes from there; so far: {readable_path(kept)}"
                return STOPPED_CODE, f"{name} stopped at its time limit, {so_far}"
            if self.signal is None:
                return 0, ""
            return 128 + self.signal, f"{self.signal.name}: {name} is finished, the same command resumes the rest"
        kept = "there is no executed copy"
        if copy:
            kept = f"executed copy: {readable_path(self.stage.keep(copy, STOPPED if self.signal else FAILED))}"
        failure = notebook_io.failure(copy) if copy else None
        if failure and failure[1] == Stopped.__name__:
            return STOPPED_CODE, f"{name} stopped: {failure[2]}\n{kept}"
        if self.signal is not None:
            goes_on = f"the same command resumes it; {kept}"
            return 128 + self.signal, f"{name} was interrupted by {self.signal.name}, {goes_on}"
        return EXIT_FAILED, f"FAILED: {name}, {self._reason(failure, state)}\n{kept}"

    def _tidied_copy(self):
        """The notebook that papermill wrote, or None if it is missing or unreadable."""
        try:
            copy = notebook_io.load(self.stage.running)
        except (DiskError, StudyError):
            return None
        notebook_io.tidy(copy, self.stage.study.folder.parent)
        return copy

    def _reason(self, failure, state):
        """Where and why the notebook failed, as text. failure: from notebook_io.failure."""
        from nbclient.exceptions import DeadKernelError

        number = failure[0] if failure else self.cell
        where = f"cell {number}/{len(self.cells)} ({self._code_line(number)})"
        if failure:
            return f"{where}\n{failure[1]}: {failure[2]}"
        if isinstance(self.error, DeadKernelError):
            return f"{where}\nthe kernel died without an error: it probably ran out of memory or was killed"
        if self.error is not None:
            return f"{where}\npapermill failed with {type(self.error).__name__}: {without_tokens(str(self.error))}"
        if state is None:
            return "all cells ran, but the last one did not print the last line of finish()"
        return f"its last line is for other settings (state {state}) than this run's (state {self.stage.state})"


def environment():
    """{variable: value} of a child process: this checkout's peftlib, no progress bars, no prompts."""
    found = dict.fromkeys(("PEFTLIB_HEADLESS", "PYDEVD_DISABLE_FILE_VALIDATION", *NO_BARS), "1")
    if paths.checkout():
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.checkout()), os.environ.get("PYTHONPATH")]))
    return found


def end_tree(process):
    """Kill all descendants of a psutil.Process, then the process itself."""
    try:
        members = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def _with_injected(cells):
    """The cells as papermill will execute them: with ours below the parameters cell, or first if there is none."""
    injected = {"cell_type": "code", "source": "# Parameters", "metadata": {"tags": ["injected-parameters"]}}
    at = next((i + 1 for i, cell in enumerate(cells) if "parameters" in notebook_io.tags_of(cell)), 0)
    return [*cells[:at], injected, *cells[at:]]
