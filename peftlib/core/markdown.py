"""Markdown from plain text that is shown literally, including pipes, backticks and tags."""

import html
import re

_MARKUP = re.compile(r"([\\`*\[\]~$])")
_EDGE_UNDERSCORES = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")  # inside a word they are not markup
# Control characters. Some readers also end a table row at Unicode line separators.
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u2029\x85]")


def escape(text):
    """Escape text so that Markdown shows it literally in paragraphs, links and tables, with line breaks and indents."""
    text = _MARKUP.sub(r"\\\1", without_controls(text))
    text = _EDGE_UNDERSCORES.sub(lambda found: r"\_" * len(found[0]), text)
    text = html.escape(text, quote=False).replace("|", "&#124;")
    text = re.sub(r"(?m)^ +", lambda found: "&nbsp;" * len(found[0]), text)
    return text.replace("\n", "<br>")


def without_controls(text):
    """The text with \\n as its only line break, spaces for tabs, and U+FFFD for other control characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
    return _CONTROLS.sub("\ufffd", text)


def table(rows):
    """A table from rows of text; the first row is the header."""
    return "\n".join([header(rows[0]), *map(row, rows[1:])])


def header(cells, *, n_text=None):
    """The first two lines of a table. n_text: how many columns from the left hold text, not numbers; None: all."""
    rules = ("---|" if n_text is None or at < n_text else "---:|" for at in range(len(cells)))
    return f"{row(cells)}\n|{''.join(rules)}"


def row(cells):
    """One line of a table."""
    return f"| {' | '.join(map(escape, cells))} |"
