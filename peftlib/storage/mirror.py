"""Copies of a study on a remote: uploaded in the background, restored in a new session.

Uploads never block or fail training; the last cell of a notebook reports what has not been uploaded.
"""

import atexit
import contextlib
import tempfile
import threading
import time
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from peftlib import __version__
from peftlib.core.env import output_root
from peftlib.core.errors import CheckpointError, ConfigError, PeftlibError, StudyError, writing
from peftlib.core.files import gib, read_json, size_text, write_json
from peftlib.core.json_reading import Map, require_shape
from peftlib.core.limits import require_folder_name
from peftlib.core.study import Study
from peftlib.storage import archive
from peftlib.storage.remotes import remote_of

_EVERY_S = 10.0  # seconds between checks for changed files
_SMALL_FILES_S = 60.0  # seconds between copies of the small files, which change often
_LOOK_S = 300.0  # seconds between checks of a remote to which nothing was copied
_PAUSE_S = 60.0  # seconds before a failed copy is retried
_RUNNING: dict[Path, "Mirror"] = {}  # {study folder: its Mirror}: one per folder and process
_STATE = ".mirror.json"
_STATE_SHAPE = {"remote": str, "origin": str, "serials": Map(int), "copied": Map([list])}


def restore(folder, *, runs=None, log=print):
    """Restore what other sessions copied of a study folder to its remote; returns a Mirror, which copies on request.

    runs: names such as qlora-s0 whose checkpoints and weights to restore; None: all. Data, records and small files are
    always restored. Returns None if neither PEFTLIB_MIRROR nor a mounted Drive gives a remote. ConfigError: the remote
    is the study's own folder, or public.
    """
    if (remote := remote_of(Path(folder).name)) is None:
        return None
    if remote.folder is not None and Path(folder).resolve() == remote.folder.resolve():
        said = f"PEFTLIB_MIRROR points to {folder}, the study's own folder: set it to another place, or to off"
        raise ConfigError(said)
    with contextlib.suppress(OSError):  # an unreachable remote is checked again before any upload
        if refusal := remote.refusal():
            raise ConfigError(refusal)
    mirror = Mirror(Path(folder).absolute(), remote, log=log)
    mirror.restore(runs)
    return mirror


def open_mirror(folder, *, runs=None, log=print):
    """The Mirror of a study folder that uploads in the background; the first call starts it. Otherwise as restore."""
    folder = Path(folder).absolute()
    if folder not in _RUNNING:
        mirror = restore(folder, runs=runs, log=log)
        if mirror is None:
            return None
        mirror.start()
        _RUNNING[folder] = mirror
    return _RUNNING[folder]


def open_study(name):
    """The Study of a folder that exists here or on its remote, with uploads started. Errors: see Study.existing."""
    require_folder_name("study", name)
    open_mirror(output_root() / name)
    return Study.existing(name)


def running(folder):
    """The Mirror that open_mirror has started for a folder, or None."""
    return _RUNNING.get(Path(folder).absolute())


def flush_all():
    """Wait for the last uploads of every study that this process has opened; yields one line per study."""
    for mirror in _RUNNING.values():
        mirror.flush()
        yield mirror.state()


