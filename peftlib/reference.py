"""`python -m peftlib reference`: a whole study by one command, run again after every cut until it says that all is done.

Data, a sweep of learning rates a method, training and evaluation of every method and seed, the report. Runs are child
processes, side by side on all visible GPUs; what stands is not made again.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from peftlib import side_by_side, sweep
from peftlib.config import from_text
from peftlib.errors import ConfigError
from peftlib.execution import environment
from peftlib.interrupts import interrupts
from peftlib.lock import child_environment, held
from peftlib.mirror import open_mirror
from peftlib.reference_child import STOPPED_CODE, Work
from peftlib.reference_jobs import BASE, DONE, FAILED, jobs_of, only, state_of
from peftlib.study import METHOD_ORDER, Study

PRECISION_CHECKED = ("qlora", "galore", "hybrid")
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
        argv = (sys.executable, "-m", "peftlib.reference_child", work.text())
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
        from peftlib import report

        for study in self.studies:
            self.log(f"report of {study.folder.name}")
            report.build(study)


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
    from peftlib.models import locate

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
        shutil.copytree(study.data_dir, beside)
        beside.rename(sibling.data_dir)
    sibling.freeze()
    return Study.open(cfg)


def main(argv):
    """Run a whole study; returns the exit code."""
    args = _parser().parse_args(argv)
    settings = settings_of(args)
    if args.dry_run:
        from peftlib import reference_plan

        study, assumed = Study.resolve(**settings.given), _assumptions(args)
        for line in reference_plan.lines(study, settings, assumed):
            print(line)
        if args.keep_plan:
            reference_plan.keep(study, settings, assumed, Path(args.keep_plan))
        return 0
    return run(settings, log=lambda line: print(line, flush=True))


def _parser():
    parser = argparse.ArgumentParser(prog="python -m peftlib reference", description=__doc__)
    add = parser.add_argument
    add("--study", default="reference", help="name of the study folder; default: reference")
    add("--profile", default="gpu", help="demo, t4 or gpu; default: gpu")
    add("--source", action="append", metavar="NAME=FILE[,TESTFILE]", help="as `data` has it; once for each source")
    add("-p", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="any setting")
    add("--methods", nargs="+", default=list(METHOD_ORDER), help=f"default: {' '.join(METHOD_ORDER)}")
    add("--seeds", default="0,1,2", help="of every method but base; default: 0,1,2")
    add("--factors", default="0.3,1,3", help="of the learning rates that a sweep tries, or none; default: 0.3,1,3")
    add("--sweep-rows", type=int, default=1500, help="training rows of each trial; default: 1500")
    add(
        "--precision-check",
        nargs="*",
        metavar="METHOD",
        help=f"also run once in fp16, in study NAME-fp16; default: {' '.join(PRECISION_CHECKED)} with the gpu profile on a GPU",
    )
    add("--minutes", type=float, default=0.0, help="save and stop before so many are over; default: no limit")
    add("--at-once", type=int, default=1, help="runs side by side on each GPU; default: 1")
    add("--only", default="", metavar="METHOD[-sSEED],...", help="these runs alone, and the sweeps they need")
    add("--again", action="store_true", help="try what failed once more")
    add("--no-report", action="store_true", help="leave the report to `report`, which needs no GPU")
    add("--dry-run", action="store_true", help="print what there is to do and how long it is thought to take")
    add("--tokens-per-second", type=float, help="for --dry-run: of training, one run alone on a GPU")
    add("--keep-plan", metavar="DIR", help="for --dry-run: also write plan.json and plan.md there")
    add("--gpus", type=int, help="for --dry-run: GPUs that the plan is for; default: those here")
    return parser


def settings_of(args):
    """The Settings of parsed arguments. ConfigError: a value that cannot be."""
    given = {"profile": args.profile, "study": args.study}
    given |= {"sources": "; ".join(args.source)} if args.source else {}
    given |= {name: from_text(name, text) for name, text in args.p}
    methods = tuple(name for part in args.methods for name in part.replace(",", " ").split())
    if args.at_once < 1 or args.minutes < 0:
        raise ConfigError(f"--at-once {args.at_once}, --minutes {args.minutes:g}: use positive numbers")
    settings = Settings(
        given,
        methods,
        seeds=_numbers("--seeds", args.seeds, int),
        factors=() if args.factors == "none" else _numbers("--factors", args.factors, float),
        rows=args.sweep_rows,
        minutes=args.minutes,
        at_once=args.at_once,
        names=tuple(filter(None, args.only.split(","))),
        is_again=args.again,
        has_report=not args.no_report,
    )
    return replace(settings, checked=_checked(args.precision_check, methods, given))


def _assumptions(args):
    """The reference_plan.Assumptions of --dry-run."""
    from peftlib.reference_plan import Assumptions

    given = {"tokens_per_second": args.tokens_per_second, "gpus": args.gpus, "at_once": args.at_once}
    return Assumptions(**{name: value for name, value in given.items() if value is not None})


def _checked(asked, methods, given):
    """Methods to run in OTHER_PRECISION as well."""
    if asked is not None:
        names = tuple(name for name in asked if name != "none")
        strange = [name for name in names if name not in methods]
        if strange:
            raise ConfigError(f"--precision-check {' '.join(strange)}: not among --methods {' '.join(methods)}")
        return names
    import torch

    # By the profile, not by the card: asking that would take memory of a GPU in this process.
    is_bf16 = given.get("precision", "auto") in ("auto", "bf16") and given["profile"] == "gpu"
    is_gpu = given.get("device", "auto") != "cpu" and torch.cuda.device_count() > 0
    return tuple(name for name in PRECISION_CHECKED if name in methods) if is_bf16 and is_gpu else ()


def _numbers(name, text, kind):
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text!r}: use numbers with commas between, such as 0,1,2") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise ConfigError(f"{name} {text!r}: each number once, none below 0")
    return found
