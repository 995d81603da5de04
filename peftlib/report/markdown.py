"""Markdown for README from plain texts: cells may hold markup, and links."""


def table(rows):
    """A Markdown table of rows of texts, the first its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def number(value, form, unknown=""):
    """A number in a format such as '{:.2f}', or the text for None."""
    return unknown if value is None else form.format(value)
