"""One session at a time on a study folder: a lock file with owner and heartbeat.

A lock whose process is gone, or that gave no sign of life for a while, is taken over; a live one is refused by name.
The session that holds a study may let child processes in, each with a lock of its own run below it.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from peftlib.core.disk_errors import writing
from peftlib.core.errors import DiskError, LockedError
from peftlib.core.files import write_json
from peftlib.storage.lock_owner import is_gone, is_here, named, read, read_settled, this_process

HEARTBEAT_S = 15.0  # seconds between two signs of life
STALE_S = 90.0  # seconds without one after which a lock counts as left behind
_NAME = "lock.json"
_PASS = "PEFTLIB_LOCK"  # environment variable: TOKEN@FOLDER of the lock that a child process works under
_LOOK_S = 2.0  # seconds between two looks of a child whether its parent still holds the study


@contextlib.contextmanager
def held(folder, what, *, run="", log=print):
    """The locks on a study folder, here and on its remote; yields a function that raises once another took over.

    In a child process of the session that holds the folder (see child_environment) the lock is that of `run`, a name
    such as qlora-s0, and the function raises as well once that session is gone.
    LockedError: another live session holds one of them. A remote that cannot be reached is said, and not waited for.
    """
    from peftlib.storage.mirror import running  # which needs no lock

    parent = _Parent.of(folder)
    if parent is not None:
        parent.require()
        with StudyLock(folder, what, name=f"{run or 'child'}-{_NAME}") as own:
            yield lambda: (parent.require(), own.require())
        return

    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(StudyLock(folder, what))]
        mirror = running(folder)
        if mirror is not None and mirror.remote.has_locks:
            # Fewer signs of life: Drive counts writes, and shows them late to other machines.
            settle_s = 3.0 if mirror.remote.is_drive else 0.0
            far = StudyLock(mirror.remote.folder, what, heartbeat_s=60.0, stale_s=240.0, settle_s=settle_s)
            try:
                locks.append(stack.enter_context(far))
            except OSError as error:
                log(f"no lock on {mirror.remote} ({error}): see to it that no other session uses this study")

        def require():
            for lock in locks:
                lock.require()

        yield require


def child_environment(folder):
    """{variable: value} with which child processes of this one, which holds the folder's lock, may work below it.

    LockedError: this process does not hold it.
    """
    path = Path(folder).absolute() / _NAME
    owner = read(path)
    if owner is None or not is_here(owner):
        raise LockedError(f"{path} is not this process's: nobody can be let in")
    return {_PASS: f"{owner['token']}@{path.parent}"}


class _Parent:
    """The session under whose lock this process works."""

    def __init__(self, folder, token):
        self.path, self.token = Path(folder).absolute() / _NAME, token
        self._looked_at = None

    @classmethod
    def of(cls, folder):
        """The parent that lets this process work in the folder, or None where the folder is nobody's to let."""
        token, _, place = os.environ.get(_PASS, "").partition("@")
        return cls(folder, token) if place and Path(place) == Path(folder).absolute() else None

    def require(self):
        """LockedError where the parent has ended or lost its lock."""
        now = time.monotonic()
        if self._looked_at is not None and now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        owner = read(self.path)
        if owner is None or owner["token"] != self.token or is_gone(owner):
            raise LockedError(
                f"the session that started this one holds {self.path.parent.name} no more: this process stops and "
                "writes no more"
            )


@contextlib.contextmanager
def _alone_in(folder):
    """Within it no other process or thread of this machine is in the same block for the same folder.

    Held by the system for the folder itself, so no file is left behind. Where a file system has no such locks (Drive),
    or on Windows, everybody gets in.
    """
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


