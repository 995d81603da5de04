"""Charts of a study, each described in one sentence. A method keeps its colour and marker everywhere.

Functions return a `chart.Chart` in a theme. intervals: {method: {metric: stats.Interval}}.
"""

import math

import pandas as pd
from matplotlib.patheffects import withStroke

from peftlib.evaluation.stats import METRICS
from peftlib.methods import BASE, study_order
from peftlib.report.chart import Chart, drawing, dress, empty, finished, title
from peftlib.report.palette import LIGHT, marker_of

_FEW = 8  # methods that a small chart has room for
_MOST_RAW_CURVES = 4  # more would hide the smoothed ones
_RAW_ALPHA = {"light": 0.3, "dark": 0.5}  # a dark background needs more


def loss_curves(records, theme=LIGHT):
    """Training loss over optimizer steps, one smoothed line per run (for up to four runs also as logged); validation
    as points."""
    chart, axes = drawing(5.8, 3.4, "optimizer step", "loss (nats per assistant token)", theme)
    records = sorted(records, key=lambda record: (_order(record["method"]), record["seed"]))
    curves = [(r, _points(r["history"], "loss"), _points(r["valid_history"], "valid_loss")) for r in records]
    curves = [curve for curve in curves if any(curve[1:])]
    if not curves:
        return empty(chart, axes, "no training steps recorded")
    labelled, said = set(), []
    for record, history, valid in curves:
        method, color = record["method"], theme.color_of(record["method"])
        label = None if method in labelled else method  # one entry per method, not per seed
        labelled.add(method)
        parts = []
        if history:
            steps, losses = zip(*history)
            if len(curves) <= _MOST_RAW_CURVES:
                axes.plot(steps, losses, color=color, alpha=_RAW_ALPHA[theme.name], linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=color, linewidth=1.7, label=label)
            parts.append(f"{losses[0]:.2f} to {losses[-1]:.2f}")
        if valid:
            look = {**_mark(method, theme), "markeredgecolor": theme.paper}
            axes.plot(*zip(*valid), **look, label=None if history else label)
            parts.append(f"{valid[-1][1]:.2f} on validation rows")
        said.append(f"{method} (seed {record['seed']}) {', '.join(parts)}")
    alt = f"Loss from the first to the last training step: {'; '.join(said)}."
    place = "inside" if len(labelled) <= _FEW else "right"
    return finished(chart, axes, "Training loss (line: smoothed; points: validation)", alt, place)


def _points(entries, key):
    """[(step, loss), ...] of the known losses."""
    return [(entry["step"], entry[key]) for entry in entries if _is_number(entry.get(key))]


def smoothed(values):
    """Bias-corrected exponential mean of a list of numbers over about a tenth of its length."""
    return pd.Series(values, dtype=float).ewm(alpha=1 / max(1.0, 0.1 * len(values))).mean().tolist()


def score_bars(intervals, metrics=tuple(METRICS), *, rows="", theme=LIGHT):
    """One panel per metric, one bar per method with its 95 % interval. rows: name of the source if only its rows are
    scored."""
    methods = sorted(intervals, key=_order)
    chart = Chart(max(6.0, 0.34 * len(methods) * len(metrics)), 3.3, theme)
    panels = chart.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        dress(axes, "", f"{METRICS[metric]} (0-1)")
        for at, method in enumerate(methods):
            _bar(axes, at, 0.72, intervals[method][metric], method)
        slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(methods) * len(metrics) > 8 else {}
        axes.set_xticks(range(len(methods)), methods, **slant)
        _room_above(axes, [interval[metric].high for interval in intervals.values()])
        title(axes, f"{METRICS[metric]}{rows and f' on {rows}'}, 95 % intervals")
    chart.alt = f"Scores on the test rows{rows and f' of {rows}'}: {_scores_text(intervals, metrics)}."
    return chart if methods else empty(chart, panels[0], "no scores yet")


