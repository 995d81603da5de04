"""Charts of a study, each with a text for those who cannot see it. A method keeps its colour and marker everywhere.

Functions return a `chart.Chart` in the theme asked for.
"""

import math

import numpy as np
from matplotlib.patheffects import withStroke

from peftlib.methods import study_order
from peftlib.report.chart import Chart, add_axes, dress, empty, legend, title
from peftlib.report.palette import LIGHT, marker_of

_MOST_RAW_CURVES = 4  # more of them hide the smoothed ones
_RAW_ALPHA = {"light": 0.3, "dark": 0.5}  # dark paper swallows more
_METRIC_NAMES = {"bleu4": "BLEU-4", "rougeL": "ROUGE-L"}


def loss_curves(records, theme=LIGHT):
    """Training loss over optimizer steps, one line a run: smoothed, up to four runs as logged too; validation points."""
    chart = Chart(theme=theme)
    axes = add_axes(chart, "optimizer step", "loss (nats per assistant token)")
    curves = [curve for curve in map(_curve, sorted(records, key=_order)) if any(curve[1:])]
    if not curves:
        return empty(chart, axes, "no training steps recorded")
    named, said = set(), []
    for record, history, valid in curves:
        method, color = record["method"], theme.color_of(record["method"])
        label = None if method in named else method  # one entry a method, not one a seed
        named.add(method)
        if history:
            steps, losses = zip(*history)
            if len(curves) <= _MOST_RAW_CURVES:
                axes.plot(steps, losses, color=color, alpha=_RAW_ALPHA[theme.name], linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=color, linewidth=1.7, label=label)
            said.append(f"{_run_name(record)} {losses[0]:.2f} to {losses[-1]:.2f}")
        if valid:
            marker = marker_of(method)
            points = {"marker": marker, "color": color, "markeredgecolor": theme.paper, "linestyle": "none"}
            axes.plot(*zip(*valid), **points, label=None if history else label)
            said.append(f"{_run_name(record)} {valid[-1][1]:.2f} on validation rows")
    title(axes, "Training loss (line: smoothed; points: validation)")
    legend(axes)
    chart.alt = f"Loss from the first to the last training step. {'; '.join(said)}."
    return chart


def _curve(record):
    """(record, [(step, training loss), ...], [(step, validation loss), ...]) without what is unknown."""
    history, valid = (
        [(entry["step"], entry[key]) for entry in record[part] if _is_number(entry.get(key))]
        for part, key in (("history", "loss"), ("valid_history", "valid_loss"))
    )
    return record, history, valid


