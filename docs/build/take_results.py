"""Copies a finished study's results into results/: small, without weights, rows, answers or private paths."""

import shutil
import statistics
import time

import pandas as pd

from peftlib import build_report, load_tokenizer
from peftlib.core.errors import StudyError, writing
from peftlib.core.files import read_json, write_json
from peftlib.core.study import Study
from peftlib.evaluation import comparison, forgetting, results, stats
from peftlib.evaluation.hf_metrics import score
from peftlib.evaluation.results import BASE, BASE_CUT
from peftlib.export.redact import public_config, public_model, without_folders

FIGURES = ("scores", "rougeL_by_source", "rougeL_against_memory")
FIRST_LOOK_TOKENS = 96  # limit of answers in the early look whose scores docs/reference-study.md quotes
_HISTORY = 60  # entries of a history that are kept
_LEFT_OUT = ("layers", "weights_sha256", "settings_sha256", "losses")  # of records: long, or said twice
_MOST_BYTES = 300_000  # of a picture


def take_demo(study, target):
    """Write results.csv, the picture of scores and summary.json of a demo study to `target`."""
    built = build_report(study)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(study.results_path, target / "results.csv")
    shutil.copyfile(built.figures["scores"], target / "scores.png")
    boot = stats.quiet_bootstrap(built.study.systems())
    trained = [method for method in boot.value if method not in (BASE, BASE_CUT)]
    shown = (BASE, *trained)
    records = {run.record["method"]: run.record for run in built.study.runs if run.is_scored}
    evaluated = {method: records[method]["evaluation"] for method in shown}
    counts = study.manifest()["counts"]
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "model_provenance": records[BASE]["model_provenance"],
        "device": records[trained[0]]["device"],
        "steps": records[trained[0]]["steps"],
        "rows": {split: sum(counts[split].values()) for split in counts},
        "scores": {method: boot.value[method] for method in shown},
        "eval_loss": {method: records[method]["eval_loss"] for method in shown},
        "general_loss": {method: evaluated[method].get("general_loss") for method in shown},
        "general_loss_nf4": {method: evaluated[method].get(forgetting.ROUNDED_FIELD) for method in shown},
    }
    for name, other in (("rougeL_over_base", BASE), ("rougeL_over_base_cut", BASE_CUT)):
        summary[name] = {method: _interval(boot.difference(method, other, "rougeL")) for method in trained}
    write_json(target / "summary.json", summary)


def take_reference(study, target):
    """Write config, results.csv, records, sweeps, pictures and summary.json of a study to `target`, old ones removed.

    The study of the same name with the other precision, where there is one, is compared method by method.
    StudyError: no run is finished, or as build_report.
    """
    built, sibling = build_report(study), sibling_of(study)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for name in ("records", "records-fp16", "sweeps", "figures"):
        shutil.rmtree(target / name, ignore_errors=True)
    with writing(target / "results.csv"):
        shutil.copyfile(study.results_path, target / "results.csv")
    config = read_json(study.config_path)
    write_json(target / "config.json", {**config, "config": public_config(config["config"])})
    _records(study, target / "records")
    if sibling is not None:
        _records(sibling, target / "records-fp16")
    for path in sorted((study.folder / "sweeps").glob("*.json")):
        write_json(target / "sweeps" / path.name, read_json(path))
    summary = _summary(study, built)
    summary["precision"] = _precisions(built, sibling) if sibling is not None else {}
    summary["figures"] = _pictures(built, target / "figures")
    write_json(target / "summary.json", summary)


def sibling_of(study):
    """The study NAME-fp16 beside a study, or None."""
    name = f"{study.folder.name}-fp16"
    folder = study.folder.parent / name
    return Study(folder, study.cfg.replace(study=name, precision="fp16")) if folder.is_dir() else None


