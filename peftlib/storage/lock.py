"""One session at a time per study folder: the OS lock on this machine, an owner with a heartbeat for other machines.

On one machine `filelock` decides, and the OS releases its lock when a process dies. Between machines, as on Drive,
`lock.json` decides: a lock whose heartbeat is stale is taken over, and a live one raises an error that names its owner.
Workers that share a study's runs hold one claim per run instead, see storage.claims.
"""

import contextlib
import hashlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from peftlib.core.errors import LockedError, writing
from peftlib.core.files import write_json
from peftlib.core.json_reading import fault, parse
from peftlib.storage.mirror import running

HEARTBEAT_S = 15.0  # seconds between two heartbeats
STALE_S = 90.0  # seconds without a heartbeat after which a lock is stale
_NAME = "lock.json"
_ATTEMPTS = 20  # to take the OS lock
OWNER = {"host": str, "token": str, "heartbeat": float, "what?": str, "pid?": int, "boot?": float, "since?": float}
_LATEST = 2.0**33  # the year 2242: a later time is invalid


_CLAIMED: dict[tuple[Path, str], Callable[[], object]] = {}  # (folder, run) -> what raises once the claim is lost


@contextlib.contextmanager
def claimed(folder, run, require):
    """In this context `held` lets this process, which holds a run's claim, work on that run of a study folder.

    require: raises LockedError once the claim is lost.
    """
    key = (Path(folder).absolute(), run)
    _CLAIMED[key] = require
    try:
        yield
    finally:
        del _CLAIMED[key]


@contextlib.contextmanager
def held(folder, what, *, run="", log=print):
    """Hold the locks on a study folder, here and on its remote; yields a function that raises after a takeover.

    run: such as qlora-s0; if this process holds its claim (see `claimed`), no other lock is taken.
    LockedError: another live session holds one of them. If the remote is unreachable, this is logged, without a lock.
    """
    require_claim = _CLAIMED.get((Path(folder).absolute(), run))
    if require_claim is not None:
        require_claim()
        yield require_claim
        return
    with contextlib.ExitStack() as stack:
        checks = [stack.enter_context(StudyLock(folder, what)).require]
        mirror = running(folder)
        if mirror is not None and mirror.remote.lock_settle_s is not None:
            # Fewer heartbeats: Drive limits writes, and other machines see them late.
            pace = {"heartbeat_s": 60.0, "stale_s": 240.0, "settle_s": mirror.remote.lock_settle_s}
            try:
                checks.append(stack.enter_context(StudyLock(mirror.remote.folder, what, **pace)).require)
            except OSError as error:
                log(f"could not lock {mirror.remote} ({error}): make sure that no other session uses this study")
        _require_no_workers(folder, log)
        yield lambda: [check() for check in checks]


def _require_no_workers(folder, log):
    """LockedError if workers hold claims on runs of a study folder."""
    from peftlib.storage.claims import Claims  # it imports this module

    owners = Claims(folder, log=log).owners()
    if owners:
        told = ", ".join(f"{run} by {owner}" for run, owner in sorted(owners.items()))
        raise LockedError(f"study {Path(folder).name!r} has running workers: {told}. Wait for them, or stop them")


