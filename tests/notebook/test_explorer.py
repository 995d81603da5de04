"""The explorer shows the row that its settings name, marks and escapes its texts, and writes what it shows."""

import base64
import csv
import html.parser
import io
import itertools
import re

import fake_study
import numpy as np
import pytest

from peftlib.evaluation import results as scored
from peftlib.evaluation.metrics import sentence_bleu
from peftlib.notebook import results
from peftlib.notebook.answers import side_by_side
from peftlib.notebook.results import explore
from peftlib.report import charts as report_charts
from peftlib.report.answers import FILE, GAIN, HIGHEST, LOSS, LOWEST, METRICS, Answers
from peftlib.report.build import build_report
from peftlib.storage import archive

NASTY = '<script>alert("1")</script> & "quoted" <b>bold</b> </div>'
VOID = ("br", "hr", "img")


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    monkeypatch.setattr(report_charts, "charts_of", lambda *_: {})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_charts, "charts_of", lambda *_: {})
        yield build_report(fake_study.make(tmp_path_factory.mktemp("explored"), patch))


@pytest.fixture
def answers(report):
    return Answers(report.study)


@pytest.fixture
def explorer(report):
    return explore(report, is_interactive=True)


class Tags(html.parser.HTMLParser):
    """The tags and the text of a page; fails where one is not closed in its turn."""

    def __init__(self, page):
        super().__init__()
        self.seen, self.open, self.text = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def text_of(page):
    return "".join(Tags(page).text)


# Which rows


def test_scores_are_the_studys_own_by_row(report, answers):
    run = report.study.scored["qlora"][0]
    assert np.array_equal(answers.scores("qlora", "rougeL"), run.rows.rougeL)
    bleu = [sentence_bleu(*pair) for pair in zip(run.answers, report.study.references)]
    assert answers.scores("qlora", "bleu4") == pytest.approx(bleu)


@pytest.mark.parametrize("metric", METRICS)
def test_gains_and_losses_of_one_method_over_another_come_largest_first(answers, metric):
    gain = answers.scores("galore", metric) - answers.scores("qlora", metric)
    for order, sign in ((GAIN, -1), (LOSS, 1)):
        places = answers.chosen(order=order, metric=metric, name="galore", other="qlora")
        assert sorted(places) == list(range(48))
        assert np.all(np.diff(sign * gain[places]) >= 0)
    assert gain.min() < 0 < gain.max()


def test_scores_come_highest_or_lowest_first_and_equal_ones_in_file_order(answers):
    values = answers.scores("base", "rougeL")
    high = answers.chosen(order=HIGHEST, name="base")
    assert np.all(np.diff(values[high]) <= 0)
    assert np.all(np.diff(values[answers.chosen(order=LOWEST, name="base")]) >= 0)
    for one, other in itertools.pairwise(high):
        assert values[one] > values[other] or one < other
    assert list(answers.chosen(order=FILE)) == list(range(48))


def test_rows_are_found_by_source_and_by_words_in_prompt_reference_or_answer(answers):
    tulu = answers.chosen(source="tulu")
    assert {answers.rows[at]["source"] for at in tulu} == {"tulu"} and len(tulu) == 16
    for text in (answers.prompts[4][:20], answers.references[4][:25], answers.runs["hybrid"].answers[4][:25]):
        assert 4 in answers.chosen(text=f"  {text.upper()} ")
    assert len(answers.chosen(text="nowhere in there")) == 0
    assert set(answers.chosen(source="tulu", text="paris", order=GAIN, name="qlora", other="base")) <= set(tulu)


def test_several_seeds_are_several_columns(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), seeds=(0, 1), n=6)
    found = Answers(scored.load(study))
    assert list(found.runs) == ["base", "qlora, seed 0", "qlora, seed 1"]
    assert found.method_of("qlora, seed 1") == "qlora"


def test_the_telling_rows_are_each_trained_methods_best_median_and_worst(answers):
    notable = answers.notable()
    gain = answers.scores("hybrid", "rougeL") - answers.scores("base", "rougeL")
    why = {reason: at for at, reasons in notable.items() for reason, runs in reasons.items() if "hybrid" in runs}
    worst = LOSS if gain.min() < 0 else "smallest gain"
    assert gain[why[GAIN]] == gain.max() > 0 and gain[why[worst]] == gain.min()
    assert gain[why["typical gain"]] == np.sort(gain)[::-1][24]
    assert {run for reasons in notable.values() for runs in reasons.values() for run in runs} == {
        "qlora",
        "galore",
        "hybrid",
    }


def test_no_gain_is_called_a_loss_and_no_loss_a_gain(answers, monkeypatch):
    flat = np.linspace(0.1, 0.2, len(answers.rows))
    for shift, up, down in ((0.05, GAIN, "smallest gain"), (-0.05, "smallest loss", LOSS)):
        monkeypatch.setattr(
            type(answers),
            "scores",
            lambda self, name, metric, shift=shift: flat + shift * (name != "base") * (1 + flat),
        )
        said = {reason for reasons in answers.notable().values() for reason in reasons}
        assert said == {up, "typical gain", down}