def _summary(study, built):
    """What the tables are made from, as a JSON object, but for the pictures and the other precision."""
    found, manifest = built.study, study.manifest()
    boot = stats.quiet_bootstrap(found.systems())
    runs = {}
    for run in found.runs:
        if run.record["status"] == "ok":
            runs.setdefault(run.record["method"], []).append(run)
    trained = [run for method, part in runs.items() for run in part if method != BASE]
    if not trained:
        raise StudyError(f"no finished run in {study.folder}: run `peftlib reference --study {study.folder.name}`")
    counts = manifest["counts"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "study": study.folder.name,
        "model_provenance": trained[0].record["model_provenance"],
        "devices": sorted({run.record["device"] for run in trained}),
        "side_by_side": max(run.record.get("side_by_side", 1) for run in trained),
        "versions": trained[0].record["versions"],
        "commits": sorted({str(run.record["git"]["commit"])[:12] for run in trained if run.record.get("git")}),
        "split_hash": found.split_hash,
        "rows": {split: sum(counts[split].values()) for split in counts},
        "n_test": len(found.test_rows),
        "tokens_per_row": _tokens_per_row(manifest),
        "steps": sorted({run.record["steps"] for run in trained}),
        "train_tokens": sorted({run.record["train_tokens"] for run in trained}),
        "cut_at_words": found.cut_at_words,
        "base_cut": {metric: boot.value[BASE_CUT][metric] for metric in stats.METRICS}
        if BASE_CUT in boot.value
        else None,
        "sources": _by_source(built.per_source),
        "methods": {method: _method(method, part, found, boot, study) for method, part in runs.items()},
        "pairs": _pairs(built.pairs),
        "losses": _over_seeds(found),
        "first_look": _at_limit(found, study.cfg, FIRST_LOOK_TOKENS),
        "notes": [without_folders(note) for note in built.notes],
    }


def _method(method, runs, found, boot, study):
    """Figures of one method's finished runs, a list over seeds where they differ."""
    records = [run.record for run in runs]
    known = {
        "seeds": [record["seed"] for record in records],
        "eval_loss": [record["eval_loss"] for record in records],
        "general_loss": [run.general.loss if run.general else None for run in runs],
        "general_loss_nf4": next((run.rounded.loss for run in runs if run.rounded), None),
        "truncated_share": comparison.mean_of(runs, lambda run: run.truncated_share),
        "peak_memory_gib": [_gib(record["peak_memory_bytes"]) for record in records],
        "median_tokens_per_second": [_median_speed(record) for record in records],
        "first_step_seconds": [record.get("first_step_s") for record in records],
        "train_seconds": [record["train_seconds"] for record in records],
        "trainable_params": records[0]["trainable_params"],
        "precision": sorted({record["precision"] for record in records}),
        "learning_rate": records[0]["learning_rate"],
        "learning_rate_2": records[0]["learning_rate_2"],
        "sweep": study.adopted_rates().get(method),
        "scores": None,
        "over_base": None,
        "over_base_cut": None,
    }
    if method in found.scored:
        scored = found.scored[method]
        known["scores"] = {
            m: {**_interval(boot.interval(method, m)), "seeds": [run.rows.scores()[m] for run in scored]}
            for m in stats.METRICS
        }
        if method != BASE and BASE in found.scored:
            for name, other in (("over_base", BASE), ("over_base_cut", BASE_CUT)):
                known[name] = {metric: _interval(boot.difference(method, other, metric)) for metric in stats.METRICS}
    return known


def _tokens_per_row(manifest):
    """Mean tokens of a training row, or None where the data do not say."""
    known = [found["total"] for found in manifest.get("tokens", {}).get("train", {}).values() if found]
    return sum(known) / sum(manifest["counts"]["train"].values()) if known else None


def _by_source(frame):
    """{source: {'rows': int, 'scores': {method: {metric: float}}}} of the report's scores by source."""
    made = {}
    for row in frame.to_dict("records"):
        known = made.setdefault(row["source"], {"rows": int(row["n"]), "scores": {}})
        known["scores"][row["method"]] = {metric: row[metric] for metric in stats.METRICS}
    return made


def _pairs(frame):
    """Rows of the report's pairs as dicts, base cut left out; p_of_rows is None where seeds do not pair."""
    rows = [row for row in frame.to_dict("records") if BASE_CUT not in (row["method"], row["other"])]
    for row in rows:
        p = row.pop("p")
        row["p_of_rows"] = None if pd.isna(p) else p
    return rows


def _over_seeds(found):
    """[{'what', 'method', 'other', interval}, ...] of losses, every pair of methods of which several seeds are
    known."""
    scored = found.scored.items()
    values = {"eval_loss": {method: [run.eval_loss for run in runs] for method, runs in scored}}
    texts = {run.general.text_sha256 for _, runs in scored for run in runs if run.general}
    if len(texts) <= 1:  # else the losses are of different texts
        values["general_loss"] = {m: [run.general and run.general.loss for run in runs] for m, runs in scored}
    made = []
    for what, losses in values.items():
        known = {method: part for method, part in losses.items() if None not in part}
        for at, method in enumerate(known):
            for other in list(known)[:at]:
                if max(len(known[method]), len(known[other])) > 1:
                    gap = stats.seeds_difference(known[method], known[other])
                    made.append({"what": what, "method": method, "other": other, **_interval(gap)})
    return made


