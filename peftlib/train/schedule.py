"""Which rows make which optimizer step: a pure function of seed, epoch and step, so a resume needs no data state."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

_ROWS_AT_ONCE = 64  # packed together; more would gain little and first fit takes their square
_ATTENTION_SHARE = 2.5e-4  # cost of attending to one more token, as a share of a token's other work


@dataclass(frozen=True)
class StepPlan:
    """Row numbers of every optimizer step; the same for every method of a study.

    rows: number of training rows. The last step of an epoch takes what is left.
    """

    rows: int
    batch_size: int
    epochs: int
    seed: int
    max_steps: int = 0  # 0 is all of the epochs

    @property
    def steps_per_epoch(self):
        return -(-self.rows // self.batch_size)

    @property
    def steps(self):
        total = self.steps_per_epoch * self.epochs
        return min(total, self.max_steps) if self.max_steps else total

    def rows_of(self, step):
        """Row numbers of a step, counted from 0, as a list. IndexError: no such step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        start = within * self.batch_size
        return order[start : start + self.batch_size].tolist()


def pack(rows, lengths, tokens, *, multiple=1, least=1):
    """Micro-batches of at most `tokens` padded tokens for some rows: [[bin, ...], ...], a bin being [row, ...].

    The rows of a bin lie one behind the other in one sequence, so that little is padded; all bins of a micro-batch are
    padded to its fullest, rounded up to `multiple`. lengths: tokens of each row, by row number; a row longer than
    `tokens` makes a micro-batch of its own. least: bins of a micro-batch, where rows and `tokens` allow it. The summed
    loss of the rows does not depend on the cut.
    """
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    batches = []
    for start in range(0, len(order), _ROWS_AT_ONCE):
        bins, width = _best_bins(order[start : start + _ROWS_AT_ONCE], lengths, tokens, multiple, least)
        batches += _even_parts(bins, max(1, tokens // width))
    return batches


def _even_parts(bins, at_most):
    """As few runs of bins as can be, of like length: none is left with a single one."""
    count = -(-len(bins) // at_most)
    edges = [round(i * len(bins) / count) for i in range(count + 1)]
    return [bins[start:end] for start, end in itertools.pairwise(edges)]


def _best_bins(order, lengths, tokens, multiple, least):
    """(bins, their width) that cost least. Attention costs a token in proportion to the width, the rest does not."""
    longest, total = int(lengths[order[0]]), int(sum(lengths[row] for row in order))
    best = _cheaper(None, order, lengths, tokens, multiple, least, longest)
    for count in range(min(least, len(order)), len(order) + 1):
        # A little slack, for rows do not fill a bin exactly.
        for slack in (1.0, 1.03, 1.08, 1.15):
            best = _cheaper(best, order, lengths, tokens, multiple, least, max(longest, int(slack * total / count) + 1))
        if total / count < longest:
            break  # more bins can be no narrower
    return best[1], best[2]


def _cheaper(best, order, lengths, tokens, multiple, least, width):
    """`best`, or (cost, bins, width) of first fit into bins of `width` where that costs less."""
    if best is not None and width > tokens // least:
        return best
    bins = _first_fit(order, lengths, width)
    if best is not None and len(bins) < least:
        return best
    width = -(-int(max(sum(lengths[row] for row in rows) for rows in bins)) // multiple) * multiple
    cost = len(bins) * width * (1 + _ATTENTION_SHARE * width)
    return (cost, bins, width) if best is None or cost < best[0] else best


def _first_fit(order, lengths, width):
    """Rows, longest first, each into the first bin that has room."""
    bins, room = [], []
    for row in order:
        length = int(lengths[row])
        for i, left in enumerate(room):
            if length <= left:
                bins[i].append(row)
                room[i] -= length
                break
        else:
            bins.append([row])
            room.append(width - length)
    return bins


def learning_rate_factor(step, steps, cfg):
    """Share of the peak rate at a step counted from 0: linear warm-up over warmup_ratio, then cfg.lr_scheduler to 0."""
    warmup = round(cfg.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[cfg.lr_scheduler]