def source_bars(per_source, metric="rougeL", theme=LIGHT):
    """One metric by data source, one bar per method, 95 % intervals. per_source: {source: intervals}."""
    methods = sorted({method for found in per_source.values() for method in found}, key=_order)
    width = max(6.2, 0.24 * len(methods) * len(per_source))
    chart, axes = drawing(width, 3.3, "", f"{METRICS[metric]} (0-1)", theme)
    if not methods:
        return empty(chart, axes, "no scores yet")
    width = 0.8 / len(methods)
    for group, found in enumerate(per_source.values()):
        for at, method in enumerate(methods):
            if method in found:
                x = group + (at - (len(methods) - 1) / 2) * width
                _bar(axes, x, width * 0.92, found[method][metric], method, label=method if group == 0 else None)
    axes.set_xticks(range(len(per_source)), list(per_source))
    _room_above(axes, [interval[metric].high for found in per_source.values() for interval in found.values()])
    said = "; ".join(f"{source}: {_scores_text(found, (metric,), ', ')}" for source, found in per_source.items())
    alt = f"{METRICS[metric]} by data source: {said}."
    return finished(chart, axes, f"{METRICS[metric]} by source, 95 % intervals", alt, "right")


def quality_against_memory(intervals, peak_gib, metric="rougeL", theme=LIGHT, *, rows=""):
    """One point per method: peak training memory on x, score with 95 % interval on y.

    The base is a dashed line if it is near; a base far below is noted at the edge, so that the methods fill the axes.
    peak_gib: {method: GiB or None}; methods with unknown memory are left out. rows: as in `score_bars`.
    """
    name = METRICS[metric]
    size = (5.6, 3.5) if len(intervals) <= _FEW else (7.4, 4.6)
    chart, axes = drawing(*size, "peak memory of training (GiB)", f"{name} (0-1)", theme)
    scores = {m: intervals[m][metric] for m in sorted(intervals, key=_order) if _is_number(peak_gib.get(m))}
    scores.pop(BASE, None)
    if not scores:
        return empty(chart, axes, "no method with both a score and a memory figure")
    for method, found in scores.items():
        look = {"markersize": 9, "capsize": 4, **_mark(method, theme)}
        axes.errorbar(peak_gib[method], found.value, yerr=_spans(found), label=method, **look)
    ends = [end for found in scores.values() for end in (found.low, found.high)]
    said = [f"{method} {found.value:.3f} at {peak_gib[method]:.2f} GiB" for method, found in scores.items()]
    if BASE in intervals:
        base = intervals[BASE][metric].value
        said.append(f"base {base:.3f}")
        look = {"color": theme.color_of(BASE), "fontsize": 9, "ha": "right", "va": "bottom"}
        if min(ends) - base < 2 * max(max(ends) - min(ends), 0.05 * max(ends)):
            ends.append(base)
            axes.axhline(base, color=theme.color_of(BASE), linestyle="--", linewidth=1.2)
            axes.text(0.99, base, " base ", transform=axes.get_yaxis_transform(), **look)
        else:
            axes.text(0.99, 0.02, f"base: {base:.3f}, below", transform=axes.transAxes, **look)
    _hold(axes.set_xlim, [peak_gib[method] for method in scores])
    _hold(axes.set_ylim, ends)
    if axes.get_xlim()[0] > 0 or axes.get_ylim()[0] > 0:
        axes.set_xlabel(f"{axes.get_xlabel()}; axes do not start at 0")
    heading = f"{name}{rows and f' on {rows}'} against memory: up and left is better"
    alt = f"{name} on the test rows{rows and f' of {rows}'} against peak training memory: {'; '.join(said)}."
    return finished(chart, axes, heading, alt, "right")


