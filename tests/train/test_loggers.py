import importlib.util
import sys

import fake_trackio
import pytest

from peftlib.core.errors import ConfigError
from peftlib.train import callbacks, loggers
from peftlib.train.loop import TrainingRun

NAMES = {"loss", "loss_smoothed", "learning_rate", "tokens_per_second", "memory_gib", "validation_loss"}
STEPS = list(range(1, 13))


def cut_and_gone_on(make_study, report_to):
    """The study and record of a run that dies in step 6 of 12, two steps after its last checkpoint, and is run
    again."""
    study = make_study(epochs=2, save_steps=4, eval_steps=5, report_to=report_to)
    run = TrainingRun(study, "qlora", log=lambda line: None)
    step = run._step
    run._step = lambda: step() if run.progress.step < 6 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    lines = []
    again = TrainingRun(study, "qlora", log=lines.append)
    record = again.train()
    assert "resumes at step 4 of 12" in lines[0]
    return study, record


def test_tensorboard_reads_each_step_once_though_a_session_was_cut(make_study):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    study, record = cut_and_gone_on(make_study, "tensorboard")
    read = EventAccumulator(str(study.folder / "logs" / "qlora-s0"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == NAMES
    for name in NAMES - {"validation_loss", "memory_gib"}:
        assert [event.step for event in read.Scalars(name)] == STEPS, name
    assert [event.step for event in read.Scalars("validation_loss")] == [5, 10, 12]
    losses = [entry["loss"] for entry in record["history"]]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(losses)
    assert read.Scalars("loss_smoothed")[-1].value == pytest.approx(sum(losses) / 12)
    assert all(event.value > 0 for event in read.Scalars("memory_gib"))


def test_trackio_gets_each_step_once_in_a_project_named_as_the_study(make_study, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "trackio" else find(name))
    monkeypatch.setattr(fake_trackio, "runs", {})
    _, record = cut_and_gone_on(make_study, "trackio")
    [((project, name), logged)] = fake_trackio.runs.items()
    assert (project, name) == ("tiny", "qlora-s0")
    assert [step for step, numbers in logged if "loss" in numbers] == STEPS
    assert [step for step, numbers in logged if "validation_loss" in numbers] == [5, 10, 12]
    assert [numbers["loss"] for _, numbers in logged if "loss" in numbers] == [e["loss"] for e in record["history"]]


def test_an_absent_package_is_told_before_the_model_is_loaded(make_study, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("peftlib.train.loop.load_base", lambda *args, **settings: pytest.fail("the model was loaded"))
    with pytest.raises(
        ConfigError, match="report_to='trackio': the package trackio is not installed.*pip install trackio"
    ):
        TrainingRun(make_study(report_to="trackio"), "qlora", log=lambda line: None)


def test_another_place_to_log_to_is_refused_in_words(make_study):
    with pytest.raises(ConfigError, match=r"report_to='wandb' is not allowed: use '' \(none\), tensorboard, trackio"):
        make_study(report_to="wandb")


def test_nothing_is_logged_unless_asked(make_study):
    run = TrainingRun(make_study(), "qlora", log=lambda line: None)
    assert loggers.of(run) == [] and run.train()["status"] == "ok"
    assert not (run.study.folder / "logs").exists()


def test_a_log_that_cannot_be_written_does_not_end_training(make_study, monkeypatch):
    lines = []
    run = TrainingRun(make_study(report_to="tensorboard"), "qlora", log=lines.append)

    def full(self, step, numbers):
        raise OSError("no space")

    monkeypatch.setattr(loggers.TensorBoard, "_write", full)
    assert run.train()["status"] == "ok"
    assert [line for line in lines if "was disabled" in line] == [
        "TensorBoard failed (OSError: no space) and was disabled; training continues"
    ]
    assert issubclass(loggers.TensorBoard, callbacks.Callback)
