"""Charts of a study, each with a text for those who cannot see it. A method keeps its colour and marker everywhere.

Functions return a `Chart`: a matplotlib Figure that shows itself in a notebook and carries `alt`. Nothing global
(pyplot, rcParams) is touched.
"""

import base64
import html
import io
import math

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peftlib.files import atomic_path
from peftlib.study import method_rank

# Okabe and Ito's palette, told apart with every common colour blindness; markers repeat the distinction.
COLORS = {
    "base": "#7f7f7f",
    "base (cut)": "#bdbdbd",
    "qlora": "#0072b2",
    "galore": "#d55e00",
    "hybrid": "#009e73",
    "lora": "#56b4e9",
    "full": "#cc79a7",
    "apollo": "#e69f00",
}
MARKERS = {"base": "X", "qlora": "o", "galore": "s", "hybrid": "D", "lora": "^", "full": "v", "apollo": "P"}
_OTHER_COLOR, _OTHER_MARKER = "#000000", "*"
_DPI = 130
_FORMATS = ("png", "svg")
_MOST_RAW_CURVES = 4  # more of them hide the smoothed ones
_TEXT, _GRID = "#222222", "#d9d9d9"
_METRIC_NAMES = {"bleu4": "BLEU-4", "rougeL": "ROUGE-L"}


class Chart(Figure):
    """A figure with `alt`, its content in words, and `is_empty` where there was nothing to draw."""

    def __init__(self, width=7.0, height=3.8):
        super().__init__(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(self)
        self.alt = ""
        self.is_empty = False

    def _repr_mimebundle_(self, include=None, exclude=None):
        # As HTML, for JupyterLab shows an image/png without the alt text that it was given.
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=_DPI)
        address = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        image = f'<img alt="{html.escape(self.alt)}" src="{address}" style="max-width:100%">'
        return {"text/html": image, "text/plain": f"<figure: {self.alt}>"}


def save(chart, folder, name):
    """Write <name>.png and <name>.svg, whole or not at all; returns the PNG's path.

    Equal charts give equal bytes: no dates, and names inside the SVG that follow from its content.
    """
    for kind in _FORMATS:
        with atomic_path(folder / f"{name}.{kind}") as beside, rc_context({"svg.hashsalt": "peftlib"}):
            chart.savefig(beside, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
    return folder / f"{name}.png"


def color_of(method):
    """The colour of a method's lines, bars and points."""
    return COLORS.get(method, _OTHER_COLOR)


def loss_curves(records):
    """Training loss over optimizer steps, one line a run: smoothed, up to four runs as logged too; validation points."""
    chart = Chart()
    axes = _axes(chart, "optimizer step", "loss (nats per assistant token)")
    curves = [curve for curve in map(_curve, sorted(records, key=_order)) if any(curve[1:])]
    if not curves:
        return _empty(chart, axes, "no training steps recorded")
    named, said = set(), []
    for record, history, valid in curves:
        method, color = record["method"], color_of(record["method"])
        label = None if method in named else method  # one entry a method, not one a seed
        named.add(method)
        if history:
            steps, losses = zip(*history)
            if len(curves) <= _MOST_RAW_CURVES:
                axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=color, linewidth=1.7, label=label)
            said.append(f"{_run_name(record)} {losses[0]:.2f} to {losses[-1]:.2f}")
        if valid:
            marker = MARKERS.get(method, _OTHER_MARKER)
            points = {"marker": marker, "color": color, "markeredgecolor": "white", "linestyle": "none"}
            axes.plot(*zip(*valid), **points, label=None if history else label)
            said.append(f"{_run_name(record)} {valid[-1][1]:.2f} on validation rows")
    axes.set_title("Training loss (line: smoothed; points: validation)", **_TITLE)
    _legend(axes)
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


