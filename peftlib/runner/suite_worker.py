"""One run of a whole study in a process of its own; `peftlib reference` starts it.

python -m peftlib.runner.suite_worker JSON, the fields of a Work. The same command resumes a run that was cut.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from peftlib.core import record as records
from peftlib.core.env import resolve_device, training_precision
from peftlib.core.errors import LockedError, PeftlibError, Stopped, StudyError
from peftlib.core.study import Study
from peftlib.methods import BASE

STOPPED_CODE = 75  # cut, and saved: the same work resumes from there
FAILED_CODE = 1


@dataclass(frozen=True)
class Work:
    """given: what Study.resolve gets. at_once: runs that share this process's GPU. factors, rows: of a sweep."""

    given: dict
    method: str
    seed: int
    is_sweep: bool
    factors: tuple
    rows: int
    at_once: int


def perform(work, *, log=print):
    """Do the work; returns the exit code. A failure is written to the run's record with its reason.

    LockedError, StudyError: nothing can be written to the study.
    """
    study = Study.resolve(**{**work.given, "seed": work.seed})
    study = Study(study.folder, _with_memory_share(study.cfg, work.at_once))
    is_trained = work.method == BASE
    try:
        if work.is_sweep:
            from peftlib.train.sweep import sweep

            sweep(study, work.method, factors=tuple(work.factors), rows=work.rows, log=log)
            return 0
        if not is_trained:
            is_trained = _train(study, work, log)
        elif (records.load(study, BASE, 0) or {}).get("status") == "failed":
            study.record_path(BASE, 0).unlink()  # nothing of it can be resumed
        if not is_trained:
            return STOPPED_CODE
        from peftlib.evaluation.evaluate import evaluate

        record = evaluate(study, work.method, log=log)
        if record.pop("evaluation_error", None):
            records.save(study, record)
        return 0
    except Stopped as error:
        log(f"Stopped: {error}")
        return STOPPED_CODE
    except (LockedError, StudyError):
        raise
    except Exception as error:  # whatever it is, it is this run's result, and the others go on
        if work.is_sweep:
            raise
        log(f"{'evaluation ' if is_trained else ''}failed: {type(error).__name__}: {error}")
        _record_failure(study, work, error, is_trained)
        return FAILED_CODE


def _with_memory_share(cfg, at_once):
    """The config with this run's part of the GPU's memory as its limit, where several runs share it."""
    if at_once == 1 or resolve_device(cfg.device) != "cuda":
        return cfg
    import torch

    whole = torch.cuda.get_device_properties(0).total_memory
    mine = cfg.memory_gib or 0.95 * whole / 2**30 / at_once  # the rest is for the driver
    torch.cuda.set_per_process_memory_fraction(min(1.0, mine * 2**30 / whole))
    return cfg.replace(memory_gib=mine)


def _train(study, work, log):
    """Train; whether it came to its end."""
    import torch

    from peftlib.train.loop import TrainingRun

    record = TrainingRun(study, work.method, log=log).train()
    if record["status"] != "ok":
        return False
    if "side_by_side" not in record:
        records.save(study, {**record, "side_by_side": work.at_once})
    gc.collect()
    torch.cuda.empty_cache()
    return True


def _record_failure(study, work, error, is_trained):
    from peftlib.models.identity import provenance_of

    reason = f"{type(error).__name__}: {error}"
    record = records.load(study, work.method, work.seed)
    if record is not None and is_trained:
        records.save(study, {**record, "evaluation_error": reason})
        return
    if record is None or record["status"] == "ok":
        device = resolve_device(study.cfg.device)
        precision, why = training_precision(device, study.cfg.precision)
        adopted = study.with_rates_of(work.method)
        how = {"device": device, "precision": precision, "precision_reason": why}
        how["provenance"] = provenance_of(adopted.cfg.model, adopted.records(), study=adopted.folder.name)
        record = records.new_record(adopted, work.method, **how)
    records.save(study, {**record, "status": "failed", "error": reason})


def _end_with(parent):
    """Stop this process once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv):
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        return perform(Work(**json.loads(argv[0])))
    except PeftlibError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return FAILED_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
