"""04_eval's section on benchmarks shows what there is, and builds the report again where it scored anything."""

import fake_study
import numpy as np
import pytest

from peftlib.core import record as records
from peftlib.notebook import results
from peftlib.report import build as report


@pytest.fixture
def study(tmp_path, monkeypatch):
    made = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"))
    monkeypatch.setattr("peftlib.report.chart._DPI", 30)
    return made


def test_without_scores_it_shows_nothing(study, capsys, monkeypatch):
    monkeypatch.setattr("peftlib.report.charts.charts_of", lambda *_: {})
    built = report.build_report(study)
    assert results.show_benchmarks(study, built) is built
    assert capsys.readouterr().out.startswith("no benchmarks: to score some, run pip install")


def test_scores_are_shown_as_a_table_and_two_figures(study, monkeypatch):
    shown = []

    def score(study, methods):
        assert methods == ["base", "qlora"]
        for name, right in (("base", 0.5), ("qlora", 0.75)):
            record = records.load(study, name, 0)
            fake_study.write_benchmark(study, record, "arc_easy", np.arange(100) < 100 * right, chance=0.25)
            records.save(study, record)
        return True

    monkeypatch.setattr(results, "bench_study", score)
    monkeypatch.setattr("IPython.display.display", lambda thing, raw=False: shown.append(thing))
    built = results.show_benchmarks(study, None)
    assert [found.task for found in built.benchmarks] == ["arc_easy"]
    table, *figures = shown
    assert table.loc["arc_easy", "qlora"].startswith("0.750 (") and table.loc["arc_easy", "guessing"] == "0.250"
    assert [figure["text/plain"].split(": ")[1] for figure in figures] == [
        "Scores on standard benchmarks",
        "ROUGE-L gained against base, and mean change of accuracy on arc_easy",
    ]
