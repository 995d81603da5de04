"""A whole study with one command, `peftlib study run`, on one or many machines.

It builds the data, sweeps each method's learning rates, trains and evaluates every method and seed, and writes the
report. An executor starts each run as a command; claims divide the runs among all machines that run the same study.
"""

import contextlib
import shlex
import sys
import time

from peftlib.core.env import resolve_device
from peftlib.core.errors import ConfigError, LockedError
from peftlib.core.session import interrupts
from peftlib.core.study import Study
from peftlib.methods import BASE, keep
from peftlib.runner.console import STOPPED_CODE
from peftlib.runner.executors import GRACE_S, Local, Ray, workers_of
from peftlib.runner.suite_jobs import DIED, DONE, FAILED, adopt_sweeps, table
from peftlib.runner.suite_work import NODE_CODE, NOT_NOW_CODE
from peftlib.storage.claims import Claims
from peftlib.storage.lock import StudyLock
from peftlib.storage.mirror import open_mirror, running

_LOOK_S = 10.0  # seconds between checks of what others have done, 300 for a remote


def run(settings, *, log=print, why_stop=lambda: None):
    """Run all unfinished jobs of the study; returns 0 if all are done, 1 if any failed, STOPPED_CODE if stopped.

    why_stop() -> None, or a reason to stop now besides the time limit and signals.
    ConfigError, StudyError: the study does not fit the settings, or the executor is not available. LockedError: a
    session has locked the whole study.
    """
    started, reason = time.monotonic(), None
    study = _with_data(settings, log)
    StudyLock(study.folder, "study run").require_free()
    executor = Ray(study.cfg, settings) if settings.address else Local(workers_of(study.cfg, settings.at_once))
    with contextlib.closing(executor), interrupts() as interrupted:  # Ray first, because it handles SIGTERM itself
        session = _Session(study, settings, executor, log)
        log(f"to do: {', '.join(job.name for job in session.waiting()) or 'nothing'}")
        with session.shown():
            while session.running or (reason is None and session.waiting()):
                late = settings.minutes and time.monotonic() - started > 60 * settings.minutes - GRACE_S
                why = "interrupted" if interrupted.is_set() else why_stop()
                why = why or (f"minutes={settings.minutes:g} have nearly passed" if late else None)
                if reason is None and why:
                    reason = why
                    log(f"stopping ({reason}): {', '.join(session.running) or 'nothing is running'}")
                    executor.stop()
                session.step(is_cut=reason is not None)
                time.sleep(0.2)
        return session.close(reason)


def _resolved(settings, log):
    open_mirror(Study.resolve(**settings.given).folder, runs=(), log=log)  # restores from the remote
    return Study.resolve(**settings.given)


def _with_data(settings, log):
    """The study with its data built and its config frozen."""
    from peftlib.data import build_data
    from peftlib.models.locate import locate

    study = _resolved(settings, log)
    if not (study.manifest_path.exists() and study.config_path.exists()):
        log(f"building the data of {study.folder.name}")
        build_data(study.cfg, study.data_dir)
    study.freeze()
    if settings.factors != () and not sum(study.manifest()["counts"]["valid"].values()):
        raise ConfigError("a sweep needs validation rows and there are none: set valid_rows, or use --factors none")
    if study.cfg.model == "packaged":
        locate(study.cfg.model)  # converted once, before many processes need it
    if not settings.address and resolve_device(study.cfg.device) == "cpu":
        study = Study(study.folder, study.cfg.replace(device="cpu"))  # runs elsewhere must not fall back to it
    return study


