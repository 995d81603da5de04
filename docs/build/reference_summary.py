"""What the tables of the reference study are made from: summary.json of a finished study."""

import statistics
import time

import evaluate
import numpy as np
import pandas as pd

from peftlib import load_tokenizer
from peftlib.core.errors import StudyError
from peftlib.core.files import gib
from peftlib.evaluation import comparison, results, stats
from peftlib.evaluation.hf_metrics import Bleu4, RougeL
from peftlib.evaluation.results import BASE, BASE_CUT
from peftlib.export.redact import without_folders
from peftlib.models.shapes import short_name

FIRST_LOOK_TOKENS = 96  # limit of answers in the early look whose scores docs/reference-study.md quotes


def summary_of(study, built):
    """What the tables are made from, as a JSON object, but for the pictures and the other precision."""
    found, manifest = built.study, study.manifest()
    boot = stats.bootstrap(found.systems())
    runs = {}
    for run in found.runs:
        if run.record["status"] == "ok":
            runs.setdefault(run.record["method"], []).append(run)
    trained = [run for method, part in runs.items() for run in part if method != BASE]
    if not trained:
        raise StudyError(f"no finished run in {study.folder}: run `peftlib study run --study {study.folder.name}`")
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
        "base_cut": boot.value.get(BASE_CUT),
        "sources": _by_source(built.per_source),
        "methods": {method: _method(method, part, found, boot, study) for method, part in runs.items()},
        "pairs": _pairs(built.pairs),
        "losses": _over_seeds(found),
        "first_look": _at_limit(found, study.cfg, FIRST_LOOK_TOKENS),
        "benchmarks": _benchmarks(built),
        "rewound": built.numbers.rewound,
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
        "peak_memory_gib": [gib(record["peak_memory_bytes"]) for record in records],
        "median_tokens_per_second": [median_speed(record) for record in records],
        "first_step_seconds": [record.get("first_step_s") for record in records],
        "train_seconds": [record["train_seconds"] for record in records],
        "trainable_params": records[0]["trainable_params"],
        "precision": sorted({record["precision"] for record in records}),
        "on": sorted({_place(record) for record in records if record["device"]}),
        "learning_rate": records[0]["learning_rate"],
        "learning_rate_2": records[0]["learning_rate_2"],
        "sweep": study.adopted_rates().get(method),
        "scores": None,
        "over_base": None,
        "over_base_cut": None,
    }
    if method in found.scored:
        scored = found.scored[method]
        seeds = {metric: [run.rows.scores()[metric] for run in scored] for metric in stats.METRICS}
        known["scores"] = {m: {**interval(boot.interval(method, m)), "seeds": seeds[m]} for m in stats.METRICS}
        if method != BASE and BASE in found.scored:
            for name, other in (("over_base", BASE), ("over_base_cut", BASE_CUT)):
                known[name] = _differences(boot, method, other)
    return known


def _place(record):
    """The card, and how many runs shared it."""
    shared = record.get("side_by_side", 1)
    return short_name(record["device"]) + (f", {shared} runs at once" if shared > 1 else "")


def _benchmarks(built):
    """{'tasks': {task: {..., 'methods': {method: its score}}}, 'lost_on': [task, ...], 'lost': {method: change}}.

    lost: the mean change of accuracy against base over the tasks lost_on.
    """
    tasks = {}
    for scores in built.benchmarks:
        known = {}
        for method, by_seed in scores.runs.items():
            is_compared = method != BASE and BASE in scores.runs
            known[method] = {
                **interval(scores.interval(method)),
                "seeds": sorted(by_seed),
                "is_at_floor": scores.is_at_floor(method),
                "over_base": interval(scores.boot.difference(method, BASE, stats.RATIO)) if is_compared else None,
            }
        facts = {name: scores.facts[name] for name in ("metric", "is_perplexity", "chance", "shots")}
        tasks[scores.task] = {"n": scores.boot.n_rows, **facts, "methods": known}
    lost = {method: interval(change) for method, (_, change) in built.numbers.trade.items()}
    return {"tasks": tasks, "lost_on": built.numbers.lost_on, "lost": lost}


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
    """[{'what', 'method', 'other', interval}, ...] of losses, of every two methods one of which has several seeds."""
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
                    gap = seeds_difference(known[method], known[other])
                    made.append({"what": what, "method": method, "other": other, **interval(gap)})
    return made


