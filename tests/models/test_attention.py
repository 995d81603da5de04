from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from test_adapters import KINDS, adapted
from test_layers import loss_and_gradients, prepared, rows  # noqa: F401

from peftlib.models.compile import compile_layers
from peftlib.models.inspect import PROJECTIONS, core
from peftlib.models.kernels import attention
from peftlib.models.load import load_base


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The kernel is tried where there is no GPU."""
    tried = attention._fault
    monkeypatch.setattr(attention, "_fault", lambda name, config, dtype: tried(name, config, dtype, device="cpu"))


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_flat_rows_have_the_loss_and_gradients_of_rows_alone(prepared, method, monkeypatch):  # noqa: F811
    monkeypatch.setitem(attention.KERNELS, "rows", attention.attention_by_rows)
    model, _ = prepared(method)
    data = rows([50, 9, 33, 21, 40])  # longer and shorter than the sliding window of 32
    alone = [data.batch([[n]], "cpu") for n in range(5)]
    two, theirs = loss_and_gradients(model, alone)
    attention.use_kernel(model, "rows", longest=50)
    data.is_flat = True
    flat = list(data.batches(range(5), 100, "cpu"))
    assert [batch.ids.shape for batch in flat] == [(1, 128), (1, 128)]  # padded, the padding a row of its own
    one, ours = loss_and_gradients(model, flat)
    assert abs(one - two) < 1e-4 * two
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3, msg=name)
    # Calls without cumulative lengths, as of evaluation, attend as before.
    again, _ = loss_and_gradients(model, alone)
    assert again == two


def as_flash(query, key, value, *how):
    """FlashAttention's refusal, where there is no GPU."""
    if any(t.dtype not in (torch.float16, torch.bfloat16) for t in (query, key, value)):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return attention.attention_by_rows(query, key, value, *how)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """PEFT asks whether the GPU's autocast is on, by no argument; here it is the CPU's."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: asked(*(kind or ("cpu",))))
    monkeypatch.setitem(attention.KERNELS, "narrow", as_flash)


QUICK = [("LORA", True), ("DORA", True), ("DORA", False), ("OFT", True), ("IA3", True), ("ROAD", True)]
ADAPTERS = QUICK + [(kind, True) for kind in KINDS if KINDS[kind].takes_4_bit] + [(kind, False) for kind in KINDS]
ADAPTERS = [pytest.param(*a, marks=() if a in QUICK else pytest.mark.slow) for a in dict.fromkeys(ADAPTERS)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind, four_bit", ADAPTERS)
def test_every_adapter_attends_in_16_bits(tiny_model, as_on_a_gpu, kind, four_bit, precision):
    """Flat rows by a kernel that takes no other, with the loss of rows with masks; the residual stream stays bf16."""
    four = PROJECTIONS if four_bit else ()
    kind, changes = ("LORA", {"use_dora": True}) if kind == "DORA" else (kind, {})
    model = adapted(load_base(str(tiny_model), precision=precision, device="cpu", four_bit=four), kind, **changes)
    data, streams = rows([50, 9, 33]), []
    masked = list(data.batches(range(3), 100, "cpu"))
    assert any(batch.documents is not None for batch in masked)
    wanted, _ = loss_and_gradients(model.train(), masked, precision)
    attention.use_kernel(model, "narrow", longest=50)
    core(model).model.layers[-1].register_forward_hook(lambda layer, args, output: streams.append(output.dtype))
    data.is_flat = True
    found, gradients = loss_and_gradients(model, list(data.batches(range(3), 100, "cpu")), precision)
    assert abs(found - wanted) < 1e-3 * wanted and all(grad.isfinite().all() for grad in gradients.values())
    assert set(streams) == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_a_kernel_that_is_right_is_taken(monkeypatch, on_the_cpu):
    monkeypatch.setattr(attention, "KERNELS", {"broken": lambda *args: 1 / 0, "rows": attention.attention_by_rows})
    found = attention.choose_kernel(tiny.model(), device="cuda", precision="fp32")
    assert found == ("rows", "broken: division by zero")


def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch, on_the_cpu):
    def without_window(query, key, value, cu_seqlens, longest, window, scale):
        return attention.attention_by_rows(query, key, value, cu_seqlens, longest, torch.tensor(0), scale)

    monkeypatch.setattr(attention, "KERNELS", {"wrong": without_window})
    name, reason = attention.choose_kernel(tiny.model(), device="cuda", precision="fp32")
    assert name is None and reason.startswith("wrong: differs from plain attention by 0.")


def test_without_a_gpu_rows_have_masks():
    assert attention.choose_kernel(tiny.model(), device="cpu", precision="fp32") == (None, "no GPU")


@pytest.mark.parametrize("kernel, lse_shape", [("efficient", (3, 4, 64)), ("varlen", (4, 70))])
def test_the_operators_shapes_are_those_they_promise(kernel, lse_shape):
    """What torch.compile is told of the operator, whose kernels need a GPU."""
    query = torch.empty(70, 4, 16, device="meta")
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    out, lse = torch.ops.peftlib.packed_attention(query, query, query, cu_seqlens, torch.tensor(8), 40, 0.25, kernel)
    assert out.shape == (70, 4, 16) and lse.shape == lse_shape and lse.dtype == torch.float32


def on_rows(call, *given):
    """call(*given) where gradients can be taken: an operator's kernel runs below autograd, another thread does not."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *given).result()


@pytest.fixture
def on_the_cpus_rows():
    """The operator's kernels, by rows on the CPU."""

    def forward(query, key, value, cu_seqlens, window, longest, scale, kernel):
        out = attention.attention_by_rows(query, key, value, cu_seqlens, longest, window, scale)
        return out.contiguous(), query.new_zeros(query.shape[1], len(query), dtype=torch.float32)

    def backward(grad, query, key, value, out, lse, cu_seqlens, window, longest, scale, kernel):
        def gradients():
            given = [t.detach().requires_grad_() for t in (query, key, value)]
            out = attention.attention_by_rows(*given, cu_seqlens, longest, window, scale)
            return tuple(t.contiguous() for t in torch.autograd.grad(out, given, grad))

        return on_rows(gradients)

    attention.packed_attention.register_kernel("cpu", forward)
    attention.packed_attention_backward.register_kernel("cpu", backward)


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_layers_with_and_without_a_window_are_one_form_to_the_compiler(prepared, on_the_cpus_rows, method):  # noqa: F811
    model, _ = prepared(method)
    core(model).model.layers[1].self_attn.sliding_window = None  # as every sixth layer of the 270M and the 1B has it
    data = rows([50, 9, 33, 21, 40])
    data.is_flat = True
    flat = list(data.batches(range(5), 200, "cpu"))
    attention.use_kernel(model, "varlen", longest=50)
    wanted, theirs = loss_and_gradients(model, flat)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(model, backend="aot_eager")
    found, ours = loss_and_gradients(model, flat)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert abs(found - wanted) < 1e-5 * wanted
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=name)
