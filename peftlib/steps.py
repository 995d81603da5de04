"""Which rows make which optimizer step: a pure function of seed, epoch and step, so a resume needs no data state."""

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
    sequences_per_step: int
    epochs: int
    seed: int
    max_steps: int = 0  # 0 is all of the epochs

    @property
    def steps_per_epoch(self):
        return -(-self.rows // self.sequences_per_step)

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
        start = within * self.sequences_per_step
        return order[start : start + self.sequences_per_step].tolist()


def pack(rows, lengths, tokens, *, multiple=1):
    """Micro-batches of at most `tokens` padded tokens for some rows: [[bin, ...], ...], a bin being [row, ...].

    The rows of a bin lie one behind the other in one sequence, so that little is padded; all bins of a micro-batch are
    padded to its fullest, rounded up to `multiple`. lengths: tokens of each row, by row number; a row longer than
    `tokens` makes a micro-batch of its own. The summed loss of the rows does not depend on the cut.
    """
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    batches = []
    for start in range(0, len(order), _ROWS_AT_ONCE):
        bins, width = _best_bins(order[start : start + _ROWS_AT_ONCE], lengths, tokens, multiple)
        at_once = max(1, tokens // width)
        batches += [bins[i : i + at_once] for i in range(0, len(bins), at_once)]
    return batches


def _best_bins(order, lengths, tokens, multiple):
    """(bins, their width) that cost least. Attention costs a token in proportion to the width, the rest does not."""
    longest, total = int(lengths[order[0]]), int(sum(lengths[row] for row in order))
    best = None
    for count in range(1, len(order) + 1):
        width = max(longest, -(-total // count))
        if width > max(tokens, longest):
            continue
        bins = _first_fit(order, lengths, width)
        fullest = max(sum(lengths[row] for row in rows) for rows in bins)
        width = -(-int(fullest) // multiple) * multiple
        cost = len(bins) * width * (1 + _ATTENTION_SHARE * width)
        if best is None or cost < best[0]:
            best = cost, bins, width
        if width <= longest + multiple:
            break  # more bins can be no narrower
    return best[1], best[2]


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
    """Share of the peak rate at a step counted from 0: linear warm-up over warmup_ratio, then cfg.schedule to 0."""
    warmup = round(cfg.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[cfg.schedule]
