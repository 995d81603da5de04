"""What a study folder has on its remote, remembered in the folder; the remote's listing in order; one copier at a time."""

import contextlib
import uuid
from pathlib import Path

from peftlib.core.disk_errors import writing
from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import Map, require_shape

_STATE = ".mirror.json"
_SHAPE = {"remote": str, "origin": str, "serials": Map(int), "copied": Map([list])}


class MirrorState:
    """What this folder, or another process in it, has copied to a remote or brought from it.

    origin: this folder's mark in what it writes. copied: {unit: fingerprint of what the remote has of it}. serials:
    {unit: serial of the copy that this folder last was}.
    """

    def __init__(self, folder, remote):
        self._folder, self._remote = folder, str(remote)
        self.origin, self.copied, self.serials = uuid.uuid4().hex, {}, {}
        self.read()

    def read(self):
        """Take up what earlier sessions in this folder, or other processes, have copied to this remote.

        A state that is damaged counts as none: then all is copied once more.
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
    """Whether no other process of this machine copies the folder at the moment."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    with open(made(folder) / ".mirror.lock", "w", encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def made(folder):
    """The folder, made where it was not there."""
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def newest_first(unit, listing):
    """[(name, facts), ...] of a unit's archives."""
    return sorted(
        ((name, facts) for name, facts in listing.items() if facts["unit"] == unit),
        key=lambda pair: -pair[1]["serial"],
    )


def in_order(listing):
    """The units of a listing, the small files last: a record must not say more than what is here."""
    return sorted({facts["unit"] for facts in listing.values()}, key=lambda unit: (unit == "study", unit))
