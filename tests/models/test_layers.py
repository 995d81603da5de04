import pytest
import tiny
import torch

from peftlib import methods
from peftlib.core import config
from peftlib.core.errors import ModelError
from peftlib.models.inspect import PROJECTIONS, core, trainable
from peftlib.models.kernels.adapters import fuse_adapters
from peftlib.models.kernels.losses import batch_loss_sum
from peftlib.models.layers import checkpoint_layers, guard_products
from peftlib.models.load import guard_four_bit, load_base
from peftlib.models.precision import autocast
from peftlib.train.batching import Rows


@pytest.fixture
def prepared(tiny_model):
    def make(method, precision="fp32", **fields):
        cfg = config.resolve(
            "demo", model=str(tiny_model), lora_rank=4, galore_rank=8, lora_alpha=64, apollo_rank=8, **fields
        )
        found = methods.find(method)
        torch.manual_seed(0)
        base = load_base(str(tiny_model), precision=precision, device="cpu", four_bit=found.four_bit)
        model = found.prepare(base, cfg)
        for name, p in trainable(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)  # else the adapters would do nothing
        return model.train(), cfg

    return make


def rows(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randint(5, tiny.WORDS, (n,), generator=g).tolist() for n in lengths]
    return Rows([{"input_ids": ids, "is_scored": [i > len(ids) // 3 for i in range(len(ids))]} for ids in made])


def loss_and_gradients(model, batches, precision="fp32", scale=1.0):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        with autocast("cpu", precision):
            loss = batch_loss_sum(model, batch)
        (loss * scale).backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in trainable(model).items()}


@pytest.mark.parametrize("method", ["qlora", "hybrid"])
def test_fused_adapters_give_pefts_loss_and_gradients(prepared, method, monkeypatch):
    fused, _ = prepared(method)
    monkeypatch.setattr("peftlib.models.adapters.fuse_adapters", lambda model: 0)
    plain, _ = prepared(method)
    batches = [rows([40, 25]).batch([[0], [1]], "cpu")]
    (one, ours), (two, theirs) = loss_and_gradients(fused, batches), loss_and_gradients(plain, batches)
    assert abs(one - two) < 1e-4 * two
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3, msg=name)


def test_fusing_leaves_dora_to_peft_and_an_adapter_can_be_switched_off(prepared):
    dora, _ = prepared("qlora", lora_use_dora=True)
    assert fuse_adapters(dora) == 0
    model, _ = prepared("qlora")
    assert fuse_adapters(model) == 14
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(adapted, model(ids).logits)


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(prepared, method):
    model, _ = prepared(method)
    data = rows([50, 9, 33, 21, 40])  # longer and shorter than the sliding window of 32
    packed = list(data.batches(range(5), 160, "cpu"))
    assert any(len(bins.ids) < 5 for bins in packed) and packed[0].documents is not None
    alone = [data.batch([[n]], "cpu") for n in range(5)]
    (one, ours), (two, theirs) = loss_and_gradients(model, packed), loss_and_gradients(model, alone)
    assert abs(one - two) < 1e-4 * two
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("checkpointing", ["on", "offload"])
@pytest.mark.parametrize("method", ["hybrid", "galore"])
def test_recomputing_changes_nothing(prepared, method, checkpointing):
    model, cfg = prepared(method)
    batches = [rows([40, 25, 30]).batch([[0], [1, 2]], "cpu")]
    one, kept = loss_and_gradients(model, batches, "bf16")
    checkpoint_layers(model, cfg.replace(activation_checkpointing=checkpointing))
    two, recomputed = loss_and_gradients(model, batches, "bf16")
    assert one == two
    for name in kept:
        assert torch.equal(kept[name], recomputed[name]), name


def test_offloading_with_dropout_is_refused(prepared):
    model, cfg = prepared("qlora")
    with pytest.raises(
        Exception, match="activation_checkpointing='offload' with lora_dropout=0.1: use activation_checkpointing='on'"
    ):
        checkpoint_layers(model, cfg.replace(activation_checkpointing="offload", lora_dropout=0.1))


def overflowing():
    """A tiny model whose residual stream and MLP products pass fp16's 65,504."""
    model = tiny.model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.fill_(4e4)
            layer.post_attention_layernorm.weight.fill_(5e4)
            layer.pre_feedforward_layernorm.weight.fill_(2e3)
    return model


def test_weights_that_overflow_plain_fp16_train_in_ours(tmp_path):
    folder = tmp_path / "big"
    overflowing().save_pretrained(folder)
    ids = torch.randint(5, tiny.WORDS, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = rows([24, 24]).batch([[0], [1]], "cpu")
    plain = overflowing().half()
    with torch.no_grad():
        assert not torch.isfinite(plain(ids).logits).all()
    losses = {}
    for precision in ("fp32", "fp16"):
        model = load_base(str(folder), precision=precision, device="cpu")
        model = methods.find("galore").prepare(model, config.resolve("demo"))
        losses[precision], gradients = loss_and_gradients(model.train(), [batch], precision, scale=2**-16)
        assert all(torch.isfinite(grad).all() for grad in gradients.values())
    assert abs(losses["fp16"] - losses["fp32"]) < 0.02 * losses["fp32"]


def test_the_guard_changes_no_number_of_a_model_that_needs_none(tiny_model):
    plain = load_base(str(tiny_model), precision="fp32", device="cpu")
    guarded = load_base(str(tiny_model), precision="fp32", device="cpu")
    guard_products(guarded)
    ids = torch.arange(10, 40)[None]
    assert torch.equal(plain(ids).logits, guarded(ids).logits)


def test_an_untied_or_4_bit_head_is_refused(prepared):
    model, _ = prepared("qlora")
    head = core(model).get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with pytest.raises(ModelError, match="lm_head is a Linear that is not tied"):
        guard_four_bit(model, PROJECTIONS)


def test_pissa_needs_16_bit_weights_and_starts_at_the_models_loss(prepared):
    with pytest.raises(Exception, match="lora_init='pissa' needs the singular values of 16-bit weights"):
        prepared("qlora", lora_init="pissa")
    model, _ = prepared("lora", lora_use_rslora=True)
    assert next(m for m in model.modules() if hasattr(m, "lora_A")).scaling["default"] == 64 / 4**0.5


def test_a_row_that_fills_a_gpus_micro_batch_is_not_doubled_by_an_empty_one():
    data = rows([1000, 400, 100])
    assert list(data.cut([0], 1024, "cuda")) == [[[0]]]
    assert list(data.cut([1], 1024, "cuda")) == [[[1], []]]  # for two the plan has room: no other form to compile
    for numbers in ([0, 1, 2], [1, 2], [2]):
        for bins in data.cut(numbers, 1024, "cuda"):
            width = -(-max(sum(data.lengths[n] for n in held) for held in bins) // 64) * 64
            assert len(bins) * width <= 1024
    assert list(data.cut([2], 1024, "cpu")) == [[[2]]]
    batch = data.batch([[2], []], "cpu")
    assert batch.ids.shape == (2, 100) and int(batch.positions.max()) < 100
