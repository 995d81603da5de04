"""Rewinding: interpolated models between the untrained and a trained one, and what they have learned and forgotten.

W(a) = base + a (tuned - base) of merged weights, as in Wortsman et al. 2022 (WiSE-FT, arXiv:2109.01903). Every method's
base is the unquantized one, so all curves start at one point; a 4-bit method's rounding is scaled with the rest.
"""

import contextlib
import math
import time

import torch

from peftlib import data
from peftlib.core import record as records
from peftlib.core.config import differences, short_hash
from peftlib.core.env import resolve_device
from peftlib.core.errors import ConfigError, ModelError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import Map, Maybe, require_shape
from peftlib.evaluation import forgetting
from peftlib.evaluation.benchmarks import scores, tasks
from peftlib.evaluation.benchmarks.run import Lent, scored_rows
from peftlib.evaluation.evaluate import answer_into, autocast_of, evaluation_dtype, general_loss, load_model
from peftlib.evaluation.predictions import Predictions
from peftlib.methods import BASE
from peftlib.storage.lock import held
from peftlib.train.batching import Rows, mean_loss

ALL = "all"  # sources together
ROWS = 500  # maximum per benchmark and point: a mean of five tasks has a standard error of at most one point
_NUMBER = Maybe(float)
_POINT = {"factor": float, "valid_loss": Map(_NUMBER), "test_loss": Map(_NUMBER), "rougeL": float, "bleu4": float}
_POINT |= {"general_loss": _NUMBER, "seconds": float}
_POINT |= {"benchmarks?": Map({"score": float, "n": int})}
_SHAPE = {"of": {}, "points": [_POINT]}


@contextlib.contextmanager
def rewound(model, base, factor):
    """Context manager: `model` with the weights base + factor (tuned - base); restores its own weights afterwards.

    model, base: plain models of the same shape, adapters merged. factor: 1 gives exactly the model, 0 exactly the
    base. ModelError: their parameters differ in name or shape.
    """
    own, of_base = dict(model.named_parameters()), dict(base.named_parameters())
    unlike = {(name, p.shape) for name, p in own.items()} ^ {(name, p.shape) for name, p in of_base.items()}
    if unlike:
        raise ModelError(f"cannot rewind to a base of another shape: {min(unlike)[0]} differs")
    kept = {name: p.detach().clone() for name, p in own.items()}
    try:
        with torch.no_grad():
            for name, p in own.items():  # in place, because other code holds references to the weights
                p.copy_(torch.lerp(of_base[name].to(p.device).float(), kept[name].float(), factor))
        yield model
    finally:
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(kept[name])


def require_factors(method, factors):
    """ConfigError unless a method can be rewound to factors."""
    if method == BASE or not all(0 <= factor <= 1 for factor in factors):
        raise ConfigError(f"--rewind {factors} of {method}: use factors from 0 to 1 of a trained method")


def missing(study, record, factors):
    """[factor, ...] between 0 and 1 at which a run's current weights are not scored yet."""
    path = path_of(study, record["method"], record["seed"])
    kept = _read(path) if record["evaluation"] and path.exists() else {"of": {}, "points": []}
    is_of_run = record["evaluation"] and not differences(kept["of"], _identity(study, record))
    known = _known(study, kept) if is_of_run else {}
    return [factor for factor in factors if 0 < factor < 1 and factor not in known]


def rewind(study, method, factors, *, log=print):
    """Score an evaluated run at factors between base (0) and tuned (1), without these ends; returns [point, ...].

    A point is a dict: factor, valid_loss and test_loss ({source or 'all': nats per token}), general_loss, rougeL,
    bleu4, seconds, and benchmarks: {task: score, n ...} on the first ROWS rows of the retention tasks that the setting
    `benchmarks` names. Points are saved in rewind/<method>-s<seed>.json, with answers next to it, and reused.
    ConfigError: a factor outside 0 to 1, or base. StudyError: not trained or evaluated yet, or points of other weights.
    Stopped: this session ends soon. Other errors as in peftlib bench.
    """
    require_factors(method, factors)
    with held(study.folder, f"rewinding {method}", run=f"{method}-s{study.cfg.seed}", log=log):
        return _points(study, method, study.cfg.seed, {float(f) for f in factors if 0 < f < 1}, log)


