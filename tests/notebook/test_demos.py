"""What the notebooks show of the methods is true of the libraries' own code, and of wrong numbers it is not."""

import numpy as np
import pytest
import tiny
import torch

from peftlib.core import config
from peftlib.core.errors import ModelError
from peftlib.data.store import load_split
from peftlib.evaluation import stats
from peftlib.methods import find
from peftlib.models.inspect import PROJECTIONS, named_weights
from peftlib.models.load import load_base
from peftlib.models.shapes import SHAPES
from peftlib.notebook import demos
from peftlib.train import memory_model as plan
from peftlib.train.loop import TrainingRun


@pytest.fixture(scope="module")
def found():
    return demos.in_four_bits(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))


def test_levels_by_quantiles_are_bitsandbytes_levels():
    from bitsandbytes import functional

    torch.testing.assert_close(demos.nf4_levels(), functional.get_4bit_type("nf4", device="cpu"), atol=1e-6, rtol=0)


def test_four_bits_by_hand_are_bitsandbytes_own(found):
    torch.testing.assert_close(found.by_hand, found.by_library, atol=1e-6, rtol=0)
    assert len(found.by_library.unique()) > 16, "each block has a scale of its own"
    assert found.scaled.abs().max() == 1


def test_on_normal_weights_nf4_loses_less_than_even_levels(found):
    even = found.nearest(torch.linspace(-1, 1, 16))
    assert 0.05 < found.error(found.by_library) < found.error(even) < 0.15
    assert found.error(found.weight) == 0
    torch.testing.assert_close(found.nearest(found.levels), found.by_hand)


def test_bits_are_those_of_what_bitsandbytes_holds():
    from bitsandbytes import functional

    weight = torch.randn(512, 512)
    for is_doubled in (False, True):
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=is_doubled)
        held = packed.numel() + state.absmax.numel() * state.absmax.element_size()
        held += state.state2.absmax.numel() * 4 if is_doubled else 0
        assert demos.bits_per_weight(is_doubled=is_doubled) == pytest.approx(8 * held / weight.numel())


def test_kept_energy_is_the_share_of_the_largest_singular_values(make_study):
    study = make_study(galore_rank=4)
    run = TrainingRun(study, "galore", log=str)
    assert len(demos.captured_energy(run, [0], rows=99)) == len(PROJECTIONS)  # more than the study has
    rows = demos.captured_energy(run, [0], rows=2)
    assert [row["projection"] for row in rows] == list(PROJECTIONS) and {row["layer"] for row in rows} == {0}
    for row in load_split(study.data_dir, "train")[:2]:
        ids = torch.tensor([row["input_ids"]])
        logits = run.model(input_ids=ids).logits[0, :-1]
        targets = ids[0, 1:].where(torch.tensor(row["is_scored"][1:], dtype=torch.bool), -100)
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    weights = named_weights(run.model, PROJECTIONS)
    for row in rows:
        [grad] = [w.grad for name, w in weights.items() if "layers.0." in name and f"{row['projection']}." in name]
        energy = torch.linalg.svdvals(grad.double()) ** 2
        assert row["kept"] == pytest.approx(float(energy[:4].sum() / energy.sum()), abs=1e-3)
        assert row["shape"] == tuple(grad.shape) and row["by_chance"] == 4 / min(grad.shape) < row["kept"]


def test_a_zero_block_stays_zero():
    weight = torch.zeros(2, 64)
    weight[1] = torch.linspace(-1, 1, 64)
    found = demos.in_four_bits(weight)
    assert found.by_hand[0].abs().max() == 0 and torch.isfinite(found.scaled).all()


def test_one_matrix_comes_as_the_models_files_hold_it(tiny_model, tmp_path):
    name, weight = demos.one_weight(str(tiny_model))
    assert name == "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weight, tiny.model().state_dict()[name].float())
    with pytest.raises(ModelError, match="no tensor that ends in nothing"):
        demos.one_weight(str(tiny_model), "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        demos.one_weight(str(tmp_path / "empty"))


@pytest.mark.parametrize("method, fields", [("qlora", {}), ("lora", {}), ("lora", {"lora_use_dora": True})])
def test_a_merged_layer_gives_what_the_adapter_gives_beside_it(tiny_model, method, fields):
    cfg = config.resolve("demo", model=str(tiny_model), lora_rank=4, **fields)
    base = load_base(str(tiny_model), precision="fp32", device="cpu", four_bit=find(method).four_bit)
    name, layer = demos.first_adapted(find(method).prepare(base, cfg))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        beside, without = layer(x), layer.base_layer(x)
        torch.testing.assert_close(beside, x @ demos.merged(layer).T, atol=1e-4, rtol=1e-3)
    assert (beside - without).abs().max() > 0.1, "the adapter does something"
    assert name.endswith("layers.0.self_attn.q_proj")


def test_a_model_without_adapters_has_none_to_merge():
    with pytest.raises(ModelError, match="no layer has a LoRA adapter"):
        demos.first_adapted(tiny.model())


def test_galores_change_has_the_rank_of_its_bases_together():
    seen = demos.moved_directions(shape=(20, 30), rank=3, gap=4, steps=12)
    assert seen == [(step, 3 * -(-step // 4)) for step in range(1, 13)]
    assert demos.direction_chart(seen, rank=3, gap=4).alt.endswith("3 after step 4, 6 after step 8, 9 after step 12.")


def test_memory_parts_are_the_planners_and_stand_in_the_charts_words():
    cfg, shape = config.resolve("t4"), SHAPES["gemma-3-1b"]
    parts = demos.memory_parts(shape, cfg, ("qlora", "galore", "hybrid"))
    assert parts["galore"] == plan.estimate(shape, "galore", cfg, precision="bf16", micro_batch=4, checkpointing="on")
    assert parts["qlora"].weights < parts["hybrid"].weights < parts["galore"].weights
    alt = demos.memory_chart(parts).alt
    assert all(f"{name}: weights {found.weights / plan.GIB:.2f}" in alt for name, found in parts.items())


def test_resampled_means_give_about_the_interval_of_stats():
    values = np.random.default_rng(1).uniform(size=200)
    means = demos.resampled_means(values)
    interval = stats.mean_interval(values)
    assert len(means) == 2000 and means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert np.quantile(means, [0.025, 0.975]) == pytest.approx([interval.low, interval.high], abs=0.01)
    assert np.array_equal(means, demos.resampled_means(values))
    assert "2,000 resampled means of ROUGE-L" in demos.resampling_chart(means, (interval.low, interval.high)).alt


def test_every_chart_can_be_drawn_and_says_what_it_shows(found, tmp_path):
    seen = demos.moved_directions(steps=10)
    parts = demos.memory_parts(SHAPES["gemma-3-270m"], config.resolve("demo"), ("qlora", "hybrid"))
    charts = {
        "levels": demos.level_chart(found, "a matrix"),
        "directions": demos.direction_chart(seen, rank=4, gap=5),
        "memory": demos.memory_chart(parts),
        "means": demos.resampling_chart(demos.resampled_means([0.1, 0.5, 0.9]), (0.1, 0.9)),
    }
    for name, chart in charts.items():
        chart.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000 and len(chart.alt) > 60
    assert "between -0.5 and 0.5" in charts["levels"].alt
