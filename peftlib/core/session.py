"""The session that runs this code: its host, its time limit, whether anyone is watching, and how it is interrupted."""

import contextlib
import os
import signal
import sys
import threading
import time

import psutil

MARGIN_S = 300.0  # seconds before the end when work is saved and stopped
_HOURS = {"colab": 12.0, "kaggle": 12.0}  # longest session according to their documentation


def host():
    """'colab', 'kaggle', or '' for any other machine."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"  # check first: its image is built from Colab's and has Colab's variables too
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else ""


def seconds_left(session_hours=0.0):
    """Seconds until work should be saved and stopped, or None if the session has no limit.

    session_hours: session length; 0 uses the host's own limit, unless the session has already outlasted it. It counts
    from the start of the machine's first process on Colab and Kaggle, and of this process elsewhere.
    """
    hours = session_hours or _HOURS.get(host(), 0.0)
    if not hours:
        return None
    first = psutil.Process(1) if host() else psutil.Process()
    left = first.create_time() + 3600 * hours - time.time()
    if left < 0 and not session_hours:
        return None  # it outlasted the limit, as Colab's paid sessions may
    return left - MARGIN_S


class Deadline:
    """When work has to stop, counted from now: after cfg.max_seconds, or at the end of the session."""

    def __init__(self, cfg):
        self._cfg = cfg
        self._started = time.monotonic()

    def passed(self):
        """The reason to save and stop now, as text, or None."""
        limit = self._cfg.max_seconds
        if limit > 0 and time.monotonic() - self._started > limit:
            return f"max_seconds={limit:g} is reached"
        left = seconds_left(self._cfg.session_hours)
        if left is not None and left < 0:
            hours, minutes = self._cfg.session_hours or _HOURS[host()], max(0.0, left + MARGIN_S) / 60
            return f"this session's {hours:g} hours (see session_hours) end in {minutes:.0f} minutes"
        return None


@contextlib.contextmanager
def interrupts(*, echo_s=0.0):
    """Yield an event that Ctrl-C, the kernel's interrupt button or SIGTERM sets; a second signal raises at once.

    Training then stops after the current step and saves a checkpoint. Only the main thread gets signals.
    echo_s: seconds in which further signals are ignored, because a launcher forwards what the terminal already sent.
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
    ipython = sys.modules.get("IPython")  # kernels have imported it
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None


def is_watched():
    """Whether this is a kernel whose front end can answer a question: Jupyter or Colab, not papermill or our runner."""
    kernel = running_kernel()
    if kernel is None or os.environ.get("PEFTLIB_HEADLESS") == "1":
        return False
    return bool(getattr(kernel, "_allow_stdin", True))  # set by the client that runs the cell