def _points(study, method, seed, factors, log):
    """[point, ...] of one run at the factors and those in its file, in order; measures missing points."""
    record = records.load(study, method, seed)
    if record is None or not record["evaluation"]:
        raise StudyError(f"{method} (seed {seed}) is not evaluated in {study.folder}: peftlib evaluate {method} first")
    path, of = path_of(study, method, seed), _identity(study, record)
    kept = _read(path) if path.exists() else {"of": of, "points": []}
    changed = differences(kept["of"], of)
    if changed:
        raise StudyError(f"{path} holds points of another run ({'; '.join(changed)}): move it and its folder away")
    now = evaluation_dtype(resolve_device(study.cfg.device))[1]
    if now != of["precision"]:
        raise StudyError(f"{method} was evaluated in {of['precision']}, this machine uses {now}: rewind it there")
    points, models = {point["factor"]: point for point in kept["points"]}, None
    left = sorted(factors - _known(study, kept).keys())
    benchmarks = [tasks.load(task, study.cfg.benchmark_data or None) for task in _retained(study)] if left else []
    for factor in left:
        started = time.monotonic()
        models = models or _models(study, method, seed, log)
        answers = Predictions(path.with_suffix("") / f"{factor!r}.jsonl", short_hash(of))
        with rewound(*models, factor) as model:
            point = {"factor": factor, **_scores(study, model, answers, log)}
            of_tasks = (_benchmark(study, of, model, answers.path, benchmark, log) for benchmark in benchmarks)
            point["benchmarks"] = dict(zip(_retained(study), of_tasks))
        points[factor] = {**point, "seconds": time.monotonic() - started}
        write_json(path, {"of": of, "points": [points[factor] for factor in sorted(points)]})
        log(f"{method} at {factor:g}: test loss {point['test_loss'][ALL]}, general {point['general_loss']}, "
            f"ROUGE-L {point['rougeL']:.4f}")  # fmt: skip
    return [points[factor] for factor in sorted(points)]


def _retained(study):
    """[task, ...] that points are scored on: the retention tasks in the setting `benchmarks`; none for "auto"."""
    named = () if study.cfg.benchmarks in ("", "auto") else tasks.chosen(study.cfg.benchmarks)
    return [task for task in named if task in tasks.SETS[tasks.RETENTION]]


def _known(study, kept):
    """{factor: point} of a file's points that are scored on all requested tasks, with as many rows as any point."""
    asked, rows = {*_retained(study)}, _most_rows(kept["points"])

    def scored(point):
        return {task for task, of in point["benchmarks"].items() if of["n"] == rows[task]}

    return {point["factor"]: point for point in kept["points"] if asked <= scored(point)}


def _benchmark(study, of, model, answers, benchmark, log):
    """A point's entry for one task."""
    from peftlib.evaluation.benchmarks import harness  # imports lm-eval, which takes seconds

    made_by, n = f"{short_hash(of)} at {answers.stem}", min(study.cfg.benchmark_limit or ROWS, ROWS)
    responses = harness.Responses(
        answers.with_name(f"{answers.stem}.{benchmark.task.task_name}.responses.jsonl"), made_by
    )
    rows, _ = scored_rows(benchmark, Lent(lambda **_: model, study), responses, n, log)
    return {"score": scores.score_of(rows, benchmark.is_perplexity), "n": len(rows)}


def _models(study, method, seed, log):
    device = resolve_device(study.cfg.device)
    how = {"device": device, "dtype": evaluation_dtype(device)[0], "log": log}
    return [load_model(study, name, seed, **how) for name in dict.fromkeys((method, BASE))]


def _scores(study, model, kept, log):
    """A point's scores of one model; new answers are added to `kept`, a Predictions."""
    from peftlib.evaluation.hf_metrics import score  # imports evaluate, which takes seconds

    device = resolve_device(study.cfg.device)
    how, found = {"device": device, "precision": autocast_of(evaluation_dtype(device)[1])}, {}
    for split in ("valid", "test"):
        rows = list(data.load_split(study.data_dir, split))
        sources = dict.fromkeys(row["source"] for row in rows)
        parts = {ALL: rows} | {name: [row for row in rows if row["source"] == name] for name in sources}
        losses = {name: mean_loss(model, Rows(part), **how) for name, part in parts.items() if part}
        found[f"{split}_loss"] = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
    general = forgetting.record_fields(general_loss(study, model, **how))
    engine = "auto" if study.cfg.engine == "vllm" else study.cfg.engine  # vLLM reads the weights from a folder
    answer_into(kept, study.cfg, model, rows, engine=engine, log=log)
    scores = score([kept.rows[row["id"]]["answer"] for row in rows], [row["messages"][-1]["content"] for row in rows])
    loss = general["general_loss"]
    found["general_loss"] = loss if loss is not None and math.isfinite(loss) else None
    return {**found, "rougeL": scores["rougeL"], "bleu4": scores["bleu4"]}