class StudyLock:
    """Context manager that holds `folder`/lock.json, or another `name` with the same ending.

    what: describes the work to sessions that are refused. settle_s: seconds after which the file is read again, for
    Drive, where two machines may write it at the same time; the OS lock is then kept outside the folder. place: what
    is locked, as text; None: the study of that folder. log: receives messages about damaged or future-dated locks.
    LockedError: another live session holds it. While held, `require` raises LockedError after a takeover.
    """

    def __init__(
        self, folder, what, *, heartbeat_s=HEARTBEAT_S, stale_s=STALE_S, settle_s=0.0, name=_NAME, place=None, log=print
    ):
        self.path = Path(folder) / name
        self.heartbeat_s, self.stale_s, self.settle_s = heartbeat_s, stale_s, settle_s
        self._place, self._log = place or f"study {self.path.parent.name!r}", log
        self._owner = {"host": socket.gethostname(), "boot": psutil.boot_time(), "pid": os.getpid()}
        self._owner |= {"what": what, "token": uuid.uuid4().hex, "since": time.time()}
        self._is_over = threading.Event()
        self._taker = None  # the owner that has taken over
        self._local = _local_lock(self.path, is_drive=settle_s > 0)

    def __enter__(self):
        self._acquire_local()
        try:
            self._clear_if_left_behind()
            self._write_first()
            if self.settle_s:
                time.sleep(self.settle_s)
                self._look()
                self.require()
        except BaseException:
            self._release_local()
            raise
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        return self

    def __exit__(self, *exc):
        self._is_over.set()
        self._beating.join()
        with contextlib.suppress(OSError):
            if (_read(self.path) or {}).get("token") == self._owner["token"]:
                os.unlink(self.path)
        self._release_local()

    def require(self):
        """LockedError if another session has taken over."""
        if self._taker is not None:
            raise LockedError(f"{named_owner(self._taker)} has taken over {self._place}: this session stops writing")

    def require_free(self):
        """LockedError if another live session holds the lock; does not take the lock."""
        if self.path.exists():
            self._acquire_local()
            try:
                self._clear_if_left_behind()
            finally:
                self._release_local()

    def _acquire_local(self):
        """Take the OS lock. LockedError: another process or thread of this machine holds it."""
        owner = None
        for attempt in range(_ATTEMPTS):
            with writing(self.path):
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._local.acquire(blocking=False)
                    return
                except FileNotFoundError:  # the previous session removed the folder with its lock,
                    if attempt == _ATTEMPTS - 1:
                        raise  # or it cannot be made
                    continue
                except Timeout:
                    owner = _read(self.path)
            if owner is not None and is_of_this_machine(owner) and attempt >= 3:
                break
            time.sleep(0.1)  # it is being taken or released, or its owner is being killed
        if owner is not None:
            self._refuse(owner)
        raise LockedError(f"{self.path} keeps changing owners: several sessions are trying to use {self._place}")

    def _release_local(self):
        with contextlib.suppress(OSError):
            os.unlink(self._local.lock_file)  # while it is held: filelock does not take a deleted file
        self._local.release()

    def _write_first(self):
        """Write the lock file, unless another machine has just done so: network folders may not support OS locks."""
        beside = self.path.with_name(f".{self.path.name}.{self._owner['token']}")
        write_json(beside, self._owner | {"heartbeat": time.time()})
        try:
            os.link(beside, self.path)
        except OSError as error:  # another session's lock, or a file system without hard links, such as Drive's
            owner = _read(self.path) if isinstance(error, FileExistsError) else None
            if owner is not None:
                self._refuse(owner)
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)

    def _clear_if_left_behind(self):
        """Remove the lock file of a dead session. LockedError: the session is alive, or the file cannot be read."""
        owner = _read(self.path)
        if owner is not None:
            if not is_of_this_machine(owner):
                self._refuse_if_alive(owner)
        elif self.path.is_dir() or (self.path.exists() and not os.access(self.path, os.R_OK)):
            raise LockedError(
                f"{self.path} cannot be read as a lock: check whose it is, and move it away if nobody uses it"
            )
        elif self.path.exists():
            self._log(f"{self.path} is damaged and names no session: treating it as stale")
        with writing(self.path):
            self.path.unlink(missing_ok=True)

    def _refuse_if_alive(self, owner):
        """LockedError if the owner's heartbeat is recent or, if it lies in the future, keeps changing."""
        age = time.time() - owner["heartbeat"]
        if age >= self.stale_s:
            return
        if age <= -self.stale_s:  # either clock may be wrong
            self._log(
                f"the lock on {self._place} is {-age / 60:,.0f} minutes ahead of this machine's clock: waiting up to "
                f"{self.stale_s:.0f} s to see whether {named_owner(owner)} is still running"
            )
            end = time.monotonic() + self.stale_s
            while (now := _read(self.path)) == owner:
                if time.monotonic() >= end:
                    return
                time.sleep(min(1.0, self.stale_s / 10))
            if now is None:
                return
            owner = {**now, "heartbeat": time.time()}
        self._refuse(owner)

    def _refuse(self, owner):
        silent = time.time() - owner["heartbeat"]
        raise LockedError(
            f"{self._place} is in use by {named_owner(owner)}, last heartbeat {max(0, silent):.0f} s ago: wait for "
            f"it, or stop it. If it is gone, run this again in {max(0, self.stale_s - silent):.0f} s"
        )

    def _beat(self):
        while not self._is_over.wait(self.heartbeat_s):
            self._look()
            if self._taker is not None:
                return
            with contextlib.suppress(OSError):  # a full disk must not stop the work
                write_json(self.path, self._owner | {"heartbeat": time.time()})

    def _look(self):
        owner = _read(self.path)
        if owner is not None and owner["token"] != self._owner["token"]:
            self._taker = owner


def _local_lock(path, *, is_drive=False):
    """The OS lock for a lock file: next to it, or on the local disk if the file is on Drive."""
    beside = path.with_name(f".{path.name}.local")
    if is_drive:
        mark = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
        beside = Path(tempfile.gettempdir()) / f"peftlib-{mark}.lock"
    return FileLock(beside, thread_local=False)


def _read(path):
    """The owner that a lock file names, or None if the file is missing, damaged or unreadable."""
    try:
        owner = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if fault(owner, OWNER) or not 0 < owner.get("pid", 1) < 2**31:
        return None
    return owner if all(0 <= owner.get(name, 0) < _LATEST for name in ("heartbeat", "boot", "since")) else None


def is_of_this_machine(owner):
    """Whether the owner is a process of this machine since its last boot."""
    return owner["host"] == socket.gethostname() and abs(owner.get("boot", 0.0) - psutil.boot_time()) <= 5


def named_owner(owner):
    since = time.strftime("%H:%M", time.localtime(owner.get("since", 0.0)))
    return f"{owner['host']}, process {owner.get('pid')} ({owner.get('what')}, since {since})"
