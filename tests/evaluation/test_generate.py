import json
import types

import pytest
import tiny
import torch

from peftlib.core.errors import Stopped, StudyError
from peftlib.data import load_split
from peftlib.evaluation import generate
from peftlib.evaluation.evaluate import evaluate, trained_methods
from peftlib.evaluation.generate import Answer, answer_batch, answer_rows
from peftlib.evaluation.predictions import Predictions
from peftlib.models.chat_template import encode_prompt
from peftlib.train.loop import TrainingRun


def prompts(*texts):
    return [encode_prompt(tiny.tokenizer(), [{"role": "user", "content": text}]) for text in texts]


def test_a_padded_batch_answers_as_single_rows_do():
    model = tiny.model()
    asked = prompts("hi", "what is the answer to this longer question?", "and this")
    together = answer_batch(model, tiny.tokenizer(), asked, max_new_tokens=12)
    alone = [answer_batch(model, tiny.tokenizer(), [p], max_new_tokens=12)[0] for p in asked]
    assert together == alone


def test_an_answer_ends_before_the_first_stop_token():
    model = tiny.model()
    script = iter([366, 367, 106, 368])

    def say(module, args, out):
        logits = torch.zeros_like(out)
        logits[..., next(script)] = 1.0
        return logits

    model.lm_head.register_forward_hook(say)
    (answer,) = answer_batch(model, tiny.tokenizer(), prompts("hi"), max_new_tokens=4)
    assert (answer.text, answer.n_tokens, answer.finish_reason) == ("ab", 2, "stop")


def test_an_answer_of_full_length_says_so():
    model = tiny.model()
    model.lm_head.register_forward_hook(lambda m, a, out: torch.zeros_like(out).index_fill(-1, torch.tensor([366]), 1))
    (answer,) = answer_batch(model, tiny.tokenizer(), prompts("hi"), max_new_tokens=3)
    assert (answer.text, answer.n_tokens, answer.finish_reason) == ("aaa", 3, "length")


class Killed(BaseException):
    pass


class Dying(Predictions):
    """Predictions of a process that is killed after some rows."""

    left = 2

    def add(self, test_row, answer):
        if not self.left:
            raise Killed
        self.left -= 1
        super().add(test_row, answer)


@pytest.mark.parametrize(("engine", "batch"), [("auto", 0), ("slots", 1), ("slots", 4), ("plain", 2), ("plain", 3)])
def test_killed_and_run_again_answers_each_row_once_with_the_same_file(make_study, tmp_path, engine, batch):
    study = make_study()
    rows, model = load_split(study.data_dir, "test"), tiny.model()
    settings = {"max_new_tokens": 5, "batch": batch, "engine": engine, "log": lambda line: None}
    whole = Predictions(tmp_path / "whole.jsonl", "h")
    answer_rows(model, tiny.tokenizer(), rows, whole, **settings)

    cut = tmp_path / "cut.jsonl"
    for answered in (2, 4):
        with pytest.raises(Killed):
            answer_rows(model, tiny.tokenizer(), rows, Dying(cut, "h"), **settings)
        with open(cut, "a") as half_a_line:
            half_a_line.write('{"id": "x", "answ')
        ids = [json.loads(line)["id"] for line in cut.read_text().splitlines()[:-1]]
        assert len(ids) == len(set(ids)) == answered
    again = Predictions(cut, "h")
    answer_rows(model, tiny.tokenizer(), rows, again, **settings)
    assert cut.read_bytes() == whole.path.read_bytes()
    assert list(again.rows) == [row["id"] for row in rows] and len(rows) == 6


def test_a_block_cut_in_the_middle_is_answered_by_the_same_batches(monkeypatch):
    asked = []

    def generate(model, prompts, limits, **settings):
        asked.append([tuple(prompt) for prompt in prompts])
        return iter((i, [366, 106]) for i in range(len(prompts)))

    monkeypatch.setattr("peftlib.evaluation.generate.generate_rows", generate)
    rows = [
        {"id": str(i), "source": "s", "prompt_sha256": "", "messages": [{"role": "user", "content": "a" * i}, {}]}
        for i in range(1, 8)
    ]
    kept = types.SimpleNamespace(rows={"6": {}}, add=lambda row, answer: None, complete=lambda rows: None)
    settings = {"max_new_tokens": 5, "batch": 3, "engine": "plain", "log": lambda line: None}
    answer_rows(tiny.model(), tiny.tokenizer(), rows, kept, **settings)
    assert [len(block) for block in asked] == [3, 3, 1]
    kept.rows = {str(i): {} for i in (7, 6, 5, 3)}
    answer_rows(tiny.model(), tiny.tokenizer(), rows, kept, **settings)
    assert asked[3:] == asked[1:3]


