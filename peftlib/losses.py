"""Cross-entropy over a 262,144-word head without ever holding all logits (1 MiB of float32 a token)."""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a position that is not scored, torch's own default


def chunked_loss_sum(hidden: Tensor, head: Tensor, labels: Tensor, *, chunk=256) -> Tensor:
    """Sum over the scored positions of the cross-entropy, in nats, float32, 0-dim.

    hidden: (B, T, D), any float dtype; head: (V, D), the output embedding; labels: (B, T), unshifted: position t is
    scored by the hidden state of t - 1, and IGNORE is not scored. Divide by the step's number of scored tokens.

    Only scored positions reach the head, `chunk` of them at a time, and their logits are made again in the backward
    pass. Checkpointed chunks and not torch's linear_cross_entropy, whose bf16 loss was seen wrong on CPUs.
    """
    targets = labels[:, 1:]
    scored = targets != IGNORE
    rows, targets = hidden[:, :-1][scored], targets[scored]  # (N, D), (N,)
    total = 0.0 * rows.float().sum()  # keeps the graph where nothing is scored
    for part, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_logits_loss, part, head, wanted, use_reentrant=False)
    return total


def _logits_loss(rows, head, targets):
    return F.cross_entropy(F.linear(rows, head.to(rows.dtype)).float(), targets, reduction="sum")