class StudyLock:
    """Context manager that holds `folder`/lock.json, or another `name` that ends so.

    what: the work in words, shown to whoever is refused. settle_s: seconds after which the file is read again, for
    folders that several machines reach (two could have written it at once). place: what is locked, in words; None: the
    study of that folder. log: told of a lock that cannot be believed at once.
    LockedError: another live session holds it. While held, `require` raises LockedError once another has taken over.
    """

    def __init__(
        self, folder, what, *, heartbeat_s=HEARTBEAT_S, stale_s=STALE_S, settle_s=0.0, name=_NAME, place=None, log=print
    ):
        self.path = Path(folder) / name
        self.heartbeat_s, self.stale_s, self.settle_s = heartbeat_s, stale_s, settle_s
        self._place, self._log = place or f"study {self.path.parent.name!r}", log
        self._owner = this_process() | {"what": what, "token": uuid.uuid4().hex, "since": time.time()}
        self._is_over = threading.Event()
        self._taker = None  # who has taken over

    def __enter__(self):
        for _ in range(20):
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._create()
                break
            except FileExistsError:
                self._clear_if_left_behind()
            except FileNotFoundError:
                continue  # the session before removed the folder with its lock
        else:
            raise LockedError(f"{self.path} changes hands all the time: several sessions want {self._place} at once")
        if self.settle_s:
            time.sleep(self.settle_s)
            self._look()
            self.require()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        return self

    def __exit__(self, *exc):
        self._is_over.set()
        self._beating.join()
        with contextlib.suppress(OSError):
            if self._token_at(self.path) == self._owner["token"]:
                os.unlink(self.path)

    def require(self):
        """LockedError where another session has taken over."""
        if self._taker is not None:
            raise LockedError(
                f"{named(self._taker)} has taken over {self._place}: this session stops and writes no more"
            )

    def require_free(self):
        """LockedError where another live session holds the lock; nothing is taken."""
        if self.path.exists():
            self._clear_if_left_behind()

    def _create(self):
        """Write the lock. FileExistsError: there is one. DiskError: it cannot be written, and none is left."""
        try:
            opened = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:
            with writing(self.path):
                raise
        try:
            with writing(self.path), os.fdopen(opened, "w", encoding="utf-8") as out:
                json.dump(self._owner | {"heartbeat": time.time()}, out)
        except DiskError:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            raise

    def _clear_if_left_behind(self):
        """Move a stale lock out of the way. LockedError: it is a live one."""
        owner = read_settled(self.path)
        if owner is None:
            if self.path.exists():
                self._log(f"{self.path} is damaged and names no session: it counts as left behind")
        elif not is_gone(owner):
            self._require_silent(owner)
        with writing(self.path), _alone_in(self.path.parent), contextlib.suppress(FileNotFoundError):
            # Another session may have been faster, and its new lock stays. One at a time looks and deletes.
            now = read_settled(self.path)
            if (now and now["token"]) == (owner and owner["token"]):
                os.unlink(self.path)

    def _require_silent(self, owner):
        """LockedError where the owner still gives signs of life."""
        silent = time.time() - owner["heartbeat"]
        if silent < -self.stale_s:
            owner, silent = self._after_watching(owner), 0.0
            if owner is None:
                return
        if silent < self.stale_s:
            clears = time.strftime("%H:%M:%S", time.localtime(time.time() + self.stale_s - silent))
            raise LockedError(
                f"{self._place} is in use by {named(owner)}, last sign of life {max(0, silent):.0f} s ago: wait for it, "
                f"or stop it. If it is gone, run this again after {clears}"
            )

    def _after_watching(self, owner):
        """Who has given a sign of life while a lock from the future was watched, or None.

        Of two clocks that differ neither is known to be right, so a time alone cannot tell how old the lock is.
        """
        ahead = (owner["heartbeat"] - time.time()) / 60
        self._log(
            f"the lock of {self._place} is {ahead:,.0f} minutes ahead of this machine's clock: waiting up to "
            f"{self.stale_s:.0f} s to see whether {named(owner)} still works"
        )
        end = time.monotonic() + self.stale_s
        while time.monotonic() < end:
            time.sleep(min(1.0, self.stale_s / 10))
            now = read(self.path)
            if now is None or (now["token"], now["heartbeat"]) != (owner["token"], owner["heartbeat"]):
                return now
        return None

    @staticmethod
    def _token_at(path):
        return (read(path) or {}).get("token")

    def _beat(self):
        while not self._is_over.wait(self.heartbeat_s):
            self._look()
            if self._taker is not None:
                return
            with contextlib.suppress(OSError):  # a full disk is no reason to give up the work
                write_json(self.path, self._owner | {"heartbeat": time.time()})

    def _look(self):
        owner = read(self.path)
        if owner is not None and owner["token"] != self._owner["token"]:
            self._taker = owner
