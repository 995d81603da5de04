"""Charts of a study's data: how long its rows are, and what became of each source's rows."""

import numpy as np

from peftlib.chart import Chart
from peftlib.data.store import load_split

# Okabe and Ito's palette; hatches repeat what the colours say.
_KEPT = {"train": ("#0072b2", ""), "valid": ("#56b4e9", "//"), "test": ("#009e73", "..")}
_REJECTED, _UNUSED = ("#d55e00", "xx"), ("#d9d9d9", "")
_SOURCES = ("#cc79a7", "#e69f00", "#000000", "#8c6d31", "#7b4173")  # none that means a split above
_DASHES = ("solid", "dashed", "dotted", "dashdot")


def length_chart(folder, split="train"):
    """Tokens of a split's rows, one outline a source. folder: a data folder."""
    rows = load_split(folder, split)
    lengths, names = np.array(rows.column("n_tokens")), np.array(rows.column("source"))
    chart = Chart(7.0, 3.4)
    axes = chart.subplots()
    said = []
    edges = np.linspace(0, lengths.max() if lengths.size else 1, 41)
    for i, name in enumerate(dict.fromkeys(names.tolist())):
        own = lengths[names == name]
        axes.hist(
            own, edges, histtype="step", color=_SOURCES[i % 5], linestyle=_DASHES[i % 4], linewidth=1.6, label=name
        )
        said.append(f"{name} {own.min()} to {own.max()}, median {np.median(own):.0f}")
    axes.set(xlabel="tokens of a row", ylabel="rows", title=f"Length of {split} rows")
    axes.yaxis.get_major_locator().set_params(integer=True)  # rows are counted
    axes.spines[["top", "right"]].set_visible(False)
    if said:
        axes.legend(frameon=False)
    chart.alt = f"Tokens of {split} rows. {'; '.join(said) or 'no rows'}."
    chart.is_empty = not said
    return chart


def kept_chart(manifest):
    """Shares of each source's rows that were kept, rejected or not needed, and the rejected ones by reason."""
    names = list(manifest["sources"])
    reasons = sorted({reason for found in manifest["rejected"].values() for reason in found})
    chart = Chart(8.0, 1.8 + 0.35 * len(names) + 0.22 * len(reasons))
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
    read = np.maximum([manifest["read"][name] for name in names], 1)
    left = np.zeros(len(names))
    looks = {**_KEPT, "rejected": _REJECTED, "not needed": _UNUSED}
    for part, numbers in parts.items():
        color, hatch = looks[part]
        width = np.array(numbers) / read
        axes.barh(names, width, left=left, color=color, hatch=hatch, edgecolor="white", label=part)
        left += width
    axes.invert_yaxis()
    axes.set(xlabel="share of the rows read", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _reason_bars(axes, names, reasons, rejected):
    if not reasons:
        axes.text(0.5, 0.5, "no row was rejected", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    left = np.zeros(len(reasons))
    for i, name in enumerate(names):
        numbers = np.array([rejected[name].get(reason, 0) for reason in reasons])
        axes.barh(reasons, numbers, left=left, color=_SOURCES[i % 5], edgecolor="white", label=name)
        left += numbers
    for at, total in enumerate(left):
        axes.annotate(f"{total:,.0f}", (total, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="rows rejected")
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
