"""`python -m peftlib reference`: a whole study by one command, run again after every cut until it says that all is done.

Data, a sweep of learning rates a method, training and evaluation of every method and seed, the report. Runs are child
processes, side by side on all visible GPUs; what stands is not made again.
"""

import contextlib
import os
import shutil
import sys
import time
from dataclasses import dataclass

from peftlib.core.errors import ConfigError
from peftlib.core.files import copy_tree, rename
from peftlib.core.session import interrupts
from peftlib.core.study import Study
from peftlib.methods import METHODS
from peftlib.runner import process_pool as side_by_side
from peftlib.runner.execute import environment
from peftlib.runner.suite_jobs import BASE, DONE, FAILED, jobs_of, only, state_of
from peftlib.runner.suite_worker import STOPPED_CODE, Work
from peftlib.storage.lock import child_environment, held
from peftlib.storage.mirror import open_mirror
from peftlib.train import sweep

PRECISION_CHECKED = tuple(name for name, spec in METHODS.items() if not spec.is_baseline)
OTHER_PRECISION = "fp16"
UNFINISHED_CODE = 3  # cut by --minutes or a signal: the same command goes on
_ROOM_S = 60.0  # no run is started that has less time than this before it would be stopped


@dataclass(frozen=True)
class Settings:
    """given: what Study.resolve gets. methods, seeds: to run. factors: of the sweeps, empty for none; rows: of each.
    checked: methods that also run once in OTHER_PRECISION. minutes: 0 for no limit. at_once: runs on each GPU."""

    given: dict
    methods: tuple
    seeds: tuple
    factors: tuple = sweep.FACTORS
    rows: int = 1500
    checked: tuple = ()
    minutes: float = 0.0
    at_once: int = 1
    names: tuple = ()
    is_again: bool = False
    has_report: bool = True


def run(settings, *, log=print, why_stop=None):
    """Go on with the study as far as it gets; the exit code: 0 all is done, 1 something failed, UNFINISHED_CODE cut.

    why_stop() -> None, or why to stop now: asked beside the time limit and signals.
    LockedError: another session works in the study. StudyError, ConfigError: it does not fit the settings.
    """
    started = time.monotonic()
    study = _with_data(settings, log)
    with contextlib.ExitStack() as stack:
        sibling = _sibling(study, settings)
        for folder in [study.folder] + ([sibling.folder] if sibling else []):
            stack.enter_context(held(folder, "python -m peftlib reference", log=log))
        session = _Session(study, sibling, settings, log)
        interrupted = stack.enter_context(interrupts())

        def why():
            if interrupted.is_set():
                return "interrupted"
            if why_stop is not None and (asked := why_stop()):
                return asked
            over = settings.minutes and time.monotonic() - started > 60 * settings.minutes - side_by_side.GRACE_S
            return f"minutes={settings.minutes:g} are nearly over" if over else None

        session.ends_at = started + 60 * settings.minutes - side_by_side.GRACE_S if settings.minutes else None
        reason = side_by_side.run(session.next_task, session.ended, places=session.places, why_stop=why, log=log)
        return session.close(reason)