def score_bars(intervals):
    """BLEU-4 and ROUGE-L of each method with 95 % intervals. intervals: {method: {metric: stats.Interval}}."""
    chart = Chart(7.0, 3.6)
    methods = sorted(intervals, key=_method_order)
    panels = chart.subplots(1, len(_METRIC_NAMES), squeeze=False)[0]
    for axes, (metric, name) in zip(panels, _METRIC_NAMES.items()):
        _dress(axes, "", f"{name} (0-1)")
        for at, method in enumerate(methods):
            _bar(axes, at, 0.72, intervals[method][metric], method)
        slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(methods) > 4 else {}
        axes.set_xticks(range(len(methods)), methods, **slant)
        _room_above(axes, [interval[metric].high for interval in intervals.values()])
        axes.set_title(f"{name}, 95 % intervals", **_TITLE)
    chart.alt = "Scores on the test rows. " + _said(methods, intervals)
    return chart if methods else _empty(chart, panels[0], "no scores yet")


def source_bars(per_source, metric="rougeL"):
    """One metric by data source, a bar a method, 95 % intervals. per_source: {source: {method: {metric: Interval}}}."""
    name = _METRIC_NAMES[metric]
    chart = Chart(7.4, 3.6)
    axes = _axes(chart, "", f"{name} (0-1)")
    methods = sorted({method for found in per_source.values() for method in found}, key=_method_order)
    width = 0.8 / max(len(methods), 1)
    for group, found in enumerate(per_source.values()):
        for at, method in enumerate(methods):
            if method in found:
                place = group + (at - (len(methods) - 1) / 2) * width
                _bar(axes, place, width * 0.92, found[method][metric], method, label=method if group == 0 else None)
    if not methods:
        return _empty(chart, axes, "no scores yet")
    axes.set_xticks(range(len(per_source)), list(per_source))
    _room_above(axes, [found[metric].high for methods_ in per_source.values() for found in methods_.values()])
    axes.set_title(f"{name} by source, 95 % intervals", **_TITLE)
    _legend(axes, outside=True)
    said = (
        f"{source}: {_said(sorted(found, key=_method_order), found, (metric,))}" for source, found in per_source.items()
    )
    chart.alt = f"{name} by data source. " + " ".join(said)
    return chart


