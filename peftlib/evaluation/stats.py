"""Bootstrap confidence intervals and paired significance tests of methods that answered the same test rows.

The scores are corpus BLEU-4 (from summed statistics) and mean ROUGE-L, of one or more runs (seeds) of each method.
All methods share each resample's rows and seeds, so that differences are paired.
"""

import math
import statistics
from dataclasses import dataclass, field

import numpy as np

from peftlib.core.errors import DataError
from peftlib.evaluation.metrics import corpus_bleu

METRICS = {"bleu4": "BLEU-4", "rougeL": "ROUGE-L"}
RATIO = "ratio"
FEW_ROWS = 100
_CHUNK = 250  # resamples whose row counts are held at once
# Means over seeds drawn per resample of rows: Student's t with few degrees has long tails, and draws are cheap.
_SEED_DRAWS = 50


@dataclass(frozen=True)
class Interval:
    """A score or a difference with its 95 % interval, in the score's unit (0-1)."""

    value: float
    low: float
    high: float

    @property
    def is_noise(self):
        """Whether the interval of a difference contains 0."""
        return self.low <= 0.0 <= self.high

    @property
    def verdict(self):
        """'inside the noise', 'higher' or 'lower', for a difference."""
        return "inside the noise" if self.is_noise else "higher" if self.value > 0 else "lower"


@dataclass(frozen=True)
class Bootstrap:
    """Scores of several methods on the same rows, with shared resamples.

    value: {method: {metric: float}}, mean over seeds. replicates: {method: {metric: (draws,)}}, with each resample of
    rows equally often.
    """

    n_rows: int
    resamples: int
    value: dict = field(repr=False)
    replicates: dict = field(repr=False)

    def interval(self, method, metric):
        """95 % interval of one method's score."""
        return _interval(self.value[method][metric], self.replicates[method][metric], self.n_rows, self.resamples)

    def difference(self, method, other, metric):
        """95 % interval of score(method) - score(other), paired by rows and seeds."""
        value = self.value[method][metric] - self.value[other][metric]
        drawn = self.replicates[method][metric] - self.replicates[other][metric]
        return _interval(value, drawn, self.n_rows, self.resamples)


def bootstrap(runs, *, resamples=2000, seed=0):
    """Bootstrap of methods' scores. runs: {method: [RowScores of one seed, ...]}, all on the same rows in one order.

    A resample draws rows with replacement, the same for every method. If methods have several seeds, each resample
    is used 50 times, with the mean over a method's seeds drawn from Student's t around it. Seeds are paired in order:
    a seed gives all methods the same order of training rows, and its common effect cancels in a difference. If methods
    have different seeds, different ones are paired, which is valid but gains nothing.
    Intervals are percentile intervals, widened for small samples (Hesterberg 2015: t instead of normal quantiles) and
    by one standard error of the tail that the resamples estimate. Deterministic in `seed`.
    DataError: no runs, or runs of unequal row counts.
    """
    n_rows = _checked_rows(runs)
    rng = np.random.default_rng(seed)
    stacked = np.hstack([_columns(rows) for seeds in runs.values() for rows in seeds])
    scores = _scores_of_sums(stacked.sum(axis=0, keepdims=True), n_rows)
    drawn = _scores_of_sums(_resampled_sums(stacked, resamples, rng), n_rows)
    return _over_seeds(runs, n_rows, scores, drawn, rng)


def ratio_bootstrap(strata, *, is_perplexity=False, resamples=2000, seed=0):
    """Like `bootstrap`, for the metric RATIO: sum(value) / sum(weight) over rows; a mean if the weights are 1.

    strata: [{method: [(n, 2) values and weights of one seed, ...]}, ...], the same methods and seeds in each; rows are
    drawn within each stratum, and the score is the mean over strata. is_perplexity: exp of the ratio instead.
    """
    counts = [_checked_rows(runs) for runs in strata]
    rng = np.random.default_rng(seed)
    scores, drawn = [], []
    for runs in strata:
        stacked = np.hstack([np.asarray(rows, dtype=np.float64) for seeds in runs.values() for rows in seeds])
        scores.append(_ratios(stacked.sum(axis=0, keepdims=True), is_perplexity))
        drawn.append(_ratios(_resampled_sums(stacked, resamples, rng), is_perplexity))
    means = ({RATIO: np.mean(found, axis=0)} for found in (scores, drawn))
    return _over_seeds(strata[0], min(counts), *means, rng)


def _ratios(sums, is_perplexity):
    ratios = sums[:, 0::2] / sums[:, 1::2]
    return np.exp(ratios) if is_perplexity else ratios


def _over_seeds(runs, n_rows, scores, drawn, rng):
    """Bootstrap of means over seeds. scores, drawn: {metric: (1 or resamples, runs)}, runs in the order of `runs`."""
    owners = [method for method, seeds in runs.items() for _ in seeds]
    resamples, value, replicates = len(next(iter(drawn.values()))), {}, {}
    most = max(map(len, runs.values()))
    draws = 1 if most == 1 else _SEED_DRAWS
    strays = SeedDraws(resamples * draws, most, rng)
    for method, seeds in runs.items():
        mine = [column for column, owner in enumerate(owners) if owner == method]
        apart = strays.of(len(seeds))
        value[method] = {name: float(found[0, mine].mean()) for name, found in scores.items()}
        replicates[method] = {
            name: (
                found[:, mine].mean(axis=1)[:, None] + (apart @ scores[name][0, mine]).reshape(resamples, draws)
            ).ravel()
            for name, found in drawn.items()
        }
    return Bootstrap(n_rows, resamples, value, replicates)


