"""A study folder of made-up records and predictions, for tests of what reads one."""

import csv
import hashlib
import json
import random

import numpy as np

from peftlib.core.config import resolve
from peftlib.core.files import sha256, write_json
from peftlib.core.study import Study
from peftlib.evaluation.benchmarks import scores

SPLIT = "5f1e0c0ffee0"
SOURCES = ("alpaca", "tulu", "ultrachat")
# Share of a reference's words that a method's answers get right, and what it costs.
SKILL = {"base": 0.25, "qlora": 0.55, "galore": 0.62, "hybrid": 0.60}
MEMORY = {"qlora": 1.2e9, "galore": 2.4e9, "hybrid": 1.9e9}
GENERAL = {"base": 3.0, "qlora": 3.06, "galore": 3.3, "hybrid": 2.97}  # nats per token of general text
_WORDS = [
    "the",
    "model",
    "learns",
    "from",
    "each",
    "row",
    "and",
    "then",
    "answers",
    "in",
    "short",
    "plain",
    "words",
    "about",
    "paris",
    "rivers",
    "code",
    "sums",
    "tests",
    "trees",
    "light",
    "42",
    "because",
    "of",
    "it",
    "we",
    "can",
    "say",
    "that",
    "some",
    "are",
    "better",
    "than",
    "others",
]


def made_rows(n=48, seed=0):
    """Test rows as peftlib.data.load_split gives them, but for the token columns."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        prompt, reply = (" ".join(rng.choice(_WORDS) for _ in range(rng.randint(6, 24))) for _ in range(2))
        messages = [{"role": "user", "content": f"{prompt}?"}, {"role": "assistant", "content": f"{reply}."}]
        if i % 3 == 2:
            messages = [*messages[:1], {"role": "assistant", "content": "Go on."}, *messages]
        rows.append(
            {
                "source": SOURCES[i % 3],
                "id": f"{SOURCES[i % 3]}-{i}",
                "messages": messages,
                "prompt_sha256": hashlib.sha256(f"{i} {prompt}".encode()).hexdigest(),
            }
        )
    return rows


def answers_of(rows, method, seed):
    """Made-up answers: a share of the reference's words, base without an end."""
    rng = random.Random(f"{method} {seed}")
    made = []
    for row in rows:
        words = row["messages"][-1]["content"].split()
        kept = [w if rng.random() < SKILL[method] else rng.choice(_WORDS) for w in words]
        made.append(" ".join(kept if method != "base" else kept + kept + kept))
    return made


def record_of(method, seed=0, **changes):
    """A record as a finished run leaves it."""
    is_base = method == "base"
    rng = random.Random(f"{method} {seed}")
    history = [
        {"step": s, "loss": 2.2 + 1.6 / s**0.5 + rng.uniform(-0.2, 0.2), "learning_rate": 2e-4, "grad_norm": 1.0}
        for s in range(1, 25)
    ]
    record = {
        "method": method,
        "seed": seed,
        "status": "ok",
        "error": None,
        "config": {"method_independent": 1, **resolve("demo", seed=seed).fields_of("data", "math")},
        "split_hash": SPLIT,
        "model": "packaged",
        "model_provenance": "pretrained weights from a Q4_K_M file, not the original release",
        "precision": "bf16",
        "device": "CPU (test, 2 cores)",
        "trainable_params": None if is_base else 3_796_992,
        "steps": None if is_base else 24,
        "planned_steps": None if is_base else 24,
        "train_tokens": None if is_base else 31_234,
        "learning_rate": None if is_base else 2e-4,
        "learning_rate_2": 1e-3 if method == "hybrid" else None,
        "train_loss": None if is_base else history[-1]["loss"],
        "eval_loss": 3.4 if is_base else 2.4 + 0.1 * seed,
        "peak_memory_bytes": None if is_base else int(MEMORY[method]),
        "peak_reserved_bytes": None,
        "train_seconds": None if is_base else 100.0 + seed,
        "tokens_per_second": None if is_base else 310.5,
        "history": [] if is_base else history,
        "valid_history": [] if is_base else [{"step": 12, "valid_loss": 2.8}, {"step": 24, "valid_loss": 2.6}],
        "evaluation": {
            "n_test": 48,
            "eval_loss": 2.4,
            "general_loss": GENERAL[method],
            "general_tokens": 512,
            "general_text_sha256": "7e" * 6,
            "split_hash": SPLIT,
            "max_new_tokens": 48,
            "precision": "fp32",
        },
        "versions": {"torch": "2.13.0"},
    }
    return {**record, **changes}


def write_record(study, record):
    """The record at its place; returns the path."""
    path = study.record_path(record["method"], record["seed"])
    write_json(path, record)
    return path


def write_predictions(study, method, seed, rows, answers, *, split_hash=SPLIT):
    """The answers at their place, in another order than the test rows; returns the path."""
    path = study.predictions_path(method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            **{name: row[name] for name in ("id", "source", "prompt_sha256")},
            "answer": answer,
            "n_tokens": len(answer.split()),
            "finish_reason": "length" if method == "base" else "stop",
            "split_hash": split_hash,
        }
        for row, answer in zip(rows, answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in reversed(lines))
    path.write_text(text, encoding="utf-8")
    return path


def column(values, weights=1.0):
    values = np.asarray(values, dtype=float)
    return np.column_stack([values, np.broadcast_to(weights, values.shape)])


def write_benchmark(study, record, task, values, *, chance=0.5, start=0, **facts):
    """A record's score of a task as scoring leaves it."""
    weights, labels = facts.pop("weights", 1.0), facts.pop("labels", None)
    rows = [
        {"id": start + i, "doc": f"{start + i:032x}", "value": float(v), "weight": float(w)}
        | ({"label": labels[i]} if labels is not None else {})
        for i, (v, w) in enumerate(column(values, weights))
    ]
    path = study.benchmark_path(record["method"], record["seed"], task)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = dict.fromkeys(("source", "harness", "precision", "device"), "made up")
    found = {"metric": "acc", "filter": "none", "is_perplexity": False, "shots": 0, "is_chat": False, **texts, **facts}
    score = scores.score_of(rows, found["is_perplexity"])
    found |= {"n": len(rows), "score": score, "chance": chance, "seconds": 1.0, "rows_sha256": sha256(path)}
    record["benchmarks"] = {**(record.get("benchmarks") or {}), task: found}


def make(folder, monkeypatch, *, methods=tuple(SKILL), seeds=(0,), n=48):
    """A Study below `folder` with records and predictions of the methods; its test rows come without parquet files."""
    rows = made_rows(n)
    study = Study(folder / "made-up", resolve("demo", study="made-up"))
    study.freeze()
    counts = {"train": {"alpaca": 4}, "valid": {"alpaca": 2}, "test": {"alpaca": len(rows)}}
    write_json(study.manifest_path, {"split_hash": SPLIT, "counts": counts})
    for method in methods:
        for seed in seeds if method != "base" else (0,):
            write_record(study, record_of(method, seed))
            write_predictions(study, method, seed, rows, answers_of(rows, method, seed))
    monkeypatch.setattr("peftlib.data.load_split", lambda data_dir, split: rows, raising=False)
    return study


def rows_of(study):
    """The rows of a study's results.csv."""
    with open(study.results_path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
