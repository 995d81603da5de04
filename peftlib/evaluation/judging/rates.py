"""Reliability of a judge's verdicts: win rates without the effect of length, and agreement, each with an interval.

Length control is AlpacaEval 2.0's (Dubois et al. 2024, arXiv:2404.04475): a logistic model of the preference, evaluated
at zero length difference, in the form that its code calls length_controlled_minimal: with one pair of models their
identity is the intercept, and instruction difficulty is omitted, because it needs many models on the same prompts.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from peftlib.evaluation import stats

VERDICTS = ("a", "b", "tie")
# Precision of a normal prior on both weights, deviation 2.5 (Gelman et al. 2008): without it there is no finite fit if
# one model wins every row, or exactly the rows where its answer is longer.
_PRECISION = 1 / 2.5**2
_NEWTON_STEPS = 30  # of a convex fit with two weights, which converges in about ten


def length_controlled(scores, lengths_a, lengths_b):
    """The stats.Interval of b's win rate at equal lengths; None below 3 rows.

    scores: (n,) of b, 0 to 1. lengths: (n,) characters of the answers. logit P(b wins) = theta + beta tanh(d / sd(d)),
    d = length of b - length of a; the rate is sigmoid(theta). The interval is theta's by the curvature with t
    quantiles: resampling rows missed the truth in 13 to 43 % of simulated studies whose judge only uses length.
    """
    if len(scores) < 3:
        return None
    gap, y = np.subtract(lengths_b, lengths_a, dtype=float), np.asarray(scores, dtype=float)
    spread = gap.std(ddof=1)
    design = np.column_stack([np.ones_like(gap), np.tanh(gap / spread) if spread else np.zeros_like(gap)])
    weights = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-design @ weights))
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + _PRECISION * np.eye(2)
        weights = weights - np.linalg.solve(curvature, design.T @ (p - y) + _PRECISION * weights)
    theta, error = weights[0], math.sqrt(np.linalg.inv(curvature)[0, 0])
    span = stats.t_quantile(0.975, len(scores) - 2) * error
    return stats.Interval(*(float(1 / (1 + math.exp(-at))) for at in (theta, theta - span, theta + span)))


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same rows and orders."""

    judges: tuple
    a: str
    b: str
    prompts: str
    n_rows: int
    share: stats.Interval  # share of equal verdicts
    kappa: stats.Interval  # Cohen's kappa; None if all verdicts would be equal by chance


def agreements(found, names, prompts):
    """Yield an Agreement for every two judges that judged rows in common.

    found: {judge: {row: {order: verdict}}} of the rows that have a verdict in both orders. names: of the runs.
    prompts: as in verdicts.Judged.
    """
    for first, second in itertools.combinations(found, 2):
        rows = [row for row in found[first] if row in found[second]]
        if rows:
            counts = np.zeros((len(rows), len(VERDICTS), len(VERDICTS)))
            for at, row in enumerate(rows):
                for order, verdict in found[first][row].items():
                    counts[at, VERDICTS.index(verdict), VERDICTS.index(found[second][row][order])] += 1
            counts = counts.reshape(len(rows), -1)
            share, kappa = (stats.sums_interval(counts, score) for score in (_share, _kappa))
            kappa = kappa if math.isfinite(kappa.value) else None
            yield Agreement((first, second), *names, prompts, len(rows), share, kappa)


def _share(sums):
    return np.trace(_tables(sums), axis1=1, axis2=2)


def _kappa(sums):
    tables = _tables(sums)
    chance = (tables.sum(axis=2) * tables.sum(axis=1)).sum(axis=1)
    is_open = chance < 1 - 1e-12
    kappa = (_share(sums) - chance) / np.where(is_open, 1 - chance, 1.0)
    return np.where(is_open, kappa, 1.0 if len(sums) > 1 else np.nan)  # a resample with only equal verdicts agrees


def _tables(sums):
    """(draws, 3, 3) shares of the pairs of verdicts."""
    return sums.reshape(-1, len(VERDICTS), len(VERDICTS)) / sums.sum(axis=1)[:, None, None]
