"""A hidden folder in which an export is built before it is renamed to its target."""

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

from peftlib.core.errors import writing
from peftlib.core.files import remove_tree, rename
from peftlib.storage.lock import StudyLock


class Workspace:
    """Context manager that yields an empty folder in a hidden one next to `target`; both are removed after the block.

    `replace` renames it to the target. No other process can build the same target in the meantime; leftovers of a
    killed process are removed first. what: describes the work. log: reports leftovers. LockedError: the target is busy.
    """

    def __init__(self, target, what, *, log=print):
        self.target, self._log = Path(target), log
        mark = hashlib.sha256(os.fsencode(self.target.name)).hexdigest()
        self.folder = self.target.parent / f".exporting-{mark[:12]}"
        self._new, self._old = self.folder / "new", self.folder / "old"  # the new export, the previous one
        self._lock = StudyLock(self.folder, what, place=f"the export to {target}", log=log)

    def __enter__(self):
        self._lock.__enter__()
        try:
            if self._new.exists() or self._old.exists():
                self._log(f"removed {self.folder}, left by an interrupted export")
            self._clear()
            with writing(self.folder):
                self._new.mkdir()
        except BaseException:
            self.__exit__()
            raise
        return self._new

    def __exit__(self, *exc):
        try:
            self._clear()
        finally:
            self._lock.__exit__()
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(self.folder)

    def replace(self):
        """Rename the new export to the target; the previous one is removed with the workspace."""
        self._lock.require()
        if self.target.is_dir():
            rename(self.target, self._old)
        rename(self._new, self.target)

    def _clear(self):
        """Empty the folder, and restore an export that was being replaced."""
        if self._old.exists() and self._new.exists():  # killed between the two renames
            back = self.target
            if back.exists() or back.is_symlink():  # created by someone else in the meantime
                back = back.with_name(f"{back.name}.before-{uuid.uuid4().hex[:6]}")
            rename(self._old, back)
            self._log(f"restored the earlier export as {back}: an interrupted export had moved it")
        for path in (self._new, self._old):
            remove_tree(path)
