"""The runs of a whole study, their states, and the commands that do them."""

import re
from dataclasses import dataclass

from peftlib.core import record as records
from peftlib.core.errors import ConfigError
from peftlib.core.limits import factors_of
from peftlib.core.paths import code_id
from peftlib.core.study import Study
from peftlib.evaluation.benchmarks import rewind, tasks
from peftlib.methods import BASE, default_methods, find
from peftlib.train import sweep

OPEN, STOPPED, TRAINED, DONE, FAILED = "waits", "stopped", "trained", "done", "failed"
DIED = "died"  # in this session, without a reason in its record


@dataclass(frozen=True)
class Settings:
    """The settings of a whole study."""

    given: dict  # for Study.resolve
    methods: tuple = (BASE, *default_methods())
    seeds: tuple = (0, 1, 2)
    factors: tuple | None = None  # of the sweeps' rates; None: the search of train.sweep, (): no sweeps
    rows: int = sweep.ROWS  # training rows of a sweep's trial
    names: tuple = ()  # as in `jobs`, empty for all
    is_again: bool = False  # retry failed runs
    minutes: float = 0.0  # time limit; 0: none
    at_once: int = 1  # runs on each GPU
    address: str = ""  # address of a Ray cluster, '' for this machine
    has_report: bool = True

    def jobs(self, study):
        """([Job, ...] of a study in starting order: sweeps, base, then seed by seed; the jobs that `names` selects).

        A name is for example galore, galore-s1 or sweep-galore; a selected run includes its method's sweep, and base
        if the study rewinds.
        ConfigError: an unknown method, or a name that matches no job.
        """
        trained = [method for method in self.methods if method != BASE and find(method)]
        jobs = [Job(study, self, method, is_sweep=True) for method in trained if self.factors != ()]
        is_rewound = bool(study.cfg.rewind)
        jobs += [Job(study, self, BASE)] if BASE in self.methods or is_rewound else []
        jobs += [Job(study, self, method, seed) for seed in self.seeds for method in trained]
        unknown = {*self.names} - {name for job in jobs for name in (job.name, job.method)}
        if unknown:
            known = ", ".join(job.name for job in jobs)
            raise ConfigError(f"--only {','.join(sorted(unknown))}: no such run, use {known}")
        chosen = [job for job in jobs if not self.names or {job.name, job.method} & {*self.names}]
        needed = {(job.method, True) for job in chosen} | ({(BASE, False)} if is_rewound else set())
        return jobs, [job for job in jobs if job in chosen or (job.method, job.is_sweep) in needed]


@dataclass(frozen=True)
class Job:
    """One sweep of a method, or training and evaluation of one method and seed."""

    study: Study
    settings: Settings
    method: str
    seed: int = 0
    is_sweep: bool = False

    name = property(lambda self: f"sweep-{self.method}" if self.is_sweep else f"{self.method}-s{self.seed}")

    def words(self):
        """The arguments of `peftlib` that do this job on any machine, with settings that differ from the study's."""
        study, asked, usual = self.study, self.settings, Settings({})
        own = Study.existing(study.folder.name).cfg
        words = ["study", "work", self.name, "--study", study.folder.name]
        for name, value in study.cfg.fields_of("run").items():
            words += ["-p", f"{name}={value}"] if value != getattr(own, name) and name != "profile" else []
        words += ["--factors", ",".join(map(str, asked.factors)) or "none"] if asked.factors != usual.factors else []
        words += ["--sweep-rows", str(asked.rows)] if asked.rows != usual.rows else []
        words += ["--at-once", str(asked.at_once)] if asked.at_once != usual.at_once else []
        return [*words, "--code", code_id(), "--data", study.manifest()["split_hash"]]

    def swept(self):
        """The result of the method's sweep with these factors and rows, or None."""
        return sweep.kept(self.study, self.method, factors=self.settings.factors, rows=self.settings.rows)

    def is_ready(self):
        """Whether it can start: with sweeps, a run needs its method's adopted rates."""
        if self.is_sweep or self.method == BASE:
            return True
        return self.settings.factors == () or self.method in self.study.adopted_rates()

    def unscored(self, record):
        """[text, ...] of what the settings `benchmarks` ("auto" means none) and `rewind` ask for and a record lacks."""
        cfg = self.study.cfg
        named = () if cfg.benchmarks in ("", "auto") else tasks.chosen(cfg.benchmarks)
        done = record.get("benchmarks") or {}
        left = [task for task in named if task not in done or _has_more_rows(done[task], cfg.benchmark_limit)]
        factors = () if self.method == BASE else factors_of("rewind", cfg.rewind)
        return left + [f"rewound to {factor:g}" for factor in rewind.missing(self.study, record, factors)]

    def state(self):
        """(a status of this module, steps and minutes or the reason for a failure), read from the study's folder."""
        found = self.swept() if self.is_sweep else records.load(self.study, self.method, self.seed)
        if found is None:
            return OPEN, ""
        if self.is_sweep:
            return DONE, f"{found['steps']} steps, {sweep.verdict(found)}"
        if found["status"] == "failed":
            return FAILED, found["error"] or ""
        told = "" if self.method == BASE else f"step {found['steps'] or 0} of {found['planned_steps'] or '?'}"
        told += f", trained {found['train_seconds'] / 60:.1f} min" if found["train_seconds"] else ""
        if found["status"] != "ok":
            return STOPPED, told
        left = self.unscored(found)
        if not (found["evaluation"] and self.study.predictions_path(self.method, self.seed).exists()):
            left = ["not evaluated yet"]
        failure = found.get("evaluation_error")
        if left and failure:
            return FAILED, f"evaluation: {failure}"
        return (TRAINED, ", ".join(filter(None, (told, *left)))) if left else (DONE, told)


def _has_more_rows(done, limit):
    """Whether a benchmark has more rows than were scored, within a limit (0: none)."""
    of = done.get("n_all") or done["n"]
    return done["n"] < min(limit or of, of)


def job_named(study, settings, name):
    """The Job with this name. ConfigError: no such run."""
    found = re.fullmatch(r"sweep-(.+)|(.+)-s(\d+)", name)
    if not found:
        raise ConfigError(f"{name!r} is not a run: use sweep-METHOD or METHOD-sSEED, such as galore-s1")
    method = found[1] or found[2]
    if method != BASE:
        find(method)
    return Job(study, settings, method, int(found[3] or 0), bool(found[1]))


def adopt_sweeps(study, settings):
    """Adopt the best rates of all finished sweeps in the study's config. StudyError: see Study.adopt."""
    for path in (study.folder / "sweeps").glob("*.json") if settings.factors != () else []:
        found = Job(study, settings, path.stem, is_sweep=True).swept()
        if found:
            sweep.adopt(study, {**found, "method": path.stem})


def table(states):
    """Yield {run: (status, detail)} as lines."""
    for name, (status, detail) in {"run": ("status", ""), **states}.items():
        yield f"{name:<18} {status:<8} {detail[:120]}".rstrip()
