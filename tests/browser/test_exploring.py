"""What a reader can turn and press: the study form of 01, and the charts, the explorer and the ask-all box of 04 and
05."""

import random
import re
import shutil

import fake_study
import pytest
from tiny import TINY

from peftlib import data
from peftlib.core import config
from peftlib.core import record as records
from peftlib.core.files import sha256
from peftlib.core.study import Study
from peftlib.evaluation.evaluate import evaluate
from peftlib.train.loop import TrainingRun

pytestmark = pytest.mark.browser

METHODS = ("qlora", "galore", "hybrid")
ROWS = 6  # of the test set


@pytest.fixture(scope="module")
def fields(tiny_model):
    """Parameters of the one study."""
    return {"profile": "demo", "study": "explored", "model": str(tiny_model), **TINY, "max_steps": 2}


@pytest.fixture(scope="module")
def finished_study(lab, fields, built_data):
    """All methods trained and scored, then given answers that share words with the references, as a tiny model's do
    not."""
    study = Study(lab.server.runs / fields["study"], config.resolve(**fields))
    shutil.copytree(built_data, study.data_dir)
    study.freeze()
    for method in METHODS:
        TrainingRun(study, method, log=lambda line: None).train()
    rows = list(data.load_split(study.data_dir, "test"))
    for method in ("base", *METHODS):
        evaluate(study, method, log=lambda line: None)
        answers = [answer_to(row, method) for row in rows]
        fake_study.write_predictions(study, method, 0, rows, answers, split_hash=study.manifest()["split_hash"])
        record = records.load(study, method, 0)
        record["evaluation"]["predictions_sha256"] = sha256(study.predictions_path(method, 0))
        records.save(study, record)
    return study


def answer_to(row, method):
    """Some words of the reference, more of them where fake_study has the method as skilled, among other words."""
    rng = random.Random(f"{method} {row['id']}")
    words = row["messages"][-1]["content"].split()
    return " ".join(word if rng.random() < fake_study.SKILL[method] else "zebra" for word in words)


@pytest.fixture(scope="module", params=["04_eval", "05_hybrid"])
def opened(request, lab, fields, finished_study):
    """A notebook whose report is built and whose widgets stand."""
    copy = lab.server.put(request.param, fields=fields, copy=f"{request.param}-explored")
    with lab.opened(copy) as notebook:
        for words in (
            "# Parameters",
            "setup(",
            "build_report(study)",
            "show_charts(shown)",
            "explore(shown)",
            "ask_box(",
        ):
            notebook.cell(words).run()
        notebook.picture_in_both_themes(f"{request.param}-explored")
        yield notebook


def alt_text(cell):
    [alt] = cell.alt_texts()
    return alt


def shown_row(cell):
    return re.search(r"row (\w+-[0-9a-f]{16})", cell.text)[1]


def test_the_form_of_01_says_what_a_choice_costs_or_why_it_cannot_be(lab, fields):
    with lab.opened(lab.server.put("01_data", fields={**fields, "study": "planned"}, copy="01_data-form")) as notebook:
        form = notebook.cell("study_form(study)")
        notebook.run_above(form, seconds=120)
        form.run()
        assert "on a t4: 14.6 GiB" in form.wait_for(r"on a .* GiB")[0]
        before = form.text
        form.choose("GPU", "a100")
        assert "on a a100: " in form.wait_for_change(before)
        form.enter("model", "google/gemma-3-1b-it")
        form.wait_for(r"google/gemma-3-1b-it on a a100")
        form.enter("lora_rank", 7)
        form.wait_for(r"lora_rank = 7\b")
        form.wait_for(r"-p lora_rank=7\b")
        form.enter("lora_rank", 0)
        form.wait_for("Not possible: lora_rank=0 is out of range: use 1 or more")
        form.enter("lora_rank", 100_000)
        form.wait_for("lora_rank=100000")
        assert form.problems() == [] and lab.script_errors() == []


def test_the_charts_show_what_is_chosen_in_words_too(opened):
    with opened.watched():
        panel = opened.cell("show_charts(shown)")
        first = alt_text(panel)
        assert re.match(r"Scores on the test rows: .*qlora ROUGE-L 0\.\d{3}", first), first
        panel.choose("of", "tulu")
        panel.wait_for_alt(r"test rows of tulu.*qlora ROUGE-L")
        assert panel.links() == ["ROUGE_L_tulu.png", "results.csv"]
        panel.choose("show", "BLEU-4")
        panel.wait_for_alt(r"test rows of tulu.*qlora BLEU-4")
        panel.choose("show", "peak memory")
        panel.wait_for_alt(r"qlora \d\.\d+ GiB")
        assert panel.value("of") == "all rows"
        panel.choose("show", "training loss by step")
        panel.wait_for_alt("^Loss from the first to the last training step")
        assert panel.links() == ["training_loss_by_step_all_rows.png", "results.csv"] and panel.problems() == []


def test_the_explorer_goes_through_sorts_and_finds_rows(opened, finished_study):
    with opened.watched():
        explorer = opened.cell("explore(shown)")
        first = shown_row(explorer)
        assert first.startswith("alpaca-") and f"of {ROWS}" in explorer.text
        assert len(explorer.parts(".pl-card mark")) > 3 and "zebra" in explorer.parts(".pl-card u")[0]
        explorer.tick("mark words", False)
        explorer.lab.wait(lambda: not explorer.parts(".pl-card mark"), "unmarked words")
        explorer.tick("mark words", True)
        explorer.press("Next")
        explorer.lab.wait(lambda: shown_row(explorer) != first, "the next row")

        explorer.choose("sort by", "largest gain")
        explorer.choose("of", "galore")
        explorer.wait_for(rf"row {largest_gain(finished_study, 'galore')}")
        explorer.choose("source", "ultrachat")
        explorer.wait_for(r"of 2(?!\d)")
        assert shown_row(explorer).startswith("ultrachat-")
        explorer.choose("source", "all sources")

        word = "blue wavelengths"  # of one reference
        explorer.enter("text", word)
        explorer.wait_for(r"of 1(?!\d)")
        assert word in explorer.text
        explorer.enter("text", "nobody wrote this")
        explorer.wait_for("No row contains this text")
        explorer.enter("text", "")
        explorer.wait_for(f"of {ROWS}")
        explorer.press("Make CSV")
        explorer.lab.wait(lambda: explorer.links() == ["answers.download.csv"], "a link to the CSV")
        assert explorer.problems() == []


def largest_gain(study, method):
    """The id of the row where a method's ROUGE-L is furthest above base's."""
    from peftlib.report.answers import GAIN, Answers
    from peftlib.report.build import build_report

    answers = Answers(build_report(study).study)
    return answers.rows[answers.chosen(order=GAIN, name=method, other="base")[0]]["id"]


def test_every_model_answers_what_is_asked(opened):
    with opened.watched():
        box = opened.cell("ask_box(")
        box.enter("question", "What is two and two?")
        box.press("Ask all models")
        box.wait_for(r"(loading|answering with) base \(1 of 4\)")
        box.wait_for("Greedy decoding: the same question gives the same answers", seconds=120)
        assert box.parts(".pl-card h4") == ["base", *METHODS] and box.problems() == []
        assert all(re.match(r"\d tokens in \d+\.\d s, ", told) for told in box.parts(".pl-card div.pl-note"))
        assert opened.lab.script_errors() == []
