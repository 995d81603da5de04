"""What a judge's verdicts are worth: win rates without the effect of length, and agreement, each with an interval.

Length control is AlpacaEval 2.0's (Dubois et al. 2024, arXiv:2404.04475): a logistic model of the preference, read off
at no difference in length, in the form that its code calls length_controlled_minimal: with one pair of models their
identity is the intercept, and how hard an instruction is cannot be told, for that takes many models on equal prompts.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from peftlib.evaluation import stats

VERDICTS = ("a", "b", "tie")
# Of a normal prior on both weights, of deviation 2.5 (Gelman et al. 2008): without one, a pair that wins every row, or
# only its longer answers, has no finite fit.
_PRECISION = 1 / 2.5**2


def length_controlled(scores, lengths_a, lengths_b):
    """The stats.Interval of b's win rate at equal lengths; None below 3 rows.

    scores: (n,) of b, 0 to 1. lengths: (n,) characters of the answers. logit P(b wins) = theta + beta tanh(d / sd(d)),
    d = length of b - length of a; the rate is sigmoid(theta). Fitted by torch's L-BFGS: torch is required anyway, and
    scipy, scikit-learn and statsmodels are not. The interval is theta's by the curvature with t quantiles: resampled
    rows missed the truth in 13 to 43 % of simulated studies whose judge goes by length almost alone.
    """
    if len(scores) < 3:
        return None
    gap = torch.as_tensor(lengths_b, dtype=torch.float64) - torch.as_tensor(lengths_a, dtype=torch.float64)
    spread, y = gap.std(), torch.as_tensor(scores, dtype=torch.float64)
    design = torch.stack([torch.ones_like(gap), torch.tanh(gap / spread) if spread else torch.zeros_like(gap)], dim=1)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    exact = {"tolerance_grad": 1e-9, "tolerance_change": 1e-15}
    fit = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe", **exact)

    def loss():
        fit.zero_grad()
        total = binary_cross_entropy_with_logits(design @ weights, y, reduction="sum")
        total = total + _PRECISION / 2 * weights.square().sum()
        total.backward()
        return total

    fit.step(loss)
    with torch.no_grad():
        p = torch.sigmoid(design @ weights)
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + _PRECISION * torch.eye(2, dtype=torch.float64)
        theta, error = float(weights[0]), math.sqrt(float(torch.linalg.inv(curvature)[0, 0]))
    span = stats.t_quantile(0.975, len(scores) - 2) * error
    return stats.Interval(*(1 / (1 + math.exp(-at)) for at in (theta, theta - span, theta + span)))


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same rows and orders. share: of equal verdicts. kappa: Cohen's, None where chance alone would
    make all equal."""

    judges: tuple
    a: str
    b: str
    prompts: str
    n_rows: int
    share: stats.Interval
    kappa: stats.Interval


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
            yield Agreement(
                (first, second), *names, prompts, len(rows), share, kappa if math.isfinite(kappa.value) else None
            )


def _share(sums):
    return np.trace(_tables(sums), axis1=1, axis2=2)


def _kappa(sums):
    tables = _tables(sums)
    chance = (tables.sum(axis=2) * tables.sum(axis=1)).sum(axis=1)
    is_open = chance < 1 - 1e-12
    kappa = (_share(sums) - chance) / np.where(is_open, 1 - chance, 1.0)
    return np.where(is_open, kappa, 1.0 if len(sums) > 1 else np.nan)  # a resample of equal verdicts alone agrees


def _tables(sums):
    """(draws, 3, 3) shares of the pairs of verdicts."""
    return sums.reshape(-1, len(VERDICTS), len(VERDICTS)) / sums.sum(axis=1)[:, None, None]