def test_an_answer_with_a_line_separator_is_one_row(tmp_path):
    kept = Predictions(tmp_path / "p.jsonl", "h")
    kept.add({"id": "a", "source": "s", "prompt_sha256": "x"}, Answer("one\u2028two\x85three", 3, "stop"))
    before = kept.path.read_bytes()
    assert Predictions(kept.path, "h").rows == kept.rows and kept.path.read_bytes() == before


def test_answers_of_another_split_are_refused_and_stay(tmp_path):
    path = tmp_path / "p.jsonl"
    Predictions(path, "old").add({"id": "a", "source": "s", "prompt_sha256": "x"}, Answer("one", 3, "stop"))
    before = path.read_text()
    with pytest.raises(StudyError, match="split_hash old, the data new.*move the file away"):
        Predictions(path, "new")
    assert path.read_text() == before


def test_a_session_that_ends_keeps_the_answers_and_the_next_one_goes_on(make_study):
    from peftlib.core import session

    study, lines = make_study(), []
    ends = iter([None, "this session ends in 3 minutes"])

    class Ending(session.Deadline):
        def passed(self):
            return next(ends)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("peftlib.evaluation.evaluate.Deadline", Ending)
        with pytest.raises(
            Stopped, match="this session ends in 3 minutes: 2 of 6 rows are answered and kept; run again"
        ):
            evaluate(study, "base", log=lines.append)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("peftlib.evaluation.evaluate.mean_loss", None)  # the losses are known already
        assert evaluate(study, "base", log=lines.append)["evaluation"]["n_test"] == 6


def test_losses_of_another_precision_are_measured_anew_for_an_evaluation_that_names_one(make_study, monkeypatch):
    study, measured = make_study(), []
    as_on = {"fp16": (torch.float16, "fp16", "as on a T4"), "fp32": (torch.float32, "fp32", "as on a CPU")}

    def mean_loss(*args, precision, **settings):
        measured.append(precision)
        return 2.0

    def evaluate_in(precision, answers=None):
        with monkeypatch.context() as patched:
            patched.setattr("peftlib.evaluation.evaluate.mean_loss", mean_loss)
            patched.setattr("peftlib.evaluation.evaluate.evaluation_dtype", lambda device: as_on[precision])
            if answers is not None:
                patched.setattr("peftlib.evaluation.evaluate._answers", answers)
            return evaluate(study, "base", log=lambda line: None)

    def cut(*args, **settings):
        raise Stopped("cut after the losses")

    for _ in range(2):  # the second time they are known
        with pytest.raises(Stopped):
            evaluate_in("fp16", cut)
    assert measured == ["fp16"]
    record = evaluate_in("fp32")
    assert measured == ["fp16", "fp32"] and record["evaluation"]["precision"] == "fp32"


def test_evaluation_writes_loss_and_answers_once(make_study):
    study = make_study()
    TrainingRun(study, "qlora", log=lambda line: None).train()
    for method in ("base", "qlora"):
        record = evaluate(study, method, log=lambda line: None)
        lines = study.predictions_path(method, 0).read_text().splitlines()
        assert len(lines) == record["evaluation"]["n_test"] == 6
        assert list(json.loads(lines[0])) == [
            "id",
            "source",
            "prompt_sha256",
            "answer",
            "n_tokens",
            "finish_reason",
            "split_hash",
        ]
        assert record["eval_loss"] == record["evaluation"]["eval_loss"] > 0
    before = study.record_path("qlora", 0).read_bytes()
    said = []
    evaluate(study, "qlora", log=said.append)
    assert said == ["qlora: already evaluated, nothing to do"]
    assert study.record_path("qlora", 0).read_bytes() == before
    assert trained_methods(study) == ["qlora"]


def test_evaluation_in_fp16_scores_as_in_float32(make_study, monkeypatch):
    study = make_study()
    exact = evaluate(study, "base", log=lambda line: None)
    study.record_path("base", 0).unlink()
    study.predictions_path("base", 0).unlink()
    monkeypatch.setattr(
        "peftlib.evaluation.evaluate.evaluation_dtype", lambda device: (torch.float16, "fp16", "as on a T4")
    )
    record = evaluate(study, "base", log=lambda line: None)
    assert record["precision"] == record["evaluation"]["precision"] == "fp16"
    assert abs(record["eval_loss"] - exact["eval_loss"]) < 1e-3


def test_evaluating_what_was_not_trained_is_refused(make_study):
    with pytest.raises(StudyError, match="no record of galore.*train it first"):
        evaluate(make_study(), "galore", log=lambda line: None)


def test_the_time_left_is_told_once_enough_rows_are_answered(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(generate.time, "monotonic", lambda: now[0])
    progress = generate._Progress(48, 8, lines.append)
    for seconds in (30.0, 33.0, 36.0, 39.0, 60.0):
        now[0] = seconds
        progress.count(types.SimpleNamespace(n_tokens=10))
    assert lines[0] == "answered 9/48  0 tok/s" and "ETA" not in lines[2]
    assert lines[3] == "answered 12/48  1 tok/s  ETA 5:51" and lines[4].endswith("ETA 7:00")
