"""The hybrid with any split: what trains, what it takes, what is saved, resumed and said of it."""

import pytest
import torch
from card_code import logits, run_code_of

from peftlib import methods
from peftlib.core import config
from peftlib.core.errors import ConfigError
from peftlib.evaluation.evaluate import evaluate
from peftlib.export.export import export_model
from peftlib.methods import hybrid
from peftlib.models.inspect import ATTENTION, MLP, PROJECTIONS, count_parameters, is_four_bit, is_named, trainable
from peftlib.models.kernels.projections import View
from peftlib.models.saved import ATTENTION_FILE, load_trained
from peftlib.models.shapes import SHAPES, shape_of
from peftlib.report.build import build_report
from peftlib.runner.suite_plan import plan_lines
from peftlib.train import memory_model
from peftlib.train.loop import TrainingRun

SHAPE = SHAPES["gemma-3-1b"]
BY_GALORE = {  # {choice: what GaLore trains of a model of two layers, by layer}
    "attention": (ATTENTION, ATTENTION),
    "mlp": (MLP, MLP),
    "o_proj": (("o_proj",), ("o_proj",)),
    "v_proj, q_proj,mlp": (("q_proj", "v_proj", *MLP),) * 2,
    "last_1_layers": ((), PROJECTIONS),
}


def run_of(study, lines=None):
    return TrainingRun(study, "hybrid", log=(lines if lines is not None else []).append)


@pytest.mark.parametrize("choice", BY_GALORE)
def test_each_projection_is_held_and_trained_as_the_choice_says(make_study, choice):
    study, lines = make_study(hybrid_galore=choice, max_steps=4, galore_rank=4), []
    run = run_of(study, lines)
    parameters = dict(run.model.named_parameters())
    for layer, whole in enumerate(BY_GALORE[choice]):
        for leaf in PROJECTIONS:
            of = {name: p for name, p in parameters.items() if f"layers.{layer}." in name and f".{leaf}." in name}
            if leaf in whole:
                [weight] = of.values()
                assert weight.requires_grad and weight.dtype == torch.float32
            else:
                assert {name.split(leaf)[1]: p.requires_grad for name, p in of.items()} == {
                    ".base_layer.weight": False,
                    ".lora_A.default.weight": True,
                    ".lora_B.default.weight": True,
                }
                assert is_four_bit(next(p for name, p in of.items() if "base_layer" in name))
    assert (
        memory_model.trained_numbers(shape_of(study.cfg.model), "hybrid", study.cfg) == count_parameters(run.model)[0]
    )
    before = {name: p.detach().clone() for name, p in parameters.items()}
    record = run.train()
    assert record["status"] == "ok" and record["config"]["hybrid_galore"] == choice
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable(run.model))
    assert any(isinstance(getattr(module, "view", None), View) for module in run.model.modules())
    assert any(f"hybrid (hybrid_galore={choice})" in line for line in lines) == (choice != "attention")


@pytest.mark.parametrize("choice", ["mlp", "q_proj", "last_1_layers"])
def test_what_was_trained_is_saved_and_loaded_by_us_and_by_the_cards_stock_code(finished, tiny_model, tmp_path, choice):
    study = finished("hybrid", hybrid_galore=choice, galore_rank=4)
    folder = study.weights_dir("hybrid", 0)
    assert (folder / ATTENTION_FILE).exists()
    ours = run_of(study)
    ours.train()  # finished: loads its weights as they were trained
    merged = load_trained(folder)
    torch.testing.assert_close(logits(merged), logits(ours.model), atol=1e-5, rtol=0)
    made = export_model(study, "hybrid", to=tmp_path / "out", form="adapter")
    names, _ = run_code_of(tmp_path / "out", made.card, base=tiny_model)
    torch.testing.assert_close(logits(names["model"]), logits(merged), atol=1e-4, rtol=0)
    assert f"hybrid_galore={choice}" in made.card and "four attention projections" not in made.card


