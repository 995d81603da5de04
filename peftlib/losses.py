"""Cross-entropy over a 262,144-word head without ever holding all logits (1 MiB of float32 a token)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a position that is not scored, torch's own default
_FP16_LIFT = 1024.0  # exact power of two that keeps small probabilities above fp16's smallest number


def chunked_loss_sum(hidden: Tensor, head: Tensor, labels: Tensor, *, chunk=256) -> Tensor:
    """Sum over the scored positions of the cross-entropy, in nats, float32, 0-dim.

    hidden: (B, T, D), any float dtype; head: (V, D), the output embedding, in whose dtype the products run; labels:
    (B, T), unshifted: position t is scored by the hidden state of t - 1, and IGNORE is not scored. Divide by the
    step's number of scored tokens.

    Only scored positions reach the head, `chunk` of them at a time. For a frozen head the gradient is made in the
    forward pass, as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), so the logits are made once; a trained head
    makes them again in the backward pass. Not torch's linear_cross_entropy, whose bf16 loss was seen wrong on CPUs.
    """
    targets = labels[:, 1:]
    scored = targets != IGNORE
    rows, targets = hidden[:, :-1][scored], targets[scored]  # (N, D), (N,)
    if torch.is_grad_enabled() and head.requires_grad:
        total = 0.0 * rows.float().sum()  # keeps the graph where nothing is scored
        for part, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(_logits_loss, part, head, wanted, use_reentrant=False)
        return total
    return _FrozenHeadLoss.apply(rows, head, targets, chunk)


def _logits_loss(rows, head, targets):
    return F.cross_entropy(F.linear(rows.to(head.dtype), head).float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of losses whose gradient with respect to the rows is kept from the forward pass, (N, D) float32."""

    @staticmethod
    def forward(ctx, rows, head, targets, chunk):
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty(rows.shape, dtype=torch.float32, device=rows.device) if wants_grad else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        lift = _FP16_LIFT if head.dtype == torch.float16 else 1.0
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            wanted = targets[part, None]
            log_p = F.log_softmax(F.linear(rows[part].to(head.dtype), head), dim=-1, dtype=torch.float32)
            total -= log_p.gather(1, wanted).sum()
            if wants_grad:
                slope = log_p.exp_().scatter_add_(1, wanted, log_p.new_full(wanted.shape, -1.0))
                grad[part] = ((slope.mul_(lift).to(head.dtype) @ head).float()).div_(lift)
        ctx.save_for_backward(grad)
        ctx.dtype = rows.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(ctx.dtype), None, None, None
