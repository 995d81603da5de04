"""The parameters cells as Colab's forms: `name = value  # @param ...`, as
colab.research.google.com/notebooks/forms.ipynb has them. Colab writes what is chosen into the line, so the line must
stay one that everything else reads."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
from papermill.inspection import inspect_notebook

from peftlib.core.config import Config, resolve
from peftlib.notebook import session as notebook
from peftlib.runner import notebook_io as executed

PATHS = sorted((Path(notebook.__file__).resolve().parents[2] / "notebooks").glob("0*.ipynb"))
FIELD = re.compile(r"(\w+) = (.+?)  # @param (\[.*?\])?\s*(\{.*\})?")
PROPERTY = re.compile(r"([\w-]+)\s*:\s*(\"[^\"]*\"|true|false|[-\d.]+)")


def parsed(annotation):
    """(choices or None, {property: value}) of what stands after @param. ValueError: Colab would not read it."""
    choices, properties = annotation
    found = {name: json.loads(value) for name, value in PROPERTY.findall(properties or "{}")}
    left = PROPERTY.sub("", properties or "{}")
    if re.sub(r"[\s,]", "", left) != "{}":
        raise ValueError(f"{properties} holds {left}")
    return json.loads(choices) if choices else None, found


def fields_of(path):
    """[(name, value as text, choices, properties), ...] of a notebook's annotated parameters, in order."""
    [cell] = [cell for cell in executed.load(path)["cells"] if "parameters" in executed.tags_of(cell)]
    lines = executed.source_of(cell).splitlines()
    marked = [(before, line) for before, line in itertools.pairwise(lines) if "@param" in line]
    made = []
    for before, line in marked:
        match = FIELD.fullmatch(line)
        assert match, f"{path.stem}: Colab reads no form from {line}"
        assert before.startswith("# @markdown "), f"{path.stem}: nothing says what {match[1]} changes"
        made.append((match[1], match[2], *parsed(match.groups()[2:])))
    return made


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_every_annotation_is_one_that_colab_knows(path):
    fields = fields_of(path)
    assert len(fields) >= 5
    for name, value, choices, properties in fields:
        if choices is None:
            assert properties in ({"type": "string"}, {"type": "raw"}), name
        else:
            assert set(properties) <= {"type", "allow-input"} and properties.get("type", "string") in ("string", "raw")
            assert all(isinstance(choice, str) for choice in choices), name
        if value == "None":
            assert properties["type"] == "raw", f"{name}: any other type would write 'None' in quotes"


def test_the_default_is_a_choice_and_every_choice_is_a_value_that_the_config_takes(path):
    for name, value, choices, properties in fields_of(path):
        is_raw = properties.get("type") == "raw"
        shown = value if is_raw else ast.literal_eval(value)
        assert choices is None or shown in choices, name
        values = [ast.literal_eval(choice) if is_raw else choice for choice in choices or []]
        for chosen in values:
            given = {"profile": "demo", name: chosen}
            cfg = resolve(**given)  # ConfigError: wrong type, or outside the field's limits
            assert chosen in (None, "auto") or getattr(cfg, name) == chosen


def test_text_is_typed_without_quotes(path):
    for name, value, _, properties in fields_of(path)[1:]:  # after the profile
        if Config.__dataclass_fields__[name].type in (str, "str"):
            assert properties.get("type") != "raw", f"{name}: Colab would take unquoted text as code"
            assert resolve("demo", **{name: ast.literal_eval(value)}) == resolve("demo", **{name: None}), name


def test_a_closed_list_is_all_that_the_config_allows_and_an_open_one_says_so(path):
    for name, _, choices, properties in fields_of(path):
        allowed = Config.__dataclass_fields__[name].metadata["choices"]
        if choices is not None and not properties.get("allow-input"):
            plain = {choice.strip("'") for choice in choices}  # a raw list holds Python's literals
            assert plain - {"auto", "None"} == set(allowed), name


def test_papermill_still_infers_every_parameter(path):
    [cell] = [cell for cell in executed.load(path)["cells"] if "parameters" in executed.tags_of(cell)]
    values = notebook.literals(executed.source_of(cell))
    inferred = inspect_notebook(path)
    assert {name: ast.literal_eval(found["default"]) for name, found in inferred.items()} == values


@pytest.mark.parametrize(
    "line",
    [
        'a = 1  # @param ["x" {type:"raw"}',
        "a = 1  # @param {type=raw}",
        'a = 1  # @param {type:"raw"} said',
        "a = 1  # @param",
    ],
)
def test_a_broken_annotation_would_be_seen(line):
    match = FIELD.fullmatch(line)
    with pytest.raises((ValueError, AssertionError)):
        assert match and any(match.groups()[2:])
        parsed(match.groups()[2:])