class _Session:
    """The jobs of one command: which are waiting, which are running, and how the others ended."""

    def __init__(self, study, settings, executor, log):
        self.study, self.settings, self.executor, self.log = study, settings, executor, log
        self.all, self.chosen = settings.jobs(study)
        for method in {job.method for job in self.all} - {BASE}:
            keep(method, study.folder)
        self.running, self.notes = {}, {}  # {name: its log}, {name: (status, last line)}
        self._died, self._tried = {}, set()  # {name: (DIED, why)}, names not started here again
        self._restore_at = 0.0
        self._look()

    def _look(self):
        """Update what is done, here and elsewhere, and which runs others hold."""
        mirror = running(self.study.folder)
        if mirror is not None and time.monotonic() >= self._restore_at:
            mirror.restore(())
            self._restore_at = time.monotonic() + 30 * _LOOK_S
        adopt_sweeps(self.study, self.settings)
        self.states = {job.name: job.state() for job in self.all}
        self.states |= {name: died for name, died in self._died.items() if self.states[name][0] != DONE}
        owners = Claims(self.study.folder, log=self.log).owners()
        held = {name: ("held", f"by {who}") for name, who in owners.items() if name in self.states}
        self.notes = held | {name: note for name, note in self.notes.items() if name in self.running}
        self.ready = [job for job in self.waiting() if job.name not in owners and job.is_ready()]
        self._look_at = time.monotonic() + _LOOK_S

    def waiting(self):
        """[Job, ...] that are still to do, by this command or another."""
        over = {DONE} if self.settings.is_again else {DONE, FAILED}
        left = [job for job in self.chosen if self.states[job.name][0] not in over]
        vain = {job.method for job in left if job.is_sweep and job.name in self._tried}
        left = [job for job in left if job.name not in self._tried and job.name not in self.running]
        return [job for job in left if job.is_sweep or job.method not in vain or job.is_ready()]

    def step(self, *, is_cut):
        """Start the jobs that can start, relay their output, and handle finished ones."""
        if time.monotonic() >= self._look_at:
            self._look()
        while not is_cut and self.ready and self.executor.has_room:
            job = self.ready.pop(0)
            path = self.study.folder / "logs" / f"{job.name}.log"
            path.parent.mkdir(exist_ok=True)
            self.running[job.name] = path.open("a+", encoding="utf-8", errors="replace")  # at its end
            self.log(f"{job.name} starts")
            self.executor.start(job.name, job.words())
        for name in self.running:
            self._pass_on(name)
        for ending in self.executor.ended():
            self._ended(ending, is_cut)

    def shown(self):
        """A context in which a terminal shows the table of all runs with the last line of each."""
        from rich.live import Live
        from rich.text import Text

        live = Live(get_renderable=lambda: Text("\n".join(table(self.states | self.notes))), refresh_per_second=1)
        return live if sys.stdout.isatty() else contextlib.nullcontext()  # without a terminal, lines are logged

    def _pass_on(self, name):
        for line in self.running[name].read().splitlines():
            self.notes[name] = ("running", line)
            if not sys.stdout.isatty():
                self.log(f"{name} | {line}")

    def _ended(self, ending, is_cut):
        name, code = ending.name, ending.code
        self._pass_on(name)
        self.running.pop(name).close()
        self._restore_at = 0.0
        self._look()
        status = self.states[name][0]
        self.log(f"{name} ended {ending.place} after {ending.seconds / 60:.1f} min: {status}")
        self.ready = [job for job in self.ready if job.name != name]  # the next check may add it again
        if code == NODE_CODE and self.executor.avoid(ending.node):
            self.log(f"{ending.last}; no more runs are sent there")
        elif code != NOT_NOW_CODE:
            self._tried.add(name)
            if not is_cut and code not in (0, STOPPED_CODE) and status not in (DONE, FAILED):
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                self._died[name] = DIED, f"{how}: {ending.last or 'no output'}"

    def close(self, reason):
        """Build the report, log the table, and return the exit code."""
        self._look()
        if not reason and self.settings.has_report and all(s in (DONE, FAILED) for s, _ in self.states.values()):
            from peftlib import build_report

            with contextlib.suppress(LockedError), Claims(self.study.folder, log=self.log).take("report"):
                self.log(f"building the report of {self.study.folder.name}")
                build_report(self.study)
        for line in table(self.states | self.notes):
            self.log(line)
        status = {job.name: self.states[job.name][0] for job in self.chosen}
        failed = [name for name in status if status[name] in (FAILED, DIED)]
        left = [name for name in status if status[name] not in (DONE, FAILED)]
        if failed:
            self.log(f"failed: {', '.join(failed)}; --again retries them")
        if left:
            self.log(f"left: {', '.join(left)}; the same command resumes them")
        if not failed and not left:
            self.log("all runs are done" if len(status) == len(self.all) else "all chosen runs are done")
        return 1 if failed else STOPPED_CODE if left else 0


def listing(settings, *, is_pending):
    """The state of a study's runs as lines, or the commands that can start now. StudyError: no data yet."""
    study = _resolved(settings, lambda line: None)
    study.manifest()
    study.freeze()
    session = _Session(study, settings, None, lambda line: print(line, file=sys.stderr))  # stdout is for the list
    commands = (shlex.join(["peftlib", *job.words()]) for job in session.ready)
    return commands if is_pending else table(session.states | session.notes)
