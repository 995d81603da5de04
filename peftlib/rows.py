"""Tokenized rows as batches, and the mean loss over them."""

import numpy as np
import torch

from peftlib.losses import IGNORE, chunked_loss_sum
from peftlib.models import head_weight, hidden_states
from peftlib.precision import autocast
from peftlib.steps import micro_batches


class Rows:
    """Tokenized rows. lengths: (N,) tokens; scored: (N,) tokens that count in the loss."""

    def __init__(self, rows):
        self.ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        self.is_scored = [np.asarray(row["is_scored"], dtype=bool) for row in rows]
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.scored = np.array([mask.sum() for mask in self.is_scored])

    def __len__(self):
        return len(self.ids)

    def batch(self, numbers, device):
        """(input_ids, labels), each (B, T) int64, right-padded to the longest of the rows."""
        width = max(self.lengths[n] for n in numbers)
        ids = np.zeros((len(numbers), width), dtype=np.int64)
        labels = np.full((len(numbers), width), IGNORE, dtype=np.int64)
        for i, n in enumerate(numbers):
            ids[i, : self.lengths[n]] = self.ids[n]
            labels[i, : self.lengths[n]] = np.where(self.is_scored[n], self.ids[n], IGNORE)
        return torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)


def mean_loss(model, rows, *, device, precision, batch=8):
    """Nats per scored token over all rows, a float; rows are taken longest first in batches of `batch`.

    Small batches of like lengths pad little, and a forward pass of a few rows fills the processor.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), autocast(device, precision):
        for numbers in micro_batches(range(len(rows)), rows.lengths, batch):
            ids, labels = rows.batch(numbers, device)
            total += chunked_loss_sum(hidden_states(model, ids), head_weight(model), labels).double().cpu()
    model.train(was_training)
    return float(total / rows.scored.sum())
