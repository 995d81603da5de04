"""Run notebooks headless, in order, and skip finished ones."""

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
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

HEARTBEAT_S = 20.0  # seconds of silence after which the runner prints a line
_SIGNALS = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])


@dataclasses.dataclass(frozen=True)
class Stage:
    """One notebook of a run: its file, its study, and the parameters to inject."""

    name: str
    source: Path
    study: Study
    parameters: dict

    copy = property(lambda self: self.path(""), doc="Path of the executed notebook once it is finished.")
    running = property(lambda self: self.path(".running"), doc="Path of the executed notebook while it is made.")
    state = property(lambda self: state_hash(self.name, self.study.cfg), doc="Hash of the settings of this run.")

    def path(self, mark):
        """Path of an executed copy; mark: '' or the suffix of an unfinished one, such as '.failed'."""
        seed = self.study.cfg.seed
        return self.study.notebooks_dir / f"{self.name}{f'-s{seed}' if seed else ''}{mark}.ipynb"

    def keep(self, copy, status):
        """Save an executed copy by its status; only a finished copy replaces a finished one. Returns the path."""
        mark = "" if status == FINISHED else f".{status}"
        target = self.path(mark)
        copy["metadata"].setdefault("papermill", {})["output_path"] = target.name
        notebook_io.save(target, copy)
        for other in {".running", f".{FAILED}", f".{STOPPED}"} - {mark}:
            self.path(other).unlink(missing_ok=True)
        return target


def plan(wanted, overrides, notebooks_dir=None):
    """[Stage, ...] in the notebooks' order.

    wanted: numbers or names, empty for all. overrides: {field: value}, including 'profile'.
    ConfigError: unknown notebook, field or value. StudyError: the study folder was made with another config.
    """
    folder = Path(notebooks_dir) if notebooks_dir else paths.shipped("notebooks")
    found = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise ConfigError(f"no notebooks in {folder}: set their folder with --notebooks")
    return [_stage(name, found[name], overrides) for name in _selected(wanted, found)]


def run(stages, heartbeat_s=HEARTBEAT_S):
    """Execute unfinished notebooks in order until one does not finish; returns the exit code.

    LockedError: another runner is running in the study.
    """
    minutes = {}
    code = 0
    with contextlib.ExitStack() as stack:
        for folder in {stage.study.folder for stage in stages}:
            # Not the study's own lock, which the kernel takes: it keeps two runners from sharing executed copies.
            stack.enter_context(StudyLock(folder, "python -m peftlib run", name="runner-lock.json"))
        signals = stack.enter_context(_caught_signals())
        for stage in stages:
            reason = unfinished_reason(stage)
            if reason is None:
                print(f"{stage.name}: already finished, skipped ({readable_path(stage.copy)})", flush=True)
                continue
            cfg = stage.study.cfg
            print(f"{stage.name}: starting, {reason} (study {cfg.study}, seed {cfg.seed})", flush=True)
            started = time.monotonic()
            code, message = Execution(stage, signals, heartbeat_s).run()
            minutes[stage.name] = (time.monotonic() - started) / 60
            mirror = restore(stage.study.folder)
            if mirror is not None:  # uploads the executed copy; the kernel has uploaded the rest
                mirror.flush()
                print(mirror.state(), flush=True)
            if code:
                print(message, flush=True)
                break
    print("minutes per stage:")
    for name, value in {**minutes, "together": sum(minutes.values())}.items():
        print(f"  {name:<12} {value:>7.1f}", flush=True)
    return code


def unfinished_reason(stage):
    """Why a notebook must be run, or None if its executed copy is up to date."""
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
        return f"{gone[0]} is missing"
    # A user's own notebook may read what any earlier one wrote.
    earlier_ones = [path.stem for path in stage.source.parent.glob("[0-9][0-9]_*.ipynb") if path.stem < stage.name]
    for name in NOTEBOOKS.get(stage.name, earlier_ones):
        earlier = dataclasses.replace(stage, name=name).copy
        if earlier.exists() and notebook_io.ended_at(notebook_io.load(earlier)) > notebook_io.ended_at(copy):
            return f"{earlier.stem} was run after it"
    return None


def _selected(wanted, found):
    """The requested names in order; all names if none is requested."""
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
    """The notebook with its parameters and the overrides, resolved as its kernel will resolve them."""
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


def _profile_of_this_machine():
    # In a separate process: a CUDA context in the runner would take GPU memory from the notebooks.
    code = "from peftlib.core.env import profile_for_hardware; print(profile_for_hardware())"
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment()}, check=False
    )
    if asked.returncode:
        last_line = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"profile='auto' could not be resolved here: set one with --profile ({last_line})")
    return asked.stdout.split()[-1]


@contextlib.contextmanager
def _caught_signals():
    """A deque that receives the signals during the block."""
    caught = collections.deque()
    before = {number: signal.signal(number, lambda got, _: caught.append(signal.Signals(got))) for number in _SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
