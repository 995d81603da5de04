"""`peftlib bench`: score a study's models on standard benchmarks, resumable, with the score of every row."""

import gc
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from peftlib import data as splits
from peftlib.core import record as records
from peftlib.core.env import resolve_device
from peftlib.core.errors import DataError, StudyError
from peftlib.core.files import gib, sha256, write_text
from peftlib.core.paths import pip_line
from peftlib.core.session import Deadline
from peftlib.core.study import Study
from peftlib.evaluation.benchmarks import tasks
from peftlib.evaluation.benchmarks.scores import read_rows, score_of
from peftlib.evaluation.evaluate import evaluation_dtype, opened
from peftlib.methods import BASE

_BATCH_CPU, _BATCH, _BATCH_LARGE = 8, 32, 64  # rows whose logits are held at a time; halved when out of memory
_LARGE_GIB = 40  # of a card's memory


def bench(
    study: Study,
    method: str | None = None,
    names: str = tasks.RETENTION,
    *,
    path: str | Path | None = None,
    name: str = "",
    data: str | Path | None = None,
    limit: int = 0,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Score a finished run, or the untrained model ('base'), on benchmarks; returns its record with the scores.

    names: comma-separated tasks and sets ('retention', 'skill'). path: instead of a method, the folder of a model that
    was trained elsewhere; name: of its row, as in `evaluate_path`. data: a folder with the tasks' files; default: the
    hub. limit: number of first rows of each task, 0 for all. A task already scored on that many rows is skipped, and
    an interrupted one is resumed.
    ConfigError: no such task or folder. DataError: a file is missing or has other rows, the harness has renamed a
    metric, or an answer breaks a task's parser. ModelError: lm-evaluation-harness is missing, or not even one row fits
    the memory. StudyError: as in `evaluate`, or scores of other rows or weights exist. Stopped: this session ends soon.
    """
    chosen, doing = tasks.chosen(names), "running benchmarks"
    record = records.load(study, method, study.cfg.seed) if method and not path else None
    if record and method != BASE:
        records.require_ok(record)  # before anything is downloaded
    benchmarks = [tasks.load(task, data) for task in chosen]  # before a model is loaded: most errors occur here
    path = Path(path).expanduser() if path else None
    with opened(study, name if path else method, doing, path=path, log=log) as (record, load):
        lent = Lent(load, study)
        for benchmark in benchmarks:
            _score(study, record, benchmark, lent, limit=limit, log=log)
        return record


def bench_study(study: Study, methods: list[str], *, log: Callable[[str], object] = print) -> bool:
    """Score methods by the settings `benchmarks`, `benchmark_data` and `benchmark_limit`; returns whether any was.

    "auto" is the retention set if there is a GPU and lm-evaluation-harness; unavailable rows are then logged and
    skipped. Errors as in `bench`.
    """
    cfg, names = study.cfg, study.cfg.benchmarks
    if names == "auto":
        names = tasks.RETENTION if resolve_device(cfg.device) == "cuda" and find_spec("lm_eval") else ""
    if not names:
        log(f"no benchmarks: to score some, run {pip_line('bench')} and set benchmarks = 'retention'")
        return False
    try:
        for method in methods:
            bench(study, method, names, data=cfg.benchmark_data or None, limit=cfg.benchmark_limit, log=log)
    except DataError as error:
        if cfg.benchmarks != "auto":
            raise
        log(f"no benchmarks: {error}")
        return False
    return True


class Lent:
    """The model, loaded when a task first needs it, and its scoring settings."""

    def __init__(self, load, study):
        self.device = resolve_device(study.cfg.device)
        self.dtype, self.precision, _ = evaluation_dtype(self.device)
        self._load, self._model = load, None
        self.batch = study.cfg.eval_batch_size or _batch_of(self.device)
        self.tokenizer = splits.load_tokenizer(study.cfg.model)
        self.deadline = Deadline(study.cfg.replace(max_seconds=0.0))

    def model(self):
        if self._model is None:
            self._model = self._load(device=self.device, dtype=self.dtype)
        return self._model


def _batch_of(device):
    if device != "cuda":
        return _BATCH_CPU
    return _BATCH_LARGE if gib(torch.cuda.get_device_properties(0).total_memory) > _LARGE_GIB else _BATCH


def _score(study, record, benchmark, lent, *, limit, log):
    """Score one task and save it in the record and its file, unless it is already scored on that many rows."""
    from peftlib.evaluation.benchmarks import harness  # imports lm-eval, which takes seconds

    task, run = benchmark.task.task_name, (record["method"], record["seed"])
    n_rows = min(limit or len(benchmark.task.eval_docs), len(benchmark.task.eval_docs))
    done = (record.get("benchmarks") or {}).get(task)
    path = study.benchmark_path(*run, task)
    before = read_rows(path, done) if done and path.exists() else []
    if len(before) >= n_rows:
        log(f"{record['method']}: {task} is already scored on {len(before)} rows, nothing to do")
        return
    log(f"{record['method']}: {task}, {n_rows} rows from {benchmark.source}")
    responses = harness.Responses(path.with_name(f"{task}.responses.jsonl"), _weights_of(record))
    rows, chance = scored_rows(benchmark, lent, responses, n_rows, lambda line: log(f"{record['method']}: {line}"))
    if [row["doc"] for row in rows[: len(before)]] != [row["doc"] for row in before]:
        raise StudyError(f"{path} has scores for other rows than {benchmark.source}: move it away and run again")
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    found = {
        "n": len(rows),
        "n_all": len(benchmark.task.eval_docs),
        "metric": benchmark.metric,
        "filter": benchmark.filter,
        "is_perplexity": benchmark.is_perplexity,
        "score": score_of(rows, benchmark.is_perplexity),
        "chance": chance,
        "shots": benchmark.task.config.num_fewshot,
        "is_chat": benchmark.is_generated,
        "source": benchmark.source,
        "harness": tasks.version(),
        "precision": " and ".join(sorted({row["precision"] for row in responses.lines.values()})),
        "device": records.device_name(lent.device),
        "seconds": responses.total("seconds"),
        "rows_sha256": sha256(path),
    }
    record["benchmarks"] = {**(record.get("benchmarks") or {}), task: found}
    records.save(study, record)
    log(f"{record['method']}: {task} {found['metric']} {found['score']:.4f} on {len(rows)} rows")
    gc.collect()


def scored_rows(benchmark, lent, responses, n_rows, log):
    """([row, ...], score of guessing) of a task's first n_rows by a lent model; `responses` saves its answers."""
    from peftlib.evaluation.benchmarks import harness

    how = {"batch": lent.batch, "precision": lent.precision, "deadline": lent.deadline}
    how["log"] = lambda line: log(f"{benchmark.task.task_name}: {line}")
    lm = harness.KeepingModel(lent.model(), lent.tokenizer, responses, **how)
    samples = harness.score(lm, benchmark, limit=n_rows)
    lent.batch = lm.batch_size_per_gpu  # what fits the memory
    docs = [sample["doc"] for sample in samples]
    labels = [{"label": label} for label in benchmark.labels(docs) or ()] or [{}] * len(docs)
    rows = [_row(benchmark, sample) | label for sample, label in zip(samples, labels, strict=True)]
    return rows, benchmark.chance(docs)


def _row(benchmark, sample):
    value, weight = benchmark.row(sample)
    return {"id": sample["doc_id"], "doc": sample["doc_hash"][:32], "value": value, "weight": weight}


def _weights_of(record):
    """A short text that identifies a record's weights."""
    known = record.get("weights_sha256") or (record.get("trained_elsewhere") or {}).get("files")
    known = known or {"model": record.get("model_sha256") or record["model"]}
    return " ".join(f"{name}:{digest[:16]}" for name, digest in sorted(known.items()))
