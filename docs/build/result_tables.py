"""The tables of README and docs, each made from the files of results/ (or from the settings themselves)."""

import dataclasses
import json
from pathlib import Path

import bench_tables
import plan_tables
import study_tables

from peftlib.core.config import PROFILES, Config, resolve
from peftlib.core.files import read_json
from peftlib.methods import study_order
from peftlib.runner.suite_plan import method_rows

RESULTS = Path(__file__).resolve().parents[2] / "results"
BENCH = ("methods", "generate", "resume", "fp16", "parity", "scale", "export")
_SCOPES = {"data": "rows", "math": "what is learned", "run": "where and how fast"}


class Results:
    """The parsed files of a results folder. FileNotFoundError: one of them is missing."""

    def __init__(self, folder=RESULTS):
        self.demo = read_json(folder / "demo" / "summary.json")
        self.reference = read_json(folder / "reference" / "summary.json")
        records = (folder / "reference" / "records").glob("*.json")
        self.records = [read_json(path) for path in sorted(records)]
        sweeps = (folder / "reference" / "sweeps").glob("*.json")
        self.sweeps = [read_json(path) for path in sorted(sweeps, key=lambda path: study_order(path.stem))]
        bench = {name: json.loads((folder / "bench" / f"{name}.json").read_text("utf-8")) for name in BENCH}
        for name in BENCH:
            setattr(self, name, bench[name])

    @property
    def trained(self):
        """{method: its figures} of the reference study, without the untrained model."""
        return {method: known for method, known in self.reference["methods"].items() if method != "base"}


def make_all(results):
    """{marker: Markdown table} of everything that stands between markers in README and docs."""
    tables = (*study_tables.TABLES, *bench_tables.TABLES, *plan_tables.TABLES, settings, method_list)
    return {rows.__name__: _table(list(rows(results))) for rows in tables}


def _table(rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def method_list(results):
    """Every registered method as `peftlib methods` lists it."""
    header, *rows = method_rows()
    yield header
    for name, *cells in rows:
        yield f"`{name}`", *cells


def settings(results):
    """Every field of the config with its default in each profile."""
    yield "setting", "default", "governs", "meaning"
    profiles = {name: resolve(name) for name in PROFILES}
    for field in dataclasses.fields(Config):
        values = {name: getattr(cfg, field.name) for name, cfg in profiles.items()}
        if field.name == "profile":
            continue
        shown = {name: f"`{value!r}`".replace("'", '"') for name, value in values.items() if field.name != "study"}
        default = next(iter(shown.values()), "the profile's name")
        if len(set(shown.values())) > 1:
            default = ", ".join(f"{name} {value}" for name, value in shown.items())
        meaning = field.metadata["unit"].replace("|", "\\|")
        choices = field.metadata["choices"]
        listed = f" ({', '.join(f'`{choice}`' for choice in choices if choice != '')})" if choices else ""
        yield f"`{field.name}`", default, _SCOPES[field.metadata["scope"]], meaning + listed
