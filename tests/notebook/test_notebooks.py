"""The five notebooks: as data, and in one headless pass on a tiny model."""

import ast
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import update_badges as badges
from IPython.core.inputtransformer2 import TransformerManager
from tiny import TINY

from peftlib import cli as command_line
from peftlib.core.config import AUTO, resolve
from peftlib.notebook import session as notebook
from peftlib.runner import notebook_io as executed

CHECKOUT = Path(notebook.__file__).resolve().parents[2]
NAMES = list(notebook.NOTEBOOKS)
PATHS = {name: CHECKOUT / "notebooks" / f"{name}.ipynb" for name in NAMES}

TOKEN = "hf_planted0token0that0must0not0appear"
BAR = re.compile(r"\d%\||\d(?:it/s|s/it)\b")  # of progress, as tqdm writes it
COLUMNS = (
    "method, seed, status, n_test, bleu4, rougeL, train_loss, eval_loss, trainable_params, steps, train_tokens, "
    "learning_rate, learning_rate_2, precision, device, peak_memory_gib, peak_reserved_gib, tokens_per_second, "
    "train_seconds, split_hash"
)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def cells(name):
    return executed.load(PATHS[name])["cells"]


def code_of(cells):
    return [executed.source_of(cell) for cell in cells if cell["cell_type"] == "code"]


def is_install(source):
    return source.startswith(badges.INSTALL)


def test_it_is_a_valid_notebook_of_the_plain_python_kernel(name):
    made = nbformat.read(PATHS[name], as_version=4)
    nbformat.validate(made)
    assert made.metadata.kernelspec.name == "python3"
    assert set(made.metadata) == {"kernelspec", "language_info", "accelerator", "colab", "kaggle"}


def test_the_badges_open_a_machine_with_a_t4(name):
    metadata = executed.load(PATHS[name])["metadata"]
    colab = {"gpuType": "T4", "name": f"{name}.ipynb", "provenance": [], "toc_visible": True}
    assert metadata["accelerator"] == "GPU" and metadata["colab"] == colab
    kaggle = {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True}
    assert metadata["kaggle"] == {**kaggle, "dataSources": [], "language": "python", "sourceType": "notebook"}
    assert list(metadata) == sorted(metadata), "as Jupyter writes it"
    assert badges.badge(name).endswith("&accelerator=nvidiaTeslaT4)")


def test_it_holds_no_results(cells):
    for cell in cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert set(cell["metadata"]) <= {"tags"}


def test_one_parameters_cell_of_literals_that_are_settings(cells):
    [cell] = [cell for cell in cells if "parameters" in executed.tags_of(cell)]
    source = executed.source_of(cell)
    assert source.splitlines()[0] == "# Parameters"
    assert all("#" in line for line in source.splitlines()), "each parameter says what it changes, and its unit"
    values = notebook.literals(source)
    assert values["profile"] == "auto" and values["study"] == "auto"
    resolve(**{**values, "profile": "demo"})  # ConfigError for a name that is no field
    others = {field: value for field, value in values.items() if field not in ("profile", "study")}
    assert all(value is None or (field, value) in AUTO for field, value in others.items())


def test_every_code_cell_parses_is_short_and_is_announced(cells):
    lengths = []
    for before, cell in zip([None, *cells], cells):
        if cell["cell_type"] != "code":
            continue
        source = executed.source_of(cell)
        assert before is not None and before["cell_type"] == "markdown", f"no text before: {source[:60]}"
        lengths.append(sum(bool(line.strip()) for line in source.splitlines()))
        ast.parse(
            TransformerManager().transform_cell(source)
        )  # of IPython's own lines there is only the install cell's
    assert max(lengths) <= 25
    assert statistics.median(lengths) <= 8


def test_it_opens_and_closes_by_its_own_name(name, cells):
    sources = code_of(cells)
    assert [s for s in sources if f'setup("{name}")' in s] == [s for s in sources if "setup(" in s]
    assert "finish(" in sources[-1] and f'"{name}"' in sources[-1]


def test_badge_and_install_cell_hold_the_one_address(name, cells):
    assert executed.source_of(cells[0]).splitlines()[0] == badges.badge(name), "run make badges"
    assert [s for s in code_of(cells) if is_install(s)] == [badges.install_cell()], "run make badges"
    for opener in (
        "https://colab.research.google.com/github/",
        "https://kaggle.com/notebooks/welcome?src=https://github.com/",
    ):
        assert re.search(
            rf"\({re.escape(opener)}[\w.-]+/[\w.-]+/blob/main/notebooks/{name}\.ipynb[)&]", badges.badge(name)
        )


def test_readmes_table_holds_the_one_address():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert badges.with_badge_table(readme, NAMES) == readme, "run make badges"


def test_the_first_cell_ends_by_saying_what_runs_here(cells):
    first = code_of(cells)[0]
    assert is_install(first) and first.splitlines()[-1] == "show_runtime()"
    assert first.index("No GPU. Colab: Runtime") < first.index("%pip install"), "before anything is downloaded"


ENDS = ("chat_box", "drive_box", "hub_box", "gguf_box")


