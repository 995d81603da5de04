"""A document as a list of blocks, written out as Markdown or as one self-contained HTML page.

Block texts are plain: whatever they hold (pipes, backticks, tags, from answers of a model) shows as it is.
"""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple


@dataclass(frozen=True)
class Table:
    """rows of texts. n_text: how many columns from the left hold text; the rest are numbers, aligned to the right."""

    header: tuple
    rows: tuple
    n_text: int = 1


@dataclass(frozen=True)
class Picture:
    """A PNG file, shown with its description. dark_path: what an HTML page shows instead to readers of dark pages."""

    path: Path
    alt: str
    dark_path: Path = None


def to_markdown(blocks, folder):
    """GitHub-flavoured Markdown; pictures are linked relative to `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def to_html(blocks, title):
    """One HTML page with its style and pictures inside; light or dark as the reader's system is."""
    body = "\n".join(_html(block) for block in blocks)
    return _PAGE.format(title=html.escape(title), body=body)


_MARKUP = re.compile(r"([\\`*\[\]~$])")
_EDGE_UNDERSCORES = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")  # inside a word they are no markup


def markdown_text(text):
    """Text that Markdown shows as it is, in a paragraph or a table cell; line breaks and indents kept."""
    text = _without_controls(text)
    text = _MARKUP.sub(r"\\\1", text)
    text = _EDGE_UNDERSCORES.sub(lambda found: r"\_" * len(found[0]), text)
    text = html.escape(text, quote=False).replace("|", "&#124;")
    text = re.sub(r"(?m)^ +", lambda found: "&nbsp;" * len(found[0]), text)
    return text.replace("\n", "<br>")


def _without_controls(text):
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
    # Line separators of Unicode would end a table row in some readers.
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u2029\x85]", "\ufffd", text)


def _markdown(block, folder):
    if isinstance(block, Heading):
        return "#" * block.level + " " + markdown_text(block.text)
    if isinstance(block, Paragraph):
        return markdown_text(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {markdown_text(item)}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{markdown_text(block.alt)}]({block.path.relative_to(folder).as_posix()})"
    rule = [" --- " if at < block.n_text else " ---: " for at in range(len(block.header))]
    lines = [_markdown_row(block.header), "|" + "|".join(rule) + "|", *map(_markdown_row, block.rows)]
    return "\n".join(lines)


def _markdown_row(cells):
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def _html(block):
    if isinstance(block, Heading):
        return f"<h{block.level}>{_html_text(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_html_text(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_html_text(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        image = f'<img alt="{html.escape(block.alt)}" src="{png_address(block.path.read_bytes())}">'
        if block.dark_path is not None:
            dark = png_address(block.dark_path.read_bytes())
            image = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">{image}</picture>'
        return f"<figure>{image}</figure>"
    rows = [_html_row("th", block.header, block.n_text)]
    rows += [_html_row("td", row, block.n_text) for row in block.rows]
    return f'<div class="wide"><table><thead>{rows[0]}</thead><tbody>{"".join(rows[1:])}</tbody></table></div>'


def png_address(content):
    """A data: address that holds the bytes of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _html_row(tag, cells, n_text):
    kinds = ("text" if at < n_text else "number" for at in range(len(cells)))
    made = (f'<{tag} class="{kind}">{_html_text(cell)}</{tag}>' for kind, cell in zip(kinds, cells))
    return f"<tr>{''.join(made)}</tr>"


def _html_text(text):
    return html.escape(_without_controls(text))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; --soft: #f4f4f4; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e4e4; --paper: #16181b; --line: #444; --soft: #212429; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; overflow-wrap: anywhere; }}
h1, h2, h3 {{ line-height: 1.25; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid var(--line); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }}
th, td {{ border: 1px solid var(--line); padding: 0.3rem 0.55rem; text-align: left; vertical-align: top; }}
th {{ background: var(--soft); }}
.number {{ text-align: right; white-space: nowrap; }}
.text {{ white-space: pre-wrap; overflow-wrap: break-word; }}
.text:first-child {{ min-width: 6rem; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; height: auto; }}
/* On a phone: charts from edge to edge, and rows of tables that scroll keep their name in sight. */
@media (max-width: 40rem) {{
  figure {{ margin: 1rem -1.25rem; }}
  tr > :first-child {{ position: sticky; left: 0; background: var(--paper); max-width: 8rem; }}
  th:first-child {{ background: var(--soft); }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def folded(title, text):
    """HTML of a plain text that opens by a click on its title."""
    return f"<details><summary>{html.escape(title)}</summary>{plain(text)}</details>"


def plain(text):
    """HTML of a plain text with its line breaks."""
    # JupyterLab would break a line within a word.
    return f'<pre style="white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere">{html.escape(text)}</pre>'
