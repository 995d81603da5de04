"""A whole study by one command, `peftlib reference`, run again after every cut until it says that all is done.

Data, a sweep of learning rates a method, training and evaluation of every method and seed, the report. Runs are child
processes, side by side on all visible GPUs; what stands is not made again.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass

from peftlib.core.errors import ConfigError
from peftlib.core.session import interrupts
from peftlib.core.study import Study
from peftlib.methods import BASE, METHODS
from peftlib.runner import process_pool
from peftlib.runner.execute import environment
from peftlib.runner.suite_jobs import DONE, FAILED, jobs_of, only, state_of
from peftlib.runner.suite_worker import STOPPED_CODE, Work
from peftlib.storage.lock import child_environment, held
from peftlib.storage.mirror import open_mirror
from peftlib.train import sweep

UNFINISHED_CODE = 3  # cut by --minutes or a signal: the same command goes on
_ROOM_S = 60.0  # no run is started that has less time than this before it would be stopped


@dataclass(frozen=True)
class Settings:
    """given: what Study.resolve gets. methods, seeds: to run. factors: of the sweeps, empty for none; rows: of each.
    minutes: 0 for no limit. at_once: runs on each GPU. names: as in suite_jobs.only, empty for all. is_again: try what
    failed once more."""

    given: dict
    methods: tuple
    seeds: tuple
    factors: tuple = sweep.FACTORS
    rows: int = 1500
    minutes: float = 0.0
    at_once: int = 1
    names: tuple = ()
    is_again: bool = False
    has_report: bool = True

    @classmethod
    def of(cls, given, *, methods, seeds, factors, only, **others):
        """Settings from a command line's words; lists have commas between. ConfigError: a value that cannot be."""
        known = (BASE, *METHODS)
        names = known if methods is None else tuple(methods.replace(",", " ").split())
        strange = [name for name in names if name not in known]
        if strange or not names:
            raise ConfigError(f"--methods {' '.join(strange) or repr('')}: use {', '.join(known)}")
        return cls(
            given,
            names,
            seeds=_numbers("--seeds", seeds, int),
            factors=() if factors == "none" else _numbers("--factors", factors, float),
            names=tuple(filter(None, only.split(","))),
            **others,
        )

    def jobs(self, study):
        """[Job, ...] of a study in the order in which they start."""
        return jobs_of(study, self.methods, self.seeds, has_sweeps=bool(self.factors))


def _numbers(option, text, kind):
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r}: use numbers with commas between, such as 0,1,2") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise ConfigError(f"{option} {text!r}: each number once, none below 0")
    return found


def run(settings, *, log=print, why_stop=lambda: None):
    """Run all unfinished jobs of the study; returns 0 if all is done, 1 if something failed, UNFINISHED_CODE if cut.

    why_stop() -> None, or why to stop now: asked beside the time limit and signals.
    LockedError: another session works in the study. StudyError, ConfigError: it does not fit the settings.
    """
    ends_at = time.monotonic() + 60 * settings.minutes - process_pool.GRACE_S if settings.minutes else float("inf")
    study = _with_data(settings, log)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(study.folder, "python -m peftlib reference", log=log))
        session = _Session(study, settings, log, ends_at)
        interrupted = stack.enter_context(interrupts())

        def why():
            if interrupted.is_set():
                return "interrupted"
            return why_stop() or (
                f"minutes={settings.minutes:g} are nearly over" if session.seconds_left() < 0 else None
            )

        workers = session.workers
        reason = process_pool.run(session.next_task, session.ended, workers=workers, why_stop=why, log=log)
        return session.close(reason)