@pytest.mark.parametrize("choice", ["mlp", "last_1_layers"])
def test_a_resumed_run_is_bit_equal(make_study, choice):
    fields = {"hybrid_galore": choice, "max_steps": 6, "galore_rank": 4}
    straight = run_of(make_study(study="whole", **fields)).train()
    run_of(make_study(study="cut", max_seconds=1e-6, **fields)).train()
    resumed = run_of(make_study(study="cut", **fields)).train()
    assert (resumed["steps"], resumed["weights_sha256"]) == (6, straight["weights_sha256"])


@pytest.mark.parametrize(
    "choice, words",
    [
        ("o_prj", r"'o_prj' is not a projection: did you mean o_proj"),
        ("mlp,nothing", r"'nothing' is not a projection: known: attention, mlp, q_proj"),
        ("last_2_layer", r"did you mean last_4_layers"),
        ("last_0_layers", r"is not a projection"),
        ("", r"names no projection: that is the method qlora"),
        ("attention,mlp", r"none is left in 4 bits: use the method galore"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_with_the_way_out(choice, words):
    with pytest.raises(ConfigError, match=rf"hybrid_galore='{choice}'.*{words}"):
        config.resolve("demo", hybrid_galore=choice)


def test_more_layers_than_the_model_has_are_refused_and_planned_as_such(make_study):
    study = make_study(hybrid_galore="last_2_layers")
    with pytest.raises(
        ConfigError, match=r"leaves none of the model's 2 layers in 4 bits: use last_1_layers to last_1_"
    ):
        run_of(study)
    [line] = [line for line in plan_lines("t4", {"hybrid_galore": "last_26_layers"}) if line.startswith("hybrid")]
    assert line.split()[:3] == ["hybrid", "(hybrid_galore=last_26_layers)", "no"] and "26 layers" in line


def test_the_choice_is_planned_and_named_where_it_is_another(finished, no_charts):
    def total(choice):
        cfg = config.resolve("t4", hybrid_galore=choice)
        return memory_model.estimate(SHAPE, "hybrid", cfg, precision="fp16", micro_batch=4, checkpointing="on").total

    # The MLP holds 85 % of the weights: training it whole costs the most, half of the layers less.
    assert total("o_proj") < total("attention") < total("last_13_layers") < total("mlp")
    [line] = [line for line in plan_lines("h100", {"hybrid_galore": "mlp"}) if line.startswith("hybrid (")]
    assert line.startswith("hybrid (hybrid_galore=mlp)") and line.endswith("estimate"), "that split was not measured"
    study = finished("hybrid", hybrid_galore="mlp", galore_rank=4)
    evaluate(study, "hybrid", log=lambda line: None)
    assert list(build_report(study).table["technique"]) == ["hybrid (hybrid_galore=mlp)"]


def test_the_default_leaves_every_hash_and_description_as_it_was():
    cfg = config.resolve("demo")
    found = methods.find("hybrid").resolve(cfg, 18)
    assert (found.trains, found.four_bit) == (hybrid.SPEC.trains, hybrid.SPEC.four_bit)
    assert found.description == hybrid.SPEC.description and found.variant(vars(cfg)) == "" == found.variant({})
    assert cfg.run_hash("hybrid") == "1fee1c4d9510", "as before the setting came"
    assert cfg.replace(hybrid_galore="mlp").run_hash("hybrid") != cfg.run_hash("hybrid")


def test_a_layers_number_is_matched_whole():
    assert is_named("base_model.model.model.layers.1.mlp.up_proj", ("layers.1.mlp.up_proj",))
    assert not is_named("model.layers.11.mlp.up_proj", ("layers.1.mlp.up_proj",))
    assert is_named("model.layers.11.mlp.up_proj", MLP) and not is_named("model.layers.11.mlp.my_up_proj", MLP)


def test_the_reversed_hybrid_is_the_hybrid_with_its_setting(make_study):
    losses = []
    for name, method, choice in (("set", "hybrid", "mlp"), ("own", "hybrid_mlp", "attention")):
        study = make_study(study=name, hybrid_galore=choice, max_steps=4, galore_rank=4)
        record = TrainingRun(study, method, log=lambda line: None).train()
        losses.append([entry["loss"] for entry in record["history"]])
    assert losses[0] == losses[1]
