"""A small learning-rate sweep per method, scored on the validation rows and kept beside the study."""

import shutil

from peftlib import methods
from peftlib import record as records
from peftlib.errors import ConfigError
from peftlib.files import write_json
from peftlib.study import Study
from peftlib.train import TrainingRun

FACTORS = (0.3, 1.0, 3.0)


def sweep(study, method, *, factors=FACTORS, rows=1500, log=print):
    """Train `method` on the first `rows` of the study's row order at each factor of its rates; returns what was found.

    A method with two rates (the hybrid) has both multiplied. {'method', 'rows', 'steps', 'tried': [{'factor', one
    entry a rate field, 'valid_loss', 'train_loss'}, ...], 'best': the entry of the least validation loss}, also written
    to sweeps/<method>.json. Test rows are never seen. A cut sweep goes on where it stopped.
    ConfigError: no validation rows, a factor that is not positive or leads to a rate out of range.
    """
    cfg = study.cfg
    if cfg.valid_rows == 0:
        raise ConfigError("valid_rows=0: a sweep is scored on validation rows, so build the data with some")
    if not factors or min(factors) <= 0:
        raise ConfigError(f"factors={factors!r}: use positive numbers")
    fields = methods.find(method).RATES
    steps = max(1, rows // cfg.sequences_per_step)
    tried = []
    for factor in factors:
        rates = {name: getattr(cfg, name) * factor for name in fields}
        record = _trained(study, method, cfg.replace(max_steps=steps, **rates), factor, log)
        last = record["valid_history"][-1]["valid_loss"]
        tried.append({"factor": factor, **rates, "valid_loss": last, "train_loss": record["train_loss"]})
        log(f"{method}, {_shown(rates)}: validation loss {last:.4f}")
    best = min(tried, key=lambda entry: entry["valid_loss"])
    found = {"method": method, "rows": rows, "steps": record["steps"], "seed": cfg.seed, "tried": tried, "best": best}
    write_json(study.folder / "sweeps" / f"{method}.json", found)
    edge = " (at the edge of what was tried: try further)" if best["factor"] in (min(factors), max(factors)) else ""
    log(f"{method}: best {_shown({name: best[name] for name in fields})}{edge}")
    return found


def _trained(study, method, cfg, factor, log):
    """The record of one run of the sweep, from its place below the study or made now."""
    small = Study(study.folder / "sweeps" / f"{method}-{factor:g}", cfg)
    kept = records.load(small, method, cfg.seed)
    if kept is not None and kept["status"] == "ok" and kept["run_hash"] == cfg.run_hash(method):
        return kept
    if not small.data_dir.exists():
        shutil.copytree(study.data_dir, small.data_dir)
    small.freeze()
    record = TrainingRun(small, method, log=log).train()
    records.require_ok(record)
    for folder in (small.weights_dir(method, cfg.seed), small.data_dir):
        shutil.rmtree(folder, ignore_errors=True)  # the record is what counts
    return record


def _shown(rates):
    return ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