def rewind_curves(curves, theme=LIGHT):
    """Retained ability over the loss on the test rows, one line per method from base to tuned.

    curves: from rewind.curves. Retained ability is the accuracy on retention tasks if all curves have it, else the
    loss on general text.
    """
    every = [point for points in curves.values() for point in points]
    kept, label = "general_loss", "loss on general text"
    if every and all(_is_number(point["retention"]) for point in every):
        kept, label = "retention", "accuracy on retention tasks"
    chart, axes = drawing(5.6, 3.5, "loss on test rows (nats per token)", label, theme)
    said = []
    for method in sorted(curves, key=_order):
        known = [p for p in curves[method] if _is_number(p["test_loss"]) and _is_number(p[kept])]
        if known:
            x, y = ([point[name] for point in known] for name in ("test_loss", kept))
            axes.plot(x, y, color=theme.color_of(method), linewidth=1.7, marker=".", label=method)
            for at, name in ((-1, method), (0, BASE)):
                axes.plot(x[at], y[at], markersize=9, zorder=3, **_mark(name, theme))
            steps = ", ".join(f"{p['test_loss']:.3f} and {p[kept]:.3f} at {p['factor']:g}" for p in known)
            said.append(f"{method} {steps}")
    if not said:
        return empty(chart, axes, "no model between base and tuned was scored")
    better = "left and up" if kept == "retention" else "left and down"
    alt = f"Loss on test rows and {label} of the models between base (0) and tuned (1): {'; '.join(said)}."
    return finished(chart, axes, f"From base (cross) to tuned (large marks): {better} is better", alt, "right")


def benchmark_points(benchmarks, theme=LIGHT):
    """One row per task and one point per method with its 95 % interval; a grey line at the score of guessing.

    benchmarks: [scores.TaskScores, ...]; perplexities, which are not accuracies, are left out.
    """
    tasks = [scores for scores in benchmarks if not scores.facts["is_perplexity"]]
    methods = sorted({method for scores in tasks for method in scores.runs}, key=study_order)
    height = 1.2 + max(0.55, 0.065 * len(methods)) * max(len(tasks), 2)
    chart, axes = drawing(6.2, height, "score (0-1)", "", theme, grid="x")
    if not tasks:
        return empty(chart, axes, "no benchmark scores yet")
    said, labelled = [], set()
    for row, scores in enumerate(tasks):
        for at, method in enumerate(method for method in methods if method in scores.runs):
            found, y = scores.interval(method), row + (at - (len(scores.runs) - 1) / 2) * 0.7 / len(scores.runs)
            look = {"capsize": 2, "alpha": 0.35 if scores.is_at_floor(method) else 1.0, **_mark(method, theme)}
            label = None if method in labelled else method  # not every task has every method
            labelled.add(method)
            axes.errorbar(found.value, y, xerr=_spans(found), label=label, **look)
        if scores.chance is not None:
            axes.vlines(scores.chance, row - 0.45, row + 0.45, color=theme.ink, linewidth=1.2, linestyle="--")
        points = ", ".join(
            f"{method} {scores.interval(method).value:.3f}" for method in methods if method in scores.runs
        )
        said.append(f"{scores.task} {points}" + ("" if scores.chance is None else f" (guessing {scores.chance:.3f})"))
    axes.set_yticks(range(len(tasks)), [scores.task for scores in tasks])
    axes.invert_yaxis()
    alt = f"Scores on standard benchmarks: {'; '.join(said)}."
    return finished(chart, axes, "Benchmarks, 95 % intervals (dashed: guessing)", alt, "right")


def gain_against_loss(trade, tasks, theme=LIGHT):
    """One point per method: its gain on the test rows on x, its mean change on other tasks on y, both from base.

    trade: {method: (gain, change)} of stats.Intervals. tasks: names of the tasks in the mean change.
    """
    size = (5.6, 3.6) if len(trade) < _FEW else (7.4, 4.6)
    chart, axes = drawing(
        *size, "ROUGE-L gained on the test rows", f"mean change of accuracy on {len(tasks)} tasks", theme
    )
    if not trade:
        return empty(chart, axes, "no method with scores on test rows and on benchmarks beside base")
    said = []
    for method in sorted(trade, key=_order):
        gain, change = trade[method]
        look = {"markersize": 9, "capsize": 4, **_mark(method, theme)}
        axes.errorbar(gain.value, change.value, xerr=_spans(gain), yerr=_spans(change), label=method, **look)
        said.append(f"{method} {gain.value:+.3f} and {change.value:+.3f} ({change.verdict})")
    gains = [end for gain, _ in trade.values() for end in (gain.low, gain.high)]
    axes.axhline(0.0, color=theme.color_of(BASE), linestyle="--", linewidth=1.2)
    if min(gains) < max(gains) - min(gains):  # otherwise it would squeeze the methods into one corner
        axes.axvline(0.0, color=theme.color_of(BASE), linestyle="--", linewidth=1.2)
    else:
        axes.set_xlabel(f"{axes.get_xlabel()}; the axis does not start at 0")
    alt = f"ROUGE-L gained against base, and mean change of accuracy on {', '.join(tasks)}: {'; '.join(said)}."
    return finished(chart, axes, "Gained on the task against lost elsewhere: up is better", alt, "right")


