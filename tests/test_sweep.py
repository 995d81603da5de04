import json

import pytest

from peftlib.__main__ import main
from peftlib.errors import ConfigError
from peftlib.sweep import sweep


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
