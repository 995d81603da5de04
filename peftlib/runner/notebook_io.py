"""Notebook files: reading, writing, how an executed copy ended, and what is removed before it is kept."""

import json
import re
import sys
from pathlib import Path

from peftlib.core.errors import StudyError, reading
from peftlib.core.files import write_text
from peftlib.core.hub_token import MASK, token_pattern
from peftlib.core.json_reading import fault
from peftlib.core.paths import PACKAGE
from peftlib.notebook.session import last_words
from peftlib.notebook.widgets import VIEW

FAILED = "failed"  # one status of an ended notebook; notebook.session has the others
_WAY_OUT = "restore the original file; an executed copy can be deleted, the next run writes it again"
_OUTPUT = {"output_type": str, "data?": {}}
_CELL = {"cell_type": str, "metadata?": {"tags?": [str]}, "outputs?": [_OUTPUT]}
_SHAPE = {"cells": [_CELL], "metadata": {}}


def load(path):
    """A notebook file as a dict. StudyError: not a notebook. DiskError: the file is missing or unreadable."""
    with reading(path, _WAY_OUT):
        notebook = json.loads(Path(path).read_bytes().decode("utf-8"))
    found = fault(notebook, _SHAPE)
    if not found and not all(isinstance(cell.get("source"), str | list) for cell in notebook["cells"]):
        found = "a cell has no source"
    if found:
        raise StudyError(f"{path} is not a notebook ({found}): {_WAY_OUT}")
    return notebook


def save(path, notebook):
    """Write a notebook as Jupyter does, atomically."""
    write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def source_of(cell):
    """A cell's text, which the format stores as a string or a list of lines."""
    return "".join(cell["source"])


def tags_of(cell):
    return cell.get("metadata", {}).get("tags", [])


def code_of(notebook):
    """The texts of the code cells, without the parameters that papermill injected."""
    cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    return [source_of(cell) for cell in cells if "injected-parameters" not in tags_of(cell)]


def ending(notebook):
    """(status, state hash, [paths it wrote]) that the last code cell printed by `finish`, or None if it did not.

    The cells' own status is not reliable: a killed kernel leaves its cell marked completed.
    """
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and source_of(cell).strip()]
    outputs = code[-1].get("outputs", []) if code else []
    return last_words("".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout"))


def ended_at(notebook):
    """When papermill finished it, as sortable UTC text; empty if unknown."""
    return notebook["metadata"].get("papermill", {}).get("end_time") or ""


def failure(notebook):
    """(number of the cell from 1, name, message) of the first error among the outputs, or None."""
    for number, cell in enumerate(notebook["cells"], 1):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                return number, output["ename"], output["evalue"]
    return None


def first_line(cell):
    """A cell's first line of code, else its first line, for messages."""
    lines = [line.strip() for line in source_of(cell).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("#")), lines[0] if lines else "")


def tidy(notebook, studies_root):
    """Remove what must not be kept: widgets, overwritten progress text, this machine's paths, tokens. In place."""
    notebook["metadata"].pop("widgets", None)
    if "papermill" in notebook["metadata"]:
        notebook["metadata"]["papermill"]["input_path"] = Path(notebook["metadata"]["papermill"]["input_path"]).name
    # papermill's red banners; the error itself stays in its cell
    notebook["cells"] = [cell for cell in notebook["cells"] if "papermill-error-cell-tag" not in tags_of(cell)]
    changes = _changes(studies_root)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            outputs = (output for output in cell.get("outputs", []) if VIEW not in output.get("data", {}))
            cell["outputs"] = [_changed(output, changes) for output in outputs]


def _changes(studies_root):
    """[(pattern, replacement)] of overwritten progress text, tokens and this machine's own paths, longer ones first."""
    paths = {str(studies_root): "runs", str(PACKAGE.parent): ".", sys.prefix: "[python]", str(Path.home()): "~"}
    longer_first = sorted((path for path in paths if len(path) > 1), key=len, reverse=True)
    of_paths = [(re.compile(re.escape(path) + r"(?![\w.-])"), paths[path]) for path in longer_first]
    # Anchored: otherwise every position of a long line is tried, which takes seconds.
    overwritten = re.compile(r"^[^\n]*\r(?!\n)", re.MULTILINE)
    return [(overwritten, ""), (token_pattern(), MASK), *of_paths]


def _changed(value, changes):
    """An output, or a part of one, with all its texts changed; images are kept."""
    if isinstance(value, dict):
        return {k: part if k.startswith("image/") else _changed(part, changes) for k, part in value.items()}
    if isinstance(value, list):
        return [_changed(part, changes) for part in value]
    for pattern, shown in changes if isinstance(value, str) else ():
        value = pattern.sub(shown, value)
    return value
