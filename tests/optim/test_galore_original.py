"""galore_torch's own optimizer as an engine of galore: it trains, resumes and refuses as the loop needs."""

import pytest
import torch

from peftlib.core import config
from peftlib.core.errors import CheckpointError, ConfigError
from peftlib.models.inspect import PROJECTIONS
from peftlib.models.saved import load_trained
from peftlib.models.shapes import SHAPES
from peftlib.train import memory_model
from peftlib.train.loop import TrainingRun

FIELDS = {"galore_engine": "galore_torch", "galore_learning_rate": 1e-2}


def run_of(study, method="galore"):
    return TrainingRun(study, method, log=lambda line: None)


@pytest.mark.parametrize("method", ["galore", "hybrid"])
@pytest.mark.parametrize("cut_after", [1, 4], ids=["inside a gap", "after a refresh"])
def test_a_resumed_run_is_bit_equal(make_study, monkeypatch, method, cut_after):
    fields = {**FIELDS, "max_steps": 6, "save_steps": 1}
    straight = run_of(make_study(study="whole", **fields), method).train()
    cut = run_of(make_study(study="cut", **fields), method)
    monkeypatch.setattr(cut, "_reason_to_stop", lambda *args: "asked to" if cut.progress.step == cut_after else None)
    assert cut.train()["status"] == "stopped"
    study = make_study(study="cut", **fields)
    resumed = run_of(study, method).train()
    assert (resumed["steps"], resumed["weights_sha256"]) == (6, straight["weights_sha256"])
    assert resumed["config"]["galore_engine"] == "galore_torch"
    assert load_trained(study.weights_dir(method, 0))(input_ids=torch.tensor([[2, 30]])).logits.isfinite().all()


def test_the_loss_falls_on_repeated_rows(make_study):
    losses = [e["loss"] for e in run_of(make_study(epochs=6, lr_scheduler="constant", **FIELDS)).train()["history"]]
    assert sum(losses[-6:]) < 0.97 * sum(losses[:6])


@pytest.mark.parametrize(
    "field, value",
    [("moment_bits", 8), ("galore_weights", "bf16"), ("galore_on_refresh", "project"), ("shard_optimizer", True)],
)
def test_what_it_has_nothing_for_is_refused_by_field(make_study, field, value):
    study = make_study(**FIELDS, **{field: value})
    with pytest.raises(
        ConfigError, match=rf"{field}={value!r} does not work with galore_engine='galore_torch': set {field} to"
    ):
        run_of(study).train()


def test_several_processes_too_large_ranks_and_foreign_states_are_refused(make_study):
    run = run_of(make_study(**FIELDS))
    optimizer = run.method.build_optimizer(run.model, run.cfg)
    with pytest.raises(ConfigError, match="trains on one process: start it without torchrun"):
        optimizer.use_flat_buffer(4)
    with pytest.raises(ConfigError, match=r"galore_rank=999 is larger than a layer: use 1\.\.32"):
        run.method.build_optimizer(run.model, run.cfg.replace(galore_rank=999))
    sum(p.sum() for group in optimizer.param_groups for p in group["params"]).backward()
    optimizer.finish_accumulation()
    optimizer.step()
    optimizer.require_state(optimizer.state_dict())
    for name, kept in (("step", ()), ("basis", (8, 64)), ("exp_avg", (64, 8))):
        state = optimizer.state_dict()
        assert state["state"][0][name].shape == kept  # q_proj, square: projected from the right
        state["state"][0][name] = torch.zeros(2, 2)
        with pytest.raises(CheckpointError, match=f"the optimizer's {name} of weight 0"):
            optimizer.require_state(state)


def test_the_memory_model_counts_whole_gradients():
    shape, how = SHAPES["gemma-3-1b"], {"precision": "fp16", "micro_batch": 1, "checkpointing": "on"}
    ours, theirs = (
        memory_model.estimate(shape, "galore", config.resolve("t4", galore_engine=engine), **how)
        for engine in ("peftlib", "galore_torch")
    )
    assert (theirs.optimizer, theirs.weights) == (ours.optimizer, ours.weights)
    trained = sum(rows * columns for rows, columns in shape.all_matrices(PROJECTIONS))
    assert theirs.gradients == 4 * trained > ours.gradients and theirs.total > ours.total
