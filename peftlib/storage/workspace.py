"""Hidden folders in which an export is built before it is renamed to its target; what killed ones leave is removed."""

import contextlib
import hashlib
import os
import time
import uuid
from pathlib import Path

from peftlib.core.errors import LockedError, writing
from peftlib.core.files import remove_tree, rename
from peftlib.storage.lock import StudyLock

_NEW, _OLD, _TARGET = "new", "old", "target"  # what is built, what the target held before, the target's name
_OURS = {_NEW, _OLD, _TARGET, "lock.json"}
_OLD_S = 86400.0  # after which a workspace without a lock, of an earlier peftlib, counts as left behind


class Workspace:
    """Context manager that yields an empty folder `new` in a hidden folder of `parent`; both are gone after the block.

    target: name in `parent` that `replace` gives to `new`, for which nobody else builds meanwhile; None: none. what:
    the work, place: its goal, both in words. tidies: remove what killed processes left beside it. log: told what they
    left. LockedError: another process builds for the same target.
    """

    def __init__(self, parent, *, target, what, place, tidies, prefix=".exporting-", log=print):
        self._parent, self._target, self._prefix, self._log = Path(parent), target, prefix, log
        self._tidies = tidies
        mark = uuid.uuid4().hex if target is None else hashlib.sha256(os.fsencode(target)).hexdigest()
        self.folder = self._parent / f"{prefix}{mark[:12]}"
        self._lock = StudyLock(self.folder, what, place=place, log=log)

    def __enter__(self):
        self._lock.__enter__()
        try:
            if self._tidy(self.folder):
                self._log(f"removed {self.folder}, which an interrupted export had left")
            if self._tidies:
                self._remove_others()
            with writing(self.folder):
                if self._target is not None:
                    (self.folder / _TARGET).write_bytes(os.fsencode(self._target))
                (self.folder / _NEW).mkdir()
        except BaseException:
            self.__exit__()
            raise
        return self.folder / _NEW

    def __exit__(self, *exc):
        try:
            self._tidy(self.folder)
        finally:
            self._lock.__exit__()
            _remove_empty(self.folder)

    def replace(self):
        """Rename `new` to the target; what was there goes with the workspace."""
        self._lock.require()
        place = self._parent / self._target
        if place.is_dir():
            rename(place, self.folder / _OLD)
        rename(self.folder / _NEW, place)

    def _remove_others(self):
        for found in sorted(self._parent.glob(f"{self._prefix}*")):
            if found != self.folder and _is_workspace(found):
                try:
                    self._remove(found)
                except OSError as error:
                    self._log(f"{found} was left by an interrupted export and cannot be removed ({error})")

    def _remove(self, found):
        if not (found / "lock.json").exists() and time.time() - found.stat().st_mtime < _OLD_S:
            _remove_empty(found)  # perhaps one that is being made, which then makes it again
            return
        try:
            with StudyLock(found, "removing what an interrupted export left", place=str(found), log=self._log):
                self._tidy(found)
        except LockedError:
            return  # at work
        _remove_empty(found)
        if not found.exists():
            self._log(f"removed {found}, which an interrupted export had left")

    def _tidy(self, folder):
        """Empty a workspace whose lock is held, and put back what was to be replaced; returns whether it held
        anything."""
        new, old, target = (folder / name for name in (_NEW, _OLD, _TARGET))
        is_used = new.exists() or old.exists()
        if old.exists() and new.exists():  # cut between the two renames
            self._put_back(old, os.fsdecode(target.read_bytes()) if target.exists() else "export")
        for path in (new, old):
            remove_tree(path)
        target.unlink(missing_ok=True)
        return is_used

    def _put_back(self, old, name):
        place = self._parent / Path(name).name
        if place.exists() or place.is_symlink():  # of somebody else, meanwhile
            place = place.with_name(f"{place.name}.before-{uuid.uuid4().hex[:6]}")
        rename(old, place)
        self._log(f"{place} is the earlier export, which an interrupted one had moved away")


def _is_workspace(found):
    """Whether a path is a folder of this user's that holds what a workspace does and nothing else."""
    if found.is_symlink() or not found.is_dir():
        return False
    if hasattr(os, "getuid") and found.stat().st_uid != os.getuid():
        return False
    with contextlib.suppress(FileNotFoundError):
        return all(path.name in _OURS or path.name.startswith(".lock.json.") for path in found.iterdir())
    return False


def _remove_empty(folder):
    with contextlib.suppress(OSError):  # not empty, or gone
        os.rmdir(folder)