class _Session:
    """The jobs of one command: which wait, and how they ended."""

    def __init__(self, study, settings, log, ends_at):
        self.study, self.settings, self.log, self.ends_at = study, settings, log, ends_at
        self.workers = workers_of(study.cfg, settings.at_once)
        self.all = {job.name: job for job in settings.jobs(study)}
        self.died = {}  # name -> what happened to a child that left no record of it
        self.adopt()
        chosen = only(list(self.all.values()), settings.names)
        swept = {job.method for job in chosen if job.method != BASE}  # a run needs the rates of its method's sweep
        self.chosen = [job for job in self.all.values() if job in chosen or (job.is_sweep and job.method in swept)]
        over = (DONE,) if settings.is_again else (DONE, FAILED)
        self.waiting = [job for job in self.chosen if self.state(job).status not in over]

    def seconds_left(self):
        return self.ends_at - time.monotonic()

    def state(self, job):
        return state_of(job, factors=self.settings.factors, rows=self.settings.rows)

    def adopt(self):
        """Have the study take the best rates of finished sweeps, before a first run of the method."""
        how = {"factors": self.settings.factors, "rows": self.settings.rows}
        for job in self.all.values():
            found = job.is_sweep and sweep.kept(self.study, job.method, **how)
            if found:
                rates = {name: value for name, value in found["best"].items() if name.endswith("_learning_rate")}
                basis = {name: found[name] for name in ("rows", "steps", "seed", "tried")}
                self.study.adopt(job.method, rates, {**basis, "is_at_edge": sweep.is_at_edge(found)})

    def next_task(self):
        """The next process_pool.Task that can be started, or None."""
        job = next((job for job in self.waiting if self._is_ready(job)), None)
        if job is None or self.seconds_left() < _ROOM_S:
            return None
        self.waiting.remove(job)
        factors, rows = self.settings.factors, self.settings.rows
        at_once = self.settings.at_once if self.workers[0] else 1
        work = Work(self.settings.given, job.method, job.seed, job.is_sweep, factors, rows, at_once)
        argv = (sys.executable, "-m", "peftlib.runner.suite_worker", json.dumps(dataclasses.asdict(work)))
        return process_pool.Task(job.name, argv, {**environment(), **child_environment(self.study.folder)})

    def _is_ready(self, job):
        needs_rates = not job.is_sweep and job.method != BASE and self.settings.factors
        return not needs_rates or job.method in self.study.adopted_rates()

    def ended(self, ending):
        """Take in how a child ended."""
        self.adopt()
        name = ending.task.name
        status = self.state(self.all[name]).status
        self.log(f"{name} ended after {ending.seconds / 60:.1f} min: {status}")
        if ending.code not in (0, STOPPED_CODE) and not ending.is_cut and status != FAILED:
            how = f"killed by signal {-ending.code}" if ending.code < 0 else f"exit code {ending.code}"
            self.died[name] = f"{how}: {ending.tail.splitlines()[-1] if ending.tail else 'no word'}"

    def close(self, reason):
        """Report and table; the exit code."""
        states = {name: self.state(job) for name, job in self.all.items()}
        is_all = all(state.status in (DONE, FAILED) for state in states.values())
        if is_all and self.settings.has_report and not reason:
            from peftlib import build_report

            self.log(f"report of {self.study.folder.name}")
            build_report(self.study)
        for line in table(states, self.died):
            self.log(line)
        names = [job.name for job in self.chosen]
        failed = [name for name in names if states[name].status == FAILED] + list(self.died)
        left = [name for name in names if states[name].status not in (DONE, FAILED)]
        if failed:
            self.log(f"failed: {', '.join(failed)}; --again tries them once more")
        if left:
            self.log(f"left: {', '.join(left)}; the same command goes on")
        if not failed and not left:
            self.log("all is done" if len(names) == len(self.all) else "all that was chosen is done")
        return 1 if failed else UNFINISHED_CODE if left else 0


def table(states, died):
    """Yield the table of {name: State} as lines. died: {name: what happened to a child that left no record}."""
    yield f"{'run':<18} {'status':<8} {'steps':>6} {'train min':>10} {'answer min':>11}  "
    for name, state in states.items():
        steps = "" if state.steps is None else state.steps
        train, answer = ("" if s is None else f"{s / 60:.1f}" for s in (state.train_s, state.evaluate_s))
        status, detail = ("died", died[name]) if name in died else (state.status, state.detail)
        yield f"{name:<18} {status:<8} {steps:>6} {train:>10} {answer:>11}  {detail[:120]}".rstrip()


def workers_of(cfg, at_once):
    """[{variable: value}, ...], the environment of each worker: every visible GPU at_once times, or the CPU once."""
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
    """The study with its data built and its config frozen."""
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
