import json

import pytest

from peftlib.cli import main
from peftlib.core.errors import ConfigError, NonFiniteLossError, Stopped, StudyError
from peftlib.core.study import Study
from peftlib.train.loop import TrainingRun
from peftlib.train.sweep import kept, sweep


def test_a_sweep_finds_the_least_validation_loss_and_records_every_trial(make_study):
    study = make_study()
    lines = []
    found = sweep(study, "hybrid", factors=(1e-4, 1.0), rows=6, log=lines.append)
    losses = [entry["valid_loss"] for entry in found["tried"]]
    assert found["steps"] == 3 and found["best"]["valid_loss"] == min(losses) and losses[0] != losses[1]
    assert found["tried"][0]["galore_learning_rate"] == study.cfg.galore_learning_rate * 1e-4
    assert found["tried"][0]["lora_learning_rate"] == study.cfg.lora_learning_rate * 1e-4
    written = json.loads((study.folder / "sweeps" / "hybrid.json").read_text())
    assert written["tried"] == found["tried"]
    assert "at the edge" in lines[-1] and not list(study.folder.glob("sweeps/*/weights/*/*.safetensors"))
    lines.clear()
    assert sweep(study, "hybrid", factors=(1e-4, 1.0), rows=6, log=lines.append) == found
    assert not any("step 1/" in line for line in lines)  # nothing is trained twice


def test_a_factor_that_is_not_positive_is_refused(make_study):
    with pytest.raises(ConfigError, match=r"factors=\(0\.0,\): use positive numbers"):
        sweep(make_study(), "qlora", factors=(0.0,))


def test_the_command_sweeps_the_named_method(make_study, capsys):
    study = make_study()
    assert main(["sweep", "--study", study.folder.name, "--method", "qlora", "--factor", "1", "--rows", "2"]) == 0
    assert "qlora: best lora_learning_rate=" in capsys.readouterr().out


def test_a_rate_that_diverges_is_recorded_and_the_sweep_goes_on(make_study, monkeypatch):
    study, lines = make_study(), []
    real = TrainingRun._step

    def step(self):
        if self.cfg.galore_learning_rate > study.cfg.galore_learning_rate:
            raise NonFiniteLossError("planted")
        real(self)

    monkeypatch.setattr(TrainingRun, "_step", step)
    found = sweep(study, "galore", factors=(1.0, 3.0), rows=4, log=lines.append)
    assert [entry["valid_loss"] is None for entry in found["tried"]] == [False, True] and found["best"]["factor"] == 1.0
    assert not [path for path in study.folder.glob("sweeps/*/*") if path.name in ("data", "weights", "compile")]
    lines.clear()
    assert sweep(study, "galore", factors=(1.0, 3.0), rows=4, log=lines.append) == found
    assert not any("step 1/" in line for line in lines)
    with pytest.raises(NonFiniteLossError, match="no rate of 1 led to a finite loss"):
        sweep(study, "galore", factors=(3.0,), rows=4, log=lines.append)


def test_a_cut_sweep_says_so_and_goes_on(make_study):
    study = make_study(max_seconds=0.0001)
    with pytest.raises(Stopped, match="stopped at factor 1"):
        sweep(study, "qlora", factors=(1.0,), rows=6)
    whole = Study(study.folder, study.cfg.replace(max_seconds=0.0))
    assert kept(study, "qlora", factors=(1.0,), rows=6) is None
    found = sweep(whole, "qlora", factors=(1.0,), rows=6)
    assert kept(study, "qlora", factors=(1.0,), rows=6) == {**found, "schema_version": 1}


def test_rates_are_adopted_once_and_before_the_first_run(make_study):
    study = make_study()
    study.adopt("qlora", {"lora_learning_rate": 6e-4}, {"rows": 6})
    study.adopt("qlora", {"lora_learning_rate": 6e-4}, {"rows": 6})
    with pytest.raises(StudyError, match=r"has learning rates of qlora already: lora_learning_rate: 0.0006 -> 0.0001"):
        study.adopt("qlora", {"lora_learning_rate": 1e-4}, {})
    record = TrainingRun(study, "qlora").train()
    assert record["learning_rate"] == 6e-4 and record["config"]["lora_learning_rate"] == 6e-4
    assert TrainingRun(Study.open(study.cfg), "qlora").finished_record() is not None
    plain = TrainingRun(study, "hybrid")
    assert plain.cfg.lora_learning_rate == study.cfg.lora_learning_rate  # another method's rate is its own
    plain.train()
    with pytest.raises(StudyError, match=r"hybrid \(seed 0\) was trained .* with other rates"):
        study.adopt("hybrid", {"lora_learning_rate": 6e-4, "galore_learning_rate": 1e-3}, {})
