"""Ctrl-C, the kernel's interrupt button and SIGTERM as a wish to stop, not as an exception in the middle of a step."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def interrupts():
    """An event that Ctrl-C, the kernel's interrupt button or SIGTERM sets; a second one ends at once.

    Training then stops after the step at hand, with a checkpoint. Threads other than the main one get no signals.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
