"""A reference study's results, taken into results/reference: small, without weights, rows, answers or private paths."""

import shutil
import statistics
import time
from pathlib import Path

import pandas as pd

from peftlib import data
from peftlib.evaluation import comparison, metrics, stats
import reference_precision
from peftlib.core.errors import StudyError, writing
from peftlib.core.files import read_json, write_json
from peftlib.export.redact import public_config, public_model, without_folders
from reference_numbers import bootstrap, interval
from peftlib.report.results import gib
from peftlib.evaluation.results import BASE, BASE_CUT
from peftlib.core.study import Study
from peftlib.methods import BASE, METHODS

FIGURES = ("scores", "rougeL_by_source", "rougeL_against_memory")
FIRST_LOOK_TOKENS = 96  # the limit of answers in the first look of this project's plan, whose scores are quoted
_HISTORY = 60  # entries of a history that are kept
_LEFT_OUT = ("layers", "weights_sha256", "settings_sha256", "losses")  # of records: long, or said twice
_MOST_BYTES = 300_000  # of a picture


def take(study, target, *, sibling=None, seeds=(0, 1, 2), lacking=""):
    """Write config, results.csv, records, sweeps, pictures and summary.json of a study to `target`, old ones removed.

    sibling: the study of the checked methods in the other precision, or None. seeds: that each method should have.
    lacking: why runs without a record were not run, and runs in the other precision not scored, in words.
    StudyError: as report.build.
    """
    from peftlib.report import build as report

    built = report.build(study)
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
    summary = summary_of(study, built, seeds=seeds, lacking=lacking)
    summary["precision"] = reference_precision.compared(built, sibling, lacking=lacking)
    summary["figures"] = _pictures(built, target / "figures")
    write_json(target / "summary.json", summary)


def sibling_of(study):
    """The study of the other precision beside a study, or None."""
    from peftlib.runner.suite import OTHER_PRECISION

    name = f"{study.folder.name}-{OTHER_PRECISION}"
    folder = study.folder.parent / name
    if not (folder / "records").is_dir():
        return None
    return Study(folder, study.cfg.replace(study=name, precision=OTHER_PRECISION))


def summary_of(study, built, *, seeds, lacking=""):
    """What README's section is made from, as a JSON object, but for the pictures and the other precision."""
    found, manifest = built.study, study.manifest()
    boot = bootstrap(found.systems())
    runs = {}
    for run in found.runs:
        runs.setdefault(run.record["method"], []).append(run)
    finished = {m: [run for run in part if run.record["status"] == "ok"] for m, part in runs.items()}
    trained = [run for method, part in finished.items() for run in part if method != BASE]
    if not trained:
        raise StudyError(
            f"no finished run in {study.folder}: run python -m peftlib reference --study {study.folder.name}"
        )
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
        "methods": {method: _method(method, part, found, boot, study) for method, part in finished.items() if part},
        "pairs": _pairs(built.pairs),
        "losses": _over_seeds(found),
        "cells": _cells(runs, seeds, lacking=lacking),
        "first_look": _at_limit(found, study.cfg, FIRST_LOOK_TOKENS),
        "notes": [without_folders(note) for note in built.notes],
    }


def _tokens_per_row(manifest):
    """Mean tokens of a training row, or None where the data do not say."""
    known = [found["total"] for found in manifest.get("tokens", {}).get("train", {}).values() if found]
    return sum(known) / sum(manifest["counts"]["train"].values()) if known else None


def _pairs(frame):
    """Rows of the report's pairs as dicts, base cut left out; p is None where seeds do not pair."""
    rows = [row for row in frame.to_dict("records") if BASE_CUT not in (row["method"], row["other"])]
    # As report.md says, p is of these runs on other rows: it does not count that seeds differ, as the interval does.
    for row in rows:
        p = row.pop("p")
        row["p_of_rows"] = None if pd.isna(p) else p
    return rows


def _at_limit(found, cfg, limit):
    """{'max_new_tokens', 'scores': {method: {metric: mean over seeds}}} of answers cut at fewer tokens than they had.

    A model that never stops loses precision with each token more, so that scores under two limits cannot be compared.
    """
    if cfg.max_new_tokens <= limit:
        return None
    tokenizer = data.load_tokenizer(cfg.model)

    def scores(answers):
        ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        cut = tokenizer.batch_decode([row[:limit] for row in ids])
        return metrics.row_scores(cut, found.references, tokenizer=found.tokenizer).scores()

    made = {method: [scores(run.answers) for run in runs] for method, runs in found.scored.items()}
    means = {m: {name: statistics.fmean(s[name] for s in part) for name in stats.METRICS} for m, part in made.items()}
    return {"max_new_tokens": limit, "scores": means}


