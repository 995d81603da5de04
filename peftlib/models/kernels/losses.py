"""Cross-entropy over a 262,144-token vocabulary without materializing all logits (1 MiB of float32 per token)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftlib.models.inspect import head_weight, hidden_states

IGNORE = -100  # label of positions that are not scored, torch's default
CHUNK = 256  # positions whose logits are in memory at once
_FP16_LIFT = 1024.0  # power of two that keeps small probabilities above fp16's smallest number


def chunked_loss_sum(
    hidden: Tensor, head: Tensor, positions: Tensor, targets: Tensor, *, chunk=CHUNK, is_compiled=False
) -> Tensor:
    """Sum of the cross-entropy over the scored positions, in nats, float32, 0-dim.

    hidden: (B, T, D), any float dtype; head: (V, D), the output embedding, whose dtype the products use; positions,
    targets: (N,) int64 from `next_tokens`. A target of IGNORE does not count. Divide by the step's number of scored
    tokens. is_compiled: let torch.compile fuse a chunk's softmax.

    Only scored positions go through the head, `chunk` at a time. For a frozen head the gradient is computed in the
    forward pass, as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), so logits are computed once; a trained head
    recomputes them in the backward pass. We do not use torch's linear_cross_entropy: its bf16 loss was wrong on CPUs.
    """
    rows = hidden.flatten(0, 1).index_select(0, positions)  # (N, D)
    if torch.is_grad_enabled() and head.requires_grad:
        total = 0.0 * rows.float().sum()  # keeps the graph connected if nothing is scored
        for part, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(_logits_loss, part, head, wanted, use_reentrant=False)
        return total
    return _FrozenHeadLoss.apply(rows, head, targets, chunk, is_compiled)


def batch_loss_sum(model, batch, **settings) -> Tensor:
    """chunked_loss_sum of a model over a batching.Batch. settings: its chunk and is_compiled."""
    hidden = hidden_states(model, batch)
    return chunked_loss_sum(hidden, head_weight(model), batch.positions, batch.targets, **settings)


def next_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, targets), (N,) int64 each, of (B, T) unshifted labels, without those that are IGNORE.

    The hidden state at positions[i] of the flattened (B, T) predicts targets[i], the next token's label.
    """
    is_scored = F.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)
    positions = is_scored.flatten().nonzero().squeeze(1)
    return positions, labels.flatten().index_select(0, positions + 1)


def _logits_loss(rows, head, targets):
    return F.cross_entropy(F.linear(rows.to(head.dtype), head).float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of losses; the gradient with respect to the rows, (N, D) float32, is saved in the forward pass."""

    @staticmethod
    def forward(ctx, rows, head, targets, chunk, is_compiled):
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty(rows.shape, dtype=torch.float32, device=rows.device) if wants_grad else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        chunk_loss = _compiled_chunk_loss() if is_compiled else _chunk_loss
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            loss, slope = chunk_loss(rows[part], head, targets[part, None], wants_grad)
            total += loss
            if wants_grad:
                grad[part] = _head_product(slope, head)
            del slope  # otherwise it is in memory while the next chunk's is made: 0.25 GiB at 512 positions
        ctx.save_for_backward(grad)
        ctx.dtype = rows.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(ctx.dtype), None, None, None, None


def _chunk_loss(rows, head, wanted, wants_grad):
    """(loss, its gradient with respect to the logits, lifted, in the head's dtype) of (c, D) rows, (c, 1) targets."""
    log_p = F.log_softmax(F.linear(rows.to(head.dtype), head), dim=-1, dtype=torch.float32)
    counts, wanted = (wanted != IGNORE).float(), wanted.clamp_min(0)
    loss = -(log_p.gather(1, wanted) * counts).sum()
    if not wants_grad:
        return loss, None
    slope = log_p.exp_().scatter_add_(1, wanted, log_p.new_full(wanted.shape, -1.0))
    return loss, slope.mul_(counts * _lift(head)).to(head.dtype)


def _chunk_loss_to_fuse(rows, head, wanted, wants_grad):
    """_chunk_loss in a form that compiles to two passes over the logits without a float32 copy of them."""
    logits = F.linear(rows.to(head.dtype), head).float()
    log_z = logits.logsumexp(-1, keepdim=True)
    counts = (wanted != IGNORE).float()
    loss = ((log_z - logits.gather(1, wanted.clamp_min(0))) * counts).sum()
    if not wants_grad:
        return loss, None
    is_wanted = torch.arange(head.shape[0], device=head.device) == wanted
    return loss, (((logits - log_z).exp() - is_wanted.float()) * (counts * _lift(head))).to(head.dtype)


@functools.cache
def _compiled_chunk_loss():
    return torch.compile(_chunk_loss_to_fuse, dynamic=True)


def _head_product(slope, head):
    return (slope @ head).float().div_(_lift(head))


def _lift(head):
    return _FP16_LIFT if head.dtype == torch.float16 else 1.0