# What is shown


def test_the_widgets_show_the_row_that_they_name(explorer):
    assert explorer.count.value == "of 48"
    explorer.order.value, explorer.name.value, explorer.other.value = GAIN, "galore", "qlora"
    best = explorer.answers.chosen(order=GAIN, name="galore", other="qlora")
    for number in (1, 2, 48):
        explorer.number.value = number
        at = best[number - 1]
        assert explorer.place() == at
        shown = text_of(explorer.shown.value)
        assert explorer.answers.rows[at]["id"] in shown and explorer.answers.references[at] in shown
        for name in explorer.answers.runs:
            assert explorer.answers.runs[name].answers[at] in shown
            assert f"ROUGE-L {explorer.answers.scores(name, 'rougeL')[at]:.3f}" in shown
        gain = explorer.answers.scores("galore", "rougeL")[at] - explorer.answers.scores("qlora", "rougeL")[at]
        assert f"({gain:+.3f})" in shown and "change from qlora" in shown


def test_buttons_walk_and_stop_at_both_ends(explorer):
    assert explorer.previous.disabled and not explorer.next.disabled
    explorer.next.click()
    assert explorer.place() == 1 and not explorer.previous.disabled
    explorer.previous.click()
    explorer.previous.click()
    assert explorer.place() == 0
    explorer.number.value = 1000
    assert explorer.place() == 47 and explorer.next.disabled
    explorer.next.click()
    assert explorer.place() == 47


def test_another_choice_of_rows_starts_at_its_first(explorer):
    explorer.number.value = 30
    explorer.source.value = "ultrachat"
    assert explorer.number.value == 1 and explorer.count.value == "of 16" and explorer.place() == 2
    explorer.text.value = "no row has this"
    assert explorer.place() is None and "No row contains this text" in explorer.shown.value
    assert explorer.previous.disabled and explorer.next.disabled
    explorer.text.value = ""
    assert explorer.place() == 2


def test_only_settings_that_count_can_be_changed(explorer):
    assert explorer.name.disabled and explorer.metric.disabled and explorer.other.disabled
    explorer.order.value = HIGHEST
    assert not explorer.name.disabled and explorer.other.disabled
    explorer.order.value = LOSS
    assert not explorer.other.disabled


def test_methods_and_marks_are_shown_or_not(explorer):
    assert {"mark", "u"} <= set(Tags(explorer.shown.value).seen)
    explorer.methods["base"].value = False
    heads = re.findall(r"<h4>(.*?)</h4>", explorer.shown.value)
    assert heads == ["reference", "qlora", "galore", "hybrid"]
    explorer.is_marked.value = False
    cards = explorer.shown.value.split('class="pl-cards"')[1].split("In brackets")[0]
    assert "<mark>" not in cards and "<u>" not in cards


def test_how_an_answer_ended_stands_beside_it(explorer):
    shown = text_of(explorer.shown.value)
    assert "tokens, cut at the token limit" in shown and "tokens, finished" in shown


def test_a_conversation_is_folded_and_a_short_question_is_not(explorer):
    assert "<details>" not in explorer.shown.value
    explorer.source.value = "ultrachat"
    assert "<details><summary>user: " in explorer.shown.value
    assert explorer.answers.prompts[2] in text_of(explorer.shown.value)


def test_texts_of_a_model_are_shown_and_never_obeyed(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=6)
    rows = fake_study.made_rows(6)
    for row in rows:
        row["messages"][0]["content"] = row["messages"][-1]["content"] = NASTY
        row["source"] = "<i>source</i>"
    monkeypatch.setattr("peftlib.data.load_split", lambda data_dir, split: rows)
    fake_study.write_predictions(study, "qlora", 0, rows, [NASTY, "", *[NASTY + " script more"] * 4])
    fake_study.write_predictions(study, "base", 0, rows, [NASTY] * 6)
    report = build_report(study)
    pages = [explore(report, is_interactive=False)._repr_html_()]
    explorer = explore(report, is_interactive=True)
    for number in (1, 2, 3):
        explorer.number.value = number
        pages.append(explorer.shown.value)
    for page in pages:
        found = Tags(page)
        assert not {"script", "b2", "i"} & set(found.seen)
        assert NASTY in "".join(found.text)
    assert "(empty)" in pages[2]


# What is written


def csv_of(explorer):
    [found] = re.findall(
        r'download="answers.download.csv" href="data:text/csv;base64,([^"]+)"', explorer.download.value
    )
    return list(csv.DictReader(io.StringIO(base64.b64decode(found).decode(), newline="")))