class _Session:
    """What of the study is left, while this command works on it."""

    def __init__(self, study, sibling, settings, log):
        self.study, self.settings, self.log = study, settings, log
        self.places = places_of(study.cfg, settings.at_once)
        checked = settings.checked if sibling else ()
        self.all = jobs_of(
            study,
            settings.methods,
            settings.seeds,
            sibling=sibling,
            checked=checked,
            has_sweeps=bool(settings.factors),
        )
        self.studies = [study] + ([sibling] if sibling else [])
        self.environments = {found.folder: child_environment(found.folder) for found in self.studies}
        self.chosen = only(self.all, settings.names)
        self.started = {}  # name -> Job
        self.died = {}  # name -> what happened to a child that left no record of it
        self.ends_at = None
        self.adopt()
        self.waiting = [job for job in self._with_sweeps() if self._is_left(job)]

    def _with_sweeps(self):
        """The chosen jobs, with the sweeps that they need."""
        needed = {job.method for job in self.chosen if job.method != BASE}
        return [job for job in self.all if job in self.chosen or (job.is_sweep and job.method in needed)]

    def _is_left(self, job):
        status = self.state(job).status
        return status != DONE and (status != FAILED or self.settings.is_again)

    def state(self, job):
        return state_of(job, factors=self.settings.factors, rows=self.settings.rows)

    def adopt(self):
        """Have each study take the best rates of finished sweeps, before a first run of the method."""
        for job in self.all:
            found = job.is_sweep and sweep.kept(
                self.study, job.method, factors=self.settings.factors, rows=self.settings.rows
            )
            if found:
                rates = {name: value for name, value in found["best"].items() if name.endswith("_learning_rate")}
                basis = {name: found[name] for name in ("rows", "steps", "seed", "tried")}
                for study in self.studies:
                    study.adopt(job.method, rates, {**basis, "is_at_edge": sweep.is_at_edge(found)})

    def next_task(self):
        """The next side_by_side.Task that can be started, or None."""
        if self.ends_at is not None and time.monotonic() > self.ends_at - _ROOM_S:
            return None
        job = next((job for job in self.waiting if self._is_ready(job)), None)
        if job is None:
            return None
        self.waiting.remove(job)
        self.started[job.name] = job
        settings = self.settings
        given = {**settings.given, "study": job.study.folder.name}
        if job.study is not self.study:
            given["precision"] = OTHER_PRECISION
        work = Work(
            given,
            job.method,
            job.seed,
            job.is_sweep,
            settings.factors,
            settings.rows,
            settings.at_once if self.places[0] else 1,
        )
        argv = (sys.executable, "-m", "peftlib.runner.suite_worker", work.text())
        return side_by_side.Task(job.name, argv, {**environment(), **self.environments[job.study.folder]})

    def _is_ready(self, job):
        return job.is_sweep or job.method == BASE or not self.settings.factors or self._has_rates(job)

    def _has_rates(self, job):
        return job.method in job.study.adopted_rates()

    def ended(self, ending):
        """Take in how a child ended."""
        job = self.started[ending.task.name]
        self.adopt()
        self.log(f"{job.name} ended after {ending.seconds / 60:.1f} min: {self.state(job).status}")
        is_cut = ending.is_cut or ending.code == STOPPED_CODE
        if ending.code and not is_cut and self.state(job).status != FAILED:
            how = f"killed by signal {-ending.code}" if ending.code < 0 else f"exit code {ending.code}"
            self.died[job.name] = f"{how}: {ending.tail.splitlines()[-1] if ending.tail else 'no word'}"

    def close(self, reason):
        """Report and table; the exit code."""
        states = {job: self.state(job) for job in self.all}
        is_all = all(state.status in (DONE, FAILED) for state in states.values())
        if is_all and self.settings.has_report and not reason:
            self._report()
        for line in table(states, self.died):
            self.log(line)
        failed = [job.name for job in self.chosen if states[job].status == FAILED] + list(self.died)
        left = [job.name for job in self._with_sweeps() if states[job].status not in (DONE, FAILED)]
        if failed:
            self.log(f"failed: {', '.join(failed)}; --again tries them once more")
        if left:
            self.log(f"left: {', '.join(left)}; the same command goes on")
        if not failed and not left:
            self.log("all is done" if self.chosen == self.all else "all that was chosen is done")
        return 1 if failed else UNFINISHED_CODE if left else 0

    def _report(self):
        from peftlib.report import build as report

        for study in self.studies:
            self.log(f"report of {study.folder.name}")
            report.build_report(study)


def table(states, died):
    """Lines: one a job, with what is known of it."""
    yield f"{'run':<18} {'status':<8} {'steps':>6} {'train min':>10} {'answer min':>11}  "
    for job, state in states.items():
        numbers = "".join(
            f" {'' if value is None else form.format(value):>{width}}"
            for value, form, width in (
                (state.steps, "{}", 6),
                (state.train_minutes, "{:.1f}", 10),
                (state.evaluate_minutes, "{:.1f}", 11),
            )
        )
        status = "died" if job.name in died else state.status
        yield f"{job.name:<18} {status:<8}{numbers}  {died.get(job.name, state.detail)[:120]}".rstrip()


def places_of(cfg, at_once):
    """[{variable: value}, ...]: environments of the places for runs: each visible GPU so often, or the CPU once."""
    if cfg.device == "cpu":
        return [{}]
    import torch

    n_gpus = torch.cuda.device_count()  # asks the driver alone: no memory of a GPU is taken here
    if not n_gpus:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(n_gpus)]
    share = max(1, (os.cpu_count() or 1) // (n_gpus * at_once))
    threads = {"OMP_NUM_THREADS": str(share), "TORCHINDUCTOR_COMPILE_THREADS": str(share)}
    return [{"CUDA_VISIBLE_DEVICES": name.strip(), **threads} for _ in range(at_once) for name in names[:n_gpus]]


def _with_data(settings, log):
    """The study, whose data stand and whose config is frozen."""
    from peftlib.data import build_data
    from peftlib.models.locate import locate

    name = settings.given["study"]
    study = Study.resolve(**settings.given)
    open_mirror(study.folder, log=log)  # brings what stands on a remote, and copies from here alone
    study = Study.resolve(**settings.given)
    if not (study.manifest_path.exists() and study.config_path.exists()):
        log(f"builds the data of {name}")
        build_data(study.cfg, study.data_dir)
    study.freeze()
    if settings.factors and not sum(study.manifest()["counts"]["valid"].values()):
        raise ConfigError("no validation rows, on which a sweep is scored: set valid_rows, or --factors none")
    if study.cfg.model == "packaged":
        locate(study.cfg.model)  # converted once, before many processes want it
    return study


def _sibling(study, settings):
    """The study in which the checked methods run in the other precision, made where it is not there; or None."""
    if not settings.checked:
        return None
    cfg = study.cfg.replace(study=f"{study.folder.name}-{OTHER_PRECISION}", precision=OTHER_PRECISION)
    sibling = Study(study.folder.parent / cfg.study, cfg)
    open_mirror(sibling.folder)
    if not sibling.data_dir.exists():
        beside = sibling.folder / "data.copying"
        shutil.rmtree(beside, ignore_errors=True)
        copy_tree(study.data_dir, beside)
        rename(beside, sibling.data_dir)
    sibling.freeze()
    return Study.open(cfg)
