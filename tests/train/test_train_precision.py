"""Mixed precision, overflow, losses that are not finite, memory that runs out."""

import pytest
import torch
from trainings import assert_equal_weights, kept_weights, trained

from peftlib.core import record as records
from peftlib.core.errors import ConfigError, NonFiniteLossError
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.train.loop import TrainingRun
from peftlib.train.step import Stepper


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(make_study, monkeypatch):
    study = make_study(save_steps=2)
    run = TrainingRun(study, "qlora", log=lambda line: None)
    gradients = Stepper.gradients

    def spoil(*args, **kw):
        return gradients(*args, **kw) * (float("nan") if run.progress.step == 3 else 1)

    monkeypatch.setattr(Stepper, "gradients", spoil)
    with pytest.raises(NonFiniteLossError, match="loss of step 4 is nan.*learning rate.*checkpoint is kept"):
        run.train()
    record = records.load(study, "qlora", 0)
    assert record["status"] == "failed" and "NonFiniteLossError" in record["error"]
    assert CheckpointDir(study.checkpoint_dir("qlora", 0), keep=1).newest()[0].state["progress"]["step"] == 2


def test_out_of_memory_halves_the_micro_batch_and_replays_the_step(make_study, monkeypatch):
    plain = make_study(study="plain", batch_size=4, micro_batch_size=2)
    short = make_study(study="short", batch_size=4, micro_batch_size=4)
    trained(plain, "galore")
    lines = []
    run = TrainingRun(short, "galore", log=lines.append)
    forward_backward = Stepper.forward_backward

    def full_card(*args):
        loss = forward_backward(*args)
        if run.execution.micro_batch_size == 4:
            raise torch.OutOfMemoryError("planted")
        return loss

    monkeypatch.setattr(Stepper, "forward_backward", full_card)
    run.train()
    assert any("continuing with micro_batch_size=2" in line for line in lines)
    assert_equal_weights(kept_weights(plain, "galore"), kept_weights(short, "galore"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_active_and_learns(make_study, precision):
    study = make_study(precision=precision, epochs=2)
    run = TrainingRun(study, "hybrid", log=lambda line: None)
    seen = []
    layer = next(m for n, m in run.model.named_modules() if n.endswith("self_attn.q_proj"))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    record = run.train()
    assert seen[0] == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert run.scaler.is_enabled() == (precision == "fp16")
    assert record["precision"] == precision and record["history"][-1]["loss"] < record["history"][0]["loss"]


def test_a_planted_fp16_overflow_skips_exactly_one_step(make_study, monkeypatch):
    run = TrainingRun(make_study(precision="fp16"), "hybrid", log=lambda line: None)
    gradients = Stepper.gradients

    def overflow(*args, **settings):
        loss = gradients(*args, **settings)
        if run.progress.step == 2:
            run.optimizer._gather()
            low = next(iter(run.optimizer._low.values()), None)
            (low if low is not None else next(iter(run.optimizer._full.values()))).view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(Stepper, "gradients", overflow)
    record = run.train()
    assert record["skipped_steps"] == 1 and record["status"] == "ok"
    assert record["placement"] == {
        "micro_batch_size": run.execution.micro_batch_size,
        "activation_checkpointing": "off",
        "recomputed_layers": None,
        "is_compiled": False,
        "adapter_path": "fused",
        "attention": "masks",
        "is_graphed": False,
        "captured_lengths": 0,
    }
    assert [entry["grad_norm"] is None for entry in record["history"]].count(True) == 1


def test_a_card_that_one_row_does_not_fit_recomputes_then_names_the_ways_out(make_study, monkeypatch):
    study = make_study(batch_size=2, micro_batch_size=2)
    lines = []
    run = TrainingRun(study, "galore", log=lines.append)

    def full_card(*args):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Stepper, "forward_backward", full_card)
    with pytest.raises(
        ConfigError, match="does not fit this GPU even with micro_batch_size=1 and activation_checkpointing=on: lower"
    ):
        run.train()
    assert ["micro_batch_size=1, activation_checkpointing=off" in line for line in lines].count(True) == 1
    assert ["micro_batch_size=1, activation_checkpointing=on" in line for line in lines].count(True) == 1
