"""Standard benchmarks in a report: their table, and what they show in sentences."""

import pandas as pd

from peftlib.methods import BASE
from peftlib.report.render import interval_text, shown


def table(benchmarks):
    """Texts, one row a task and one column a method. benchmarks: [scores.TaskScores, ...]."""
    methods = list(dict.fromkeys(method for scores in benchmarks for method in scores.runs))
    rows = [
        {
            "task": scores.task,
            "metric": scores.facts["metric"],
            "shots": str(scores.facts["shots"]),
            "rows": str(scores.boot.n_rows),
            "guessing": shown(scores.chance, ".3f"),
            **{method: _cell(scores, method) for method in methods},
        }
        for scores in benchmarks
    ]
    return pd.DataFrame(rows)


def _cell(scores, method):
    if method not in scores.runs:
        return ""
    return interval_text(scores.interval(method), ".3f") + (", at floor" if scores.is_at_floor(method) else "")


def sentences(benchmarks):
    """[sentence, ...] on the differences from base that lie beyond the noise, and on what is at its floor."""
    pairs = [pair for scores in benchmarks for pair in scores.pairs() if pair.other == BASE]
    beyond = [pair for pair in pairs if not pair.difference.is_noise]
    if pairs:
        listed = ", ".join(f"{p.method} on {p.metric} {p.difference.value:+.3f} ({p.verdict})" for p in beyond)
        yield (
            f"On standard benchmarks, {len(beyond)} of {len(pairs)} differences from base lie beyond the noise"
            f"{': ' if listed else ''}{listed}."
        )
    floor = [scores.task for scores in benchmarks if all(map(scores.is_at_floor, scores.runs))]
    if floor:
        yield f"No method is above guessing on {', '.join(floor)}: nothing that was learnt or forgotten can show there."
