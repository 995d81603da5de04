"""Claims on the runs of a study, so that workers on several machines do each run once.

A claim is a small file on the study's store: its remote, or the study folder if it has none, which may be on NFS. Its
owner writes a heartbeat into it. Machines' clocks differ, so a claim is stale once its heartbeat has not changed for a
while; each machine stores since when it has seen which claim unchanged, for later commands.
"""

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path, PurePosixPath

import psutil

from peftlib.core.errors import LockedError, StudyError
from peftlib.core.files import read_json, sealed, write_json
from peftlib.core.json_reading import fault, parse
from peftlib.storage.hub import as_os_errors
from peftlib.storage.lock import HEARTBEAT_S, OWNER, STALE_S, is_of_this_machine, named_owner
from peftlib.storage.mirror import running
from peftlib.storage.remotes import remote_of
from peftlib.storage.store import Remote

_FOLDER = "claims"
_SETTLE_S = 3.0  # seconds after which a claim is read back from a store where two workers may write it at once


class Claims:
    """Who works on which run of a study folder.

    log: receives messages about an unreachable store. heartbeat_s, stale_s, settle_s: seconds between heartbeats, until
    a claim without a new one is stale, and until a new claim is read back; None: what the store allows. remote: a
    storage.remotes.Remote; None: the study's, or its folder.
    """

    def __init__(self, folder, *, log=print, heartbeat_s=None, stale_s=None, settle_s=None, remote=None):
        self.folder, self.log = Path(folder).absolute(), log
        mirror = running(self.folder)
        self.remote = remote or (mirror.remote if mirror else remote_of(self.folder.name)) or Remote(self.folder)
        self.heartbeat_s = heartbeat_s or max(HEARTBEAT_S, self.remote.pace_s)
        self.stale_s = stale_s or max(STALE_S, 4 * self.remote.pace_s)
        self.settle_s = (_SETTLE_S if self.remote.lock_settle_s != 0 else 0.0) if settle_s is None else settle_s
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())
        self._memory = self.folder / f".claims-{host}.json"

    @contextlib.contextmanager
    def take(self, run):
        """Hold the claim of a run, such as qlora-s0; yields the Claim.

        LockedError: another live worker, which the message names, holds it. OSError: cannot write to the store.
        """
        claim = Claim(self, run)
        claim.begin()
        try:
            yield claim
        finally:
            claim.end()

    def owners(self):
        """{run: its owner as text} of claims that may be alive; {} if the store is unreachable."""
        try:
            with as_os_errors():
                self.remote.fs.invalidate_cache(self.remote.root)
                entries = self.remote.fs.ls(self.remote.at(_FOLDER), detail=False, refresh=True)
            runs = [PurePosixPath(path).stem for path in entries if path.endswith(".json")]
            found = {run: self.read(run) for run in sorted(runs)}
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.log(f"{self.remote}: cannot read who works on {self.folder.name} ({error.strerror or error})")
            return {}
        return {run: self.named(text) for run, text in found.items() if text is not None and self.is_alive(run, text)}

    def path(self, run):
        """The path of a run's claim in the remote's file system."""
        return self.remote.at(f"{_FOLDER}/{run}.json")

    def read(self, run):
        """The text of a run's claim, or None."""
        try:
            with as_os_errors():
                self.remote.fs.invalidate_cache(self.remote.root)
                return self.remote.fs.cat_file(self.path(run)).decode(errors="replace")
        except FileNotFoundError:
            return None

    def is_alive(self, run, text):
        """Whether a claim's owner may still be running: it is a live process here, or it changed the claim recently."""
        owner = _owner(text)
        if owner is not None and is_of_this_machine(owner) and owner.get("space") == _space():
            return psutil.pid_exists(owner.get("pid", 0))
        return self.seen_for(run, text) < self.stale_s

    def seen_for(self, run, text):
        """Seconds for which this machine has seen a claim unchanged."""
        try:
            seen = dict(read_json(self._memory)["seen"])
        except (OSError, StudyError, TypeError, ValueError):
            seen = {}
        now = time.time()  # only times of the same machine are compared
        known = seen.get(run)
        if isinstance(known, list) and known[0] == text and now >= known[1]:
            return now - known[1]
        with contextlib.suppress(OSError):
            write_json(self._memory, {"seen": {**seen, run: [text, now]}})
        return 0.0

    def named(self, text):
        """The owner of a claim as text."""
        owner = _owner(text)
        return "a worker with a damaged claim" if owner is None else named_owner(owner)


