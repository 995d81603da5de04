"""The runner's child process: executes one notebook with papermill and tells its parent what happens, line by line.

Started as `python -m peftlib.runner.papermill_worker SOURCE TARGET PARAMETERS_JSON`. Exit codes: 0, 1 for a failed cell, 138 for a dead
kernel (as papermill's own command line has it).
"""

import json
import logging
import os
import re
import sys
import threading
import time

from peftlib.core.errors import DiskError, writing

CELL_EVENT = "\x1ecell "  # begins the line that announces a cell; its number follows, from 1
DEAD_KERNEL = 138
# What papermill says about its own work. It guesses at our parameters; peftlib.core.config knows them.
_ABOUT_ITSELF = (
    "Input Notebook",
    "Output Notebook",
    "Executing note",
    "Unable to parse line",
    "Passed unknown param",
    "Kernel died while waiting",  # the runner says why in its own words
)
_CELL_START = re.compile(r"Executing Cell (\d+)-*$")
_CELL_END = re.compile(r"Ending Cell \d+-*$")
_NOT_TEXT = re.compile(r"<[^\n]*>$|[^\n]*\d%\|[^\n]*$")  # the text form of a figure, an HTML table, a progress bar


def main(argv):
    """Execute; the exit code."""
    source, target, parameters = argv
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _log_to_stdout()
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    # Without it newer kernels warn that what they say to papermill could be read on the way.
    encrypted = Config({"KernelManager": {"transport_encryption": "auto"}})
    try:
        with writing(target):
            papermill.execute_notebook(
                source, target, json.loads(parameters), progress_bar=False, log_output=True, config=encrypted
            )
    except papermill.PapermillExecutionError:
        return 1  # the executed copy holds the error; the parent reads it there
    except DeadKernelError:
        return DEAD_KERNEL
    except DiskError as error:
        print(error, flush=True)  # the parent quotes the last line
        return 1
    return 0


def end_tree(process):
    """Kill all that a psutil.Process started, then the process itself."""
    import psutil

    try:
        started = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for member in [*started, process]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


class _Lines(logging.Handler):
    """papermill's log as lines on stdout: announced cells, and what the cells print."""

    def emit(self, record):
        text = record.getMessage().rstrip("\n")
        start = _CELL_START.match(text)
        if start:
            print(f"{CELL_EVENT}{start[1]}", flush=True)
        elif not _CELL_END.match(text) and not _NOT_TEXT.match(text):
            print(text, flush=True)


def _log_to_stdout():
    log = logging.getLogger("papermill")
    log.setLevel(logging.INFO)
    log.addHandler(_Lines())
    log.addFilter(lambda record: not record.getMessage().startswith(_ABOUT_ITSELF))


def _end_with_parent(parent_pid):
    """A runner that was killed outright must not leave a training behind that its next run would collide with."""
    import psutil

    while os.getppid() == parent_pid:
        time.sleep(1)
    end_tree(psutil.Process())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
