"""Learning-rate sweep that brackets a method's best rate, scored on validation rows and saved in the study."""

import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from peftlib import methods
from peftlib.core import record as records
from peftlib.core.errors import ConfigError, NonFiniteLossError, Stopped
from peftlib.core.files import copy_tree, read_json, rename, write_json
from peftlib.core.json_reading import Maybe, require_shape
from peftlib.core.study import Study
from peftlib.train.callbacks import Callback
from peftlib.train.loop import TrainingRun
from peftlib.train.parallel.processes import require_one

ROWS, TRIALS = 1500, 9  # rows per trial; maximum trials per method
CLEARLY_WORSE = 0.5  # nats per token above the lowest loss: a trial that ends or stays there has diverged
_FIRST_LOOK = 4  # no trial is stopped before this many tenths of the steps
_TRIED = {"factor": float, "factor_2?": float, "valid_loss": Maybe(float), "train_loss?": Maybe(float)}
_SHAPE = {"method": str, "rows": int, "steps": int, "seed?": int, "tried": [_TRIED], "best": _TRIED}
_SHAPE |= {"max_trials?": int, "is_at_edge?": bool, "diverges_beyond?": {}}


def sweep(
    study: Study,
    method: str,
    *,
    factors: Sequence[float] | None = None,
    rows: int = ROWS,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train `method` on the first `rows` of the study's row order at several rates; returns the results.

    factors: multiply all of the method's rates in the study; each trial is trained to the end. None: `next_trial`
    searches from 1/3, 1 and 3 on, two rates (the hybrid's) separately, in at most TRIALS trials, and a trial that
    `is_hopeless` is stopped. An interrupted sweep resumes, and every trial is kept; test rows are never used. The
    study keeps its rates until they are adopted (see `adopt`).
    Returned, and written to sweeps/<method>.json: {'method', 'rows', 'steps', 'seed', 'tried': [{'factor', 'factor_2'
    if two rates are searched separately, one entry per rate field, 'valid_loss' (None if the loss became inf or nan, or
    the trial was stopped), 'train_loss', 'curve': see curve_of, 'stopped_at': its step, or None}, ...], 'best': the
    entry with the lowest validation loss, 'is_at_edge': nothing was tried on one side of it, so it may not be optimal,
    'diverges_beyond': {field: the next higher rate, which diverged}, 'max_trials' of a search}.
    ConfigError: no validation rows, or a factor is not positive or gives a rate out of range. StudyError: the study
    started with other settings. Stopped: interrupted, and saved. NonFiniteLossError: no factor gave a finite loss.
    """
    require_one("a sweep")
    cfg, fields = study.cfg, methods.find(method).rates
    if cfg.valid_rows == 0:
        raise ConfigError("valid_rows=0: a sweep needs validation rows, so build the data with some")
    if rows < 1:
        raise ConfigError(f"rows={rows}: a trial needs at least one training row, so use 1 or more")
    if factors is not None and (not factors or not all(0 < factor < math.inf for factor in factors)):
        raise ConfigError(f"factors={factors!r}: use positive finite numbers")
    study.freeze()
    method = methods.keep(method, study.folder)
    steps = max(1, rows // cfg.batch_size)
    tried: list[dict[str, Any]] = []
    for point in _search(cfg, fields, tried) if factors is None else [(factor,) for factor in factors]:
        rates = _rates(cfg, fields, point)
        own = {"max_steps": steps, "resume_rate_factor": 1.0}  # a diverged trial is a result and needs no rescue
        least = _least(tried) if factors is None else None
        entry = _trial(study, method, cfg.replace(**own, **rates), point, least and least["curve"], log)
        tried.append({**dict(zip(("factor", "factor_2"), point)), **rates, **entry})
        last, cut = entry["valid_loss"], entry["stopped_at"]
        ended = "not finite" if last is None else f"validation loss {last:.4f}"
        log(f"{method}, {_shown(rates)}: " + (f"stopped at step {cut}, clearly worse" if cut else ended))
    best = _least(tried)
    if best is None:
        raise NonFiniteLossError(f"{method}: none of {len(tried)} rates gave a finite loss: sweep with smaller factors")
    found = {"method": method, "rows": rows, "steps": steps, "seed": cfg.seed, "tried": tried, "best": best}
    found |= {"is_at_edge": is_at_edge(found), "diverges_beyond": _diverges_beyond(found, fields)}
    found |= {"max_trials": TRIALS} if factors is None else {}
    write_json(path_of(study, method), found)
    log(f"{method}: {verdict(found)}: {_shown({name: best[name] for name in fields})}")
    return found


def adopt(study: Study, found: dict[str, Any]) -> None:
    """Train a method with the best rates of its sweep from now on. found: as `sweep` returned it.

    StudyError: the method was already trained with other rates, or has adopted others.
    """
    rates = {name: value for name, value in found["best"].items() if name.endswith("_learning_rate")}
    basis = {name: value for name, value in found.items() if name not in ("schema_version", "method", "best")}
    study.adopt(found["method"], rates, {**basis, "is_at_edge": is_at_edge(found)})


def next_trial(tried, n_rates=1, *, trials=TRIALS, is_allowed=lambda powers: True):
    """The powers of 3 by which to multiply the rates in the next trial, or None when the search is over.

    tried: {powers: validation loss, or None if it diverged}, in trial order. First 0, -1 and 1 for the first rate;
    then the untried neighbours of the lowest loss, starting with the rate that was varied last, until there are none,
    so that the best rate is between worse ones or below one that diverged. While no loss is finite, all rates are
    lowered. is_allowed(powers): whether such rates are valid. Never more than `trials` in total.
    """
    known = {powers: loss for powers, loss in tried.items() if loss is not None}
    if len(tried) >= trials:
        return None
    if not known:
        return (-len(tried),) * n_rates
    start = (0,) * n_rates
    if len(tried) == 2 and start in known and is_allowed(_moved(start, 0, 1)):
        return _moved(start, 0, 1)
    best = min(known, key=known.__getitem__)
    *_, last = tried
    before = {powers: loss for powers, loss in known.items() if powers != last}
    centre = min(before, key=before.__getitem__) if before else last
    varied = next((axis for axis in range(n_rates) if last[axis] != centre[axis]), 0)
    around = [_moved(best, (varied + turn) % n_rates, by) for turn in range(n_rates) for by in (-1, 1)]
    return next((powers for powers in around if powers not in tried and is_allowed(powers)), None)


def _moved(powers, axis, by):
    return (*powers[:axis], powers[axis] + by, *powers[axis + 1 :])


def curve_of(losses, steps):
    """Mean training loss over each completed tenth of `steps`; empty for fewer than ten. A skipped step has None."""
    size = steps // 10
    parts = [losses[k * size : (k + 1) * size] for k in range(min(10, len(losses) // size))] if size else []
    known = [[loss for loss in part if loss is not None] for part in parts]
    return [statistics.fmean(part) if part else None for part in known]


def is_hopeless(curve, best):
    """Whether to stop a trial: after four tenths of the steps, its training loss is more than CLEARLY_WORSE above the
    best trial's at the same steps and rows, and the gap has not shrunk since the previous tenth.

    So a rate that is too low, which catches up slowly, is trained to the end.
    """
    last = [*curve[-2:], *best[max(0, len(curve) - 2) : len(curve)]]
    if len(curve) < _FIRST_LOOK or len(last) < 4 or None in last:
        return False
    before, now = last[0] - last[2], last[1] - last[3]
    return now > CLEARLY_WORSE and now >= before


def path_of(study, method):
    """The file with the result of a method's sweep."""
    return study.folder / "sweeps" / f"{method}.json"


def kept(study, method, *, factors=None, rows=ROWS):
    """The result of an earlier sweep with the same factors and rows, or None.

    factors=None: a search, or whichever sweep the study adopted its rates from.
    """
    path = path_of(study, method)
    found = require_shape(read_json(path), _SHAPE, path) if path.exists() else None
    if found is None or found["rows"] != rows:
        return None
    if factors is None:
        return found if "max_trials" in found or method in study.adopted_rates() else None
    return found if [entry["factor"] for entry in found["tried"]] == list(factors) else None


def is_at_edge(found):
    """Whether nothing was tried on one side of the best rate, so that a better one may lie beyond."""
    lines = _lines(found)
    return any(not below or not above for below, above in lines)


def verdict(found):
    """Text for a sweep's lowest loss: 'best' only if it is bracketed. found: a result, or what was adopted from one."""
    n_tried = f"{len(found['tried'])} trial{'s'[: len(found['tried']) > 1]}"
    n_tried += f" of at most {found['max_trials']}" if "max_trials" in found else ""
    at = f"on {found['rows']:,} rows"
    if is_at_edge(found):
        return f"lowest loss of {n_tried} {at}, at the edge of the tried range (a better rate may lie beyond)"
    return f"best of {n_tried} {at}" + (
        ", the next higher rate diverged or was clearly worse" if found.get("diverges_beyond") else ""
    )


def _lines(found):
    """[(entries below, entries above), ...] the best, one pair per searched factor; the nearest last and first."""
    best, made = _least(found["tried"]), []
    names = [name for name in ("factor", "factor_2") if name in best]
    for name in names:
        line = [entry for entry in found["tried"] if all(entry[n] == best[n] for n in names if n != name)]
        line.sort(key=lambda entry, name=name: entry[name])
        here = best[name]
        made.append(([e for e in line if e[name] < here], [e for e in line if e[name] > here]))
    return made


def _diverges_beyond(found, fields):
    """{field: the next higher rate} for rates at which training diverged."""
    highest, made = _least(found["tried"])["valid_loss"] + CLEARLY_WORSE, {}
    for at, (_, above) in enumerate(_lines(found)):
        if above and (above[0]["valid_loss"] is None or above[0]["valid_loss"] > highest):
            made |= {name: above[0][name] for name in (fields[at : at + 1] if "factor_2" in above[0] else fields)}
    return made


def _search(cfg, fields, tried):
    """Yield the factors of each trial; the caller adds its entry to `tried` before the next one."""

    def is_allowed(powers):
        try:
            return bool(cfg.replace(**_rates(cfg, fields, [3.0**power for power in powers])))
        except ConfigError:  # a rate out of range
            return False

    powers = []
    while True:
        known = dict(zip(powers, (entry["valid_loss"] for entry in tried), strict=True))
        found = next_trial(known, len(fields), is_allowed=is_allowed)
        if found is None:
            return
        powers.append(found)
        yield tuple(3.0**power for power in found)


def _rates(cfg, fields, point):
    """{field: rate}; a single factor applies to all rates."""
    each = point if len(point) > 1 else point * len(fields)
    return {name: getattr(cfg, name) * factor for name, factor in zip(fields, each, strict=True)}


def _least(tried):
    known = [entry for entry in tried if entry["valid_loss"] is not None]
    return min(known, key=lambda entry: entry["valid_loss"]) if known else None


class _Hopeless(Callback):
    """Stops a trial that is hopeless compared with the best trial's curve."""

    is_so = False

    def __init__(self, run, best):
        self._run, self._best = run, best

    def stop_asked(self):
        self.is_so = _is_hopeless(self._run.record, self._best)
        return self.is_so


def _is_hopeless(record, best):
    losses, steps = [step["loss"] for step in record["history"]], record["config"]["max_steps"]
    return best is not None and is_hopeless(curve_of(losses, steps), best)


def _trial(study, method, cfg, point, best, log):
    """The result of one trial, read from its record or trained now. Only the record is kept.

    best: the best trial's curve, for stopping a hopeless trial, or None.
    """
    shown = "x".join(f"{factor:g}" for factor in point)
    small = Study(study.folder / "sweeps" / f"{method}-{shown}", cfg)
    record = records.load(small, method, cfg.seed)
    is_settled = record is not None and (
        record["status"] == "ok"
        or _has_diverged(record)
        or (record["status"] == "stopped" and _is_hopeless(record, best))
    )
    if not is_settled or record["run_hash"] != cfg.run_hash(method):
        if not small.data_dir.exists():
            beside = small.folder / "data.copying"  # an incomplete copy must not be taken for the data
            shutil.rmtree(beside, ignore_errors=True)
            copy_tree(study.data_dir, beside)
            rename(beside, small.data_dir)
        small.freeze()
        run = TrainingRun(small, method, log=log)
        watch = _Hopeless(run, best)
        try:
            record = run.train([watch])
        except NonFiniteLossError:
            record = records.load(small, method, cfg.seed)
        if record["status"] == "stopped" and not watch.is_so:
            raise Stopped(f"the sweep of {method} stopped at factor {shown}, step {record['steps']}: run it again")
    for name in ("weights", "checkpoints", "compile", "data"):
        shutil.rmtree(small.folder / name, ignore_errors=True)
    return {
        "valid_loss": record["valid_history"][-1]["valid_loss"] if record["status"] == "ok" else None,
        "train_loss": record["train_loss"],
        "curve": curve_of([step["loss"] for step in record["history"]], cfg.max_steps),
        "stopped_at": record["steps"] if record["status"] == "stopped" else None,
    }


def _has_diverged(record):
    return record["status"] == "failed" and (record["error"] or "").startswith(NonFiniteLossError.__name__)


def _shown(rates):
    return ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
