"""Copies of a study on a remote: uploaded in the background, restored in a new session.

Uploads never block or fail training; the last cell of a notebook reports what has not been uploaded.
"""

import atexit
import contextlib
import tempfile
import threading
import time
from pathlib import Path

from peftlib import __version__
from peftlib.core.errors import CheckpointError, ConfigError
from peftlib.core.files import gib
from peftlib.core.study import Study
from peftlib.storage import archive
from peftlib.storage.mirror_state import MirrorState, alone, made
from peftlib.storage.remotes import remote_of

EVERY_S = 10.0  # seconds between two looks for something new
SMALL_FILES_S = 60.0  # seconds between two copies of the small files, which change all the time
LOOK_S = 300.0  # seconds between two looks at a remote to which nothing was copied
FLUSH_S = 900.0  # seconds that the end of a notebook waits for the last copies
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0  # after an error, doubled each time
_RUNNING: dict[Path, "Mirror"] = {}  # study folder -> its Mirror: a process has one for each


def restore(folder, *, log=print):
    """Restore what another session left of a study folder on its remote; returns a Mirror, which copies when told.

    None where neither PEFTLIB_MIRROR nor a mounted Drive name a remote. ConfigError: it is the study's own folder, or a
    public repository.
    """
    remote = remote_of(Path(folder).name)
    if remote is None:
        return None
    if Path(folder).resolve() == Path(getattr(remote, "folder", "hub")).resolve():
        raise ConfigError(
            f"PEFTLIB_MIRROR leads to {folder}, where the study itself is kept: name another place, or off"
        )
    with contextlib.suppress(OSError):  # one that cannot be asked now is asked again before anything goes there
        refusal = remote.refusal()
        if refusal:
            raise ConfigError(refusal)
    mirror = Mirror(Path(folder).absolute(), remote, log=log)
    mirror.restore()
    return mirror


def open_mirror(folder, *, log=print):
    """The Mirror of a study folder that uploads in the background, started by the first call; None as in restore."""
    folder = Path(folder).absolute()
    if folder not in _RUNNING:
        mirror = restore(folder, log=log)
        if mirror is None:
            return None
        if mirror.remote.notice:
            log(mirror.remote.notice)
        mirror.start()
        _RUNNING[folder] = mirror
    return _RUNNING[folder]


def open_study(name):
    """The Study of a folder that exists here or on its remote; uploaded from now on. Errors: see Study.existing."""
    return Study.existing(name, on_open=open_mirror)


def running(folder):
    """The Mirror that open_mirror has started for a folder, or None."""
    return _RUNNING.get(Path(folder).absolute())


def flush_all():
    """Wait for the last uploads of every study that this process has opened; yields a line on each."""
    for mirror in _RUNNING.values():
        mirror.flush()
        yield mirror.state()


