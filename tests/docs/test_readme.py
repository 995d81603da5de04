"""README and docs: tables from results/, links, length, and that README's Python runs."""

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
import update
from cells import ends
from result_tables import RESULTS, Results, make_all
from tiny import TINY

import peftlib
from peftlib import cli
from peftlib.core.errors import StudyError

PAGES = update.pages()
README = PAGES[0].read_text(encoding="utf-8")
TABLES = make_all(Results())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_come_back_from_results_byte_for_byte(page):
    text = page.read_text(encoding="utf-8")
    assert update.with_tables(text, TABLES) == text, "run make readme"
    emptied = re.sub(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", r"\1\3", text, flags=re.DOTALL)
    for name in update.ELSEWHERE:  # written by make badges
        for found in re.finditer(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL):
            emptied = emptied.replace(f"<!-- {name} -->\n", f"<!-- {name} -->\n{found[1]}")
    assert update.with_tables(emptied, TABLES) == text


def test_every_table_is_shown_somewhere():
    texts = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in TABLES if f"<!-- {name} -->" not in texts] == []


def test_a_marker_without_a_table_or_an_end_is_named():
    with pytest.raises(StudyError, match=r"<!-- strange --> names no table"):
        update.with_tables("<!-- strange -->\n<!-- /strange -->", TABLES)
    with pytest.raises(StudyError, match=r"has no <!-- /demo -->"):
        update.with_tables("<!-- demo -->\n", TABLES)


def test_readme_is_short():
    assert len(README.splitlines()) <= 180 and len(README.encode()) <= 15_000


def test_alt_texts_are_one_sentence():
    for page in PAGES:
        for alt in re.findall(r"!\[([^\]]*)\]\((?!https:)", page.read_text(encoding="utf-8")):
            assert alt.endswith(".") and alt.count(". ") == 0 and len(alt) < 180, alt


def test_ratios_are_of_the_rows(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    rows = [
        {"name": "galore", "method": "galore", "device": "NVIDIA H100", "date": "d", "precision": "bf16", "cap_gib": 0.0,
         "micro_batch": 4, "tok_s": 1600.0, "peak_gib": 1.0, "first_step_s": 1.0, "seq": 100, "checkpoint_gib": 3.0,
         "save_stall_s": 2.0, "save_written_s": 9.0, "save_step_s": 1.5,
         "mixed_found": {"random_4": {"useful_tok_s": 100.0}, "random_8": {"useful_tok_s": 400.0},
                         "packed_4": {"useful_tok_s": 250.0, "kernels_s": [0.3, 0.4]}}}
    ]  # fmt: skip
    found = json.loads((RESULTS / "bench" / "fp16.json").read_text())
    for run in found["runs"]:
        run["last_losses"] = 2.02 if run["precision"] == "fp16" else 2.0
    for name, content in (("methods", rows), ("fp16", found)):
        (tmp_path / "results" / "bench" / f"{name}.json").write_text(json.dumps(content))
    made = make_all(Results(tmp_path / "results"))
    assert "| 4 | 250 |  |  | 75% |" in made["lengths"] and made["fp16"].count("+1.00%") == 9
    assert "| 3.00 | 2.0 | 9 | 1.50 | 1.00 |" in made["saving"]
    assert made["peers"].count("\n") == 1  # no grid was run


@pytest.mark.parametrize(
    "low, high, said",
    [(-0.0196, -0.0001, "-0.0196 to -0.0001"), (-0.0123, 0.0, "-0.012 to +0.000"), (0.01, 0.02, "+0.010 to +0.020")],
)
def test_an_interval_shows_on_which_side_of_0_its_ends_lie(low, high, said):
    assert ends({"value": (low + high) / 2, "low": low, "high": high}) == said


def _anchors(text):
    """The ids that GitHub and the site give to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(update.CHECKOUT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))],
    ids=lambda page: page.name,
)
def test_no_link_is_dead(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        place, _, part = link.partition("#")
        target = page.parent / place if place else page
        is_alive = target.exists() and (not part or part in _anchors(target.read_text(encoding="utf-8")))
        dead += [] if is_alive else [link]
    assert dead == []


def test_pages_of_the_package_name_modules_that_exist():
    text = (update.CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = (update.CHECKOUT / "docs" / "img" / "travel.svg").read_text(encoding="utf-8")
    folders = "core|storage|optim|models|data|methods|train|evaluation|report|export|notebook|runner"
    for name in set(re.findall(rf"`((?:{folders})/\w+)`", text) + re.findall(rf">((?:{folders})/\w+)<", drawing)):
        path = update.CHECKOUT / "peftlib" / name
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


@pytest.fixture(scope="module")
def commands():
    """{name: click command} of the command line."""
    return typer.main.get_command(cli.app).commands


def test_every_command_is_on_the_page_of_the_command_line(commands):
    page = (update.CHECKOUT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(commands) == set(re.findall(r"^\| `peftlib (\w+)` \|", page, re.MULTILINE))
    assert set(commands) == set(re.findall(r"^## (\w+)$", page, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_can_be_given(page, commands):
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"^    peftlib (.*)$", text, re.MULTILINE) + re.findall(
        r"`peftlib ((?:study )?\w+ --study .*?)`", text
    ):
        name, *args = shlex.split(line.partition(" > ")[0], comments=True)
        command = commands[name]
        if name == "study":
            name, *args = args
            command = command.commands[name]
        command.make_context(name, args)  # click.UsageError: an option or argument that it does not have


def test_every_setting_that_a_page_sets_exists():
    fields = {field.name for field in dataclasses.fields(peftlib.Config)}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r" -p (\w+)[ =]", text)) - {"NAME"} <= fields, page.name
        assert set(re.findall(r"`([a-z_]+) = ", text)) <= fields, page.name


@pytest.mark.slow
def test_readmes_python_runs(tiny_model, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    given = f'profile="demo", model={str(tiny_model)!r}, **TINY'
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme.py").write_text(code.replace('profile="demo"', given))
    runpy.run_path(str(tmp_path / "readme.py"), {"TINY": TINY})
    assert (tmp_path / "runs/mine/report.html").exists() and (tmp_path / "my-adapter/README.md").exists()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: make docs installs it")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=update.CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {"architecture", "cli", "reference-study"} <= pages
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", page.read_text(encoding="utf-8")
        )
        assert [place for place in loaded if "img.shields.io" not in place] == [], "a page loads nothing from elsewhere"
