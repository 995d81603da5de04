"""How long this machine lasts: Colab and Kaggle end a session by themselves."""

import os
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

    session_hours: the longest session; 0 takes the host's own. Counted on Colab and Kaggle from the start of the machine's
    first process, which is the session's, elsewhere from the start of this one.
    """
    hours = session_hours or _HOURS.get(host(), 0.0)
    if not hours:
        return None
    first = psutil.Process(1) if host() else psutil.Process()
    return first.create_time() + 3600 * hours - MARGIN_S - time.time()


class Deadline:
    """When the work of a config has to stop, counted from now: cfg.max_seconds, or this machine's end."""

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
            return f"this session ends in {(left + MARGIN_S) / 60:.0f} minutes"
        return None
