"""The tables of a report: results.csv, before and after training, by source, all scores, standard benchmarks."""

import pandas as pd

from peftlib.core.files import gib
from peftlib.evaluation import comparison, forgetting, results, stats
from peftlib.methods import BASE, METHODS
from peftlib.report.charts import by_method
from peftlib.report.render import interval_text, shown

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
    judges = [name for name in _JUDGED if rows and name in rows[0]]
    scored = [f"bench_{scores.task}" for scores in benchmarks]
    names = [*COLUMNS, *(name for name in scored if any(name in row for row in rows)), *judges]
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pd.DataFrame({name: pd.array(of, _DTYPES.get(name, "float64")) for name, of in columns.items()})


def _result_row(run):
    """{column of results.csv: value or None} of a results.Run, plus other columns."""
    record = run.record
    scores = run.rows.scores() if run.is_scored else {}
    return {
        **record,
        **{metric: scores.get(metric) for metric in stats.METRICS},
        "n_test": len(run.rows) if run.is_scored else None,
        "peak_memory_gib": gib(record["peak_memory_bytes"]),
        "peak_reserved_gib": gib(record["peak_reserved_bytes"]),
        **{f"bench_{task}": of["score"] for task, of in (record.get("benchmarks") or {}).items()},
    }


def _judged_columns(run, judged):
    """Win rates of a run's answers to the test rows against base, means over the judges; {} if nothing was judged."""
    own = [of for of in judged if not of.prompts and of.a == f"{BASE}-s0" and of.length_controlled is not None]
    of_run = [of for of in own if of.b == f"{run.record['method']}-s{run.record['seed']}"]
    means = (comparison.mean_of(of_run, lambda of, name=name: getattr(of, name).value) for name in _JUDGED.values())
    return dict(zip(_JUDGED, means)) if own else {}


def source_frame(by_source):
    """Scores with their intervals, one row per source and method. by_source: {source: Bootstrap}."""
    rows = []
    for source, boot in by_source.items():
        for method in boot.value:
            row = {"source": source, "method": method, "n": boot.n_rows}
            for metric in stats.METRICS:
                found = boot.interval(method, metric)
                row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def difference_tables(gaps):
    """[Texts with named rows and columns] of differences, split into tables of a few columns.

    gaps: [(row, column, stats.Interval), ...]. The intervals show which are beyond the noise.
    """
    rows, columns = {}, dict.fromkeys(column for _, column, _ in gaps)
    for row, column, gap in gaps:
        said = "" if gap.is_noise else f", {gap.verdict}"
        cells = rows.setdefault(row, {"difference": row, **dict.fromkeys(columns, "")})
        cells[column] = f"{gap.low:+.4f} to {gap.high:+.4f}{said}"
    return _split(pd.DataFrame(list(rows.values())))


def _split(frame, columns=6):
    """[frame, ...] with at most `columns` columns each, after the first one, which all have."""
    first, *rest = frame.columns
    return [frame[[first, *rest[at : at + columns]]] for at in range(0, len(rest), columns)]


def score_frame(found):
    """Every score of every scored run, one row per run."""
    runs = [run for run in found.runs if run.is_scored]
    rows = [
        {
            "method": run.record["method"],
            "seed": run.record["seed"],
            **run.rows.scores(),
            "chrf": run.scores["chrf"],
            "truncated_share": run.truncated_share,
            "eval_loss": run.eval_loss,
        }
        for run in runs
    ]
    return pd.DataFrame(rows)


def method_table(found, boot):
    """The main table as texts: one row per method with a record, one for base cut at the median reference length."""
    rows = []
    for method, runs in by_method(found.runs).items():
        rows.append({"technique": _technique(method, runs), **_method_cells(method, runs, found, boot)})
        if method == BASE and found.base_cut is not None:
            name = f"base, cut at the median reference length ({found.cut_at_words} words)"
            cut = {metric: interval_text(boot.interval(results.BASE_CUT, metric)) for metric in stats.METRICS}
            after = {f"{label} after (95 %)": cut[metric] for metric, label in stats.METRICS.items()}
            rows.append({"technique": name, **after})
    return pd.DataFrame(rows).fillna("")


def _technique(method, runs):
    states = [run.record["status"] for run in runs if run.record["status"] != "ok"]
    variant = METHODS[method].variant(runs[0].record["config"]) if method in METHODS else ""
    notes = [variant] if variant else []
    notes += [f"{len(runs)} seeds"] if len(runs) > 1 else []
    notes += [f"{states.count(state)} {state}" if len(runs) > 1 else state for state in dict.fromkeys(states)]
    return f"{method} ({', '.join(notes)})" if notes else method


def _method_cells(method, runs, found, boot):
    """{column: text}; base has only 'before' values."""
    finished = [run for run in runs if run.record["status"] == "ok"]
    base_runs, is_base = found.scored.get(BASE, []), method == BASE
    cells = {}
    for metric, label in stats.METRICS.items():
        base, own = (boot.interval(m, metric) if boot and m in boot.value else None for m in (BASE, method))
        before = interval_text(base) if is_base else shown(base and base.value, ".4f")
        cells |= {f"{label} before": before, f"{label} after (95 %)": "" if is_base else interval_text(own)}
    base_loss, loss = (comparison.mean_of(group, lambda run: run.eval_loss) for group in (base_runs, finished))
    general = forgetting.mean_over([run.general for run in finished])
    change = forgetting.change(forgetting.mean_over([run.general for run in base_runs]), general)
    memory = comparison.mean_of(finished, lambda run: gib(run.record["peak_memory_bytes"]))
    hours = comparison.mean_of(finished, lambda run: run.record["train_seconds"] and run.record["train_seconds"] / 3600)
    return {
        **cells,
        "test loss before": shown(base_loss, ".3f"),
        "test loss after": "" if is_base else shown(loss, ".3f"),
        "general text loss (change)": shown(general and general.loss, ".3f")
        + ("" if is_base or change is None else f" ({change:+.1%})"),
        "peak memory GiB": "" if is_base else shown(memory, ".2f"),
        "training hours": "" if is_base else shown(hours, ".2f" if hours and hours >= 1 else ".2g"),  # a demo: minutes
    }


def benchmark_table(benchmarks):
    """Texts, one row per task and one column per method. benchmarks: [scores.TaskScores, ...]."""
    methods = list(dict.fromkeys(method for scores in benchmarks for method in scores.runs))
    rows = [
        {
            "task": scores.task,
            "metric": scores.facts["metric"],
            "shots": str(scores.facts["shots"]),
            "rows": str(scores.boot.n_rows),
            "guessing": shown(scores.chance, ".3f"),
            **{method: _benchmark_cell(scores, method) for method in methods},
        }
        for scores in benchmarks
    ]
    return pd.DataFrame(rows)


def benchmark_tables(benchmarks, columns=8):
    """[`benchmark_table`], or for many methods a table of the tasks and one with a row per method."""
    frame = benchmark_table(benchmarks)
    if len(frame.columns) <= columns:
        return [frame] if len(frame) else []
    facts, scores = frame.iloc[:, :5], frame.iloc[:, 5:].T
    scores.columns = frame["task"]
    return [facts, *_split(scores.rename_axis("method").reset_index())]


def _benchmark_cell(scores, method):
    if method not in scores.runs:
        return ""
    return interval_text(scores.interval(method), ".3f") + (", at floor" if scores.is_at_floor(method) else "")
