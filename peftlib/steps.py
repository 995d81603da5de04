"""Which rows make which optimizer step: a pure function of seed, epoch and step, so a resume needs no data state."""

import math
from dataclasses import dataclass

import numpy as np


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


def micro_batches(rows, lengths, size):
    """Cut a step's rows into batches of `size`, longest first, so that a batch pads little and memory peaks early.

    lengths: tokens of each row, by row number. The step's summed loss does not depend on the cut.
    """
    by_length = sorted(rows, key=lambda row: (-lengths[row], row))
    return [by_length[i : i + size] for i in range(0, len(by_length), size)]


def learning_rate_factor(step, steps, cfg):
    """Share of the peak rate at a step counted from 0: linear warm-up over warmup_ratio, then cfg.schedule to 0."""
    warmup = round(cfg.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[cfg.schedule]