@pytest.mark.parametrize("name, method", [("02_qlora", "qlora"), ("03_galore", "galore"), ("05_hybrid", "hybrid")])
def test_each_end_is_one_cell_of_two_lines(name, method):
    sources = code_of(executed.load(PATHS[name])["cells"])
    for end in ENDS:
        assert sources.count(f'from peftlib.notebook import {end}\n\n{end}(study, "{method}")') == 1
    assert all(
        sources.index(s) > sources.index(next(t for t in sources if "train_live(run)" in t))
        for s in sources
        if "_box(" in s
    )


def test_nothing_private_dead_or_decorative(cells):
    for cell in cells:
        source = executed.source_of(cell)
        assert not re.search(r"hf_\w{8,}|HF_TOKEN\s*=|login\(", source)
        assert not re.search(r"^\s*if (False|0):|print\(model\)|filterwarnings", source, re.MULTILINE)
        assert not re.search("[\u2600-\u27bf\U0001f000-\U0001faff]", source)
        if cell["cell_type"] == "code" and not is_install(source):
            assert not re.search(r"pip install|^\s*[!%]|/home/|/content/|/tmp/", source, re.MULTILINE)


# Two minutes: the tests that use it are slow; `make demo` runs the five notebooks in every check all the same.
@pytest.fixture(scope="module")
def headless(tiny_model, tmp_path_factory):
    """A study folder after three commands: 01 and 02 cut by a time limit, all five, and all five again."""
    root = tmp_path_factory.mktemp("headless")
    fields = [f for name, value in {**TINY, "model": tiny_model}.items() for f in ("-p", name, str(value))]
    command = [sys.executable, "-m", "peftlib", "run", "--profile", "demo", "--study", "tiny", *fields]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PEFTLIB_ROOT": str(root), "HF_TOKEN": TOKEN}
    environment["HF_HUB_OFFLINE"] = "1"

    def run(*more):
        started = time.monotonic()
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=False)
        return {"code": done.returncode, "said": done.stdout + done.stderr, "seconds": time.monotonic() - started}

    cut = run("-p", "max_seconds", "0.001", "--", "01", "02")
    full = run()
    results = (root / "tiny" / "results.csv").read_bytes() if full["code"] == 0 else b""
    return {"folder": root / "tiny", "cut": cut, "full": full, "results": results, "again": run()}


@pytest.mark.slow
def test_a_time_limit_stops_02_and_the_same_command_goes_on(headless):
    assert headless["cut"]["code"] == 3, headless["cut"]["said"]
    assert "02_qlora stopped at its time limit" in headless["cut"]["said"]
    assert "01_data: already finished, skipped" in headless["full"]["said"]


@pytest.mark.slow
def test_all_five_run_headless_with_small_clean_copies(headless):
    assert headless["full"]["code"] == 0, headless["full"]["said"]
    copies = {path.stem: path for path in (headless["folder"] / "notebooks").iterdir()}
    assert sorted(copies) == NAMES
    for path in copies.values():
        text = path.read_text(encoding="utf-8")
        copy = json.loads(text)
        assert executed.failure(copy) is None and executed.ending(copy)[0] == notebook.FINISHED
        assert path.stat().st_size <= 500_000
        assert "application/vnd.jupyter.widget" not in text and not BAR.search(text)
        assert str(headless["folder"]) not in text


@pytest.mark.slow
def test_every_headless_cell_shows_something(headless):
    # What a copy may not hold is taken out of it: a cell that showed only a widget would now show nothing.
    for path in (headless["folder"] / "notebooks").iterdir():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = executed.source_of(cell)
            if cell["cell_type"] == "code" and not is_install(source) and not source.startswith("# Parameters"):
                assert cell["outputs"], f"{path.stem} shows nothing after {source}"


@pytest.mark.slow
def test_results_have_the_contracts_columns_and_a_row_for_each_method(headless):
    rows = list(csv.DictReader(headless["results"].decode().splitlines()))
    assert ", ".join(rows[0]) == COLUMNS
    assert [(row["method"], row["seed"]) for row in rows] == [(m, "0") for m in ("base", "qlora", "galore", "hybrid")]
    for row in rows:
        assert row["status"] == "ok"
        assert int(float(row["n_test"])) > 0 and float(row["eval_loss"]) > 0
        assert 0 <= float(row["bleu4"]) <= 1 and 0 <= float(row["rougeL"]) <= 1
    assert len({row["split_hash"] for row in rows}) == 1
    base, *trained = rows
    assert all(base[name] == "" for name in ("train_loss", "trainable_params", "steps", "train_seconds"))
    assert all(float(row["train_loss"]) > 0 and int(float(row["trainable_params"])) > 0 for row in trained)


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_changes_nothing(headless):
    assert headless["again"]["code"] == 0, headless["again"]["said"]
    assert headless["again"]["said"].count("already finished, skipped") == len(NAMES)
    assert headless["again"]["seconds"] < 60
    assert (headless["folder"] / "results.csv").read_bytes() == headless["results"]


@pytest.mark.slow
def test_the_report_command_writes_the_same_results(headless, monkeypatch, capsys):
    monkeypatch.setenv("PEFTLIB_ROOT", str(headless["folder"].parent))
    assert command_line.main(["report", "--study", "tiny"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.endswith("tiny/results.csv") for line in shown)
    assert (headless["folder"] / "results.csv").read_bytes() == headless["results"]


@pytest.mark.slow
def test_the_token_is_nowhere_in_the_study(headless):
    for path in headless["folder"].rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in headless["full"]["said"]
