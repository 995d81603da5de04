"""Twenty steps of every method on the tiny model give the losses that they gave when these histories were written.

A refactoring must not move them. `PEFTLIB_GOLDEN=write pytest tests/train/test_golden.py` writes them anew, for a
change that is meant to. Compared within 1e-3: other processors and versions of torch round differently.
"""

import json
import os
from pathlib import Path

import pytest

from peftlib import methods
from peftlib.train.loop import TrainingRun

HISTORIES = Path(__file__).with_name("golden_histories.json")
STEPS = 20


# Those of methods.variants have none: PEFT makes their layers, and may make them otherwise one day.
@pytest.mark.parametrize("method", [name for name, spec in methods.METHODS.items() if not spec.is_counted])
def test_losses_are_those_of_the_golden_history(make_study, method):
    study = make_study(max_steps=STEPS, epochs=10, eval_steps=10, galore_update_interval=7)
    record = TrainingRun(study, method, log=lambda line: None).train()
    found = {
        "split_hash": study.manifest()["split_hash"],
        "trainable_params": record["trainable_params"],
        "train_tokens": record["train_tokens"],
        "losses": [entry["loss"] for entry in record["history"]],
        "grad_norms": [entry["grad_norm"] for entry in record["history"]],
        "valid_losses": [entry["valid_loss"] for entry in record["valid_history"]],
    }
    kept = json.loads(HISTORIES.read_text()) if HISTORIES.exists() else {}
    if os.environ.get("PEFTLIB_GOLDEN") == "write":
        HISTORIES.write_text(json.dumps({**kept, method: found}, indent=1) + "\n")
        return
    golden = kept[method]
    assert len(found["losses"]) == STEPS
    for name in ("split_hash", "trainable_params", "train_tokens"):
        assert found[name] == golden[name], name
    for name in ("losses", "grad_norms", "valid_losses"):
        assert found[name] == pytest.approx(golden[name], rel=1e-3), name