class Mirror:
    """Copies of a study folder on a remote, in archives that alternate between slots, so that one is always whole.

    keep: checkpoints of a run that stay whole on the remote while another is written, so keep + 1 slots.
    every_s, small_files_s: see the constants of this module.
    """

    def __init__(self, folder, remote, *, keep=1, log=print, every_s=EVERY_S, small_files_s=SMALL_FILES_S):
        self.folder, self.remote, self.log, self.keep = Path(folder), remote, log, keep
        self.every_s, self.small_files_s = every_s, small_files_s
        self.busy_with = None  # the unit being copied
        self._state = MirrorState(self.folder, remote)
        self._doubt = remote.doubt  # what is not known about what is written there
        self._failures = {}  # unit -> (what went wrong, time of the next try, pause)
        self._small_files_at = self._look_at = 0.0  # last copied; when to look next for checkpoints of finished runs
        self._is_taken_over = False
        self._one_at_a_time = threading.Lock()
        self._is_over = threading.Event()

    def start(self):
        """Start the thread that copies."""
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        atexit.register(self._is_over.set)

    def stop(self):
        """Copy no more; returns once nothing is being copied."""
        self._is_over.set()
        self._thread.join()

    def restore(self):
        """Restore what another session has uploaded since this folder was last up to date.

        What cannot be read is logged and left; an older whole copy is taken where there is one.
        """
        try:
            listing = self.remote.listing()
        except OSError as error:
            self.log(f"{self.remote} cannot be read ({_reason(error)}): going on with what is here")
            return
        # The small files come last: a record must not say more than what is here.
        units = sorted({facts["unit"] for facts in listing.values()}, key=lambda unit: (unit == "study", unit))
        for unit in (unit for unit in units if unit not in archive.NOT_RESTORED):
            self._restore_unit(unit, listing)
        newest = {unit: archive.newest_first(unit, listing)[0][1]["serial"] for unit in units}
        self._state.forget([unit for unit in self._state.copied if newest.get(unit) != self._state.serials[unit]])

    def _restore_unit(self, unit, listing):
        for name, facts in archive.newest_first(unit, listing):
            if facts["origin"] == self._state.origin or facts["serial"] <= self._state.serials.get(unit, 0):
                return  # what is here is at least as new
            if unit.startswith("checkpoint-") and archive.is_finished(self.folder, unit.removeprefix("checkpoint-")):
                return
            try:
                with tempfile.TemporaryDirectory(dir=made(self.folder), prefix=".fetching-") as beside:
                    fetched = Path(beside) / "archive.tar"
                    self.remote.fetch(name, facts, fetched)
                    names = archive.unpack(fetched, self.folder)
            except OSError as error:
                self.log(f"{self.remote}: {name} not used ({_reason(error)})")
                continue
            self.log(f"restored {unit} from {self.remote} ({len(names)} files, {facts['bytes'] / 2**20:.0f} MiB)")
            files = archive.units_of(self.folder).get(unit, [])
            newest = archive.newest_first(unit, listing)[0][1]["serial"]
            self._state.keep(unit, newest, archive.fingerprint(self.folder, files))
            return

    def require_space(self, run, checkpoint_bytes):
        """Check before step 1 that keep + 1 checkpoints of a run fit on the remote; keep one where more do not.

        CheckpointError, with the numbers: not even two copies fit. An unreachable remote is no error here.
        """
        try:
            listing = self.remote.listing()
            free = self.remote.free_bytes()
        except OSError as error:
            self.log(f"{self.remote} cannot be read ({_reason(error)}): its free space is not known")
            return
        free += sum(facts["bytes"] for _, facts in archive.newest_first(f"checkpoint-{run}", listing))
        if 2 * checkpoint_bytes > free:
            raise CheckpointError(
                f"{self.remote} may take {gib(free):.2f} GiB more, two checkpoints of {run} need "
                f"{gib(2 * checkpoint_bytes):.2f} GiB: free some space (a Drive's trash counts), name another place in "
                "PEFTLIB_MIRROR, or set PEFTLIB_MIRROR=off to train without a copy"
            )
        if (self.keep + 1) * checkpoint_bytes > free:
            self.log(f"{self.remote} has {gib(free):.1f} GiB: it keeps one checkpoint, not {self.keep}")
            self.keep = 1

    def flush(self, timeout_s=FLUSH_S):
        """Wait at most `timeout_s` until all is uploaded; returns whether it is."""
        end = time.monotonic() + timeout_s
        flushing = threading.Thread(target=self._copy_all, args=(end,), daemon=True)
        flushing.start()
        flushing.join(timeout_s)
        return not flushing.is_alive() and not self._waiting()

    def state(self):
        """What is on the remote, what is not, and why, in words."""
        if self._is_taken_over:
            return f"another session writes to {self.remote} now: what this one made since is only in {self.folder}"
        waiting = self._waiting()
        if not waiting:
            where = f"written to {self.remote}; {self._doubt}" if self._doubt else f"on {self.remote}"
            return f"all of the study is {where}"
        told = [f"{unit} ({self._failures[unit][0]})" if unit in self._failures else unit for unit in waiting]
        return f"NOT on {self.remote} yet: {', '.join(told)}"

    def _copy_all(self, end):
        """Copy until nothing waits, `end` is reached, or what waits has failed several times over."""
        for pause in (1.0, 2.0, 4.0, 8.0, 0.0):
            self._failures = {unit: (said, 0.0, wait) for unit, (said, _, wait) in self._failures.items()}
            while self._is_behind() and time.monotonic() < end:
                self.copy_once(is_last=True)
                if self._is_behind():
                    time.sleep(0.2)  # another process of this machine copies, or a file has changed again
            if not self._waiting() or self._is_taken_over:
                break
            time.sleep(min(pause, self.every_s))
        if not self._waiting():
            self._doubt = self.remote.flush()

    def _is_behind(self):
        """Whether something waits that has not just failed."""
        waiting = [] if self._is_taken_over else self._waiting()
        return any(unit not in self._failures or not self._failures[unit][1] for unit in waiting)

    def _waiting(self):
        """Units whose present files the remote does not have."""
        units = archive.units_of(self.folder)
        return [unit for unit in units if archive.fingerprint(self.folder, units[unit]) != self._state.copied.get(unit)]

    def _loop(self):
        while not self._is_over.wait(self.every_s) and not self._is_taken_over:
            self.copy_once()

    def copy_once(self, *, is_last=False):
        """Copy each unit that has changed; is_last: the small files even if they were copied a moment ago."""
        with self._one_at_a_time, alone(self.folder) as is_alone:
            if not is_alone:
                return
            self._state.read()
            for unit in self._waiting():
                if self._is_over.is_set() and not is_last:
                    return
                if unit == "study" and not is_last and time.monotonic() - self._small_files_at < self.small_files_s:
                    continue
                self._try(unit)
            self._drop_finished()

    def _try(self, unit):
        _, next_at, pause = self._failures.get(unit, ("", 0.0, _FIRST_PAUSE_S))
        if self._is_taken_over or time.monotonic() < next_at:
            return
        try:
            self.busy_with = unit
            self._put(unit)
            if self._failures.pop(unit, None):
                self.log(f"{self.remote}: {unit} is copied now")
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError) and Path(error.filename or "").is_relative_to(self.folder)
            if not is_gone:  # else it was replaced while it was read, and the next look finds what took its place
                self._fail(unit, error, pause)
        finally:
            self.busy_with = None

    def _fail(self, unit, error, pause):
        said = _reason(error)
        if self._failures.get(unit, ("",))[0] != said:
            self.log(f"{self.remote}: {unit} could not be copied ({said}). Work goes on; {self.remote.remedy(error)}")
        self._failures[unit] = (said, time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE_S))
        with contextlib.suppress(OSError):
            self.remote.reconnect()

    def _put(self, unit):
        files = archive.units_of(self.folder).get(unit, [])
        files_fingerprint = archive.fingerprint(self.folder, files)
        known = archive.newest_first(unit, self.remote.listing())
        newest = known[0][1] if known else {"serial": 0, "origin": self._state.origin}
        if newest["origin"] != self._state.origin and newest["serial"] > self._state.serials.get(unit, 0):
            self._is_taken_over = True
            self.log(self.state())
            return
        serial = newest["serial"] + 1
        facts = {"unit": unit, "serial": serial, "origin": self._state.origin, "written_by": f"peftlib {__version__}"}
        with archive.pinned(self.folder, files) as pairs:
            needed = sum(path.stat().st_size + 1024 for path, _ in pairs) + 10240
            self.remote.put(self._slot(unit, known), lambda out: archive.pack(pairs, out), needed, facts)
        self._state.keep(unit, serial, files_fingerprint)
        self._look_at = 0.0
        self._doubt = self.remote.doubt
        if unit == "study":
            self._small_files_at = time.monotonic()

    def _slot(self, unit, known):
        """The archive to write: a free one of the unit's slots, else the oldest."""
        # Data can be made again, and the checkpoint is kept until the weights are copied.
        slots = self.keep + 1 if unit.startswith("checkpoint-") else 2 if unit == "study" else 1
        names = [f"{unit}.{slot}" for slot in range(slots)]
        taken = [name for name, _ in known if name in names]
        free = [name for name in names if name not in taken]
        return free[0] if free else taken[-1]

    def _drop_finished(self):
        """Delete the checkpoints of finished runs, once their records and weights are on the remote."""
        if self._is_taken_over or time.monotonic() < self._look_at or self._waiting():
            return
        self._look_at = time.monotonic() + LOOK_S
        with contextlib.suppress(OSError):
            listing = self.remote.listing()
            for name, facts in listing.items():
                run = facts["unit"].removeprefix("checkpoint-")
                is_kept = any(other["unit"] == f"weights-{run}" for other in listing.values())
                if facts["unit"].startswith("checkpoint-") and is_kept and archive.is_finished(self.folder, run):
                    self.remote.drop(name)


def _reason(error):
    return error.strerror or str(error)
