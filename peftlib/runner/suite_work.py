"""One run of a whole study with one command, `peftlib study work RUN`, which can be started anywhere and repeatedly.

A claim prevents others from doing the same run; a finished run is not repeated, and an interrupted one is resumed.
"""

import gc
import os
import signal
import socket
import threading
import time
import traceback
from dataclasses import replace

import psutil
from filelock import FileLock

from peftlib.core import record as records
from peftlib.core.env import output_root, resolve_device, training_precision
from peftlib.core.errors import LockedError, NodeError, PeftlibError, Stopped, StudyError
from peftlib.core.limits import factors_of
from peftlib.core.paths import code_id
from peftlib.core.study import Study
from peftlib.methods import BASE
from peftlib.runner.console import ERROR_CODE, STOPPED_CODE, say
from peftlib.runner.suite_jobs import DONE, FAILED, adopt_sweeps, job_named
from peftlib.storage.claims import Claims
from peftlib.storage.lock import StudyLock, claimed
from peftlib.storage.mirror import open_mirror
from peftlib.train.sweep import sweep

FAILED_CODE = 1  # the run's record says why
NODE_CODE = 69  # this machine cannot do it, another may (EX_UNAVAILABLE)
NOT_NOW_CODE = 75  # another worker has it, or its sweep is not done: retry later (EX_TEMPFAIL)


def main(settings, name, *, code="", data="", is_attended=False):
    """Do one run unless it is done; returns the exit code. Its lines are also written to the study's logs/RUN.log.

    settings.given: the study's name, and this run's own settings. name: such as galore-s1. code, data: the required
    code_id() and split_hash of the rows; '' for any. is_attended: an executor started this process, which stops when
    its parent exits. A failure is saved in the run's record.
    """
    if is_attended:
        parent = psutil.Process(os.getppid())
        threading.Thread(target=lambda: (parent.wait(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    folder, log = output_root() / settings.given["study"], say
    path = folder / "logs" / f"{name}.log"

    def log_both(line):
        say(line)
        with path.open("a", encoding="utf-8") as out:  # also for the copying thread, which outlives this call
            out.write(f"{line}\n")

    try:
        job_named(None, settings, name)  # validate it before it becomes a file name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        log = log_both
        if code not in ("", code_id()):
            raise NodeError(f"has peftlib {code_id()}, but the command needs {code}: install the same on all machines")
        return _claimed(folder, settings, name, data, log)
    except (NodeError, OSError) as error:  # disk errors of training are in its record
        why = error if isinstance(error, NodeError) else f"cannot write to the store: {error}"
        log(f"NodeError: {socket.gethostname()} {why}")
        return NODE_CODE
    except PeftlibError as error:
        log(f"{type(error).__name__}: {error}")
        return NOT_NOW_CODE if isinstance(error, LockedError) else ERROR_CODE
    except Exception:  # noqa: BLE001 - it is logged, and other runs continue
        log(traceback.format_exc())
        return FAILED_CODE


def _claimed(folder, settings, name, data, log):
    with FileLock(folder / ".restore.lock"):  # several runs may start here at once
        mirror = open_mirror(folder, runs=(name,), log=log)
    with Claims(folder, log=log).take(name) as claim, claimed(folder, name, claim.require):
        StudyLock(folder, name).require_free()
        if mirror is not None:
            mirror.restore((name,))  # what the claim's last owner has done
        job = _job(folder, settings, name, data)
        adopt_sweeps(job.study, settings)
        if job.state()[0] == DONE:
            log(f"{name} is already done")
            return 0
        if not job.is_ready():
            raise LockedError(f"{name} waits for sweep-{job.method}, which finds its learning rates")
        log(f"{name} starts on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
        ended = _do(job, log)
        if mirror is not None and not mirror.flush():
            raise NodeError(mirror.state())
        return ended


def _job(folder, settings, name, data):
    """The Job with this machine's settings."""
    if not (folder / "config.json").exists():
        place = "PEFTLIB_ROOT to the folder that all machines share, or PEFTLIB_MIRROR to the study's store"
        raise NodeError(f"has no study {folder.name!r} in {folder.parent}: set {place}")
    study = Study.existing(folder.name)
    found = study.manifest()["split_hash"]
    if data not in ("", found):
        raise NodeError(f"has rows with hash {found} in {folder}, but the command needs {data}: remove that folder")
    job = job_named(study, settings, name)
    cfg = study.cfg.replace(**settings.given, seed=job.seed)
    if cfg.device == "auto" and resolve_device("auto") == "cpu":
        raise NodeError("has no GPU that torch can use: check nvidia-smi there, or train on CPUs with -p device=cpu")
    if settings.at_once > 1 and cfg.device != "cpu" and not cfg.memory_gib:
        import torch

        whole_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        cfg = cfg.replace(memory_gib=0.95 * whole_gib / settings.at_once)  # the rest is for the driver
    return replace(job, study=Study(folder, cfg))


def _do(job, log):
    import torch

    from peftlib.evaluation.evaluate import evaluate
    from peftlib.train.loop import TrainingRun
    from peftlib.train.placement import memory_cap

    study, is_trained = job.study, job.method == BASE
    try:
        with memory_cap(study.cfg, resolve_device(study.cfg.device)):
            if job.is_sweep:
                sweep(study, job.method, factors=job.settings.factors, rows=job.settings.rows, log=log)
                return 0
            if is_trained and job.state()[0] == FAILED:
                study.record_path(BASE, 0).unlink()  # it cannot be resumed
            if not is_trained:
                record = TrainingRun(study, job.method, log=log).train()
                if record["status"] != "ok":
                    return STOPPED_CODE
                is_trained = True
                records.save(study, {"side_by_side": job.settings.at_once, **record})
                gc.collect()
                torch.cuda.empty_cache()
            record = evaluate(study, job.method, log=log)
            if job.unscored(record):
                record = _score_more(job, log)
            if record.pop("evaluation_error", None):
                records.save(study, record)
            return 0
    except Stopped as error:
        log(f"Stopped: {error}")
        return STOPPED_CODE
    except (LockedError, StudyError):
        raise
    except Exception as error:  # any error is this run's result, and the others continue
        if job.is_sweep:
            raise
        log(f"{'evaluation ' if is_trained else ''}failed: {type(error).__name__}: {error}")
        _record_failure(job, error, is_trained)
        return FAILED_CODE


def _score_more(job, log):
    """Score what the settings `benchmarks` and `rewind` name; returns the run's record."""
    from peftlib.evaluation.benchmarks import rewind
    from peftlib.evaluation.benchmarks.run import bench_study

    study, factors = job.study, factors_of("rewind", job.study.cfg.rewind)
    if study.cfg.benchmarks not in ("", "auto"):
        bench_study(study, [job.method], log=log)
    if factors and job.method != BASE:
        rewind.rewind(study, job.method, factors, log=log)
    return records.load(study, job.method, job.seed)


def _record_failure(job, error, is_trained):
    from peftlib.models.identity import new_record

    study, reason = job.study, f"{type(error).__name__}: {error}"
    record = records.load(study, job.method, job.seed)
    if record is not None and is_trained:
        records.save(study, {**record, "evaluation_error": reason})
        return
    if record is None or record["status"] == "ok":
        device = resolve_device(study.cfg.device)
        precision, why = training_precision(device, study.cfg.precision)
        how = {"device": device, "precision": precision, "precision_reason": why}
        record = new_record(study.with_rates_of(job.method), job.method, **how)
    records.save(study, {**record, "status": "failed", "error": reason})