def path_of(study, method, seed):
    """The file of a run's points."""
    return study.folder / "rewind" / f"{method}-s{seed}.json"


def _read(path):
    kept = require_shape(read_json(path), _SHAPE, path, "delete it and rewind again")
    for point in kept["points"]:
        point.setdefault("benchmarks", {})  # for points from before benchmarks were scored here
    return kept


def _identity(study, record):
    """What a run's points depend on."""
    weights, done = short_hash(record.get("weights_sha256")), record["evaluation"]
    fields = {name: done.get(name) for name in ("precision", "max_new_tokens", "general_text_sha256")}
    return {"weights": weights, "model": record.get("model_sha256"), "split_hash": record["split_hash"], **fields}


def curves(study, runs):
    """{method: [point, ...]} of scored runs from base to tuned, means over seeds, without points of other weights.

    Means: factor, test_loss, general_loss, rougeL, retention (mean accuracy over the tasks that scores.lost uses, on
    the rows that points are scored on); None if a seed's value is None.
    """
    found, base = {}, next((run for run in runs if run.record["method"] == BASE and run.is_scored), None)
    for run in runs:
        path = path_of(study, run.record["method"], run.record["seed"])
        if run.is_scored and run is not base and path.exists():
            kept = _read(path)
            if not differences(kept["of"], _identity(study, run.record)):
                found.setdefault(run.record["method"], []).append((run, kept["points"]))
    rows = _most_rows([point for seeds in found.values() for _, points in seeds for point in points])
    made, at_base = {}, base and _end(study, base, 0.0, rows)
    judged = scores.above_guessing(scores.load([(BASE, study, base.record)])) if base and rows else []
    kept = {of.task: rows[of.task] for of in judged if of.task in at_base["benchmarks"]}
    for method, seeds in found.items():
        of_seeds = []
        for run, points in seeds:
            ends = ([at_base] if at_base else []) + [_end(study, run, 1.0, rows)]
            of_seeds.append({point["factor"]: point for point in (*points, *ends)})
        made[method] = [_mean(factor, of_seeds, kept) for factor in sorted(set.intersection(*map(set, of_seeds)))]
    return made


def _end(study, run, factor, rows):
    """The point of an evaluated model, on the same rows of benchmarks as the others ({task: n})."""
    record, done = run.record, run.record.get("benchmarks") or {}
    found = {}
    for task, n in rows.items():
        if done.get(task, {"n": 0})["n"] >= n:
            read = scores.read_rows(study.benchmark_path(record["method"], record["seed"], task), done[task])[:n]
            found[task] = {"score": scores.score_of(read, done[task]["is_perplexity"]), "n": n}
    losses = {"test_loss": {ALL: record["eval_loss"]}, "general_loss": record["evaluation"].get("general_loss")}
    return {"factor": factor, **losses, "rougeL": run.scores["rougeL"], "benchmarks": found}


def _most_rows(points):
    """{task: maximum number of scored rows}: points with fewer rows are not comparable."""
    rows = {}
    for task, of in (item for point in points for item in point["benchmarks"].items()):
        rows[task] = max(rows.get(task, 0), of["n"])
    return rows


def _mean(factor, seeds, kept):
    found = [of[factor] for of in seeds]
    values = [(p["test_loss"][ALL], p["general_loss"], p["rougeL"], _retention(p, kept)) for p in found]
    means = (None if None in of else sum(of) / len(of) for of in zip(*values))
    return {"factor": factor, **dict(zip(("test_loss", "general_loss", "rougeL", "retention"), means))}


def _retention(point, kept):
    """Mean accuracy of a point over the tasks `kept` ({task: n}); None without any, or if one does not have n rows."""
    found = [of["score"] for task, of in point["benchmarks"].items() if of["n"] == kept.get(task)]
    return sum(found) / len(found) if found and len(found) == len(kept) else None
