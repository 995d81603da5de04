"""Who holds a lock: what `lock.json` says, checked before it is believed."""

import json
import os
import socket
import time

import psutil

from peftlib.core.errors import LockedError

_LATEST = 2.0**33  # the year 2242: a later time is no time
_TORN_S = 2.0  # a file that is being written right now is whole within so many seconds


def this_process():
    """What names this process among all machines."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "boot": psutil.boot_time(),
        "pid": process.pid,
        "started": process.create_time(),
    }


def read(path):
    """The owner that a lock file names, or None where there is no file, or one that is damaged or cannot be read."""
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return owner if _is_whole(owner) else None


def read_settled(path):
    """Like `read`, but waits a moment for a file that may be half written.

    LockedError: it is there and cannot be read, so nobody can say whose it is.
    """
    waited = 0.0
    while True:
        owner = read(path)
        if owner is not None:
            return owner
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return None
        if path.is_dir() or not os.access(path, os.R_OK):
            raise LockedError(
                f"{path} cannot be read as a lock: see whose it is, and move it away if nobody works there"
            )
        # A file from the future may be one of right now, under a clock that was wrong.
        if age > _TORN_S or waited > _TORN_S:
            return None
        time.sleep(0.1)
        waited += 0.1


def is_gone(owner):
    """Whether the owner was a process of this machine that runs no more."""
    here = this_process()
    if owner["host"] != here["host"] or abs(owner.get("boot", 0.0) - here["boot"]) > 5 or "pid" not in owner:
        return False
    try:
        process = psutil.Process(owner["pid"])
        # A killed process whose parent is gone too may stay in the table for long.
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return abs(process.create_time() - owner.get("started", 0.0)) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def is_here(owner):
    """Whether the owner is this very process."""
    return owner.get("pid") == os.getpid() and owner["host"] == socket.gethostname()


def named(owner):
    """The owner in words."""
    since = time.strftime("%H:%M", time.localtime(owner.get("since", 0.0)))
    return f"{owner['host']}, process {owner.get('pid')} ({owner.get('what')}, since {since})"


def _is_whole(owner):
    if not isinstance(owner, dict) or not {"host", "token", "heartbeat"} <= owner.keys():
        return False
    texts = [owner[name] for name in ("host", "token", "what") if name in owner]
    times = [owner[name] for name in ("heartbeat", "boot", "started", "since") if name in owner]
    pid = owner.get("pid", 1)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(t) in (int, float) and 0 <= t < _LATEST for t in times)
        and type(pid) is int
        and 0 < pid < 2**31
    )
