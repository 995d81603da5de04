"""A disk that fails on request: every operation that peftlib.core.files does below a folder is counted, and one goes
wrong."""

import builtins
import contextlib
import errno
import os
from pathlib import Path
from unittest import mock

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "Errno 107": errno.ENOTCONN}
DEATHS = ("dies before", "dies after", "dies, truncated", "dies, zero bytes", "dies, bit flipped", "dies, missing")


class Died(BaseException):
    """The process is gone: nothing that it would do after this happens."""


class FaultDisk:
    """Counts operations below `folder`; operation number `at` (from 0) goes wrong as `kind` says, once.

    kind: a name in ERRORS, which is raised, or one of DEATHS: the process ends there, and what was being written is
    cut to half, to nothing, has one bit flipped, or is not there, as an unflushed disk may leave it.
    """

    def __init__(self, folder, *, at=None, kind=None):
        self.folder, self.at, self.kind = Path(folder), at, kind
        self.operations = []
        self.is_dead = False

    @contextlib.contextmanager
    def plugged_in(self):
        """Within it peftlib.core.files works on this disk."""
        with mock.patch("peftlib.core.files.os", self), mock.patch("peftlib.core.files.open", self._open, create=True):
            yield self

    def __getattr__(self, name):
        return getattr(os, name)

    def _open(self, path, mode="r", **more):
        if "w" not in mode:
            return builtins.open(path, mode, **more)
        return self._do("create", path, lambda: _Written(self, builtins.open(path, mode, **more), path))

    def fsync(self, opened):
        path = os.readlink(f"/proc/self/fd/{opened}")
        return self._do("fsync", path, lambda: os.fsync(opened))

    def replace(self, old, new):
        return self._do("rename", new, lambda: os.replace(old, new))

    def unlink(self, path):
        return self._do("delete", path, lambda: os.unlink(path))

    def rmdir(self, path):
        return self._do("delete", path, lambda: os.rmdir(path))

    def _do(self, what, path, call):
        if self.is_dead:
            raise Died  # what a `finally` of a dead process would do does not happen either
        if not Path(path).is_relative_to(self.folder):
            return call()
        self.operations.append(f"{what} {Path(path).relative_to(self.folder)}")
        if len(self.operations) - 1 != self.at:
            return call()
        if self.kind in ERRORS:
            raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), str(path))
        if self.kind != "dies before":
            call()
        self.is_dead = True
        if what != "fsync" or Path(path).is_file():  # a folder's flush holds back names, not what is in them
            _damage(Path(path), self.kind)
        raise Died


class _Written:
    """A file whose writes are operations."""

    def __init__(self, disk, raw, path):
        self._disk, self._raw, self._path = disk, raw, path

    def write(self, data):
        return self._disk._do("write", self._path, lambda: self._raw.write(data))

    def __getattr__(self, name):
        return getattr(self._raw, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._raw.close()


def _damage(path, kind):
    """What an unflushed disk may leave of the file, or of the files of a folder, that was just written."""
    if kind in ("dies before", "dies after"):
        return
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []:
        damage(file, kind.removeprefix("dies, "))


def damage(file, how):
    """Harm one file: 'truncated', 'zero bytes', 'bit flipped' or 'missing'."""
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "zero bytes":
        file.write_bytes(b"")
    elif content:
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