def quality_against_memory(intervals, peak_gib, metric="rougeL"):
    """A point a method: peak training memory across, score with 95 % interval up; base as a dashed line.

    intervals as in `score_bars`; peak_gib: {method: GiB or None}; methods of unknown memory are left out.
    """
    name = _METRIC_NAMES[metric]
    chart = Chart(6.4, 4.0)
    axes = _axes(chart, "peak memory of training (GiB)", f"{name} (0-1)")
    if "base" in intervals:
        axes.axhline(intervals["base"][metric].value, color=COLORS["base"], linestyle="--", linewidth=1.2)
        axes.text(0.99, intervals["base"][metric].value, " base ", color=COLORS["base"], fontsize=9, ha="right",
                  va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
    placed = [m for m in sorted(intervals, key=_method_order) if m != "base" and _is_number(peak_gib.get(m))]
    for method in placed:
        found = intervals[method][metric]
        axes.errorbar(
            peak_gib[method],
            found.value,
            yerr=_spans(found),
            marker=MARKERS.get(method, _OTHER_MARKER),
            markersize=9,
            capsize=4,
            linestyle="none",
            color=color_of(method),
            label=method,
        )
    if not placed:
        return _empty(chart, axes, "no method with both a score and a memory figure")
    axes.set_xlim(0, max(peak_gib[m] for m in placed) * 1.18)
    lows = [intervals[m][metric].low for m in placed] + [i[metric].value for m, i in intervals.items() if m == "base"]
    _room_above(axes, [intervals[m][metric].high for m in placed], bottom=max(0.0, min(lows) * 0.85))
    axes.set_title(f"{name} against memory: up and left is better", **_TITLE)
    _legend(axes, outside=True)
    said = (f"{m} {intervals[m][metric].value:.3f} at {peak_gib[m]:.2f} GiB" for m in placed)
    base = f" Base {intervals['base'][metric].value:.3f}." if "base" in intervals else ""
    chart.alt = f"{name} against peak training memory. {'; '.join(said)}.{base}"
    return chart


def memory_bars(peak_gib, reserved_gib=None):
    """Peak training memory of each method in GiB; where known, what the allocator held beyond it as an outline."""
    reserved_gib = reserved_gib or {}
    methods = [m for m in sorted(peak_gib, key=_method_order) if _is_number(peak_gib[m])]
    chart = Chart(6.4, 0.9 + 0.5 * max(len(methods), 2))
    axes = _axes(chart, "peak memory of training (GiB)", "", grid="x")
    if not methods:
        return _empty(chart, axes, "no memory figures yet")
    for at, method in enumerate(methods):
        held = reserved_gib.get(method)
        if _is_number(held):
            axes.barh(at, held, height=0.66, fill=False, edgecolor=color_of(method), linewidth=1.2)
        axes.barh(at, peak_gib[method], height=0.66, color=color_of(method))
        axes.annotate(f"{peak_gib[method]:.2f}", (max(peak_gib[method], held or 0), at), xytext=(5, 0),
                      textcoords="offset points", va="center", fontsize=9, color=_TEXT)  # fmt: skip
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlim(0, max([peak_gib[m] for m in methods] + [reserved_gib.get(m) or 0 for m in methods]) * 1.15)
    has_outline = any(_is_number(reserved_gib.get(m)) for m in methods)
    axes.set_title("Peak memory of training" + (" (outline: reserved)" if has_outline else ""), **_TITLE)
    chart.alt = "Peak training memory. " + "; ".join(f"{m} {peak_gib[m]:.2f} GiB" for m in methods) + "."
    return chart


_TITLE = {"fontsize": 11, "color": _TEXT, "loc": "left"}


def _axes(chart, x_label, y_label, grid="y"):
    return _dress(chart.add_subplot(), x_label, y_label, grid)


def _dress(axes, x_label, y_label, grid="y"):
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def _bar(axes, place, width, interval, method, label=None):
    axes.bar(
        place,
        interval.value,
        width,
        yerr=_spans(interval),
        color=color_of(method),
        label=label,
        error_kw={"capsize": 3, "ecolor": _TEXT, "elinewidth": 1.1},
    )


def _spans(interval):
    # A replicate's quantile can lie on the other side of the score itself; a bar needs lengths of 0 or more.
    return np.array([[max(interval.value - interval.low, 0.0)], [max(interval.high - interval.value, 0.0)]])


def _room_above(axes, highs, bottom=0.0):
    top = max(highs, default=1.0)
    axes.set_ylim(bottom, top + 0.08 * (top - bottom) if top > bottom else bottom + 1)


def _legend(axes, outside=False):
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if outside else {"loc": "upper right"}
    axes.legend(frameon=False, fontsize=9, **place)


def _empty(chart, axes, reason):
    axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes, color=_TEXT)
    axes.set_axis_off()
    chart.alt, chart.is_empty = f"Empty chart: {reason}.", True
    return chart


def _said(methods, intervals, metrics=tuple(_METRIC_NAMES)):
    def numbers(found):
        return ", ".join(
            f"{_METRIC_NAMES[m]} {found[m].value:.3f} ({found[m].low:.3f} to {found[m].high:.3f})" for m in metrics
        )

    return "; ".join(f"{method} {numbers(intervals[method])}" for method in methods) + "."


def _run_name(record):
    return f"{record['method']} (seed {record['seed']})"


def _order(record):
    return (*_method_order(record["method"]), record["seed"])


def _method_order(method):
    return method_rank(method.removesuffix(" (cut)")), method


def _is_number(value):
    return value is not None and math.isfinite(value)
