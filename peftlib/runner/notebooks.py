"""Run notebooks headless, in their order, skipping those that are finished."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from peftlib.core import paths
from peftlib.core.config import resolve
from peftlib.core.env import output_root
from peftlib.core.errors import ConfigError
from peftlib.core.files import readable_path
from peftlib.core.study import Study
from peftlib.notebook.session import FINISHED, NOTEBOOKS, STOPPED, literals, state_hash
from peftlib.runner import notebook_io
from peftlib.runner.execute import Execution, environment
from peftlib.runner.notebook_io import FAILED
from peftlib.storage.lock import StudyLock
from peftlib.storage.mirror import restore

HEARTBEAT_S = 20.0  # seconds without a line after which the runner prints one itself
SAVE_S = 120.0  # seconds that an interrupted kernel gets for saving
_SIGNALS = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])


@dataclass(frozen=True)
class Stage:
    """One notebook of a run: its file, the study that its parameters name, and the parameters to inject."""

    name: str
    source: Path
    study: Study
    parameters: dict

    @property
    def copy(self):
        """Path of the executed notebook once it is finished."""
        return self._beside("")

    @property
    def running(self):
        return self._beside(".running")

    @property
    def state(self):
        return state_hash(self.name, self.study.cfg)

    def keep(self, copy, status):
        """Save an executed copy under its status; only a finished one replaces a finished one. Returns the path."""
        target = self.copy if status == FINISHED else self._beside(f".{status}")
        copy["metadata"].setdefault("papermill", {})["output_path"] = target.name
        notebook_io.save(target, copy)
        for mark in (".running", f".{FAILED}", f".{STOPPED}"):
            if self._beside(mark) != target:
                self._beside(mark).unlink(missing_ok=True)
        return target

    def _beside(self, mark):
        seed = self.study.cfg.seed
        return self.study.notebooks_dir / f"{self.name}{f'-s{seed}' if seed else ''}{mark}.ipynb"


def plan(wanted, overrides, notebooks_dir=None):
    """[Stage, ...] in the notebooks' order.

    wanted: numbers or names, none for all. overrides: {field: value}, 'profile' included.
    ConfigError: unknown notebook, field or value. StudyError: a study folder made with another config.
    """
    folder = Path(notebooks_dir) if notebooks_dir else paths.shipped("notebooks")
    found = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise ConfigError(f"no notebooks in {folder}: give their folder by --notebooks")
    return [_stage(name, found[name], overrides) for name in _selected(wanted, found)]


def run(stages, heartbeat_s=HEARTBEAT_S, save_s=SAVE_S):
    """Execute what is not finished, in order, until one does not finish; the exit code.

    LockedError: another runner is at work in the study.
    """
    minutes = []
    code = 0
    with contextlib.ExitStack() as stack:
        for folder in {stage.study.folder for stage in stages}:
            # Not the lock of the work itself, which the kernel takes: two runners would share executed copies.
            stack.enter_context(StudyLock(folder, "python -m peftlib run", name="runner-lock.json"))
        events = stack.enter_context(_signals_as_events())
        for stage in stages:
            reason = unfinished_reason(stage)
            if reason is None:
                print(f"{stage.name}: finished before, skipped ({readable_path(stage.copy)})", flush=True)
                minutes.append((stage.name, None))
                continue
            cfg = stage.study.cfg
            print(f"{stage.name}: starts, {reason} (study {cfg.study}, seed {cfg.seed})", flush=True)
            started = time.monotonic()
            outcome = Execution(stage, events, heartbeat_s, save_s).outcome()
            minutes.append((stage.name, (time.monotonic() - started) / 60))
            _copy(stage)
            if outcome.code:
                print(outcome.message, flush=True)
                code = outcome.code
                break
    _print_minutes(minutes)
    return code


def unfinished_reason(stage):
    """Why a notebook has to be run, in words, or None if its executed copy is up to date."""
    if not stage.copy.exists():
        return "not finished yet"
    copy = notebook_io.load(stage.copy)
    status, state, wrote = notebook_io.ending(copy) or (None, None, ())
    if (status, state) != (FINISHED, stage.state):
        return "its settings have changed"
    if notebook_io.code_of(copy) != notebook_io.code_of(notebook_io.load(stage.source)):
        return "its cells have changed"
    gone = [path for path in wrote if not (stage.study.folder / path).exists()]
    if gone:
        return f"{gone[0]} is gone"
    for earlier in _read_by(stage):
        if earlier.exists() and notebook_io.ended_at(notebook_io.load(earlier)) > notebook_io.ended_at(copy):
            return f"{earlier.stem} was run after it"
    return None


def _read_by(stage):
    """Executed copies of the notebooks whose outputs this one reads."""
    others = NOTEBOOKS.get(stage.name)
    if others is None:  # a notebook of someone's own reads, for all we know, what every earlier one wrote
        others = [path.stem for path in stage.source.parent.glob("[0-9][0-9]_*.ipynb") if path.stem < stage.name]
    return [Stage(name, stage.source, stage.study, {}).copy for name in others]


def _selected(wanted, found):
    """The names asked for, in order; all of them if none is."""
    by_any_name = {}
    for name in found:
        number, _, rest = name.partition("_")
        by_any_name |= dict.fromkeys((name, number, str(int(number)), rest, f"{name}.ipynb"), name)
    for asked in wanted:
        if asked not in by_any_name:
            raise ConfigError(f"notebook {asked!r} is unknown: use {', '.join(found)}, or their numbers")
    names = {by_any_name[asked] for asked in wanted}
    return [name for name in found if name in names or not names]


def _stage(name, source, overrides):
    """The notebook with its own parameters under the overrides, resolved as its kernel will resolve them."""
    given = {}
    for cell in notebook_io.load(source)["cells"]:
        if "parameters" in notebook_io.tags_of(cell):
            given |= literals(notebook_io.source_of(cell))
    given |= overrides
    if given.get("profile") in (None, "auto"):
        given["profile"] = _profile_of_this_machine()
    restore(output_root() / resolve(**given).study)
    study = Study.resolve(**given)
    return Stage(name, source, study, {**overrides, "profile": study.cfg.profile, "study": study.cfg.study})


def _copy(stage):
    """Upload the executed copy to the study's remote; the kernel has uploaded the rest."""
    mirror = restore(stage.study.folder)
    if mirror is not None:
        mirror.flush()
        print(mirror.state(), flush=True)


def _profile_of_this_machine():
    # In a process of its own: a CUDA context in the runner would take memory from the notebooks for the whole run.
    code = "from peftlib.core.env import profile_for_hardware; print(profile_for_hardware())"
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment()}, check=False
    )
    if asked.returncode:
        last_line = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"profile='auto' could not be resolved here, give one by --profile ({last_line})")
    return asked.stdout.split()[-1]


@contextlib.contextmanager
def _signals_as_events():
    """A queue that also receives the signals that come in the block."""
    events = queue.SimpleQueue()  # the one queue whose put may be called in a signal handler
    before = {number: signal.signal(number, lambda got, _: events.put(signal.Signals(got))) for number in _SIGNALS}
    try:
        yield events
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_minutes(minutes):
    print("minutes a stage:")
    for name, value in minutes:
        print(f"  {name:<12} {'skipped' if value is None else f'{value:.1f}':>7}")
    print(f"  {'together':<12} {sum(value or 0 for _, value in minutes):>7.1f}", flush=True)
