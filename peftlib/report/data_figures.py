"""Charts of a study's data: how long its rows are, and what became of each source's rows."""

import numpy as np

from peftlib.data.store import load_split
from peftlib.report.chart import Chart, add_axes, dress, empty, legend, title
from peftlib.report.palette import LIGHT

# Okabe and Ito's palette; hatches repeat what the colours say.
_KEPT = {"train": ("#0072b2", ""), "valid": ("#56b4e9", "//"), "test": ("#009e73", "..")}
_REJECTED, _UNUSED = ("#d55e00", "xx"), ("#d9d9d9", "")
_SOURCES = ("#cc79a7", "#e69f00", None, "#8c6d31", "#7b4173")  # none that means a split above; None: the ink
_DASHES = ("solid", "dashed", "dotted", "dashdot")


def length_chart(folder, split="train", theme=LIGHT):
    """Tokens of a split's rows, one outline a source. folder: a data folder."""
    rows = load_split(folder, split)
    lengths, names = np.array(rows.column("n_tokens")), np.array(rows.column("source"))
    chart = Chart(7.0, 3.4, theme)
    axes = add_axes(chart, "tokens of a row", "rows")
    said = []
    edges = np.linspace(0, lengths.max() if lengths.size else 1, 41)
    for i, name in enumerate(dict.fromkeys(names.tolist())):
        own = lengths[names == name]
        look = {"color": _source_color(i, theme), "linestyle": _DASHES[i % 4], "linewidth": 1.6}
        axes.hist(own, edges, histtype="step", label=name, **look)
        said.append(f"{name} {own.min()} to {own.max()}, median {np.median(own):.0f}")
    if not said:
        return empty(chart, axes, f"no {split} rows")
    title(axes, f"Length of {split} rows")
    legend(axes)
    axes.yaxis.get_major_locator().set_params(integer=True)  # rows are counted
    chart.alt = f"Tokens of {split} rows. {'; '.join(said)}."
    return chart


def kept_chart(manifest, theme=LIGHT):
    """Shares of each source's rows that were kept, rejected or not needed, and the rejected ones by reason."""
    names = list(manifest["sources"])
    reasons = sorted({reason for found in manifest["rejected"].values() for reason in found})
    chart = Chart(8.0, 1.8 + 0.35 * len(names) + 0.22 * len(reasons) + 0.3 * bool(reasons), theme)
    shares, counts = chart.subplots(2, 1, height_ratios=[1 + len(names), 1 + max(1, len(reasons))])
    _share_bars(shares, names, manifest)
    _reason_bars(counts, names, reasons, manifest["rejected"])
    kept = {name: sum(manifest["counts"][split][name] for split in _KEPT) for name in names}
    chart.alt = "What became of the rows. " + "; ".join(
        f"{name}: {manifest['read'][name]:,} read, {kept[name]:,} kept, "
        f"{sum(manifest['rejected'][name].values()):,} rejected"
        for name in names
    )
    return chart


def _share_bars(axes, names, manifest):
    parts = {split: [manifest["counts"][split][name] for name in names] for split in _KEPT}
    parts["rejected"] = [sum(manifest["rejected"][name].values()) for name in names]
    parts["not needed"] = [manifest["unused"][name] for name in names]
    dress(axes, "share of the rows read", "", grid="x")
    read = np.maximum([manifest["read"][name] for name in names], 1)
    left = np.zeros(len(names))
    looks = {**_KEPT, "rejected": _REJECTED, "not needed": _UNUSED}
    for part, numbers in parts.items():
        color, hatch = looks[part]
        width = np.array(numbers) / read
        axes.barh(names, width, left=left, color=color, hatch=hatch, edgecolor=axes.figure.theme.paper, label=part)
        left += width
    axes.invert_yaxis()
    axes.set(xlim=(0, 1))
    _legend_above(axes)


def _reason_bars(axes, names, reasons, rejected):
    theme = axes.figure.theme
    if not reasons:
        axes.text(0.5, 0.5, "no row was rejected", ha="center", transform=axes.transAxes, color=theme.ink)
        axes.set_axis_off()
        return
    dress(axes, "rows rejected", "", grid="x")
    left = np.zeros(len(reasons))
    for i, name in enumerate(names):
        numbers = np.array([rejected[name].get(reason, 0) for reason in reasons])
        axes.barh(reasons, numbers, left=left, color=_source_color(i, theme), edgecolor=theme.paper, label=name)
        left += numbers
    for at, total in enumerate(left):
        beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{total:,.0f}", (total, at), fontsize=8, color=theme.ink, **beside)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    _legend_above(axes)


def _legend_above(axes):
    ink = axes.figure.theme.ink
    axes.legend(ncols=5, frameon=False, labelcolor=ink, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _source_color(number, theme):
    return _SOURCES[number % len(_SOURCES)] or theme.ink
