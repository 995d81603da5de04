"""The results page's files: the report's own numbers, nothing in them that could run, and bad input refused in words."""

import itertools
import json
import re
import shutil
import sys

import fake_study
import numpy as np
import pytest

from peftlib.cli import main
from peftlib.core import config
from peftlib.core import record as records
from peftlib.core.errors import ConfigError, DiskError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.models.shapes import CARDS, SHAPES
from peftlib.report import build as report
from peftlib.report import charts
from peftlib.report.answers import SAME, Answers, marked
from peftlib.report.site import build
from peftlib.report.site.build import build_site, script_of
from peftlib.train import estimate

PLAN_DATA = build.plan_data
PLANTED = (
    '</script><script>document.title = "planted"</script>',
    "<img src=x onerror=\"document.title='planted'\"> line\u2028and\u2029ends",
    "\u202egnp.exe\u202c and \U0001f600 answers",
    '=HYPERLINK("http://planted", "here")',
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    monkeypatch.setattr(build, "plan_data", lambda: {"table": {}})
    monkeypatch.setattr(build, "_chart_library", lambda: "// charts\n")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Base, qlora and hybrid on twelve rows."""
    return fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora", "hybrid"), n=12)


def taken(folder, name):
    """The value in data/NAME.js, as a browser would take it."""
    text = (folder / "data" / f"{name}.js").read_text(encoding="utf-8")
    found = re.fullmatch(r'peftlib\.take\("([a-z0-9-]+)",(.*)\);\n', text, re.DOTALL)
    assert found[1] == name
    return json.loads(found[2])


def test_the_page_has_the_numbers_of_the_report(study, tmp_path):
    built = report.build_report(study)
    page = build_site([study.folder], tmp_path / "page")
    data = taken(page.parent, "runs")
    for run, row in zip(data["runs"], built.results.to_dict("records"), strict=True):
        assert (run["method"], run["seed"], run["rougeL"]) == (row["method"], row["seed"], row["rougeL"])
    of = built.numbers.intervals["qlora"]["rougeL"]
    assert {"study": study.folder.name, "method": "qlora", "key": "rougeL", **vars(of)} in data["intervals"]
    assert {(one["source"], one["method"]) for one in data["sources"]} >= {("tulu", "hybrid"), ("alpaca", "base")}
    assert data["runs"][0]["forgetting"] is None  # of base, against itself
    assert data["runs"][1]["forgetting"] == pytest.approx(100 * (3.06 / 3.0 - 1))
    assert [f["key"] for f in data["figures"]][:2] == ["rougeL", "bleu4"]


def test_answers_are_files_of_their_own_with_scores_and_marks(study, tmp_path):
    folder = build_site([study.folder], tmp_path / "page").parent
    [of] = [of for of in taken(folder, "runs")["answers"] if of["method"] == "qlora"]
    rows, run, answers = taken(folder, "rows"), taken(folder, of["file"]), Answers(report.scored(study)[0])
    assert rows["prompts"] == answers.prompts and run["answers"] == answers.runs["qlora"].answers
    assert run["rougeL"] == pytest.approx(list(answers.scores("qlora", "rougeL")), abs=1e-6)
    for text, lengths, reference in zip(run["answers"], run["marks"], rows["references"]):
        ends = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        parts = [text[a:b] for a, b in itertools.pairwise(ends)]
        assert "".join(parts) == text
        assert parts[1::2] == [part for kind, part in marked(text, reference) if kind == SAME]


@pytest.mark.parametrize("text", PLANTED)
def test_planted_text_ends_no_script_and_comes_back_as_it_was(text):
    made = script_of("x", {"text": text, text: 1})
    assert "<" not in made and "\u2028" not in made and "\u2029" not in made
    assert json.loads(made.removeprefix('peftlib.take("x",').removesuffix(");\n"))["text"] == text
    made.encode("utf-8")


def test_half_a_surrogate_pair_can_be_written():
    assert json.loads(script_of("x", ["\ud800"])[len('peftlib.take("x",') : -3]) == ["\ud800"]


def test_marks_are_counted_as_javascript_counts():
    from peftlib.report.site.data import _lengths

    assert _lengths("\U0001f600 paris it is", "paris") == [0, 9, 5]


def test_the_page_runs_only_its_own_scripts():
    page = (build.PAGE_FOLDER / "index.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "script-src 'self' file:;" in policy and "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert not re.findall(r"<script(?![^>]*\bsrc=)", page) and not re.findall(r"\son[a-z]+=", page)
    assert not re.findall(r"https?://", page)
    for name in build.PAGE:
        text = (build.PAGE_FOLDER / name).read_text(encoding="utf-8")
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(", text
        )


def test_equal_studies_give_equal_files_and_a_page_is_written_anew(study, tmp_path):
    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = files(build_site([study.folder], tmp_path / "a").parent)
    (tmp_path / "a" / "data" / "answers-7-7.js").write_text("of a study that is gone")
    assert files(build_site([study.folder], tmp_path / "a").parent) == first
    assert set(map(str, first)) >= {"index.html", "site.js", "vega.js", "data/runs.js", "data/rows.js"}


def test_a_study_without_rows_and_answers_shows_the_rest(study, tmp_path):
    report.build_report(study)
    bare = tmp_path / "bare"
    shutil.copytree(study.folder, bare, ignore=shutil.ignore_patterns("data", "predictions"))
    folder = build_site([bare], tmp_path / "page").parent
    data = taken(folder, "runs")
    assert data["answers"] == [] and not (folder / "data" / "rows.js").exists()
    assert [run["method"] for run in data["runs"]] == ["base", "qlora", "hybrid"] and data["runs"][1]["curve"]
    assert data["intervals"] == []

    # What docs/build takes of a study says more: intervals of scores and of benchmarks.
    found = {"value": 0.5, "low": 0.4, "high": 0.6}
    of = {"methods": {"qlora": {"scores": {"rougeL": {**found, "seeds": [0.5]}}}}}
    of["benchmarks"] = {"tasks": {"piqa": {"n": 9, "methods": {"base": {**found, "seeds": [0], "is_at_floor": False}}}}}
    write_json(bare / "summary.json", of)
    data = taken(build_site([bare], tmp_path / "page").parent, "runs")
    shown = [(entry["method"], entry["key"], entry["low"], entry["high"]) for entry in data["intervals"]]
    assert shown == [("qlora", "rougeL", 0.4, 0.6), ("base", "bench_piqa", 0.4, 0.6)]


def test_studies_of_equal_rows_share_a_page(study, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(study.folder, other)
    folder = build_site([study.folder, other], tmp_path / "page").parent
    data = taken(folder, "runs")
    assert [of["name"] for of in data["studies"]] == ["made-up", "other"]
    assert [(of["study"], of["run"]) for of in data["answers"]] == [
        (name, run) for name in ("made-up", "other") for run in ("base", "qlora", "hybrid")
    ]
    assert all((folder / "data" / f"{of['file']}.js").is_file() for of in data["answers"])


def test_benchmarks_and_rewound_models_are_shown_where_there_are_any(study, tmp_path, monkeypatch):
    for method, share in (("base", 0.25), ("qlora", 0.5)):
        record = records.load(study, method, 0)
        fake_study.write_benchmark(study, record, "arc_easy", np.arange(100) < 100 * share, chance=0.25)
        records.save(study, record)
    points = [{"factor": 0.5, "test_loss": 2.9, "general_loss": 3.0, "rougeL": 0.4}]
    monkeypatch.setattr(report.rewind, "curves", lambda *_: {"qlora": points})
    data = taken(build_site([study.folder], tmp_path / "page").parent, "runs")
    found = {entry["method"]: entry for entry in data["intervals"] if entry["key"] == "bench_arc_easy"}
    assert found.keys() == {"base", "qlora"}
    assert found["qlora"]["low"] < found["qlora"]["value"] == 0.5 < found["qlora"]["high"]
    assert data["rewound"] == [{"study": "made-up", "method": "qlora", "points": points}]
    [of] = [of for of in data["figures"] if of["key"] == "bench_arc_easy"]
    assert (of["label"], of["unit"], of["better"]) == ("arc easy", "acc", 1)
    assert [run.get("bench_arc_easy") for run in data["runs"]] == [0.25, 0.5, None]


def test_the_calculators_table_is_the_planners(monkeypatch):
    monkeypatch.setattr(build, "CARDS", {"t4": CARDS["t4"]})
    monkeypatch.setattr(build, "LENGTHS", (1024,))
    monkeypatch.setattr(build, "SHAPES", {"gemma-3-1b": SHAPES["gemma-3-1b"]})
    data = PLAN_DATA()
    cfg = config.resolve("gpu", model="google/gemma-3-1b-it", train_rows=2 * data["rows"])
    costs = estimate.forecast(cfg, "t4", CARDS["t4"], shape=SHAPES["gemma-3-1b"], names=data["methods"]).costs
    for cost, entry in zip(costs, data["table"]["t4"]["gemma-3-1b"][0], strict=True):
        assert entry[0] == round(cost.memory_gib, 2) and (entry[1] == "") == cost.fits
        assert entry[2:4] == [cost.micro_batch, cost.checkpointing]
        assert [2 * seconds / 3600 for seconds in entry[6:8]] == pytest.approx(cost.hours, rel=1e-4)


def refused(words, *args):
    with pytest.raises((StudyError, ConfigError, DiskError)) as caught:
        build_site(*args)
    assert re.search(words, str(caught.value)), caught.value


def test_bad_input_is_refused_in_words_and_nothing_is_written(study, tmp_path):
    to = tmp_path / "page"
    refused("nothing here is not a study", ["nothing here"], to)
    refused("the same study is given twice", [study.folder, study.folder], to)
    other = tmp_path / "other"
    shutil.copytree(study.folder, other)
    write_json(
        other / "data" / "manifest.json", {**read_json(other / "data" / "manifest.json"), "split_hash": "0" * 12}
    )
    for path in (other / "records").glob("*.json"):
        write_json(path, {**read_json(path), "split_hash": "0" * 12})
    shutil.rmtree(other / "predictions")
    refused("these studies have different test rows.*split_hash differs", [study.folder, other], to)
    shutil.rmtree(other / "data")
    refused(r"no results in .*peftlib report", [other], to)
    (other / "results.csv").write_text("method,seed\nqlora,7\n")
    refused(r"results.csv is damaged \(it lacks status, n_test", [other], to)
    assert not to.exists()


def test_a_folder_that_holds_something_else_or_cannot_be_written_is_refused(study, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    refused("holds something other", [study.folder], tmp_path / "mine")
    refused("holds something other", [study.folder], tmp_path / "mine" / "thesis.txt")
    refused("cannot be written", [study.folder], tmp_path / "mine" / "thesis.txt" / "page")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not touch"


def test_a_page_that_was_cut_short_can_be_written_anew(study, tmp_path, monkeypatch):
    def cut(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "answer_data", cut)
        with pytest.raises(KeyboardInterrupt):
            build_site([study.folder], tmp_path / "page")
    assert build_site([study.folder], tmp_path / "page").is_file()


def test_a_study_of_which_nothing_is_scored_yet_shows_its_runs(study, tmp_path):
    for path in (study.folder / "records").glob("*.json"):
        write_json(path, {**read_json(path), "evaluation": None})
    shutil.rmtree(study.folder / "predictions")
    report.build_report(study)
    shutil.rmtree(study.folder / "data")
    data = taken(build_site([study.folder], tmp_path / "page").parent, "runs")
    assert data["studies"][0]["n_test"] is None and len(data["runs"]) == 3


def test_the_missing_extra_is_named(study, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    refused(r"pip install -e '.*\[site\]'", [study.folder], tmp_path / "page")


def test_the_command_prints_where_the_page_is(study, tmp_path, capsys):
    assert main(["site", str(study.folder), "--to", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
