"""Runs that cannot be are refused with the way out, and nothing is lost."""

import shutil

import pytest
from trainings import trained

from peftlib.core.errors import CheckpointError, ConfigError, StudyError
from peftlib.core.study import Study
from peftlib.train.loop import TrainingRun


def test_a_checkpoint_of_other_settings_is_refused_by_field(make_study, tmp_path):
    study = make_study(max_seconds=1e-6)
    trained(study, "qlora")
    study.config_path.unlink()  # else the study itself refuses first
    other = make_study(lora_alpha=8)
    with pytest.raises(CheckpointError, match=r"lora_alpha: 32 -> 8"):
        TrainingRun(other, "qlora", log=lambda line: None).train()
    assert any(study.checkpoint_dir("qlora", 0).iterdir())


def test_a_study_of_another_config_is_refused_with_its_fields(make_study):
    study = make_study()
    before = study.config_path.read_bytes()
    with pytest.raises(StudyError, match=r"max_new_tokens: 6 -> 7.*choose another study name"):
        Study.open(study.cfg.replace(max_new_tokens=7))
    assert study.config_path.read_bytes() == before
    Study.open(study.cfg.replace(seed=3, micro_batch_size=1))  # seeds and run-time fields are free


def test_training_before_data_is_refused(make_study):
    study = make_study()
    shutil.rmtree(study.data_dir)
    with pytest.raises(StudyError, match="run 01_data first"):
        TrainingRun(study, "qlora", log=lambda line: None)


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("nosuch", {}, "'nosuch' is unknown: use qlora, galore, hybrid, lora, full, apollo, muon"),
        ("qlora", {"lora_rank": 65}, r"lora_rank=65 is larger than a layer: use 1\.\.32"),
        ("galore", {"galore_rank": 65}, r"galore_rank=65, weight \(32, 64\): use 1\.\.32"),
    ],
)
def test_a_method_or_rank_that_cannot_be_is_refused(make_study, method, fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainingRun(make_study(**fields), method, log=lambda line: None).train()


def test_a_full_disk_is_refused_before_the_first_step(make_study, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="GiB free, save_total_limit=1 needs .* GiB: free some space"):
        TrainingRun(make_study(), "galore", log=lambda line: None).train()


def test_a_checkpoint_of_other_layers_is_refused(make_study, monkeypatch):
    study = make_study(save_steps=2, max_seconds=1e-6)
    TrainingRun(study, "hybrid", log=lambda line: None).train()
    run = TrainingRun(study, "hybrid", log=lambda line: None)
    monkeypatch.setattr("peftlib.train.run_state.layer_table", lambda model: [{"layer": "q_proj", "class": "Other"}])
    with pytest.raises(CheckpointError, match="the model has the layers .*'Other'.*use the model and versions"):
        run.train()


def test_another_session_in_the_same_study_is_refused_and_nothing_is_lost(make_study):
    from peftlib.storage.lock import StudyLock

    study = make_study(max_steps=2)
    with StudyLock(study.folder, "training galore"), pytest.raises(StudyError, match="is in use by .*training galore"):
        trained(study, "qlora")
    assert trained(study, "qlora")[1]["status"] == "ok"
