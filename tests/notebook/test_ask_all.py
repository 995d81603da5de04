"""All models answer one question from their saved weights; what goes wrong with one of them is its own affair."""

import pytest
import tiny

from peftlib import data
from peftlib.core import record as records
from peftlib.core.env import resolve_device
from peftlib.core.files import sha256
from peftlib.evaluation.evaluate import load_model
from peftlib.evaluation.generate import ask
from peftlib.models.identity import new_record
from peftlib.models.saved import save_trained
from peftlib.notebook import ask as ask_all
from peftlib.notebook.ask import Models, ask_box

QUESTION = "What is <b>this</b>?"


@pytest.fixture
def study(make_study):
    """A study with two trained methods, whose weights are those of two other tiny models."""
    study = make_study()
    for seed, method in enumerate(("galore", "full"), start=3):
        train(study, method, seed)
    return study


def train(study, method, seed):
    """Leave what a run leaves: its weights, those of a tiny model, and its record."""
    facts = {"model": study.cfg.model, "four_bit": [], "precision": "fp32"}
    tokenizer, folder = data.load_tokenizer(study.cfg.model), study.weights_dir(method, 0)
    save_trained(tiny.model(seed=seed), tokenizer, folder, facts)
    record = new_record(study, method, device="cpu", precision="fp32", precision_reason="")
    digests = {"model.safetensors": sha256(folder / "model.safetensors")}
    records.save(study, {**record, "status": "ok", "weights_sha256": digests})


@pytest.fixture
def said():
    return []


@pytest.fixture
def models(study, said):
    return Models(study, said.append)


def expected(study, method):
    model = load_model(study, method, 0, device=resolve_device("cpu"), dtype=next(tiny.model().parameters()).dtype)
    return ask(model, data.load_tokenizer(study.cfg.model), [QUESTION], max_new_tokens=5)[0]


def test_every_model_answers_from_its_own_weights(study, models, said):
    assert models.names == ["base", "galore", "full"]
    replies = list(models.ask(QUESTION, models.names, 5))
    assert [reply.method for reply in replies] == models.names
    assert [reply.answer.text for reply in replies] == [expected(study, name) for name in models.names]
    assert len({reply.answer.text for reply in replies}) == 3
    assert said == [
        f"{done} {name} ({n} of 3)" for n, name in enumerate(models.names, 1) for done in ("loading", "answering with")
    ]


def test_models_stay_loaded_where_memory_allows_and_one_at_a_time_where_not(models, said, monkeypatch):
    list(models.ask(QUESTION, models.names, 2))
    said.clear()
    list(models.ask(QUESTION, ["galore"], 2))
    assert said == ["answering with galore (1 of 1)"]
    held = []
    monkeypatch.setattr(models, "_free_bytes", lambda: held.append(len(models._loaded)) or 0)
    said.clear()
    models.close()
    list(models.ask(QUESTION, models.names, 2))
    assert held == [1, 1, 1] and not models._loaded  # never two
    list(models.ask(QUESTION, ["galore"], 2))
    assert said[-2:] == ["loading galore (1 of 1)", "answering with galore (1 of 1)"]


def test_weights_trained_anew_are_loaded_anew(study, models, said):
    [before] = models.ask(QUESTION, ["galore"], 5)
    train(study, "galore", 9)
    [after] = models.ask(QUESTION, ["galore"], 5)
    assert before.answer.text != after.answer.text and len(models._loaded) == 1


def test_an_error_of_one_model_leaves_the_others_their_answers(study, models):
    (study.weights_dir("galore", 0) / "peftlib.json").unlink()
    base, galore, full = models.ask(QUESTION, models.names, 3)
    assert base.answer and full.answer and galore.answer is None
    assert "ModelError: no trained model in" in galore.error


def test_an_error_while_answering_is_that_models_too(models, monkeypatch):
    answer, calls = ask_all.answer_batch, []

    def fails_once(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory <now>")
        return answer(*given, **named)

    monkeypatch.setattr(ask_all, "answer_batch", fails_once)
    replies = list(models.ask(QUESTION, models.names, 2))
    assert [reply.answer is None for reply in replies] == [False, True, False]


def test_the_box_shows_answers_side_by_side_as_they_come(study, monkeypatch):
    box = ask_box(study, is_interactive=True)
    box.question.value, box.tokens.value = QUESTION, 5
    states = []
    box.status.observe(
        lambda change: states.append((change["new"], box.button.disabled, box.shown.value.count("<h4>"))), "value"
    )
    box.button.click()
    assert states[1] == ("answering with base (1 of 3)", True, 0)
    assert states[5] == ("answering with full (3 of 3)", True, 2)
    assert not box.button.disabled and box.shown.value.count("<h4>") == 3
    assert "5 tokens in" in box.shown.value or ", finished" in box.shown.value


def test_the_box_asks_the_ticked_models_alone_and_nothing_without_a_question(study):
    box = ask_box(study, is_interactive=True)
    box.question.value = "  "
    box.button.click()
    assert box.status.value == "Type a question first." and box.shown.value == ""
    box.question.value = QUESTION
    for name in ("base", "galore"):
        box.methods[name].value = False
    box.button.click()
    assert "<h4>full</h4>" in box.shown.value and box.shown.value.count("<h4>") == 1
    box.methods["full"].value = False
    box.button.click()
    assert box.status.value == "Tick a model first."


def test_answers_and_errors_are_escaped(study, monkeypatch):
    def nasty(*given, **named):
        raise RuntimeError("<script>")

    box = ask_box(study, is_interactive=True)
    monkeypatch.setattr(ask_all, "answer_batch", lambda *given, **named: [ask_all_answer("<b>bold</b>")])
    box.button.click()
    assert "&lt;b&gt;bold" in box.shown.value and "<b>bold" not in box.shown.value
    monkeypatch.setattr(ask_all, "answer_batch", nasty)
    box.button.click()
    assert "&lt;script&gt;" in box.shown.value and "<script>" not in box.shown.value


def ask_all_answer(text):
    from peftlib.evaluation.generate import Answer

    return Answer(text, 3, "stop")


def test_the_interrupt_button_ends_the_asking_and_keeps_what_is_there(study, monkeypatch):
    answer, calls = ask_all.answer_batch, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*given, **named)

    monkeypatch.setattr(ask_all, "answer_batch", interrupted)
    box = ask_box(study, is_interactive=True)
    box.button.click()
    assert box.status.value.startswith("Interrupted") and box.shown.value.count("<h4>") == 1
    assert not box.button.disabled and len(calls) == 2


def test_without_a_reader_one_sentence_says_what_the_cell_is_for(study, capsys):
    assert ask_box(study) is None
    assert capsys.readouterr().out == "In Jupyter or Colab this cell asks your question to base, galore, full.\n"
