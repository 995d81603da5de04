"""The columns of results.csv: a row for each method and seed."""

import pandas as pd

from peftlib.core.files import gib
from peftlib.evaluation import comparison, stats
from peftlib.methods import BASE

COLUMNS = (
    *("method", "seed", "status", "n_test", "bleu4", "rougeL", "train_loss", "eval_loss", "trainable_params", "steps"),
    *("train_tokens", "learning_rate", "learning_rate_2", "precision", "device", "peak_memory_gib"),
    *("peak_reserved_gib", "tokens_per_second", "train_seconds", "split_hash"),
)
_JUDGED = {"judge_win_rate": "win_rate", "judge_win_rate_length_controlled": "length_controlled"}  # if base was judged
_DTYPES = dict.fromkeys(("method", "status", "precision", "device", "split_hash"), "object")
_DTYPES |= dict.fromkeys(("seed", "n_test", "trainable_params", "steps", "train_tokens"), "Int64")  # others: float64


def result_frame(found, judged, benchmarks):
    """results.csv of a ScoredStudy, its [verdicts.Judged, ...] and [scores.TaskScores, ...], as a DataFrame."""
    rows = [{**_result_row(run), **_judged_columns(run, judged)} for run in found.runs]
    return _frame(rows, [f"bench_{scores.task}" for scores in benchmarks])


def _result_row(run):
    """{column of results.csv: value or None} of a results.Run, among others."""
    record = run.record
    scores = run.rows.scores() if run.is_scored else {}
    return {
        **record,
        **{metric: scores.get(metric) for metric in stats.METRICS},
        "n_test": len(run.rows) if run.is_scored else None,
        "eval_loss": run.eval_loss,
        "peak_memory_gib": gib(record["peak_memory_bytes"]),
        "peak_reserved_gib": gib(record["peak_reserved_bytes"]),
        **{f"bench_{task}": of["score"] for task, of in (record.get("benchmarks") or {}).items()},
    }


def _judged_columns(run, judged):
    """Win rates of a run's answers to the test rows against base, means over the judges; {} where nothing is judged."""
    own = [of for of in judged if not of.prompts and of.a == f"{BASE}-s0" and of.length_controlled is not None]
    of_run = [of for of in own if of.b == f"{run.record['method']}-s{run.record['seed']}"]
    means = (comparison.mean_of(of_run, lambda of, name=name: getattr(of, name).value) for name in _JUDGED.values())
    return dict(zip(_JUDGED, means)) if own else {}


def _frame(rows, benchmarks):
    names = [*COLUMNS, *benchmarks, *(name for name in _JUDGED if rows and name in rows[0])]
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pd.DataFrame({name: pd.array(of, _DTYPES.get(name, "float64")) for name, of in columns.items()})
