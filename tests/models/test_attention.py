import pytest
import tiny
import torch
from test_layers import loss_and_gradients, prepared, rows  # noqa: F401

from peftlib.models.kernels import attention


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


def test_a_kernel_that_is_right_is_taken(monkeypatch, on_the_cpu):
    monkeypatch.setattr(attention, "KERNELS", {"broken": lambda *args: 1 / 0, "rows": attention.attention_by_rows})
    found = attention.choose_kernel(tiny.model(), device="cuda", precision="fp32")
    assert found == ("rows", "broken: division by zero")


def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch, on_the_cpu):
    def without_window(query, key, value, cu_seqlens, longest, window, scale):
        return attention.attention_by_rows(query, key, value, cu_seqlens, longest, None, scale)

    monkeypatch.setattr(attention, "KERNELS", {"wrong": without_window})
    name, reason = attention.choose_kernel(tiny.model(), device="cuda", precision="fp32")
    assert name is None and reason.startswith("wrong: differs from plain attention by 0.")


def test_without_a_gpu_rows_have_masks():
    assert attention.choose_kernel(tiny.model(), device="cpu", precision="fp32") == (None, "no GPU")


def test_the_operators_shapes_are_those_they_promise():
    """What torch.compile is told of the memory-efficient operator, whose kernel needs a GPU."""
    query, key = (torch.empty(70, heads, 16, device="meta") for heads in (4, 4))
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    out, lse = torch.ops.peftlib.efficient_attention(query, key, key, cu_seqlens, 40, 8, 0.25)
    assert out.shape == (70, 4, 16) and lse.dtype == torch.float32
