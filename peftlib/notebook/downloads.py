"""Links in a notebook that save a file on the reader's machine.

A link carries its file in itself (a data: address with a download attribute), so it needs no path that the browser can
reach: JupyterLab leaves such links alone, VS Code's notebooks hand them to a save dialog, and a kernel on Colab or Kaggle
is not asked. Large files go to the study's folder instead.
"""

import base64
import html

from peftlib.core.files import readable_path, write_text

LINK_LIMIT_BYTES = 2_000_000  # of a file inside a link; a notebook that holds more gets slow
CSV, PNG = "text/csv", "image/png"


def link(name, content, kind):
    """HTML of a link that saves `content` (bytes of MIME type `kind`) as `name`."""
    address = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f'<a style="text-decoration:underline" download="{html.escape(name)}" href="{address}">Download {html.escape(name)}</a>'


def offer_csv(folder, name, text):
    """HTML of a link to a CSV file, or, where it is too large for one, a sentence on where it was written: `folder`."""
    content = text.encode()
    if len(content) <= LINK_LIMIT_BYTES:
        return link(name, content, CSV)
    path = folder / name
    write_text(path, text)
    size = f"{len(content) / 2**20:.1f} MiB"
    return f"{html.escape(name)} has {size}, too much for a link. It is written: {html.escape(readable_path(path))}"
