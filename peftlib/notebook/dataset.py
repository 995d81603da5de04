"""Rows to look at, with what the loss sees marked: widgets for who sits before them, a static table where nobody does."""

import html
from itertools import groupby

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


def static_table(rows, tokenizer, per_source=2):
    """HTML of the first rows of each source."""
    names = rows.column("source")
    shown = [i for name in dict.fromkeys(names) for i in _places(names, name)[:per_source]]
    cells = "".join(f'<tr><td style="text-align:left">{mask_html(rows[i], tokenizer)}</td></tr>' for i in shown)
    return f"{_LEGEND}<table>{cells}</table>"


def _places(names, name):
    return [i for i, found in enumerate(names) if found == name]


def browse(rows, tokenizer, *, is_interactive=None):
    """What a notebook cell shows of a split: widgets to pick source and row, or a static table.

    rows: data.load_split(...). is_interactive: None finds out whether somebody is there to click.
    """
    from peftlib.notebook.session import can_click

    if can_click() if is_interactive is None else is_interactive:
        return _widgets(rows, tokenizer)
    from IPython.display import HTML

    return HTML(static_table(rows, tokenizer))


def _widgets(rows, tokenizer):
    import ipywidgets

    names = rows.column("source")
    places = {name: _places(names, name) for name in dict.fromkeys(names)}
    source = ipywidgets.Dropdown(options=list(places), description="source")
    number = ipywidgets.BoundedIntText(value=0, min=0, max=len(places[source.value]) - 1, description="row")
    shown = ipywidgets.HTML()

    def show(change=None):
        number.max = len(places[source.value]) - 1  # a larger value is brought down to it
        shown.value = _LEGEND + mask_html(rows[places[source.value][number.value]], tokenizer)

    source.observe(show, "value")
    number.observe(show, "value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([source, number]), shown])
