"""Tokenized rows as batches, and the mean loss over them."""

from typing import NamedTuple

import numpy as np
import torch

from peftlib.models.inspect import head_weight, hidden_states
from peftlib.models.losses import IGNORE, chunked_loss_sum, scored_positions
from peftlib.models.precision import autocast
from peftlib.train.schedule import pack


class Batch(NamedTuple):
    """Rows on a device.

    ids, labels: (B, T) int64; positions: (N,) int64, what losses.scored_positions finds in the labels; places: (B, T)
    int64, each token's place in its row; documents: (B, T) int64, the number of each token's row; both None on CPUs
    where each sequence holds one row.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    def to(self, device):
        """The batch on a device, without waiting for it."""
        if device == "cpu":
            return self
        return Batch(*(t if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))


class Rows:
    """Tokenized rows. lengths: (N,) tokens; scored: (N,) tokens that count in the loss."""

    def __init__(self, rows):
        self.ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        self.is_scored = [np.asarray(row["is_scored"], dtype=bool) for row in rows]
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.scored = np.array([mask.sum() for mask in self.is_scored])

    def __len__(self):
        return len(self.ids)

    def batch(self, bins, device):
        """A Batch of bins (lists of row numbers), each a sequence, right-padded to the fullest."""
        is_gpu = device != "cpu"
        filled = max(sum(self.lengths[n] for n in rows) for rows in bins)
        shape = (len(bins), -(-int(filled) // multiple_on(device)) * multiple_on(device))
        ids, places = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        labels, documents = np.full(shape, IGNORE, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        for i, rows in enumerate(bins):
            start = 0
            for document, n in enumerate(rows):
                part = slice(start, start + self.lengths[n])
                ids[i, part] = self.ids[n]
                labels[i, part] = np.where(self.is_scored[n], self.ids[n], IGNORE)
                labels[i, start] = IGNORE  # nothing stands before a row's first token
                places[i, part] = np.arange(self.lengths[n])
                documents[i, part] = document
                start = part.stop
        labels = torch.from_numpy(labels)
        batch = Batch(torch.from_numpy(ids), labels, scored_positions(labels))
        if is_gpu or any(len(rows) > 1 for rows in bins):
            batch = batch._replace(places=torch.from_numpy(places), documents=torch.from_numpy(documents))
        return batch.to(device)

    def batches(self, numbers, tokens, device):
        """Batches of at most `tokens` padded tokens that hold the given rows, see steps.pack."""
        for bins in self.cut(numbers, tokens, device):
            yield self.batch(bins, device)

    def cut(self, numbers, tokens, device):
        """[[bin, ...], ...]: the bins of each of `batches`.

        On a GPU they are two where `tokens` allows it, if need be an empty one, for torch.compile compiles once more for a
        batch of one. A row that takes more than half of `tokens` stays alone: a second one would take memory unplanned.
        """
        least, multiple = (1 if device == "cpu" else 2), multiple_on(device)
        for bins in pack(numbers, self.lengths, tokens, multiple=multiple, least=least):
            width = -(-max(sum(int(self.lengths[n]) for n in rows) for rows in bins) // multiple) * multiple
            yield [*bins, []] if len(bins) < least and least * width <= tokens else bins


def multiple_on(device):
    """Widths on a GPU are multiples of 64: matrix units like round numbers, attention masks need them."""
    return 1 if device == "cpu" else 64


def mean_loss(model, rows, *, device, precision, tokens=2048):
    """Nats per scored token over all rows, a float; rows are packed into batches of at most `tokens` tokens."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), autocast(device, precision):
        for batch in rows.batches(range(len(rows)), tokens, device):
            hidden = hidden_states(model, batch)
            loss = chunked_loss_sum(hidden, head_weight(model), batch.labels, positions=batch.positions)
            total += loss.double().cpu()
    model.train(was_training)
    return float(total / rows.scored.sum())
