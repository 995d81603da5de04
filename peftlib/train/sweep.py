"""A small learning-rate sweep per method, scored on the validation rows and kept beside the study."""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

from peftlib import methods
from peftlib.core import record as records
from peftlib.core.errors import ConfigError, NonFiniteLossError, Stopped
from peftlib.core.files import copy_tree, read_json, rename, write_json
from peftlib.core.json_reading import Maybe, require_shape
from peftlib.core.study import Study
from peftlib.train.loop import run_training
from peftlib.train.parallel.processes import require_one

FACTORS, ROWS = (0.3, 1.0, 3.0), 1500
_TRIED = {"factor": float, "valid_loss": Maybe(float), "train_loss?": Maybe(float)}
_SHAPE = {"method": str, "rows": int, "steps": int, "seed?": int, "tried": [_TRIED], "best": _TRIED}


def sweep(
    study: Study,
    method: str,
    *,
    factors: Sequence[float] = FACTORS,
    rows: int = ROWS,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train `method` on the first `rows` of the study's row order at each factor of its rates; returns the findings.

    A method with two rates (the hybrid) has both multiplied. {'method', 'rows', 'steps', 'tried': [{'factor', one
    entry a rate field, 'valid_loss', 'train_loss'}, ...], 'best': the entry of the least validation loss}, also written
    to sweeps/<method>.json. valid_loss is None where the loss became inf or nan. Test rows are never seen. A cut sweep
    resumes where it stopped.
    ConfigError: no validation rows, a factor that is not positive or leads to a rate out of range. StudyError: the
    study has begun with other settings. Stopped: cut, and saved. NonFiniteLossError: no factor led to a finite loss.
    """
    require_one("a sweep")
    cfg = study.cfg
    if cfg.valid_rows == 0:
        raise ConfigError("valid_rows=0: a sweep is scored on validation rows, so build the data with some")
    if not factors or min(factors) <= 0:
        raise ConfigError(f"factors={factors!r}: use positive numbers")
    fields = methods.find(method).rates
    study.freeze()
    method = methods.keep(method, study.folder)
    steps = max(1, rows // cfg.batch_size)
    tried = []
    for factor in factors:
        rates = {name: getattr(cfg, name) * factor for name in fields}
        own = {"max_steps": steps, "resume_rate_factor": 1.0}  # a trial that diverges is a finding, not to be saved
        record = _trial(study, method, cfg.replace(**own, **rates), factor, log)
        last = record["valid_history"][-1]["valid_loss"] if record["status"] == "ok" else None
        tried.append({"factor": factor, **rates, "valid_loss": last, "train_loss": record["train_loss"]})
        log(f"{method}, {_shown(rates)}: " + ("not finite" if last is None else f"validation loss {last:.4f}"))
    known = [entry for entry in tried if entry["valid_loss"] is not None]
    if not known:
        raise NonFiniteLossError(f"{method}: no rate of {len(tried)} led to a finite loss: sweep with smaller factors")
    best = min(known, key=lambda entry: entry["valid_loss"])
    found = {"method": method, "rows": rows, "steps": steps, "seed": cfg.seed, "tried": tried, "best": best}
    write_json(path_of(study, method), found)
    edge = " (at the edge of what was tried: try further)" if is_at_edge(found) else ""
    log(f"{method}: best {_shown({name: best[name] for name in fields})}{edge}")
    if best["factor"] != 1:
        given = " ".join(f"-p {name}={best[name]:g}" for name in fields)
        log(f"to train with it: {given}, in a study in which nothing was trained yet")
    return found


def path_of(study, method):
    """Where the result of a method's sweep is written."""
    return study.folder / "sweeps" / f"{method}.json"


def kept(study, method, *, factors=FACTORS, rows=ROWS):
    """Read what an earlier sweep of the same factors and rows found, or None."""
    path = path_of(study, method)
    found = require_shape(read_json(path), _SHAPE, path) if path.exists() else None
    is_same = found is not None and (found["rows"], [e["factor"] for e in found["tried"]]) == (rows, list(factors))
    return found if is_same else None


def is_at_edge(found):
    """Whether the best factor is the least or the largest that was tried, so that a better one may lie beyond."""
    factors = [entry["factor"] for entry in found["tried"]]
    return found["best"]["factor"] in (min(factors), max(factors))


def _trial(study, method, cfg, factor, log):
    """The record of one run of the sweep, read or trained now; 'failed' where it diverged. Only the record is kept."""
    small = Study(study.folder / "sweeps" / f"{method}-{factor:g}", cfg)
    record = records.load(small, method, cfg.seed)
    is_settled = record is not None and (record["status"] == "ok" or _has_diverged(record))
    if not is_settled or record["run_hash"] != cfg.run_hash(method):
        if not small.data_dir.exists():
            beside = small.folder / "data.copying"  # a cut copy must not pass for the data
            shutil.rmtree(beside, ignore_errors=True)
            copy_tree(study.data_dir, beside)
            rename(beside, small.data_dir)
        small.freeze()
        try:
            record = run_training(small, method, log=log)
        except NonFiniteLossError:
            record = records.load(small, method, cfg.seed)
        if record["status"] == "stopped":
            raise Stopped(f"the sweep of {method} stopped at factor {factor:g}, step {record['steps']}: run it again")
    for name in ("weights", "checkpoints", "compile", "data"):
        shutil.rmtree(small.folder / name, ignore_errors=True)
    return record


def _has_diverged(record):
    return record["status"] == "failed" and (record["error"] or "").startswith(NonFiniteLossError.__name__)


def _shown(rates):
    return ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
