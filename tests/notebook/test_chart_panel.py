"""The chart panel draws what is picked; where nobody can click the report's own figures stand."""

import base64
import dataclasses
import re

import fake_study
import pytest

from peftlib.notebook.results import show_charts
from peftlib.report import charts as report_charts
from peftlib.report.build import build_report
from peftlib.report.chart import image
from peftlib.report.charts import ALL_ROWS, EACH_SOURCE, KINDS, chart_of, row_choices
from peftlib.report.palette import DARK, LIGHT


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftlib.report.chart._DPI", 30)
        yield build_report(fake_study.make(tmp_path_factory.mktemp("charted"), patch))


@pytest.fixture
def panel(report):
    return show_charts(report, is_interactive=True)


def alt_of(panel):
    return re.search(r'<img alt="([^"]+)" src="data:image/png;base64,', panel.shown.value)[1]


def test_each_choice_draws_a_chart_with_words_and_unit(report):
    for kind in KINDS:
        for rows in row_choices(report.numbers, kind):
            chart = chart_of(report.numbers, kind, rows)
            assert not chart.is_empty and len(chart.alt) > 40, (kind, rows)
            labels = [text for axes in chart.axes for text in (axes.get_xlabel(), axes.get_ylabel())]
            assert any(re.search(r"\(0-1\)|nats|GiB|tokens/s", label) for label in labels), (kind, rows, labels)


def test_a_sources_chart_shows_its_own_rows(report, panel):
    panel.rows.value = "tulu"
    value = report.numbers.per_source["tulu"]["qlora"]["rougeL"].value
    assert f"qlora ROUGE-L {value:.3f}" in alt_of(panel) and "test rows of tulu" in alt_of(panel)
    whole = report.numbers.intervals["qlora"]["rougeL"].value
    panel.rows.value = ALL_ROWS
    assert f"qlora ROUGE-L {whole:.3f}" in alt_of(panel) and f"{whole:.3f}" != f"{value:.3f}"


def test_the_metric_can_be_changed_and_keeps_the_source_where_it_can(panel):
    panel.rows.value = EACH_SOURCE
    panel.kind.value = "BLEU-4"
    assert panel.rows.value == EACH_SOURCE and alt_of(panel).startswith("BLEU-4 by data source")
    panel.kind.value = "test loss"
    assert panel.rows.value == ALL_ROWS and panel.rows.disabled
    assert "base 3.400 nats per token; qlora 2.400" in alt_of(panel)
    panel.kind.value = "general text loss"
    assert "hybrid 2.970" in alt_of(panel)
    panel.kind.value = "BLEU-4 against memory"
    assert not panel.rows.disabled and EACH_SOURCE not in panel.rows.options


def test_the_picture_and_the_results_can_be_downloaded(report, panel):
    panel.kind.value = "peak memory"
    links = dict(re.findall(r'download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', panel.download.value))
    assert set(links) == {"peak_memory_all_rows.png", "results.csv"}
    png = base64.b64decode(links["peak_memory_all_rows.png"])
    assert png.startswith(b"\x89PNG") and base64.b64encode(png).decode() in panel.shown.value
    assert base64.b64decode(links["results.csv"]) == (report.folder / "results.csv").read_bytes()


def test_the_theme_can_be_changed(report, panel):
    assert panel.theme.value == "light"
    before = panel.shown.value
    panel.theme.value = "dark"
    assert panel.shown.value != before
    assert chart_of(report.numbers, KINDS[0], theme=DARK).get_facecolor() != (1, 1, 1, 1)


def test_losses_on_other_general_texts_are_not_put_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(report_charts, "charts_of", lambda *_: {})
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora", "galore"), n=6)
    record = fake_study.record_of("qlora")
    record["evaluation"]["general_text_sha256"] = "0ther"
    fake_study.write_record(study, record)
    assert build_report(study).numbers.general_loss == {"base": 3.0, "galore": 3.3}


def test_a_study_without_scores_has_charts_that_say_so(tmp_path, monkeypatch, no_charts):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base",), n=6)
    study.predictions_path("base", 0).unlink()
    panel = show_charts(build_report(study), is_interactive=True)
    for kind in KINDS:
        panel.kind.value = kind
        if kind not in ("test loss", "general text loss"):  # these need no answers
            assert alt_of(panel).startswith("Empty chart"), kind


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_without_a_reader_the_reports_figures_are_shown_in_the_theme(report, monkeypatch, capsys, theme):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle["text/html"]))
    report = dataclasses.replace(report, theme=theme)
    assert show_charts(report, is_interactive=False) is None
    figures = report.dark_figures if theme == "dark" else report.figures
    assert shown == [
        image(figures[name].read_bytes(), report.alt[name])
        for name in ("scores", "rougeL_by_source", "rougeL_against_memory")
    ]
    assert "all figures: loss, scores" in capsys.readouterr().out


def test_a_page_shows_the_dark_pictures_to_readers_of_dark_pages(report):
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    pairs = re.findall(
        r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="data:image/png;base64,([^"]+)">'
        r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"></picture>',
        page,
    )
    assert [alt for _, alt, _ in pairs] == [text.replace("'", "&#x27;") for text in report.alt.values()]
    for (dark, _, light), name in zip(pairs, report.figures, strict=True):
        assert base64.b64decode(dark) == report.dark_figures[name].read_bytes()
        assert base64.b64decode(light) == report.figures[name].read_bytes() and dark != light


def test_the_report_draws_what_the_panel_draws(report):
    drawn = report_charts.charts_of(report.numbers, LIGHT)
    assert list(drawn) == list(report.figures)
