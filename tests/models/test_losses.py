import weakref

import pytest
import torch
import torch.nn.functional as F

from peftlib.models.kernels import losses
from peftlib.models.kernels.losses import IGNORE, chunked_loss_sum, next_tokens


def case(dtype, scored_share=0.5):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 17, 16, generator=g).to(dtype).requires_grad_()
    head = (torch.randn(101, 16, generator=g) / 4).to(dtype).requires_grad_()
    labels = torch.randint(0, 101, (3, 17), generator=g)
    labels[torch.rand(3, 17, generator=g) > scored_share] = IGNORE
    return hidden, head, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("is_head_trained", [True, False])
def test_chunked_loss_and_gradients_equal_plain_logits(dtype, chunk, is_head_trained):
    hidden, head, labels = case(dtype)
    head.requires_grad_(is_head_trained)
    leaves = [hidden, head] if is_head_trained else [hidden]
    logits = F.linear(hidden, head).float()
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    wanted = torch.autograd.grad(plain, leaves)
    ours = chunked_loss_sum(hidden, head, *next_tokens(labels), chunk=chunk)
    got = torch.autograd.grad(ours, leaves)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    # a bf16 head gradient is summed over chunks in bf16, so it may differ by roundings
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, wanted, strict=True):
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize("is_head_trained", [True, False])
def test_unscored_positions_get_no_gradient(is_head_trained):
    hidden, head, labels = case(torch.float32)
    head.requires_grad_(is_head_trained)
    chunked_loss_sum(hidden, head, *next_tokens(labels)).backward()
    unscored = labels[:, 1:] == IGNORE
    assert hidden.grad[:, :-1][unscored].abs().max() == 0
    assert hidden.grad[:, -1].abs().max() == 0


@pytest.mark.parametrize("is_head_trained", [True, False])
def test_a_batch_with_nothing_scored_is_zero_and_can_be_differentiated(is_head_trained):
    hidden, head, labels = case(torch.float32)
    head.requires_grad_(is_head_trained)
    loss = chunked_loss_sum(hidden, head, *next_tokens(torch.full_like(labels, IGNORE)))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().max() == 0


def test_an_fp16_head_keeps_the_gradient_of_improbable_words():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, 16, generator=g).requires_grad_()
    head = torch.randn(60000, 16, generator=g) / 8
    labels = torch.tensor([[IGNORE, 5, 7]])
    exact = torch.autograd.grad(chunked_loss_sum(hidden, head, *next_tokens(labels)), hidden)[0]
    half = torch.autograd.grad(chunked_loss_sum(hidden, head.half(), *next_tokens(labels)), hidden)[0]
    assert (half - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_one_chunk_of_logits_is_in_memory_at_once(monkeypatch, is_compiled):
    hidden, head, labels = case(torch.float32, scored_share=1.0)
    made = []

    def chunk_loss(*args):
        assert all(slope() is None for slope in made), "an earlier chunk's gradient is still in memory"
        loss, slope = losses._chunk_loss_to_fuse(*args)
        made.append(weakref.ref(slope))
        return loss, slope

    monkeypatch.setattr(losses, "_chunk_loss", chunk_loss)
    monkeypatch.setattr(losses, "_compiled_chunk_loss", lambda: chunk_loss)
    chunked_loss_sum(hidden, head.detach(), *next_tokens(labels), chunk=8, is_compiled=is_compiled)
    assert len(made) == 6