class Mirror:
    """Copies of a study folder on a remote, in archives that alternate between slots, so that one is always complete.

    Machines may share a remote: if another machine has uploaded a newer version of a unit, this one stops copying it.

    The state of the copies is saved in the folder for later sessions and other processes:
    `origin`: this folder's id in its uploads. `copied`: {unit: fingerprint of the files that the remote has}.
    `serials`: {unit: serial of the last upload that this folder's files include}.
    """

    def __init__(self, folder, remote, *, log=print, every_s=_EVERY_S, small_files_s=_SMALL_FILES_S):
        self.folder, self.remote, self.log = Path(folder), remote, log
        self.every_s, self.small_files_s = every_s, max(small_files_s, remote.pace_s)
        self.busy_with = None  # the unit being copied
        self.origin, self.copied, self.serials = uuid.uuid4().hex, {}, {}
        # what is uncertain about the uploads; when to look next for checkpoints of finished runs
        self._doubt, self._look_at = remote.doubt, 0.0
        self._failures = {}  # {unit: (what went wrong, time of the next retry)}
        self._small_files_at, self._taken_over = {}, set()  # {unit: time of its last copy}, units
        self._one_at_a_time, self._is_over = threading.Lock(), threading.Event()
        self._read_state()

    def start(self):
        """Log the remote's notice and start the copying thread."""
        if self.remote.notice:
            self.log(self.remote.notice)

        def loop():
            told = set()
            while not self._is_over.wait(self.every_s):
                try:
                    self.copy_once()
                except (OSError, PeftlibError) as error:  # from the local disk, which may recover
                    if str(error) not in told:
                        self.log(f"cannot copy to {self.remote} ({error}); will retry")
                    told.add(str(error))

        threading.Thread(target=loop, daemon=True).start()
        atexit.register(self._is_over.set)

    def restore(self, runs=None):
        """Restore what others have uploaded since; `runs` as in restore. Unreadable archives are logged and skipped."""
        if (listing := self._listing("continuing with the local files")) is None:
            return
        units = archive.in_order({facts["unit"] for facts in listing.values()})
        with self._one_at_a_time:
            for unit in (unit for unit in units if archive.is_wanted(unit, runs)):
                self._restore_unit(unit, archive.newest_first(unit, listing))
            newest = {unit: archive.newest_first(unit, listing)[0][1]["serial"] for unit in units}
            lost = [unit for unit in self.copied if newest.get(unit, -1) < self.serials[unit]]
            self.copied = {unit: files for unit, files in self.copied.items() if unit not in lost}
            if lost:
                self._write_state()

    def _restore_unit(self, unit, known):
        for name, facts in known:
            if facts["origin"] == self.origin or facts["serial"] <= self.serials.get(unit, 0):
                return  # the local files are at least as new
            if unit.startswith("checkpoint-") and archive.is_finished(self.folder, unit.removeprefix("checkpoint-")):
                return
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._unpack(name, facts)
            except OSError as error:
                self.log(f"{self.remote}: skipped {name} ({error.strerror or error})")
                continue
            self.log(f"restored {unit} from {self.remote} ({size_text(facts['bytes'])})")
            files = archive.units_of(self.folder).get(unit, [])
            self._has_copied(unit, known[0][1]["serial"], archive.fingerprint(self.folder, files))
            self._taken_over.discard(unit)
            return

    def _unpack(self, name, facts, **how):
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetching-") as beside:
            fetched = Path(beside) / "archive.tar"
            self.remote.fetch(name, facts, fetched)
            return archive.unpack(fetched, self.folder, **how)

    def require_space(self, run, checkpoint_bytes):
        """CheckpointError, with numbers, if the remote answers and has no space for two checkpoints of a run."""
        if (listing := self._listing("its free space is unknown")) is None:
            return
        free = self.remote.free_bytes()
        free += sum(facts["bytes"] for _, facts in archive.newest_first(f"checkpoint-{run}", listing))
        if 2 * checkpoint_bytes > free:
            raise CheckpointError(
                f"{self.remote} has {gib(free):.2f} GiB free, two checkpoints of {run} need "
                f"{gib(2 * checkpoint_bytes):.2f} GiB: free some space (a Drive's trash counts), set PEFTLIB_MIRROR to "
                "another place, or set PEFTLIB_MIRROR=off to train without a copy"
            )

    def _listing(self, consequence):
        try:
            return self.remote.listing()
        except OSError as error:
            self.log(f"{self.remote} cannot be read ({error.strerror or error}): {consequence}")
            return None

    def flush(self, timeout_s=900.0):
        """Wait at most `timeout_s` until everything is uploaded; returns whether it is."""
        flushing = threading.Thread(target=self._copy_all, daemon=True)
        flushing.start()
        flushing.join(timeout_s)
        return not flushing.is_alive() and not self._waiting()

    def _copy_all(self):
        """Copy until nothing is pending, or what is pending has failed several times."""
        for pause in (0.0, 1.0, 2.0, 4.0, 8.0):
            time.sleep(min(pause, self.every_s))
            self._failures = {unit: (said, 0.0) for unit, (said, _) in self._failures.items()}
            self.copy_once(is_last=True)
            if self._taken_over.issuperset(self._waiting()):
                self._doubt = self.remote.flush()
                return

    def state(self):
        """Text that says what is on the remote, what is not, and why."""
        waiting = self._waiting()
        if lost := ", ".join(sorted(self._taken_over.intersection(waiting))):
            what = f"this session's newer files of {lost} are only in {self.folder}"
            return f"another session now writes to {self.remote}: {what}"
        if not waiting:
            where = f"written to {self.remote}; {self._doubt}" if self._doubt else f"on {self.remote}"
            return f"the whole study is {where}"
        told = [" ".join([unit, *(f"({said})" for said in self._failures.get(unit, [])[:1])]) for unit in waiting]
        return f"NOT on {self.remote} yet: {', '.join(told)}"

    def _waiting(self):
        """Units whose current files are not on the remote."""
        units = archive.units_of(self.folder)
        return [unit for unit in units if archive.fingerprint(self.folder, units[unit]) != self.copied.get(unit)]

    def copy_once(self, *, is_last=False):
        """Copy each changed unit; is_last: wait for another copying process, and include small files."""
        lock = FileLock(self.folder / ".mirror.lock")
        with self._one_at_a_time, contextlib.suppress(Timeout), lock.acquire(blocking=is_last):
            self._read_state()
            for unit in self._waiting():
                if self._is_over.is_set() and not is_last:
                    return
                since = time.monotonic() - self._small_files_at.get(unit, -self.small_files_s)
                if is_last or not archive.is_small(unit) or since >= self.small_files_s:
                    self._try(unit)
            self._drop_finished()

    def _try(self, unit):
        if unit in self._taken_over or time.monotonic() < self._failures.get(unit, ("", 0.0))[1]:
            return
        self.busy_with = unit
        try:
            self._put(unit)
            if self._failures.pop(unit, None):
                self.log(f"{self.remote}: {unit} is now copied")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and Path(error.filename or "").is_relative_to(self.folder):
                return  # it was replaced while it was read; the next check finds its replacement
            said = error.strerror or str(error)
            if self._failures.get(unit, ("",))[0] != said:
                self.log(f"{self.remote}: cannot copy {unit} ({said}). Work continues; {self.remote.remedy(error)}")
            self._failures[unit] = (said, time.monotonic() + _PAUSE_S)
            with contextlib.suppress(OSError):
                self.remote.reconnect()
        finally:
            self.busy_with = None

    def _put(self, unit):
        if not (files := archive.units_of(self.folder).get(unit)):
            return None  # it is being replaced; the next check finds its replacement
        fingerprint = archive.fingerprint(self.folder, files)
        known = archive.newest_first(unit, self.remote.listing([unit]))
        newest = known[0][1] if known else {"serial": 0, "origin": self.origin}
        if newest["origin"] != self.origin and newest["serial"] > self.serials.get(unit, 0):
            if newest.get("content") == archive.content(self.folder, files):  # two workers made the same files
                return self._has_copied(unit, newest["serial"], fingerprint)
            if unit != "study":
                return self._taken_over.add(unit) or self.log(self.state())
            with contextlib.suppress(OSError):  # every worker writes there: add what others have added
                self._unpack(*known[0], only_missing=True)
            files = archive.units_of(self.folder)[unit]
            fingerprint = archive.fingerprint(self.folder, files)
        serial = newest["serial"] + 1
        facts = {"unit": unit, "serial": serial, "origin": self.origin, "written_by": f"peftlib {__version__}"}
        facts |= {} if archive.run_of(unit) else {"content": archive.content(self.folder, files)}
        with archive.pinned(self.folder, files) as pairs:
            needed = sum(path.stat().st_size + 1024 for path, _ in pairs) + 10240
            self.remote.put(archive.slot_of(unit, known), lambda out: archive.pack(pairs, out), needed, facts)
        self._has_copied(unit, serial, fingerprint)
        self._look_at, self._doubt = 0.0, self.remote.doubt
        self._small_files_at[unit] = time.monotonic()

    def _drop_finished(self):
        """Delete the checkpoints of finished runs, once their records and weights are on the remote."""
        if time.monotonic() < self._look_at or not self._taken_over.issuperset(self._waiting()):
            return
        self._look_at = time.monotonic() + _LOOK_S
        with contextlib.suppress(OSError):
            for name in archive.superseded(self.remote.listing(), self.folder):
                self.remote.drop(name)

    def _read_state(self):
        """Read what other processes have copied; if it is damaged or for another remote, all is uploaded again."""
        with contextlib.suppress(OSError, StudyError):
            path = self.folder / _STATE
            state = require_shape(read_json(path), _STATE_SHAPE, path)
            if state["remote"] == str(self.remote):
                self.origin, self.serials, self.copied = state["origin"], state["serials"], state["copied"]

    def _has_copied(self, unit, serial, fingerprint):
        self.serials[unit], self.copied[unit] = serial, fingerprint
        self._write_state()

    def _write_state(self):
        state = {"origin": self.origin, "serials": self.serials, "copied": self.copied}
        write_json(self.folder / _STATE, {"remote": str(self.remote), **state})
