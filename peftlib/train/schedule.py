"""Which rows make up which optimizer step, and at which learning rate: pure functions, so a resume needs no data
state."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """Row numbers of every optimizer step; the same for every method of a study.

    rows: number of training rows. The last step of an epoch takes what is left. max_steps: 0 means all of the epochs.
    """

    rows: int
    batch_size: int
    epochs: int
    seed: int
    max_steps: int = 0

    @property
    def steps_per_epoch(self):
        return -(-self.rows // self.batch_size)

    @property
    def steps(self):
        total = self.steps_per_epoch * self.epochs
        return min(total, self.max_steps) if self.max_steps else total

    def rows_of(self, step):
        """List the row numbers of a step, counted from 0. IndexError: no such step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        start = within * self.batch_size
        return order[start : start + self.batch_size].tolist()


def learning_rate_factor(step, steps, cfg):
    """Share of the peak rate at a step counted from 0: linear warm-up over warmup_ratio, then cfg.lr_scheduler to 0."""
    warmup = round(cfg.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[cfg.lr_scheduler]
