"""Micro-batches: tokenized rows packed into sequences with little padding, and the mean loss over rows."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from peftlib.models.kernels.losses import IGNORE, batch_loss_sum, next_tokens
from peftlib.models.precision import autocast
from peftlib.train.parallel.alone import OneProcess
from peftlib.train.parallel.exchange import divide

_ALONE = OneProcess()
_ROWS_AT_ONCE = 64  # packed together; more would gain little, and first fit is quadratic
_ROWS_MULTIPLE = 16  # the number of rows in a flat batch is padded to a multiple of this
_ATTENTION_SHARE = 2.5e-4  # cost of attending to one more token, as a fraction of a token's other work


class Batch(NamedTuple):
    """Rows on a device.

    ids: (B, T) int64. positions, targets: (N,) int64 from losses.next_tokens; targets of IGNORE are padding.
    places: (B, T) int64 position ids within each row. Rows packed with masks have documents: (B, T) int64 segment ids.
    A flat batch has B = 1 and cu_seqlens: (R + 1,) int32, the row boundaries; its padding is a separate row. All three
    are None on CPUs if each sequence holds one row.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def to(self, device):
        """Copy to a device asynchronously."""
        if device == "cpu":
            return self
        return Batch(*(t if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))


class Rows:
    """Tokenized rows. lengths: (N,) tokens; scored: (N,) tokens that count in the loss.

    is_flat: `batches` are flat, for attention without masks (models/kernels/attention.py). sizes, counts: the tokens
    and scored tokens that flat batches are padded to, in ascending order; padded_size if none is large enough.
    longest: the tokens of the longest row that the attention kernel supports; padding is divided into such rows.
    """

    def __init__(self, rows, *, is_flat=False):
        self.ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        self.is_scored = [np.asarray(row["is_scored"], dtype=bool) for row in rows]
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.scored = np.array([mask.sum() for mask in self.is_scored])
        self.is_flat = is_flat
        self.sizes, self.counts, self.longest = (), (), math.inf

    def __len__(self):
        return len(self.ids)

    def batch(self, bins, device):
        """Build a Batch from bins (lists of row numbers); each bin is one sequence, right-padded to the longest."""
        shape = (len(bins), _width(bins, self.lengths, _multiple_on(device)))
        ids, places = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        labels, documents = np.full(shape, IGNORE, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        for i, rows in enumerate(bins):
            start = 0
            for document, n in enumerate(rows):
                part = slice(start, start + self.lengths[n])
                ids[i, part] = self.ids[n]
                labels[i, part] = np.where(self.is_scored[n], self.ids[n], IGNORE)
                labels[i, start] = IGNORE  # a row's first token has no prediction
                places[i, part] = np.arange(self.lengths[n])
                documents[i, part] = document
                start = part.stop
        batch = Batch(torch.from_numpy(ids), *next_tokens(torch.from_numpy(labels)))
        if device != "cpu" or any(len(rows) > 1 for rows in bins):
            batch = batch._replace(places=torch.from_numpy(places), documents=torch.from_numpy(documents))
        return batch.to(device)

    def flat_batch(self, rows):
        """Build a flat Batch of rows on the host, padded to one of a few sizes so that shapes repeat."""
        edges = np.cumsum([0, *(self.lengths[n] for n in rows)])
        total = int(edges[-1])
        size = _fitting(self.sizes, total)
        ids, places = np.zeros((1, size), dtype=np.int64), np.zeros((1, size), dtype=np.int64)
        ids[0, :total] = np.concatenate([self.ids[n] for n in rows])
        places[0, :total] = np.concatenate([np.arange(self.lengths[n]) for n in rows])
        before = [start + self.is_scored[n][1:].nonzero()[0] for start, n in zip(edges[:-1], rows, strict=True)]
        before = np.concatenate(before)
        positions = np.zeros(_fitting(self.counts, len(before)), dtype=np.int64)
        targets = np.full(len(positions), IGNORE, dtype=np.int64)
        positions[: len(before)], targets[: len(before)] = before, ids[0, before + 1]
        made = (ids, positions, targets, places, None, self._cu_seqlens(edges, size))
        return Batch(*(t if t is None else torch.from_numpy(t) for t in made))

    def _cu_seqlens(self, edges, size):
        """The row boundaries of a flat batch: its rows', then those of its padding, their number the same for many."""
        parts = int(-(-max(self.sizes, default=1) // self.longest))
        count = -(-(len(edges) - 1) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE + 1
        padding = np.minimum(edges[-1] + self.longest * np.arange(1, count + parts - len(edges) + 1), size)
        return np.concatenate([edges, padding]).astype(np.int32)

    def limit_shapes(self, steps, tokens, *, remaining, capture, longest):
        """Set `sizes` and `counts` to those that make a run with CUDA graphs fastest.

        steps: a sample of the steps' row numbers, [[row, ...], ...]. tokens: of the largest micro-batch. remaining:
        number of steps to run. capture: the cost of capturing a size, in passes of that size. longest: see Rows.
        """
        passes = [rows for numbers in steps if len(numbers) for rows in self.cut_flat(numbers, tokens)]
        each = {"weight": remaining / max(1, len(steps)), "capture": capture}
        lengths, scored = ([int(of[rows].sum()) for rows in passes] for of in (self.lengths, self.scored))
        self.sizes = cheapest_sizes([padded_size(n) for n in [*lengths, tokens]], **each)
        self.counts = cheapest_sizes([padded_size(n) for n in scored], **each)
        self.longest = longest

    def batches(self, numbers, tokens, device):
        """Yield Batches of at most `tokens` tokens (padded, unless flat) that together hold the rows."""
        if not len(numbers):
            return
        if self.is_flat:
            for rows in self.cut_flat(numbers, tokens):
                yield self.flat_batch(rows).to(device)
            return
        for bins in self.cut(numbers, tokens, device):
            yield self.batch(bins, device)

    def cut_flat(self, numbers, tokens):
        """The rows of each of `batches`, flat: [[row, ...], ...], of about equal numbers of tokens."""
        order = sorted(numbers, key=lambda row: (-self.lengths[row], row))
        total, longest = int(self.lengths[order].sum()), int(self.lengths[order[0]])
        count = -(-total // tokens)
        for slack in (1.0, 1.02, 1.05, 1.1):
            bins = _first_fit(order, self.lengths, max(longest, min(tokens, int(slack * total / count) + 1)))
            if len(bins) == count:
                return bins
        return _first_fit(order, self.lengths, max(longest, tokens))

    def cut(self, numbers, tokens, device):
        """Yield the bins of each of `batches`: [[row, ...], ...].

        On a GPU a batch has at least two bins if `tokens` allows it, one of them possibly empty, because torch.compile
        recompiles for a batch of one. A row longer than half of `tokens` stays alone, because a second bin would take
        memory that was not planned for.
        """
        least, multiple = (1 if device == "cpu" else 2), _multiple_on(device)
        for bins in pack(numbers, self.lengths, tokens, multiple=multiple, least=least):
            has_room = least * _width(bins, self.lengths, multiple) <= tokens
            yield [*bins, []] if len(bins) < least and has_room else bins


def mean_loss(model, rows, *, device, precision, tokens=2048, processes=_ALONE):
    """Mean loss over all Rows in nats per scored token; rows are packed into batches of at most `tokens` tokens.

    processes: share the rows among these.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    numbers = divide(range(len(rows)), rows.lengths, processes.world)[processes.rank]
    try:
        with torch.no_grad(), autocast(device, precision):
            for batch in rows.batches(numbers, tokens, device):
                total += batch_loss_sum(model, batch)
    finally:
        model.train(was_training)
    processes.sum_(total)
    return float(total / rows.scored.sum())


def longest_row(max_length, tokens):
    """Length of the longest row in flat batches of `tokens` tokens: a row of max_length, or the padding."""
    return max(max_length, padded_size(tokens) // 16 + 128)


def padded_size(n):
    """The padded size of a flat batch of n tokens: sixteen sizes between powers of two, from 128."""
    step = max(128, 1 << max(0, (n - 1).bit_length() - 5))
    return max(1, -(-n // step)) * step


def cheapest_sizes(needed, *, weight, capture):
    """The sizes to pad to, in ascending order, so that padding and capturing each size cost least: dynamic programming.

    needed: sizes of passes, each of which runs at the next larger of the result. weight: how often each of them runs.
    capture: the cost of capturing a size, in passes of that size; a pass's cost is proportional to its size.
    """
    sizes, numbers = (found.tolist() for found in np.unique(np.asarray(needed, dtype=np.int64), return_counts=True))
    costs, before = [0.0], []  # of the best choice for the first j sizes; the number of sizes below its last
    for j, size in enumerate(sizes):
        options, padding = [], 0.0
        for i in range(j, -1, -1):  # one graph for the sizes i to j
            padding += weight * numbers[i] * (size - sizes[i])
            options.append((costs[i] + padding + capture * size, i))
        cost, i = min(options)
        costs.append(cost)
        before.append(i)
    chosen, j = [], len(sizes)
    while j:
        chosen.append(sizes[j - 1])
        j = before[j - 1]
    return tuple(reversed(chosen))


def _fitting(sizes, n):
    return next((size for size in sizes if size >= n), padded_size(n))


def pack(rows, lengths, tokens, *, multiple=1, least=1):
    """Divide rows into micro-batches of at most `tokens` padded tokens: [[bin, ...], ...], where a bin is [row, ...].

    The rows of a bin are concatenated to one sequence, so there is little padding; all bins of a micro-batch are
    padded to its longest, rounded up to `multiple`. lengths: tokens of each row, by row number; a row longer than
    `tokens` gets its own micro-batch. least: minimum bins per micro-batch, if rows and `tokens` allow it. The summed
    loss of the rows does not depend on the division.
    """
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    batches = []
    for start in range(0, len(order), _ROWS_AT_ONCE):
        bins = _cheapest_bins(order[start : start + _ROWS_AT_ONCE], lengths, tokens // least, multiple, least)
        at_most = max(1, tokens // _width(bins, lengths, multiple))
        count = -(-len(bins) // at_most)  # micro-batches of similar size, so that none has a single bin
        edges = [round(i * len(bins) / count) for i in range(count + 1)]
        batches += [bins[start:end] for start, end in itertools.pairwise(edges)]
    return batches


def _multiple_on(device):
    """The multiple that widths are rounded up to: 64 on a GPU, which suits tensor cores and attention masks."""
    return 1 if device == "cpu" else 64


def _width(bins, lengths, multiple):
    return -(-max(sum(int(lengths[row]) for row in rows) for rows in bins) // multiple) * multiple


def _cheapest_bins(order, lengths, limit, multiple, least):
    """Try first fit at several widths up to `limit`. Attention's cost per token is proportional to the width; other
    work is not."""
    best, lowest = None, math.inf
    for width in _candidate_widths([int(lengths[row]) for row in order], limit, least):
        bins = _first_fit(order, lengths, width)
        width = _width(bins, lengths, multiple)
        cost = len(bins) * width * (1 + _ATTENTION_SHARE * width)
        if best is None or (len(bins) >= least and cost < lowest):
            best, lowest = bins, cost
    return best


def _candidate_widths(lengths, limit, least):
    longest, total = lengths[0], sum(lengths)
    yield longest
    for count in range(min(least, len(lengths)), len(lengths) + 1):
        for slack in (1.0, 1.03, 1.08, 1.15):  # rows rarely fill a bin exactly
            width = max(longest, int(slack * total / count) + 1)
            if width <= limit:
                yield width
        if total / count < longest:
            return  # more bins cannot be narrower


def _first_fit(order, lengths, width):
    """Put each row, longest first, into the first bin that has room."""
    bins, room = [], []
    for row in order:
        length = int(lengths[row])
        at = next((i for i, left in enumerate(room) if length <= left), None)
        if at is None:
            bins.append([row])
            room.append(width - length)
        else:
            bins[at].append(row)
            room[at] -= length
    return bins