def smoothed(values, share=0.1):
    """Exponential mean of a list of numbers over about `share` of its length, without the pull of its start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    made, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        made.append(total / weight)
    return made


def score_bars(intervals, metrics=tuple(_METRIC_NAMES), *, rows="", theme=LIGHT):
    """One panel a metric, a bar a method with its 95 % interval.

    intervals: {method: {metric: stats.Interval}}. rows: the source whose rows alone they are of, if any.
    """
    chart = Chart(6.0, 3.3, theme=theme)
    methods = sorted(intervals, key=_method_order)
    panels = chart.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        name = _METRIC_NAMES[metric]
        dress(axes, "", f"{name} (0-1)")
        for at, method in enumerate(methods):
            _bar(axes, at, 0.72, intervals[method][metric], method)
        slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(methods) * len(metrics) > 8 else {}
        axes.set_xticks(range(len(methods)), methods, **slant)
        _room_above(axes, [interval[metric].high for interval in intervals.values()])
        title(axes, f"{name}{_on(rows)}, 95 % intervals")
    chart.alt = f"Scores on the test rows{_of(rows)}. " + _said(methods, intervals, metrics)
    return chart if methods else empty(chart, panels[0], "no scores yet")


def source_bars(per_source, metric="rougeL", theme=LIGHT):
    """One metric by data source, a bar a method, 95 % intervals. per_source: {source: {method: {metric: Interval}}}."""
    name = _METRIC_NAMES[metric]
    chart = Chart(6.2, 3.3, theme=theme)
    axes = add_axes(chart, "", f"{name} (0-1)")
    methods = sorted({method for found in per_source.values() for method in found}, key=_method_order)
    width = 0.8 / max(len(methods), 1)
    for group, found in enumerate(per_source.values()):
        for at, method in enumerate(methods):
            if method in found:
                place = group + (at - (len(methods) - 1) / 2) * width
                _bar(axes, place, width * 0.92, found[method][metric], method, label=method if group == 0 else None)
    if not methods:
        return empty(chart, axes, "no scores yet")
    axes.set_xticks(range(len(per_source)), list(per_source))
    _room_above(axes, [found[metric].high for methods_ in per_source.values() for found in methods_.values()])
    title(axes, f"{name} by source, 95 % intervals")
    legend(axes, outside=True)
    said = (
        f"{source}: {_said(sorted(found, key=_method_order), found, (metric,))}" for source, found in per_source.items()
    )
    chart.alt = f"{name} by data source. " + " ".join(said)
    return chart


def quality_against_memory(intervals, peak_gib, metric="rougeL", theme=LIGHT, *, rows=""):
    """A point a method: peak training memory across, score with 95 % interval up; base as a dashed line where it is near.

    intervals as in `score_bars`; peak_gib: {method: GiB or None}; methods of unknown memory are left out.
    rows: as in `score_bars`. The axes hold the methods; a base far below them is named at the edge.
    """
    name = _METRIC_NAMES[metric]
    chart = Chart(5.6, 3.5, theme=theme)
    axes = add_axes(chart, "peak memory of training (GiB)", f"{name} (0-1)")
    placed = [m for m in sorted(intervals, key=_method_order) if m != "base" and _is_number(peak_gib.get(m))]
    for method in placed:
        found = intervals[method][metric]
        axes.errorbar(
            peak_gib[method],
            found.value,
            yerr=_spans(found),
            marker=marker_of(method),
            markersize=9,
            capsize=4,
            linestyle="none",
            color=theme.color_of(method),
            label=method,
        )
    if not placed:
        return empty(chart, axes, "no method with both a score and a memory figure")
    _hold(axes.set_xlim, [peak_gib[m] for m in placed])
    ends = [end for m in placed for end in (intervals[m][metric].low, intervals[m][metric].high)]
    base = intervals["base"][metric].value if "base" in intervals else None
    is_near = base is not None and min(ends) - base < 2 * max(max(ends) - min(ends), 0.05 * max(ends))
    _hold(axes.set_ylim, [*ends, base] if is_near else ends)
    if axes.get_xlim()[0] > 0 or axes.get_ylim()[0] > 0:
        axes.set_xlabel(f"{axes.get_xlabel()}; axes do not start at 0")
    if base is not None:
        color, where = theme.color_of("base"), (0.99, base if is_near else 0.02)
        if is_near:
            axes.axhline(base, color=color, linestyle="--", linewidth=1.2)
        said = " base " if is_near else f"base: {base:.3f}, below"
        place = axes.get_yaxis_transform() if is_near else axes.transAxes
        axes.text(*where, said, color=color, fontsize=9, ha="right", va="bottom", transform=place)
    title(axes, f"{name}{_on(rows)} against memory: up and left is better")
    legend(axes, outside=True)
    said = (f"{m} {intervals[m][metric].value:.3f} at {peak_gib[m]:.2f} GiB" for m in placed)
    base = f" Base {intervals['base'][metric].value:.3f}." if "base" in intervals else ""
    chart.alt = f"{name} on the test rows{_of(rows)} against peak training memory. {'; '.join(said)}.{base}"
    return chart


def memory_bars(peak_gib, reserved_gib=None, theme=LIGHT):
    """Peak training memory of each method in GiB; where known, what the allocator held beyond it as an outline."""
    reserved_gib = reserved_gib or {}
    outlined = " (outline and brackets: reserved)" if any(map(_is_number, reserved_gib.values())) else ""
    name = "Peak memory of training"
    return _value_bars(peak_gib, name, "GiB", outlines=reserved_gib, note=outlined, theme=theme)


def loss_bars(losses, rows="test rows", theme=LIGHT):
    """The loss of each method on some text. losses: {method: nats per token or None}."""
    return _value_bars(losses, f"Loss on {rows}: shorter is better", "nats per token", form=".3f", theme=theme)


def speed_bars(tokens_per_second, theme=LIGHT):
    """How fast each method trained. tokens_per_second: {method: unpadded tokens a second or None}."""
    return _value_bars(tokens_per_second, "Speed of training", "tokens/s", form=",.0f", theme=theme)


def _value_bars(values, name, unit, *, theme, form=".2f", outlines=None, note=""):
    """One lying bar a method whose value is known, with the number at its end; `outlines` around some of them."""
    outlines = outlines or {}
    methods = [m for m in sorted(values, key=_method_order) if _is_number(values[m])]
    chart = Chart(5.6, 0.9 + 0.5 * max(len(methods), 2), theme=theme)
    axes = add_axes(chart, unit, "", grid="x")
    if not methods:
        return empty(chart, axes, f"{name.split(':')[0].lower()} is not known yet")
    for at, method in enumerate(methods):
        held = outlines.get(method)
        if _is_number(held):
            axes.barh(at, held, height=0.66, fill=False, edgecolor=theme.color_of(method), linewidth=1.2)
        axes.barh(at, values[method], height=0.66, color=theme.color_of(method))
        end = max(values[method], held or 0)
        more = f" ({held:{form}})" if _is_number(held) else ""
        axes.annotate(f"{values[method]:{form}}{more}", (end, at), xytext=(5, 0), textcoords="offset points", va="center",
                      fontsize=9, color=theme.ink)  # fmt: skip
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlim(
        0, max([values[m] for m in methods] + [outlines.get(m) or 0 for m in methods]) * (1.3 if outlines else 1.15)
    )
    title(axes, name + note)
    chart.alt = f"{name}. " + "; ".join(f"{m} {values[m]:{form}} {unit}" for m in methods) + "."
    return chart


def _bar(axes, place, width, interval, method, label=None):
    theme = axes.figure.theme
    # The rim keeps the lower half of the interval apart from a dark bar.
    rim = [withStroke(linewidth=2.6, foreground=theme.paper)]
    axes.bar(
        place,
        interval.value,
        width,
        yerr=_spans(interval),
        color=theme.color_of(method),
        label=label,
        error_kw={"capsize": 3, "ecolor": theme.ink, "elinewidth": 1.1, "path_effects": rim},
    )


def _spans(interval):
    # A replicate's quantile can lie on the other side of the score itself; a bar needs lengths of 0 or more.
    return np.array([[max(interval.value - interval.low, 0.0)], [max(interval.high - interval.value, 0.0)]])


def _hold(set_limits, values):
    """Limits of an axis that hold the values, with room for marks, and never below 0."""
    room = 0.15 * ((max(values) - min(values)) or max(values) or 1.0)
    set_limits(max(0.0, min(values) - room), max(values) + room)


def _room_above(axes, highs, bottom=0.0):
    top = max(highs, default=1.0)
    axes.set_ylim(bottom, top + 0.08 * (top - bottom) if top > bottom else bottom + 1)


def _said(methods, intervals, metrics=tuple(_METRIC_NAMES)):
    def numbers(found):
        return ", ".join(
            f"{_METRIC_NAMES[m]} {found[m].value:.3f} ({found[m].low:.3f} to {found[m].high:.3f})" for m in metrics
        )

    return "; ".join(f"{method} {numbers(intervals[method])}" for method in methods) + "."


def _on(rows):
    return f" on {rows}" if rows else ""


def _of(rows):
    return f" of {rows}" if rows else ""


def _run_name(record):
    return f"{record['method']} (seed {record['seed']})"


def _order(record):
    return (*_method_order(record["method"]), record["seed"])


def _method_order(method):
    return study_order(method.removesuffix(" (cut)")), method


def _is_number(value):
    return value is not None and math.isfinite(value)
