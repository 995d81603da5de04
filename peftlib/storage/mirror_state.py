"""What a study folder has on its remote, remembered in the folder, and one copier at a time."""

import contextlib
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from peftlib.core.errors import StudyError, writing
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import Map, require_shape

_STATE = ".mirror.json"
_SHAPE = {"remote": str, "origin": str, "serials": Map(int), "copied": Map([list])}


class MirrorState:
    """What this folder, or another process in it, has uploaded to a remote or restored from it.

    origin: this folder's mark in what it uploads. copied: {unit: fingerprint of the files that the remote has}.
    serials: {unit: serial of the upload that this folder's files are as new as}.
    """

    def __init__(self, folder, remote):
        self._folder, self._remote = folder, str(remote)
        self.origin, self.copied, self.serials = uuid.uuid4().hex, {}, {}
        self.read()

    def read(self):
        """Read what earlier sessions in this folder, or other processes, have uploaded to this remote.

        A damaged state counts as none: everything is then uploaded once more.
        """
        with contextlib.suppress(OSError, StudyError):
            path = self._folder / _STATE
            state = require_shape(read_json(path), _SHAPE, path)
            if state["remote"] == self._remote:
                self.origin, self.serials, self.copied = state["origin"], state["serials"], state["copied"]

    def keep(self, unit, serial, fingerprint):
        """The remote has these files of a unit, as the copy of this serial."""
        self.serials[unit], self.copied[unit] = serial, fingerprint
        self._write()

    def forget(self, units):
        """The remote has lost these units."""
        if units:
            self.copied = {unit: fingerprint for unit, fingerprint in self.copied.items() if unit not in units}
            self._write()

    def _write(self):
        state = {"remote": self._remote, "origin": self.origin, "serials": self.serials, "copied": self.copied}
        write_json(made(self._folder) / _STATE, state)


@contextlib.contextmanager
def alone(folder):
    """Yields whether this process alone copies the folder; no other process of this machine does within the block."""
    lock = FileLock(made(folder) / ".mirror.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def made(folder):
    """The folder, made where it was missing."""
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
