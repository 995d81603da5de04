import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_train import FAST, assert_equal_weights, kept_weights, trained

from peftlib.core.errors import CheckpointError, ModelError
from peftlib.models import base as models
from peftlib.storage import delta as compact
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.storage.saver import Saver
from peftlib.train.loop import TrainingRun

SLOW = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_bit_for_bit_from_fewer_bytes(dtype):
    torch.manual_seed(0)
    start = torch.randn(300, 200).bfloat16().to(dtype)
    trained_weight = (start.float() * (1 + 1e-3 * torch.randn(300, 200))).to(dtype)
    trained_weight[0, :5] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-42]).to(dtype)
    parts = compact.shrunk(trained_weight, start)
    again = compact.grown(parts, start)
    assert again.dtype == dtype and torch.equal(again.view(torch.uint8), trained_weight.view(torch.uint8))
    size = sum(part.numel() * part.element_size() for part in parts.values())
    assert size < 0.7 * trained_weight.numel() * trained_weight.element_size()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Runs save in the background, as differences."""
    monkeypatch.setattr("peftlib.train.loop.Saver", lambda *a, **k: Saver(*a, **{**k, "is_background": True}))


@pytest.mark.parametrize("method", ["galore", "hybrid", *(pytest.param(m, marks=SLOW) for m in ("full", "qlora"))])
def test_a_run_resumed_from_differences_is_bit_equal(make_study, as_on_a_gpu, method):
    whole = make_study(study="whole", **FAST)
    trained(whole, method)
    cut = make_study(study="cut", max_seconds=1e-9, **FAST)
    trained(cut, method)
    run = TrainingRun(cut, method, log=lambda line: None)
    found, _ = CheckpointDir(cut.checkpoint_dir(method, 0), keep=1).newest()
    matrices = [name for name, p in models.trainable(run.model).items() if p.ndim == 2 and "lora_" not in name]
    assert all(isinstance(found.weights[name], dict) for name in matrices)
    trained(make_study(study="cut", **FAST), method)
    assert_equal_weights(kept_weights(cut, method), kept_weights(whole, method))


def test_a_checkpoint_of_another_model_is_refused(make_study, as_on_a_gpu, tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    study = make_study(model=str(folder), max_seconds=1e-9)
    trained(study, "galore")
    tiny.model_folder(folder, seed=1)
    with pytest.raises(ModelError, match="another base model than the one of galore"):
        trained(study, "galore")


def test_a_weight_does_not_grow_from_another_models(tmp_path):
    first, second = (compact.BaseWeights(str(tiny.model_folder(tmp_path / str(seed), seed))) for seed in (0, 1))
    name = "model.layers.1.mlp.up_proj.weight"
    parts = first.shrunk(name, torch.ones(128, 64))
    assert torch.equal(first.grown(name, parts), torch.ones(128, 64))
    with pytest.raises(CheckpointError, match="take the same model and revision"):
        second.grown(name, parts)


def test_sharded_files_are_read_too(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    base = compact.BaseWeights(str(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(base.get(name, torch.float32), model.state_dict()[name])
    assert base.get("absent", torch.float32) is None
    tiny.model().save_pretrained(tmp_path / "one")
    one = compact.BaseWeights(str(tmp_path / "one"))
    assert torch.equal(one.get(name, torch.float32), load_file(tmp_path / "one" / "model.safetensors")[name])


def test_what_has_no_start_is_kept_as_it_is(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    base = compact.BaseWeights(str(tmp_path))
    for name, weight in (("model.layers.0.lora_A", torch.ones(2, 2)), ("model.norm.weight", torch.ones(64))):
        assert base.shrunk(name, weight) is weight
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="model.safetensors"):
        compact.BaseWeights(str(tmp_path / "empty"))