def seeds_difference(values, others, *, resamples=20_000, seed=0):
    """95 % Interval of mean(values) - mean(others), numbers of one seed each; seeds are all that varies.

    Each mean is drawn from Student's t around it, seeds paired in their order; a side with one value stands as it is.
    ValueError: no values on a side, or one on both, of which nothing says how far seeds are apart.
    """
    if not values or not others or max(len(values), len(others)) < 2:
        raise ValueError(f"{len(values)} and {len(others)} seeds: an interval over seeds needs two on a side")
    draws = stats.SeedDraws(resamples, max(len(values), len(others)), np.random.default_rng(seed))
    mine, theirs = (draws.of(len(side)) @ np.array(side, float) for side in (values, others))
    value = statistics.fmean(values) - statistics.fmean(others)
    low, high = value + np.quantile(mine - theirs, [0.025, 0.975])
    return stats.Interval(value, float(low), float(high))


def _at_limit(found, cfg, limit, methods=(BASE, "qlora", "galore")):
    """{'max_new_tokens', 'scores': {method: {metric: mean over seeds}}} of answers cut at fewer tokens than they had.

    A model that never stops loses precision with each token more, so scores under two limits cannot be compared.
    """
    if cfg.max_new_tokens <= limit:
        return None
    tokenizer = load_tokenizer(cfg.model)

    def scores(answers):
        ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        cut = tokenizer.batch_decode([row[:limit] for row in ids])
        metric = evaluate.combine([Bleu4(found.tokenizer), RougeL()])
        return metric.compute(predictions=cut, references=found.references)

    made = {m: [scores(run.answers) for run in runs] for m, runs in found.scored.items() if m in methods}
    means = {m: {name: statistics.fmean(s[name] for s in part) for name in stats.METRICS} for m, part in made.items()}
    return {"max_new_tokens": limit, "scores": means}


def compared(built, sibling, names=None):
    """{method: figures of one seed of a sibling study and of this one}; a run that was not scored has no 'difference'.

    names: of the two sides; their precisions where there are none.
    """
    others = {(run.record["method"], run.record["seed"]): run for run in results.load(sibling).runs}
    made = {}
    for run in built.study.runs:
        other = others.get((run.record["method"], run.record["seed"]))
        if other is None or not other.record["status"] == run.record["status"] == "ok":
            continue
        difference, (there, here) = None, names or (other.record["precision"], run.record["precision"])
        if other.is_scored and run.is_scored:
            difference = _differences(stats.bootstrap({there: [other.rows], here: [run.rows]}), there, here)
        reasons = filter(None, (without_folders(one.record.get("evaluation_error")) for one in (other, run)))
        made[run.record["method"]] = {
            "seed": run.record["seed"],
            "difference": difference,
            "unscored_because": "" if difference else "; ".join(dict.fromkeys(reasons)),
            there: _facts(other),
            here: _facts(run),
        }
    return made


def _facts(run):
    record, scores = run.record, run.rows.scores() if run.is_scored else {}
    return {
        **{metric: scores.get(metric) for metric in stats.METRICS},
        "valid_loss": record["valid_history"][-1]["valid_loss"] if record["valid_history"] else None,
        "eval_loss": run.eval_loss,
        "general_loss": run.general.loss if run.general else None,
        "peak_memory_gib": gib(record["peak_memory_bytes"]),
        "median_tokens_per_second": median_speed(record),
        "on": record["device"] and _place(record),
        "skipped_steps": record["skipped_steps"],
    }


def median_speed(record):
    """Median over steps of tokens a second, which compiling and saving do not touch; None without a history."""
    speeds = [step["tokens"] / step["seconds"] for step in record["history"] if step.get("seconds")]
    return statistics.median(speeds) if speeds else None


def _differences(boot, method, other):
    return {metric: interval(boot.difference(method, other, metric)) for metric in stats.METRICS}


def interval(found):
    """A stats.Interval as a JSON object."""
    return {"value": found.value, "low": found.low, "high": found.high, "is_noise": found.is_noise}
