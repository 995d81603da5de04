"""Rows of a split in a notebook, with the tokens that the loss scores marked: widgets, or a static table."""

import html
from itertools import groupby

from peftlib.notebook.widgets import can_click

_SCORED = "background:#fff2b3;color:#000;border-bottom:2px solid #b58900"
_READ = "opacity:.65"  # of the page's own colour, light or dark
_LEGEND = (
    f'<p><span style="{_SCORED}">scored</span> by the loss; <span style="{_READ}">the rest</span> is only read.</p>'
)


def spans(row, tokenizer):
    """[(is_scored, text), ...] of a row's tokens as decoded, control tokens included."""
    pairs = zip(row["input_ids"], row["is_scored"], strict=True)
    return [
        (is_scored, tokenizer.decode([token for token, _ in part], clean_up_tokenization_spaces=False))
        for is_scored, part in groupby(pairs, key=lambda pair: pair[1])
    ]


def mask_text(row, tokenizer):
    """A row as text, what is scored between ⟦ and ⟧."""
    return "".join(f"⟦{text}⟧" if is_scored else text for is_scored, text in spans(row, tokenizer))


def mask_html(row, tokenizer):
    """A row as HTML, what is scored coloured and underlined; its text is escaped."""
    parts = "".join(
        f'<span style="{_SCORED if is_scored else _READ}">{html.escape(text)}</span>'
        for is_scored, text in spans(row, tokenizer)
    )
    name = html.escape(f"{row['source']}  {row['id']}  {row['n_tokens']} tokens, {sum(row['is_scored'])} scored")
    return f'<p><b>{name}</b></p><div style="white-space:pre-wrap;overflow-wrap:anywhere">{parts}</div>'


def browse(rows, tokenizer, *, is_interactive=None):
    """Show a split in a cell: widgets to pick source and row, or a table of each source's first two rows.

    rows: as load_split gives them. is_interactive: None finds out whether somebody is there to click.
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
        number.max = len(of_source[source.value]) - 1  # a larger value is brought down to it
        shown.value = _LEGEND + mask_html(rows[of_source[source.value][number.value]], tokenizer)

    source.observe(show, "value")
    number.observe(show, "value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([source, number]), shown])
