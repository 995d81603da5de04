"""What notebooks check on their own run: the hybrid's split and its costs, GaLore's two engines."""

import pytest
import torch

from peftlib.models.inspect import MLP, named_weights
from peftlib.models.shapes import shape_of
from peftlib.notebook import checks, demos
from peftlib.optim.galore import GaLoreAdamW
from peftlib.train import memory_model
from peftlib.train.loop import TrainingRun


def run_of(study, method):
    return TrainingRun(study, method, log=lambda line: None)


@pytest.mark.parametrize("choice, of_mlp", [("attention", 0), ("mlp", 2), ("last_1_layers", 1)])
def test_the_placement_is_counted_on_the_model(make_study, choice, of_mlp):
    run = run_of(make_study(hybrid_galore=choice, galore_engine="galore_torch"), "hybrid")
    rows = checks.placement(run)
    assert all(row["by GaLore"] == row["chosen"] == 2 - row["4-bit with LoRA"] for row in rows)
    assert {row["chosen"] for row in rows if row["projection"] in MLP} == {of_mlp}
    next(iter(named_weights(run.model, run.method.trains["galore_torch"]).values())).requires_grad_(False)
    assert any(row["by GaLore"] != row["chosen"] for row in checks.placement(run))


def test_choices_are_the_planners_with_the_studys_own_first(make_study):
    study = make_study(hybrid_galore="v_proj")
    shape = shape_of(study.cfg.model)
    found = checks.hybrid_choices(shape, study.cfg)
    names = [label.split(":")[0] for label in found]
    assert names == ["v_proj", "attention", "o_proj", "last_1_layers", "mlp"]
    cfg = study.cfg.replace(hybrid_galore="mlp")
    how = {"precision": "bf16", "micro_batch": 2, "checkpointing": "on"}
    assert list(found.values())[-1] == memory_model.estimate(shape, "hybrid", cfg, **how)
    assert (
        f"mlp: {memory_model.trained_numbers(shape, 'hybrid', cfg) / 1e6:.1f} M train" in demos.memory_chart(found).alt
    )


def test_the_engines_agree_and_a_wrong_one_would_not(make_study, monkeypatch):
    run = run_of(make_study(), "galore")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    assert checks.engines_apart(run) < 1e-5
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in run.model.named_parameters())
    monkeypatch.setattr(GaLoreAdamW, "rates_of", lambda self, group, count: torch.tensor([1.0, -1e-3, 1.0]))
    assert checks.engines_apart(run) > 1e-2
