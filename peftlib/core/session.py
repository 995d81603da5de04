"""The session that runs this code: its host, how long it lasts, who looks on, and how it is asked to stop."""

import contextlib
import os
import signal
import sys
import threading
import time

import psutil

MARGIN_S = 300.0  # seconds before the end at which work is saved and stopped
_HOURS = {"colab": 12.0, "kaggle": 12.0}  # what their documentation names as the longest session


def host():
    """'colab', 'kaggle' or '' for any other machine."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"  # first: its image is made from Colab's and has Colab's variables too
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else ""


def seconds_left(session_hours=0.0):
    """Seconds until work should be saved and stopped, or None where nothing ends the session.

    session_hours: the longest session; 0 takes the host's own, until it has lasted longer. Counted on Colab and Kaggle
    from the start of the machine's first process, which is the session's, elsewhere from the start of this one.
    """
    hours = session_hours or _HOURS.get(host(), 0.0)
    if not hours:
        return None
    first = psutil.Process(1) if host() else psutil.Process()
    left = first.create_time() + 3600 * hours - time.time()
    if left < 0 and not session_hours:
        return None  # it has outlived them, as Colab's paid sessions may
    return left - MARGIN_S


class Deadline:
    """When the work of a config has to stop, counted from now: cfg.max_seconds, or the end of the session."""

    def __init__(self, cfg):
        self._cfg = cfg
        self._started = time.monotonic()

    def passed(self):
        """Why it is time to save and stop, in words, or None."""
        limit = self._cfg.max_seconds
        if limit > 0 and time.monotonic() - self._started > limit:
            return f"max_seconds={limit:g} is over"
        left = seconds_left(self._cfg.session_hours)
        if left is not None and left < 0:
            hours, minutes = self._cfg.session_hours or _HOURS[host()], max(0.0, left + MARGIN_S) / 60
            return f"this session's {hours:g} hours, see session_hours, end in {minutes:.0f} minutes"
        return None


@contextlib.contextmanager
def interrupts(*, echo_s=0.0):
    """Yield an event that Ctrl-C, the kernel's interrupt button or SIGTERM sets; a second signal raises at once.

    Training then stops after the current step, with a checkpoint. Threads other than the main one get no signals.
    echo_s: seconds in which more signals are the first one's: a launcher passes on what the terminal has sent already.
    """
    asked, since = threading.Event(), time.monotonic()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        nonlocal since
        if asked.is_set() and time.monotonic() - since >= echo_s:
            raise KeyboardInterrupt
        if not asked.is_set():
            since = time.monotonic()
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def running_kernel():
    """The ipykernel kernel of this process; None in scripts, terminals and plain IPython."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None


def is_watched():
    """Whether this is a kernel whose front end can answer a question: Jupyter or Colab, not papermill or our runner."""
    kernel = running_kernel()
    if kernel is None or os.environ.get("PEFTLIB_HEADLESS") == "1":
        return False
    return bool(getattr(kernel, "_allow_stdin", True))  # what the client of the running cell said about itself
