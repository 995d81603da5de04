"""A study's data in a notebook: rows with the scored tokens marked, and charts of lengths and sources."""

import html
from itertools import groupby

import numpy as np

from peftlib.data.store import load_split
from peftlib.notebook.widgets import can_click
from peftlib.report.chart import Chart, drawing, dress, empty, finished, stacked_bars
from peftlib.report.palette import LIGHT

_SCORED = "background:#fff2b3;color:#000;border-bottom:2px solid #b58900"
_READ = "opacity:.65"  # of the page's own colour, light or dark
_LEGEND = f'<p><span style="{_SCORED}">scored</span> by the loss; <span style="{_READ}">the rest</span> is masked.</p>'

# Okabe and Ito's palette; hatches duplicate the colours' meaning.
_KEPT = {"train": ("#0072b2", ""), "valid": ("#56b4e9", "//"), "test": ("#009e73", "..")}
_REST = {"rejected": ("#d55e00", "xx"), "not needed": ("#d9d9d9", "")}
_SOURCES = ("#cc79a7", "#e69f00", None, "#8c6d31", "#7b4173")  # none that means a split above; None: the ink
_DASHES = ("solid", "dashed", "dotted", "dashdot")


def spans(row, tokenizer):
    """[(is_scored, text), ...] of a row's tokens as decoded, control tokens included."""
    pairs = zip(row["input_ids"], row["is_scored"], strict=True)
    return [
        (is_scored, tokenizer.decode([token for token, _ in part], clean_up_tokenization_spaces=False))
        for is_scored, part in groupby(pairs, key=lambda pair: pair[1])
    ]


def mask_text(row, tokenizer):
    """A row as text, with scored parts between ⟦ and ⟧."""
    return "".join(f"⟦{text}⟧" if is_scored else text for is_scored, text in spans(row, tokenizer))


def mask_html(row, tokenizer):
    """A row as HTML with scored parts coloured and underlined; its text is escaped."""
    parts = "".join(
        f'<span style="{_SCORED if is_scored else _READ}">{html.escape(text)}</span>'
        for is_scored, text in spans(row, tokenizer)
    )
    name = html.escape(f"{row['source']}  {row['id']}  {row['n_tokens']} tokens, {sum(row['is_scored'])} scored")
    return f'<p><b>{name}</b></p><div style="white-space:pre-wrap;overflow-wrap:anywhere">{parts}</div>'


def browse(rows, tokenizer, *, is_interactive=None):
    """Show a split in a cell: widgets to pick source and row, or a table of each source's first two rows.

    rows: as returned by load_split. is_interactive: None detects whether a user can click.
    """
    names, of_source = rows.column("source"), {}
    for at, name in enumerate(names):
        of_source.setdefault(name, []).append(at)
    if can_click(is_interactive):
        return _widgets(rows, tokenizer, of_source)
    from IPython.display import HTML

    shown = (at for found in of_source.values() for at in found[:2])
    cells = "".join(f'<tr><td style="text-align:left">{mask_html(rows[at], tokenizer)}</td></tr>' for at in shown)
    return HTML(f"{_LEGEND}<table>{cells}</table>")


def _widgets(rows, tokenizer, of_source):
    import ipywidgets

    source = ipywidgets.Dropdown(options=list(of_source), description="source")
    number = ipywidgets.BoundedIntText(value=0, min=0, max=len(of_source[source.value]) - 1, description="row")
    shown = ipywidgets.HTML()

    def show(change=None):
        number.max = len(of_source[source.value]) - 1  # a larger value is reduced to it
        shown.value = _LEGEND + mask_html(rows[of_source[source.value][number.value]], tokenizer)

    source.observe(show, "value")
    number.observe(show, "value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([source, number]), shown])


def length_chart(folder, split="train", theme=LIGHT):
    """Tokens of a split's rows, one outline per source. folder: a data folder."""
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
