"""Documents from Jinja templates, which escape plain texts, so that a model's answer is shown verbatim.

markdown.jinja and page.jinja define the same macros (heading, paragraph, list, table, picture) for their formats.
"""

import base64
import html
import math
import re
from pathlib import Path

import jinja2

from peftlib.core import markdown

UNKNOWN = "n/a"
_TEMPLATES = Path(__file__).parent / "templates"


def shown(value, form):
    """A number in a format such as '.2f'; 'n/a' for None and nan."""
    return UNKNOWN if value is None or math.isnan(value) else format(value, form)


def interval_text(found, form=".4f"):
    """A stats.Interval as 'value (low to high)'; 'n/a' for None."""
    return UNKNOWN if found is None else f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def render(template, folder=_TEMPLATES, **content):
    """The text of a template in `folder`, without repeated blank lines; ends with one line break."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _TEMPLATES]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # the macros escape, as their format requires
    )
    environment.filters |= {
        "md": markdown.escape,
        "md_header": lambda cells, n_text: markdown.header(cells, n_text=n_text),
        "md_row": markdown.row,
        "page": page_text,
        "png": lambda path: png_address(path.read_bytes()),
        "one_line": lambda text: " ".join(text.split()),
        "extract": lambda name, values: values[name],
        "number": shown,
        "interval": interval_text,
    }
    text = environment.get_template(template).render(**content)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def page_text(text):
    """HTML of a plain text."""
    return html.escape(markdown.without_controls(text))


def png_address(content):
    """A data: URL with the bytes of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def plain(text):
    """HTML of a plain text with its line breaks."""
    # JupyterLab would break lines within words.
    return f'<pre style="white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere">{html.escape(text)}</pre>'


def folded(title, text):
    """HTML of a plain text that opens with a click on its title."""
    return f"<details><summary>{html.escape(title)}</summary>{plain(text)}</details>"
