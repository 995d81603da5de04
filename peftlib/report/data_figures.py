"""Charts of a study's data: how long its rows are, and how many rows of each source were kept or rejected."""

import numpy as np

from peftlib.data.store import load_split
from peftlib.report.chart import Chart, drawing, dress, empty, finished, stacked_bars
from peftlib.report.palette import LIGHT

# Okabe and Ito's palette; hatches repeat what the colours say.
_KEPT = {"train": ("#0072b2", ""), "valid": ("#56b4e9", "//"), "test": ("#009e73", "..")}
_REST = {"rejected": ("#d55e00", "xx"), "not needed": ("#d9d9d9", "")}
_SOURCES = ("#cc79a7", "#e69f00", None, "#8c6d31", "#7b4173")  # none that means a split above; None: the ink
_DASHES = ("solid", "dashed", "dotted", "dashdot")


def length_chart(folder, split="train", theme=LIGHT):
    """Tokens of a split's rows, one outline a source. folder: a data folder."""
    rows = load_split(folder, split)
    lengths, names = np.array(rows.column("n_tokens")), np.array(rows.column("source"))
    chart, axes = drawing(7.0, 3.4, "tokens of a row", "rows", theme)
    if not lengths.size:
        return empty(chart, axes, f"no {split} rows")
    said, edges = [], np.linspace(0, lengths.max(), 41)
    for i, name in enumerate(dict.fromkeys(names.tolist())):
        own = lengths[names == name]
        look = {"color": _source_color(i, theme), "linestyle": _DASHES[i % 4], "linewidth": 1.6}
        axes.hist(own, edges, histtype="step", label=name, **look)
        said.append(f"{name} {own.min()} to {own.max()}, median {np.median(own):.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True)  # rows are counted
    return finished(chart, axes, f"Length of {split} rows", f"Tokens of {split} rows: {'; '.join(said)}.", "inside")


def kept_chart(manifest, theme=LIGHT):
    """Shares of each source's rows that were kept, rejected or not needed, and the rejected ones by reason."""
    names, rejected = list(manifest["sources"]), manifest["rejected"]
    reasons = sorted({reason for found in rejected.values() for reason in found})
    chart = Chart(8.0, 1.8 + 0.35 * len(names) + 0.22 * len(reasons) + 0.3 * bool(reasons), theme)
    shares, counts = chart.subplots(2, 1, height_ratios=[1 + len(names), 1 + max(1, len(reasons))])
    parts = {split: [manifest["counts"][split][name] for name in names] for split in _KEPT}
    kept = np.sum(list(parts.values()), axis=0)
    parts["rejected"] = [sum(rejected[name].values()) for name in names]
    parts["not needed"] = [manifest["unused"][name] for name in names]
    read = np.maximum([manifest["read"][name] for name in names], 1)
    looks = {part: {"color": color, "hatch": hatch} for part, (color, hatch) in {**_KEPT, **_REST}.items()}
    dress(shares, "share of the rows read", "", grid="x")
    stacked_bars(shares, names, {part: np.array(numbers) / read for part, numbers in parts.items()}, looks)
    shares.set(xlim=(0, 1))
    if reasons:
        dress(counts, "rows rejected", "", grid="x")
        by_source = {name: np.array([rejected[name].get(reason, 0) for reason in reasons]) for name in names}
        stacked_bars(
            counts, reasons, by_source, {name: {"color": _source_color(i, theme)} for i, name in enumerate(names)}
        )
        look = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": theme.ink}
        for at, total in enumerate(sum(by_source.values())):
            counts.annotate(f"{total:,.0f}", (total, at), **look)
        counts.margins(x=0.08)
    else:
        empty(chart, counts, "no row was rejected")
        chart.is_empty = False
    said = (
        f"{name}: {manifest['read'][name]:,} read, {n_kept:,} kept, {n_rejected:,} rejected"
        for name, n_kept, n_rejected in zip(names, kept, parts["rejected"])
    )
    chart.alt = f"Rows of each source, {'; '.join(said)}."
    return chart


def _source_color(number, theme):
    return _SOURCES[number % len(_SOURCES)] or theme.ink
