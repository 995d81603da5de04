"""Small notebooks for the runner's tests: no model, no torch, a second or two each."""

import json

PARAMETERS = '# Parameters\nprofile = "demo"\nstudy = "auto"\nlora_rank = None'
OPEN = """\
from peftlib.core.config import resolve
from peftlib.notebook.session import executed_parameters, finish
from peftlib.core.study import Study

study = Study.open(resolve(**executed_parameters(In)))
study.folder.mkdir(parents=True, exist_ok=True)"""
WRITE = '(study.folder / "NAME.txt").write_text("made by NAME")'
FINISH = 'finish(study, "NAME", wrote=[study.folder / "NAME.txt"])'


def write(folder, name, *cells, parameters=PARAMETERS):
    """A notebook of a parameters cell and some code cells, NAME in them replaced; returns its path."""
    made = [_cell("markdown", f"# {name}"), _cell("code", parameters, tags=["parameters"])]
    made += [_cell("code", source.replace("NAME", name)) for source in cells]
    for number, cell in enumerate(made):
        cell["id"] = f"cell-{number}"
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(notebook))
    return path


def write_good(folder, name, *middle):
    """A notebook that finishes, with some cells in its middle."""
    return write(folder, name, OPEN, *middle, WRITE, FINISH)


def _cell(kind, source, tags=()):
    cell = {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)} if tags else {}}
    return cell | ({"outputs": [], "execution_count": None} if kind == "code" else {})
