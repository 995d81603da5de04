"""The owner of a lock: what `lock.json` says, checked before it is believed."""

import socket
import time

import psutil

from peftlib.core.json_reading import fault, parse

_LATEST = 2.0**33  # the year 2242: a later time is no time
_TIMES = ("heartbeat", "boot", "started", "since")
_SHAPE = {"host": str, "token": str, "heartbeat": float, "what?": str, "pid?": int}
_SHAPE |= {"boot?": float, "started?": float, "since?": float}


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
        owner = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if fault(owner, _SHAPE) or not 0 < owner.get("pid", 1) < 2**31:
        return None
    return owner if all(0 <= owner.get(name, 0) < _LATEST for name in _TIMES) else None


def is_of_this_machine(owner):
    """Whether the owner is a process of this machine, since it was started."""
    return owner["host"] == socket.gethostname() and abs(owner.get("boot", 0.0) - psutil.boot_time()) <= 5


def named(owner):
    """The owner in words."""
    since = time.strftime("%H:%M", time.localtime(owner.get("since", 0.0)))
    return f"{owner['host']}, process {owner.get('pid')} ({owner.get('what')}, since {since})"
