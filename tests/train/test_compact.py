"""Checkpoints of the first edition, which hold weights as differences from the model's files, still resume."""

import zlib

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_train import FAST, assert_equal_weights, kept_weights, trained

from peftlib.core.errors import CheckpointError, ModelError
from peftlib.models.locate import BaseWeights
from peftlib.storage import delta
from peftlib.storage.checkpoint import CheckpointDir


def shrunk(weight, start):
    """The parts that the first edition wrote for a weight."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[weight.dtype]
    differs = weight.contiguous().view(whole) ^ start.contiguous().view(whole)
    crc = zlib.crc32(start.contiguous().view(torch.uint8).numpy())
    parts = {"start_crc": torch.tensor(crc), "shape": torch.tensor(weight.shape)}
    if weight.dtype == torch.float32:
        parts["low"] = differs.to(torch.int16)
        differs = (differs >> 16).to(torch.int16)
    parts["high"] = torch.frombuffer(bytearray(zlib.compress(differs.numpy().tobytes(), 1)), dtype=torch.uint8)
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    start = torch.randn(300, 200).bfloat16().to(dtype)
    trained_weight = (start.float() * (1 + 1e-3 * torch.randn(300, 200))).to(dtype)
    trained_weight[0, :5] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-42]).to(dtype)
    again = delta.restored("w", shrunk(trained_weight, start), start)
    assert again.dtype == dtype and torch.equal(again.view(torch.uint8), trained_weight.view(torch.uint8))


def test_a_weight_is_not_restored_from_another_models_nor_from_damage():
    start, weight = torch.ones(4, 3), torch.full((4, 3), 2.0)
    parts = shrunk(weight, start)
    for other in (torch.zeros(4, 3), torch.ones(3, 4), None):
        with pytest.raises(CheckpointError, match="take the same model and revision"):
            delta.restored("w", parts, other)
    for damage in ({"high": torch.zeros(5, dtype=torch.uint8)}, {"start_crc": torch.ones(2)}):
        with pytest.raises(CheckpointError, match="the checkpoint's difference of w is none"):
            delta.restored("w", {**parts, **damage}, start)
    del parts["shape"]
    with pytest.raises(CheckpointError, match="delete that checkpoint"):
        delta.restored("w", parts, start)


def as_differences(study, method):
    """Write a run's newest checkpoint anew as the first edition did on a GPU; returns how many weights differ."""
    checkpoints, base = CheckpointDir(study.checkpoint_dir(method, 0), keep=1), BaseWeights(study.cfg.model)
    found, _ = checkpoints.newest()
    starts = {name: base.get(name, weight.dtype) for name, weight in found.weights.items() if weight.ndim == 2}
    changed = {name: shrunk(found.weights[name], start) for name, start in starts.items() if start is not None}
    found.weights |= changed
    checkpoints.save(found.state["progress"]["step"], found)
    return len(changed)


def test_a_run_resumed_from_differences_is_bit_equal(make_study):
    whole = make_study(study="whole", **FAST)
    trained(whole, "galore")
    cut = make_study(study="cut", max_seconds=1e-9, **FAST)
    trained(cut, "galore")
    assert as_differences(cut, "galore") > 0
    trained(make_study(study="cut", **FAST), "galore")
    assert_equal_weights(kept_weights(cut, "galore"), kept_weights(whole, "galore"))


def test_a_checkpoint_of_another_model_is_refused(make_study, tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    study = make_study(model=str(folder), max_seconds=1e-9)
    trained(study, "galore")
    tiny.model_folder(folder, seed=1)
    with pytest.raises(ModelError, match="another base model than the one of galore"):
        trained(study, "galore")


def test_sharded_files_are_read_too(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    base = BaseWeights(str(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(base.get(name, torch.float32), model.state_dict()[name])
    assert base.get("absent", torch.float32) is None
    tiny.model().save_pretrained(tmp_path / "one")
    one = BaseWeights(str(tmp_path / "one"))
    assert torch.equal(one.get(name, torch.float32), load_file(tmp_path / "one" / "model.safetensors")[name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        BaseWeights(str(tmp_path / "empty"))
