"""Benchmarks in results.csv, report, figures and the comparison of studies."""

import fake_study
import numpy as np
import pytest
from fake_study import write_benchmark as write

from peftlib.core import record as records
from peftlib.report import build as report
from peftlib.report import charts, figures, tables
from peftlib.report.compare import compare_studies


def scored(folder, monkeypatch, seed=0):
    """A made-up study in which galore forgets arc_easy and nobody is above guessing on piqa."""
    study, rng = fake_study.make(folder, monkeypatch, methods=("base", "qlora", "galore")), np.random.default_rng(seed)
    for name, skill in (("base", 0.8), ("qlora", 0.8), ("galore", 0.5)):
        record = records.load(study, name, 0)
        write(study, record, "arc_easy", rng.random(150) < skill, chance=0.25)
        if name != "qlora":
            write(study, record, "piqa", np.arange(60) % 2, chance=0.5)
        nats = {"weights": 10.0, "chance": None, "is_perplexity": True, "metric": "word_perplexity"}
        write(study, record, "wikitext", rng.normal(30, 1, 30), **nats)
        records.save(study, record)
    return study


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftlib.report.chart._DPI", 30)
        study = scored(tmp_path_factory.mktemp("built"), patch)
        yield study, report.build_report(study)


def test_results_have_a_column_a_task(built):
    _, made = built
    assert list(made.results.columns[-3:]) == ["bench_arc_easy", "bench_piqa", "bench_wikitext"]
    by_method = made.results.set_index("method")
    assert by_method.loc["galore", "bench_arc_easy"] < 0.6 < by_method.loc["qlora", "bench_arc_easy"]
    assert np.isnan(by_method.loc["qlora", "bench_piqa"]) and by_method.loc["base", "bench_wikitext"] > 15


def test_the_report_says_what_is_a_finding_and_what_is_not(built):
    study, made = built
    text = " ".join(study.report_path.read_text().split())
    assert "## Standard benchmarks" in text and "arc_easy | acc | 0 | 150 | 0.250 |" in text
    assert text.count(", at floor") == 2 and "galore - base | arc_easy | lower |" in text
    assert "galore - base | piqa" not in text and "Fewer than 100 rows: piqa, wikitext." in text
    said = [sentence for sentence in made.findings if "benchmarks" in sentence or "guessing" in sentence]
    assert said[0].startswith(
        "On standard benchmarks, 1 of 4 differences from base are beyond the noise: galore on arc_easy -0."
    )
    assert said[1].startswith("No method beats guessing on piqa")
    assert "Standard benchmarks" in study.folder.joinpath("report.html").read_text()


def test_a_task_with_a_balanced_accuracy_is_counted_by_it(tmp_path, monkeypatch):
    study, answers = fake_study.make(tmp_path, monkeypatch, methods=("base", "galore")), np.array(["yes", "no"] * 60)
    for name, said in (("base", answers), ("galore", np.array(["yes"] * 120))):
        record = records.load(study, name, 0)
        write(study, record, "boolq", answers == said, chance=0.5, labels=answers)
        records.save(study, record)
    said = [sentence for sentence in report.build_report(study).findings if "benchmarks" in sentence]
    assert said[0].startswith(
        "On standard benchmarks, 1 of 1 differences from base are beyond the noise: galore on boolq_balanced -0.500"
    )


def test_figures_show_guessing_and_what_was_gained_against_what_was_lost(built):
    _, made = built
    assert "piqa base 0.500, galore 0.500 (guessing 0.500)" in made.alt["benchmarks"]
    assert "mean change of accuracy on arc_easy: " in made.alt["gain_against_loss"]
    assert list(made.numbers.trade) == ["qlora", "galore"] and made.numbers.lost_on == ["arc_easy"]
    gain, change = made.numbers.trade["galore"]
    assert (
        gain.value == made.numbers.intervals["galore"]["rougeL"].value - made.numbers.intervals["base"]["rougeL"].value
    )
    assert change.verdict == "lower"


def test_a_report_without_benchmarks_says_nothing_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"))
    made = report.build_report(study)
    assert list(made.results.columns) == list(tables.COLUMNS) and "benchmarks" not in study.report_path.read_text()


def test_studies_are_compared_on_the_benchmarks_that_they_share(tmp_path, monkeypatch):
    one, two = (scored(tmp_path / name, monkeypatch, seed) for name, seed in (("one", 0), ("two", 1)))
    shown = " ".join(compare_studies([one.folder, two.folder]).split())
    pair = "qlora: two/made-up - one/made-up"
    assert "## Standard benchmarks" in shown and f"{pair} | arc_easy | inside the noise" in shown
    assert "made-up | piqa |" not in shown and shown.count("arc_easy | ") == 4


def test_a_method_without_the_first_task_is_in_the_legend_too(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora", "galore"))
    for method, tasks in (("base", ("arc_easy", "piqa")), ("qlora", ("arc_easy",)), ("galore", ("piqa",))):
        record = records.load(study, method, 0)
        for task in tasks:
            fake_study.write_benchmark(study, record, task, np.arange(100) < 50)
        records.save(study, record)
    chart = figures.benchmark_points(report.scored(study)[3].benchmarks)
    assert sorted(text.get_text() for text in chart.axes[0].get_legend().get_texts()) == ["base", "galore", "qlora"]