def test_the_csv_holds_the_rows_found_in_their_order(explorer):
    explorer.source.value, explorer.order.value, explorer.other.value = "alpaca", GAIN, "base"
    explorer.methods["galore"].value = False
    explorer.csv.click()
    rows = csv_of(explorer)
    places = explorer.answers.chosen(source="alpaca", order=GAIN, name="qlora", other="base")
    assert [row["id"] for row in rows] == [explorer.answers.rows[at]["id"] for at in places]
    assert not any("galore" in name for name in rows[0])
    first = places[0]
    assert rows[0]["reference"] == explorer.answers.references[first]
    assert rows[0]["qlora answer"] == explorer.answers.runs["qlora"].answers[first]
    assert float(rows[0]["qlora rougeL"]) == pytest.approx(explorer.answers.scores("qlora", "rougeL")[first], abs=1e-6)
    assert rows[0]["base finish_reason"] == "length" and int(rows[0]["base n_tokens"]) > 0
    explorer.source.value = "tulu"
    assert explorer.download.value == ""  # it was of other rows


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_spreadsheet_calculates_nothing_of_a_models_text(explorer, start):
    nasty = f"{start}cmd|' /C calc'!A0"
    at = explorer.place()
    explorer.answers.rows[at] = {**explorer.answers.rows[at], "id": nasty, "source": nasty}
    explorer.answers.prompts[at] = explorer.answers.references[at] = nasty
    explorer.answers.runs["qlora"].answers[at] = nasty
    explorer.csv.click()
    row = csv_of(explorer)[0]
    for column in ("id", "source", "prompt", "reference", "qlora answer"):
        assert row[column] == f"'{nasty}", column


def test_other_cells_of_the_csv_are_as_they_are(explorer):
    kept = ["a = b", "'quoted'", " =1", "1-2", "", "x\n=y", "x\r=y"]
    at = explorer.place()
    for answer in kept:
        explorer.answers.runs["qlora"].answers[at] = answer
        explorer.csv.click()
        assert csv_of(explorer)[0]["qlora answer"] == answer


def test_a_csv_too_large_for_a_link_is_written_into_the_study(report, explorer, monkeypatch):
    monkeypatch.setattr(results, "_LINK_LIMIT_BYTES", 1000)
    explorer.csv.click()
    path = report.folder / "answers.download.csv"
    assert len(list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))) == 48
    assert "href" not in explorer.download.value and path.name in explorer.download.value
    assert path not in archive.units_of(report.folder)["study"]  # not copied to Drive again and again
    path.unlink()


# Where nobody can click


def test_without_a_reader_a_static_page_has_the_telling_rows(report, answers):
    shown = explore(report, is_interactive=False)
    text = text_of(shown._repr_html_())
    assert (
        "Largest gain of" in text
        and "ypical gain of" in text
        and ("argest loss of" in text or "mallest gain of" in text)
    )
    for at in answers.notable():
        assert answers.rows[at]["id"] in text and answers.rows[at]["id"] in repr(shown)
    assert len(shown._repr_html_()) < 200_000 and not hasattr(shown, "_repr_mimebundle_")


def test_long_texts_are_cut_in_the_static_page_alone(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=6)
    rows = fake_study.made_rows(6)
    fake_study.write_predictions(study, "qlora", 0, rows, ["word " * 5000] * 6)
    report = build_report(study)
    page = explore(report, is_interactive=False)._repr_html_()
    assert "more characters)" in page and len(page) < 100_000
    assert ("word " * 5000).strip() in text_of(explore(report, is_interactive=True).shown.value)


def test_outside_a_notebook_nobody_can_click(report):
    assert "Largest gain" in explore(report)._repr_html_()


def test_a_study_without_answers_says_so(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base",), n=6)
    study.predictions_path("base", 0).unlink()
    for is_interactive in (True, False):
        assert "No answers yet" in explore(build_report(study), is_interactive=is_interactive)._repr_html_()


def test_a_study_of_base_alone_can_be_explored(tmp_path, monkeypatch):
    report = build_report(fake_study.make(tmp_path, monkeypatch, methods=("base",), n=6))
    assert "Highest score of base" in explore(report, is_interactive=False)._repr_html_()
    explorer = explore(report, is_interactive=True)
    explorer.order.value = GAIN  # over itself: nothing
    assert explorer.place() == 0


def test_answers_stand_side_by_side_escaped_with_their_line_breaks():
    shown = side_by_side(["What is <b>?", "Code?"], {"before": ["", NASTY], "after": ["def f():\n    return 1", "x"]})
    made = shown._repr_html_()
    assert "def f():\n    return 1" in made and "(empty)" in made and "alert(&quot;1&quot;)" in made
    assert Tags(made).seen.count("h4") == 4 and Tags(made).seen.count("b") == 2
    assert "> What is <b>?\nbefore: \nafter: def f():" in repr(shown)