def value_bars(values, name, unit, form, theme=LIGHT, *, outlines=None):
    """One horizontal bar per method with a known value, with the number at its end.

    values: {method: number or None}. outlines: {method: larger value}, such as the allocator's reserved memory.
    """
    methods = [method for method in sorted(values, key=_order) if _is_number(values[method])]
    outer = {method: value for method, value in (outlines or {}).items() if method in methods and _is_number(value)}
    chart, axes = drawing(5.6, 0.9 + 0.5 * max(len(methods), 2), unit, "", theme, grid="x")
    if not methods:
        return empty(chart, axes, f"{name.split(':')[0].lower()} is not known yet")
    look = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, "color": theme.ink}
    ends = []
    for at, method in enumerate(methods):
        color, text = theme.color_of(method), f"{values[method]:{form}}"
        axes.barh(at, values[method], height=0.66, color=color)
        if method in outer:
            axes.barh(at, outer[method], height=0.66, fill=False, edgecolor=color, linewidth=1.2)
            text = f"{text} ({outer[method]:{form}})"
        ends.append(max(values[method], outer.get(method, 0.0)))
        axes.annotate(text, (ends[-1], at), **look)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlim(0, (max(ends) or 1.0) * (1.15 if outlines is None else 1.3))
    alt = f"{name.replace(':', ',')}: {'; '.join(f'{m} {values[m]:{form}} {unit}' for m in methods)}."
    return finished(chart, axes, f"{name} (outline and brackets: reserved)" if outer else name, alt)


def _mark(method, theme):
    """Style of a method's points."""
    return {"marker": marker_of(method), "color": theme.color_of(method), "linestyle": "none"}


def _bar(axes, x, width, interval, method, label=None):
    theme = axes.figure.theme
    # The outline separates the lower half of the interval from a dark bar.
    rim = [withStroke(linewidth=2.6, foreground=theme.paper)]
    error = {"capsize": 3, "ecolor": theme.ink, "elinewidth": 1.1, "path_effects": rim}
    color = theme.color_of(method)
    axes.bar(x, interval.value, width, yerr=_spans(interval), color=color, label=label, error_kw=error)


def _spans(interval):
    # A quantile of the replicates can be on the other side of the score; error bars need non-negative lengths.
    return [[max(interval.value - interval.low, 0.0)], [max(interval.high - interval.value, 0.0)]]


def _hold(set_limits, values):
    """Set an axis' limits around the values, with space for markers, and never below 0."""
    room = 0.15 * ((max(values) - min(values)) or max(values) or 1.0)
    set_limits(max(0.0, min(values) - room), max(values) + room)


def _room_above(axes, highs):
    top = max(highs, default=1.0)
    axes.set_ylim(0.0, 1.08 * top if top > 0 else 1.0)


def _scores_text(intervals, metrics, between="; "):
    scores = (
        (method, ", ".join(f"{METRICS[metric]} {intervals[method][metric].value:.3f}" for metric in metrics))
        for method in sorted(intervals, key=_order)
    )
    return between.join(f"{method} {score}" for method, score in scores)


def _order(method):
    return study_order(method.removesuffix(" (cut)")), method


def _is_number(value):
    return value is not None and math.isfinite(value)