def swap_test(runs, others, metric, *, resamples=2000, seed=0):
    """Two-sided p of a difference by approximate randomization: each row's answers are swapped between methods or not.

    runs, others: [RowScores of one seed, ...] of two methods on the same rows, with equal numbers of seeds, or one on a
    side, which is then paired with each seed of the other. p = (draws at least as far apart + 1) / (resamples + 1). It
    is about these runs on other rows; only the interval includes the variation over seeds.
    DataError: several but different numbers of seeds, or different row counts.
    """
    n_rows = _checked_rows({"first": runs, "second": others})
    pairs = max(len(runs), len(others))
    if {len(runs), len(others)} - {1, pairs}:
        raise DataError(f"{len(runs)} and {len(others)} seeds cannot be swapped: give equal numbers, or one")
    rng = np.random.default_rng(seed)
    left, right = (np.hstack([_columns(rows[i % len(rows)]) for i in range(pairs)]) for rows in (runs, others))
    sums_left, sums_right = left.sum(axis=0), right.sum(axis=0)
    observed = _gap(sums_left[None], sums_right[None], metric, n_rows)[0]
    extreme = 0
    for start in range(0, resamples, _CHUNK):
        is_swapped = rng.integers(0, 2, size=(min(_CHUNK, resamples - start), n_rows)).astype(np.float64)
        moved = is_swapped @ (right - left)
        gaps = _gap(sums_left + moved, sums_right - moved, metric, n_rows)
        extreme += int((gaps >= observed - 1e-12).sum())
    return (extreme + 1) / (resamples + 1)


def mean_interval(values, *, resamples=2000, seed=0):
    """95 % Interval of the mean of one number per row, by the same bootstrap of rows. DataError: no values."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), 1)
    return sums_interval(values, lambda sums: sums[:, 0] / len(values), resamples=resamples, seed=seed)


def sums_interval(values, score, *, resamples=2000, seed=0):
    """95 % Interval of score(sums over rows), by the same bootstrap. values: (rows, k). score: of (draws, k) sums.

    DataError: no rows.
    """
    if not len(values):
        raise DataError("no rows to average")
    drawn = score(_resampled_sums(values, resamples, np.random.default_rng(seed)))
    return _interval(float(score(values.sum(axis=0, keepdims=True))[0]), drawn, len(values), resamples)


class SeedDraws:
    """Weights that spread means over seeds according to Student's t, with the same draws for all methods.

    Drawing k seeds with replacement gives only (k - 1) / k of their mean's variance, and ignores how poorly a few seeds
    estimate a variance; with t the interval has its nominal coverage. Shared draws pair the methods' first seeds,
    their second ones and so on: a difference then has the t interval of the differences seed by seed.
    """

    def __init__(self, draws, most_seeds, rng):
        self._normal = rng.standard_normal((draws, most_seeds))
        self._chi = np.square(rng.standard_normal((draws, most_seeds - 1))).cumsum(
            axis=1
        )  # for 1, 2, ... degrees of freedom

    def of(self, n_seeds):
        """(draws, n_seeds) weights that sum to 0; all 0 for one seed."""
        if n_seeds == 1:
            return np.zeros((len(self._normal), 1))
        normal = self._normal[:, :n_seeds]
        return (normal - normal.mean(axis=1, keepdims=True)) / np.sqrt(n_seeds * self._chi[:, [n_seeds - 2]])


def few_rows_note(n_rows):
    """A warning about the intervals of fewer than 100 test rows."""
    return f"{n_rows} test rows: below {FEW_ROWS} rows intervals are wide and rough and hide small differences"


def t_quantile(p, degrees):
    """Student's t quantile by the Cornish-Fisher series; within 0.002 of exact from 5 degrees of freedom."""
    z = statistics.NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def _interval(value, replicates, n_rows, resamples):
    # The plain percentile interval is too narrow by sqrt((n - 1) / n) and by normal instead of t quantiles.
    widened = math.sqrt(n_rows / max(n_rows - 1, 1)) * t_quantile(0.975, max(n_rows - 1, 1))
    tail = 1 - statistics.NormalDist().cdf(widened)
    # A tail estimated from finitely many resamples has this error: choose the wider interval.
    tail = max(0.0, tail - math.sqrt(tail * (1 - tail) / resamples))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def _columns(rows):
    """(n, 11): BLEU's ten counts and ROUGE-L F1 of each row."""
    return np.column_stack([rows.bleu, rows.rougeL])


def _scores_of_sums(sums, n_rows):
    """{metric: (draws, runs)} from (draws, runs * 11) sums over rows."""
    sums = sums.reshape(len(sums), -1, 11)
    return {"bleu4": corpus_bleu(sums[..., :10]), "rougeL": sums[..., 10] / n_rows}


def _resampled_sums(values, resamples, rng):
    """(resamples, ...) sums of rows drawn with replacement. values: (n_rows, ...)."""
    n_rows, sums = len(values), []
    for start in range(0, resamples, _CHUNK):
        draws = min(_CHUNK, resamples - start)
        picked = rng.integers(0, n_rows, size=(draws, n_rows)) + np.arange(draws)[:, None] * n_rows
        counts = np.bincount(picked.ravel(), minlength=draws * n_rows).reshape(draws, n_rows)
        sums.append(counts.astype(np.float64) @ values)
    return np.concatenate(sums)


def _gap(sums, other, metric, n_rows):
    left, right = (_scores_of_sums(part, n_rows)[metric].mean(axis=1) for part in (sums, other))
    return np.abs(left - right)


def _checked_rows(runs):
    counts = {method: sorted({len(rows) for rows in seeds}) for method, seeds in runs.items()}
    if not counts or not all(counts.values()):
        raise DataError(f"no scored rows to compare: {counts}")
    if len({n for found in counts.values() for n in found}) != 1:
        raise DataError(f"runs with different row counts cannot be paired: {counts}")
    return next(iter(counts.values()))[0]
