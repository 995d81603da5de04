"""The runs of a whole study: which there are, and how far each is."""

from dataclasses import dataclass

from peftlib.core import record as records
from peftlib.core.errors import ConfigError
from peftlib.core.study import Study
from peftlib.methods import BASE, find
from peftlib.train import sweep

OPEN, STOPPED, TRAINED, DONE, FAILED = "waits", "stopped", "trained", "done", "failed"


@dataclass(frozen=True)
class Job:
    """One sweep of a method, or training and evaluation of one method and seed."""

    study: Study
    method: str
    seed: int = 0
    is_sweep: bool = False

    @property
    def name(self):
        """Such as sweep-galore or galore-s1; printed before its lines."""
        return f"sweep-{self.method}" if self.is_sweep else f"{self.method}-s{self.seed}"


@dataclass(frozen=True)
class State:
    """How far a job is. status: one of this module's words. detail: steps done, or the reason of a failure."""

    status: str
    detail: str = ""
    steps: int | None = None
    train_s: float | None = None
    evaluate_s: float | None = None


def jobs_of(study, methods, seeds, *, has_sweeps=True):
    """[Job, ...] in starting order: sweeps, base, then seed after seed.

    ConfigError: an unknown method.
    """
    for method in methods:
        if method != BASE:
            find(method)
    trained = [method for method in methods if method != BASE]
    jobs = [Job(study, method, is_sweep=True) for method in trained if has_sweeps]
    jobs += [Job(study, BASE)] if BASE in methods else []
    jobs += [Job(study, method, seed) for seed in seeds for method in trained]
    return jobs


def only(jobs, names):
    """Those jobs that names such as galore, galore-s1 or sweep-galore mean. ConfigError: a name that means none."""
    if not names:
        return jobs
    found = {name: [job for job in jobs if name in (job.name, job.method)] for name in names}
    unknown = [name for name, meant in found.items() if not meant]
    if unknown:
        raise ConfigError(f"--only {','.join(unknown)} means no run here: use {', '.join(job.name for job in jobs)}")
    return [job for job in jobs if any(job in meant for meant in found.values())]


def state_of(job, *, factors, rows):
    """The State of a job, read from its study's folder."""
    if job.is_sweep:
        found = sweep.kept(job.study, job.method, factors=factors, rows=rows)
        return State(OPEN) if found is None else State(DONE, f"factor {found['best']['factor']:g}", found["steps"])
    record = records.load(job.study, job.method, job.seed)
    if record is None:
        return State(OPEN)
    known = {"steps": record["steps"], "train_s": record["train_seconds"]}
    if record["status"] == "failed":
        return State(FAILED, record["error"] or "", **known)
    if record["status"] != "ok":
        return State(STOPPED, f"step {record['steps'] or 0} of {record['planned_steps'] or '?'}", **known)
    if record["evaluation"] and job.study.predictions_path(job.method, job.seed).exists():
        return State(DONE, **known, evaluate_s=record["evaluation"].get("generate_seconds"))
    if record.get("evaluation_error"):
        return State(FAILED, f"evaluation: {record['evaluation_error']}", **known)
    return State(TRAINED, "not evaluated yet", **known)