class Claim:
    """One run's claim, held between `begin` and `end`."""

    def __init__(self, claims, run):
        self._claims, self.run = claims, run
        self._owner = {"host": socket.gethostname(), "boot": psutil.boot_time(), "pid": os.getpid(), "space": _space()}
        self._owner |= {"what": f"working on {run}", "token": uuid.uuid4().hex, "since": time.time()}
        self._is_over, self._taker = threading.Event(), None  # the text of the claim that replaced ours
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def begin(self):
        """Take the claim and keep it alive. LockedError: another live worker holds it."""
        there = self._claims.read(self.run)
        if there is not None and self._claims.is_alive(self.run, there):
            self._refuse(there)
        try:
            self._write(is_new=there is None)
        except FileExistsError:
            self._refuse(self._claims.read(self.run) or "")
        settle_s = max(self._claims.settle_s, 0.3) if there is not None else self._claims.settle_s
        if settle_s:  # others may have found the same stale claim
            time.sleep(settle_s)
            self._look()
            if self._taker is not None:
                self._refuse(self._taker)
        self._beating.start()

    def end(self):
        """Release the claim."""
        self._is_over.set()
        self._beating.join()
        with contextlib.suppress(OSError), as_os_errors():
            self._look()
            if self._taker is None:
                self._claims.remote.fs.rm(self._claims.path(self.run))

    def require(self):
        """LockedError if another worker has taken over the run."""
        if self._taker is not None:
            raise LockedError(f"{self._claims.named(self._taker)} has taken over {self.run}: this worker stops writing")

    def _refuse(self, text):
        claims = self._claims
        wait_s = claims.stale_s - claims.seen_for(self.run, text)
        raise LockedError(
            f"{self.run} of study {claims.folder.name!r} is in use by {claims.named(text)}: wait for it, or stop it. "
            f"If it is gone, run this again in {wait_s:.0f} s"
        )

    def _beat(self):
        while not self._is_over.wait(self._claims.heartbeat_s):
            with contextlib.suppress(OSError):  # an unreachable store must not stop the work
                self._look()
                if self._taker is not None:
                    return
                self._write(is_new=False)

    def _look(self):
        text = self._claims.read(self.run)
        owner = _owner(text or "")
        if owner is not None and owner["token"] != self._owner["token"]:
            self._taker = text

    def _write(self, *, is_new):
        """FileExistsError: is_new, and another worker has just written it (if the store can tell)."""
        content, remote = sealed(self._owner | {"heartbeat": time.time()}), self._claims.remote
        with as_os_errors():
            if remote.folder is None:
                how = {"mode": "create"} if is_new and remote.creates_exclusively else {}
                remote.fs.pipe_file(self._claims.path(self.run), content, **how)
                return
            path = Path(self._claims.path(self.run))
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_new:
                with open(path, "xb") as out:
                    out.write(content)
            else:
                write_json(path, self._owner | {"heartbeat": time.time()})


def _owner(text):
    """The owner that a claim names; None if it is damaged."""
    with contextlib.suppress(ValueError):
        owner = parse(text)
        if not fault(owner, OWNER) and 0 <= owner.get("since", 0) < 2**33 and 0 < owner.get("pid", 1) < 2**31:
            return owner
    return None


def _space():
    """An id of this container: containers on one machine have separate process numbers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
