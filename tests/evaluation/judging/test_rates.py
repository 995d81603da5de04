"""Rates of a judge by simulation: what goes by length alone is found even at equal lengths, and what is better stays so."""

import itertools
import math

import numpy as np
import pytest

from peftlib.evaluation import stats
from peftlib.evaluation.judging import judge, rates


def judged(rng, n, *, better=0.0, by_length=0.0, longer=0.0):
    """(scores of b, lengths of a, of b). The judge's log odds: better + by_length tanh(gap / sd); longer: mean gap in sds."""
    lengths = rng.normal(1000, 100, (2, n))
    lengths[1] += longer * 100 * math.sqrt(2)
    gap = lengths[1] - lengths[0]
    p = 1 / (1 + np.exp(-(better + by_length * np.tanh(gap / gap.std()))))
    return (rng.random(n) < p).astype(float), *lengths


def covered(n, better, **world):
    """Share of 100 simulated studies whose interval holds the rate at equal lengths; the mean raw rate."""
    rng, truth, hits, raw = np.random.default_rng(7), 1 / (1 + math.exp(-better)), 0, 0.0
    for _ in range(100):
        scores, *lengths = judged(rng, n, better=better, **world)
        found = rates.length_controlled(scores, *lengths)
        hits += found.low <= truth <= found.high
        raw += scores.mean() / 100
    return hits / 100, raw


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("by_length, longer", [(3, 1.0), (8, 1.5), (500, 1.5)])
def test_a_judge_that_prefers_length_alone_is_even_at_equal_lengths(n, by_length, longer):
    coverage, raw = covered(n, 0.0, by_length=by_length, longer=longer)
    assert raw > 0.75 and coverage >= 0.92


@pytest.mark.parametrize("longer", [-1.0, 0.0, 1.0])
def test_a_better_model_keeps_its_lead_whoever_is_longer(longer):
    coverage, _ = covered(200, 1.0, by_length=2.0, longer=longer)
    assert coverage >= 0.92
    scores, *lengths = judged(np.random.default_rng(3), 805, better=1.0, by_length=2.0, longer=longer)
    found = rates.length_controlled(scores, *lengths)
    assert found.low > 0.6 and found.low < found.value < found.high


def test_a_judge_that_sees_no_length_is_left_as_it_is():
    scores, *lengths = judged(np.random.default_rng(5), 2000, better=0.8, longer=0.5)
    found = rates.length_controlled(scores, *lengths)
    assert abs(found.value - scores.mean()) < 0.02
    same = rates.length_controlled(scores, lengths[0], lengths[0])  # no difference of length at all
    assert abs(same.value - scores.mean()) < 0.002


def test_the_fit_is_alpaca_evals_model():
    """The same rows, doubled as AlpacaEval doubles soft preferences, fitted by scikit-learn under the same penalty."""
    linear = pytest.importorskip("sklearn.linear_model", exc_type=ImportError)
    rng = np.random.default_rng(1)
    scores, *lengths = judged(rng, 400, better=0.5, by_length=1.5, longer=0.7)
    scores = np.where(rng.random(400) < 0.2, 0.5, scores)
    gap = lengths[1] - lengths[0]
    design = np.column_stack([np.ones(400), np.tanh(gap / gap.std(ddof=1))])
    fitted = linear.LogisticRegression(C=2.5**2, fit_intercept=False, tol=1e-10, max_iter=1000)
    fitted.fit(np.vstack([design, design]), [1] * 400 + [0] * 400, sample_weight=np.concatenate([scores, 1 - scores]))
    expected = 1 / (1 + math.exp(-fitted.coef_[0][0]))
    assert rates.length_controlled(scores, *lengths).value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scores", [[1.0] * 12, [0.0] * 12, [0.5] * 12, [1, 0, 0.5]])
def test_few_rows_and_clean_sweeps_have_finite_intervals(scores):
    lengths = [[10 + 3 * at for at in range(len(scores))], [20 + at * at for at in range(len(scores))]]
    found = rates.length_controlled(scores, *lengths)
    assert 0 <= found.low < found.value < found.high <= 1
    assert rates.length_controlled(scores[:2], lengths[0][:2], lengths[1][:2]) is None


def verdicts_of(rng, n, equal=1.0):
    """Two judges' {row: {order: verdict}}; the second repeats a share of the first's and draws the others."""
    first = {f"r{i}": {o: rates.VERDICTS[rng.integers(3)] for o in judge.ORDERS} for i in range(n)}
    second = {
        row: {o: v if rng.random() < equal else rates.VERDICTS[rng.integers(3)] for o, v in of.items()}
        for row, of in first.items()
    }
    return first, second


def test_agreement_of_two_judges():
    rng = np.random.default_rng(2)
    for equal, kappa in ((1.0, 1.0), (0.0, 0.0), (0.6, 0.6)):
        first, second = verdicts_of(rng, 600, equal)
        (found,) = rates.agreements({"one": first, "two": second}, ("base-s0", "qlora-s0"), "")
        assert found.judges == ("one", "two") and found.n_rows == 600
        assert found.kappa.low - 1e-9 <= kappa <= found.kappa.high + 1e-9 and abs(found.kappa.value - kappa) < 0.05
        share = np.mean([first[r][o] == second[r][o] for r, o in itertools.product(first, judge.ORDERS)])
        assert found.share.value == pytest.approx(share)
    three = dict(zip("abc", (*verdicts_of(rng, 5), {"other": {"ab": "a", "ba": "a"}})))
    assert len(list(rates.agreements(three, ("x", "y"), ""))) == 1  # the third has no row in common


def test_kappa_is_unknown_where_all_say_one_thing():
    same = {f"r{i}": {"ab": "b", "ba": "b"} for i in range(9)}
    (found,) = rates.agreements({"one": same, "two": same}, ("x", "y"), "")
    assert found.share == stats.Interval(1.0, 1.0, 1.0) and found.kappa is None


def test_kappa_of_a_known_table():
    """Fleiss, Cohen and Everitt's kind of table by hand: 20 rows, one order told apart from the other."""
    pairs = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    first = {f"r{i}": {"ab": pairs[2 * i][0], "ba": pairs[2 * i + 1][0]} for i in range(25)}
    second = {f"r{i}": {"ab": pairs[2 * i][1], "ba": pairs[2 * i + 1][1]} for i in range(25)}
    (found,) = rates.agreements({"one": first, "two": second}, ("x", "y"), "")
    assert found.share.value == pytest.approx(0.7) and found.kappa.value == pytest.approx(0.4)