def _at_limit(found, cfg, limit):
    """{'max_new_tokens', 'scores': {method: {metric: mean over seeds}}} of answers cut at fewer tokens than they had.

    A model that never stops loses precision with each token more, so scores under two limits cannot be compared.
    """
    if cfg.max_new_tokens <= limit:
        return None
    tokenizer = load_tokenizer(cfg.model)

    def scores(answers):
        ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        cut = tokenizer.batch_decode([row[:limit] for row in ids])
        return score(cut, found.references, tokenizer=found.tokenizer)

    made = {method: [scores(run.answers) for run in runs] for method, runs in found.scored.items()}
    means = {m: {name: statistics.fmean(s[name] for s in part) for name in stats.METRICS} for m, part in made.items()}
    return {"max_new_tokens": limit, "scores": means}


def _precisions(built, sibling):
    """{method: figures of one seed in both precisions}; a run that was not scored has no 'difference'."""
    others = {(run.record["method"], run.record["seed"]): run for run in results.load(sibling).runs}
    made = {}
    for run in built.study.runs:
        other = others.get((run.record["method"], run.record["seed"]))
        if other is None or not other.record["status"] == run.record["status"] == "ok":
            continue
        difference = None
        if other.is_scored and run.is_scored:
            boot = stats.quiet_bootstrap({"fp16": [other.rows], "bf16": [run.rows]})
            difference = {metric: _interval(boot.difference("fp16", "bf16", metric)) for metric in stats.METRICS}
        reasons = filter(None, (without_folders(one.record.get("evaluation_error")) for one in (other, run)))
        made[run.record["method"]] = {
            "seed": run.record["seed"],
            "difference": difference,
            "unscored_because": "" if difference else "; ".join(dict.fromkeys(reasons)),
            **{one.record["precision"]: _facts(one) for one in (other, run)},
        }
    return made


def _facts(run):
    record, scores = run.record, run.rows.scores() if run.is_scored else {}
    return {
        **{metric: scores.get(metric) for metric in stats.METRICS},
        "valid_loss": record["valid_history"][-1]["valid_loss"] if record["valid_history"] else None,
        "eval_loss": run.eval_loss,
        "general_loss": run.general.loss if run.general else None,
        "peak_memory_gib": _gib(record["peak_memory_bytes"]),
        "tokens_per_second": record["tokens_per_second"],
        "skipped_steps": record["skipped_steps"],
    }


def _median_speed(record):
    """Median over steps of tokens a second, which compiling and saving do not touch; None without a history."""
    speeds = [step["tokens"] / step["seconds"] for step in record["history"] if step.get("seconds")]
    return statistics.median(speeds) if speeds else None


def _records(study, folder):
    for record in study.records():
        kept = {name: value for name, value in record.items() if name not in _LEFT_OUT}
        kept |= {name: without_folders(kept.get(name)) for name in ("error", "evaluation_error") if name in kept}
        kept["config"] = public_config(kept["config"])
        kept["model"] = public_model(kept["model"])
        kept["median_tokens_per_second"] = _median_speed(record)
        kept["history"] = thinned([{name: e.get(name) for name in ("step", "loss")} for e in record["history"]])
        write_json(folder / f"{record['method']}-s{record['seed']}.json", kept)


def thinned(entries, most=_HISTORY):
    """At most so many entries at even distances, the first and the last among them."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def _pictures(built, folder):
    """Copy the figures that the docs show; returns [{'file', 'alt'}, ...]."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    made = []
    for path, alt in ((built.figures[name], built.alt[name]) for name in FIGURES if name in built.figures):
        if path.stat().st_size > _MOST_BYTES:
            raise StudyError(
                f"{path} has {path.stat().st_size:,} bytes, more than {_MOST_BYTES:,}: too large to commit"
            )
        with writing(folder / path.name):
            shutil.copyfile(path, folder / path.name)
        made.append({"file": path.name, "alt": alt})
    return made


def _interval(found):
    """A stats.Interval as a JSON object."""
    return {"value": found.value, "low": found.low, "high": found.high, "is_noise": found.is_noise}


def _gib(n_bytes):
    return None if n_bytes is None else n_bytes / 2**30
