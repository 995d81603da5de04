"""A study's settings: fixed with its data and, once something has run, as a whole."""

import subprocess

import pytest

from peftlib.core import config, record
from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.study import Study
from peftlib.evaluation.evaluate import evaluate
from peftlib.train.loop import TrainingRun
from peftlib.train.sweep import sweep


def reopened(study, **changes):
    return Study.open(study.cfg.replace(**changes))


def frozen(study):
    return read_json(study.config_path)["config"]


def test_what_the_data_rest_on_is_fixed_with_them(make_study):
    study = make_study()
    with pytest.raises(StudyError, match=r"another config: train_rows: \d+ -> 3\. Change these fields back, or choose"):
        reopened(study, train_rows=3)


def test_settings_left_open_come_from_the_study_and_given_ones_are_held_against_it(make_study):
    made = make_study(lora_alpha=8)
    again = Study.resolve(profile="demo", study="tiny", train_rows=None, device="cpu", seed=5)
    assert again.cfg.study_fields() == made.cfg.study_fields() and again.cfg.seed == 5
    with pytest.raises(StudyError, match=f"max_length: {made.cfg.max_length} -> 99"):
        Study.resolve(profile="demo", study="tiny", max_length=99)


def test_settings_of_training_can_change_until_something_has_run(make_study):
    study = make_study()
    changed = reopened(study, lora_rank=2, max_steps=2)
    assert frozen(study)["lora_rank"] == study.cfg.lora_rank != 2, "opening alone writes nothing"
    TrainingRun(changed, "qlora", log=str).train()
    assert (frozen(study)["lora_rank"], frozen(study)["max_steps"]) == (2, 2)
    assert Study.resolve(profile="demo", study="tiny").cfg.lora_rank == 2
    with pytest.raises(StudyError, match=f"max_steps: 2 -> 0; lora_rank: 2 -> {study.cfg.lora_rank}"):
        reopened(study)


def test_a_sweep_and_answers_fix_them_too(make_study):
    study = make_study()
    sweep(reopened(study, warmup_ratio=0.5), "qlora", factors=(1.0,), rows=4, log=str)
    assert frozen(study)["warmup_ratio"] == 0.5
    with pytest.raises(StudyError, match="warmup_ratio"):
        reopened(study)


def test_answers_of_the_untrained_model_fix_them(make_study):
    study = make_study()
    evaluate(reopened(study, lora_rank=2), "base", log=str)
    assert frozen(study)["lora_rank"] == 2
    with pytest.raises(StudyError, match="lora_rank"):
        reopened(study)


def test_a_session_that_comes_second_with_other_settings_is_refused_when_it_begins(make_study):
    study = make_study()
    first, second = reopened(study, lora_rank=2, max_steps=1), reopened(study, lora_rank=4, max_steps=1)
    late = TrainingRun(second, "qlora", log=str)
    TrainingRun(first, "qlora", log=str).train()
    with pytest.raises(StudyError, match="lora_rank: 2 -> 4"):
        late.train()
    assert frozen(study)["lora_rank"] == 2


def test_adopted_rates_fix_the_rest(make_study):
    study = make_study()
    study.adopt("qlora", {"lora_learning_rate": 1e-3}, {})
    with pytest.raises(StudyError, match="epochs: 1 -> 2"):
        reopened(study, epochs=2)


def test_a_study_older_than_a_setting_had_its_default(make_study):
    study = make_study()
    settings = read_json(study.config_path)
    del settings["config"]["galore_on_refresh"]
    write_json(study.config_path, settings)
    assert reopened(study).cfg.galore_on_refresh == config.resolve("demo").galore_on_refresh


@pytest.mark.parametrize("text", ['{"sch', "[]", '{"schema_version": 1, "profile": "demo", "seal": "0"}'])
def test_a_damaged_config_is_named_with_the_way_out(make_study, text):
    study = make_study()
    study.config_path.write_text(text)
    with pytest.raises(
        StudyError, match=r"config\.json is damaged .*delete it and run 01_data with the study's original"
    ):
        reopened(study)


def test_a_record_says_whether_the_package_differs_from_its_commit(tmp_path):
    package = tmp_path / "peftlib"
    package.mkdir()
    (package / "a.py").write_text("a = 1\n")
    assert record.git_state(package) == {"commit": None, "is_dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found = record.git_state(package)
    assert len(found["commit"]) == 40 and found["is_dirty"] is False
    (package / "b.py").write_text("b = 1\n")
    assert record.git_state(package)["is_dirty"] is True


def test_a_mistyped_study_is_answered_with_those_that_there_are(make_study):
    make_study(study="mine")
    with pytest.raises(StudyError, match="no study 'mien' in .*: studies there: mine; a new one is made by"):
        Study.existing("mien")
