"""results.csv: one row a method and seed, the columns of which are fixed. Unknown is empty."""

import csv
import io

COLUMNS = (
    "method",
    "seed",
    "status",
    "n_test",
    "bleu4",
    "rougeL",
    "train_loss",
    "eval_loss",
    "trainable_params",
    "steps",
    "train_tokens",
    "learning_rate",
    "learning_rate_2",
    "precision",
    "device",
    "peak_memory_gib",
    "peak_reserved_gib",
    "tokens_per_second",
    "train_seconds",
    "split_hash",
)
_TEXT = ("method", "status", "precision", "device", "split_hash")
_WHOLE = ("seed", "n_test", "trainable_params", "steps", "train_tokens")


def result_row(run):
    """{column: value or None} of a Run."""
    record = run.record
    row = {name: record[name] for name in COLUMNS if name in record}
    scores = run.rows.scores() if run.is_scored else {}
    row |= {"n_test": len(run.rows) if run.is_scored else None, "bleu4": scores.get("bleu4")}
    row |= {"rougeL": scores.get("rougeL"), "eval_loss": run.eval_loss}
    row |= {
        "peak_memory_gib": gib(record["peak_memory_bytes"]),
        "peak_reserved_gib": gib(record["peak_reserved_bytes"]),
    }
    return {name: row[name] for name in COLUMNS}


def gib(n_bytes):
    """Bytes in GiB, None if unknown."""
    return None if n_bytes is None else n_bytes / 2**30


def to_csv(rows):
    """The rows as CSV text with a header; numbers to ten digits, None as nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(row[name]) for name in COLUMNS] for row in rows)
    return out.getvalue()


def frame(rows):
    """The rows as a DataFrame: text, whole numbers and floats, each with missing values."""
    import pandas as pd

    kinds = {name: "object" if name in _TEXT else "Int64" if name in _WHOLE else "float64" for name in COLUMNS}
    return pd.DataFrame({name: pd.array([row[name] for row in rows], dtype=kinds[name]) for name in COLUMNS})


def _cell(value):
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