def _answer_seconds(run):
    """Seconds of all answers; a session that made the last ones alone knows only these, so they are scaled by tokens."""
    done = run.record["evaluation"] or {}
    seconds, tokens = done.get("generate_seconds"), done.get("generated_tokens")
    if tokens is None or not run.n_tokens:
        return seconds
    return seconds * sum(run.n_tokens) / tokens if seconds and tokens else None


def _median_speed(record):
    """Median over steps of tokens a second, which compiling and saving do not touch; None without a history."""
    speeds = [step["tokens"] / step["seconds"] for step in record["history"] if step.get("seconds")]
    return statistics.median(speeds) if speeds else None


def _by_source(frame):
    """{source: {'rows': int, 'scores': {method: {metric: float}}}} of the report's scores by source."""
    made = {}
    for row in frame.to_dict("records"):
        known = made.setdefault(row["source"], {"rows": int(row["n"]), "scores": {}})
        known["scores"][row["method"]] = {metric: row[metric] for metric in stats.METRICS}
    return made


def _method(method, runs, found, boot, study):
    """Figures of one method's finished runs."""
    records = [run.record for run in runs]
    known = {
        "seeds": [record["seed"] for record in records],
        "eval_loss": [record["eval_loss"] for record in records],
        "general_loss": [run.general.loss if run.general else None for run in runs],
        "general_loss_nf4": next((run.rounded.loss for run in runs if run.rounded), None),
        "truncated_share": comparison.mean_of(runs, lambda run: run.truncated_share),
        "peak_memory_gib": [gib(record["peak_memory_bytes"]) for record in records],
        "tokens_per_second": [record["tokens_per_second"] for record in records],
        "median_tokens_per_second": [_median_speed(record) for record in records],
        "first_step_seconds": [record.get("first_step_s") for record in records],
        "train_seconds": [record["train_seconds"] for record in records],
        "generate_seconds": [_answer_seconds(run) for run in runs],
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
        known["scores"] = {
            metric: {
                **interval(boot.interval(method, metric)),
                "seeds": [run.rows.scores()[metric] for run in found.scored[method]],
            }
            for metric in stats.METRICS
        }
        if method != BASE and BASE in found.scored:
            for name, other in (("over_base", BASE), ("over_base_cut", BASE_CUT)):
                known[name] = {metric: interval(boot.difference(method, other, metric)) for metric in stats.METRICS}
    return known


def _over_seeds(found):
    """[{'what', 'method', 'other', interval}, ...] of losses, methods against base and each other, where seeds tell."""
    made = []
    values = {
        "eval_loss": {m: [run.eval_loss for run in runs] for m, runs in found.scored.items()},
        "general_loss": {m: [run.general and run.general.loss for run in runs] for m, runs in found.scored.items()},
    }
    texts = {run.general.text_sha256 for runs in found.scored.values() for run in runs if run.general}
    if len(texts) > 1:
        del values["general_loss"]  # of other texts
    for what, losses in values.items():
        known = {method: part for method, part in losses.items() if None not in part}
        names = list(known)
        for at, method in enumerate(names):
            for other in names[:at]:
                if max(len(known[method]), len(known[other])) > 1:
                    gap = stats.seeds_difference(known[method], known[other])
                    made.append({"what": what, "method": method, "other": other, **interval(gap)})
    return made


def _cells(runs, seeds, *, lacking):
    """[{'method', 'seed', 'status', 'reason'}, ...] of every run that the study should have."""
    made = []
    for method in (BASE, *METHODS):
        by_seed = {run.record["seed"]: run for run in runs.get(method, [])}
        for seed in (0,) if method == BASE else seeds:
            run = by_seed.get(seed)
            status, reason = "not run", lacking
            if run is not None:
                record = run.record
                status, reason = record["status"], record["error"] or record.get("evaluation_error") or ""
                if status == "ok" and not run.is_scored:
                    status, reason = "trained", reason or "not evaluated"
                elif status == "stopped":
                    reason = f"at step {record['steps']} of {record['planned_steps']}"
            reason = without_folders(reason).split("\n")[0][:200]
            made.append({"method": method, "seed": seed, "status": status, "reason": reason})
    return made


def _records(study, folder):
    for record in study.records():
        kept = {name: value for name, value in record.items() if name not in _LEFT_OUT}
        kept["error"] = without_folders(kept["error"])
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
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in FIGURES:
        if name not in built.figures:
            continue
        path = Path(built.figures[name])
        if path.stat().st_size > _MOST_BYTES:
            raise StudyError(
                f"{path} has {path.stat().st_size:,} bytes, more than {_MOST_BYTES:,}: too large to commit"
            )
        with writing(folder / path.name):
            shutil.copyfile(path, folder / path.name)
        made.append({"file": path.name, "alt": built.alt[name]})
    return made
