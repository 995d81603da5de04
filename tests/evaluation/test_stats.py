"""Intervals hold what they promise: coverage, equal systems called equal, pairing by rows."""

import numpy as np
import pytest

from peftlib.core.errors import DataError
from peftlib.evaluation import hf_metrics, metrics, stats

ROUNDS = 300


def simulated(rng, n_rows, *, skill=0.5, shared=None):
    """RowScores of made-up rows: binomial n-gram matches and beta ROUGE-L, both around `skill`.

    shared: (n_rows,) difficulty of each row, the same for systems that answer the same rows.
    """
    ease = np.clip(skill + (0 if shared is None else shared), 0.02, 0.98)
    length = rng.integers(8, 40, size=n_rows)
    total = np.stack([length - n for n in range(4)], axis=1)
    matched = rng.binomial(total, np.clip(np.broadcast_to(ease, n_rows)[:, None] ** [1, 2, 3, 4], 0, 1))
    bleu = np.column_stack([length, length + rng.integers(-2, 6, size=n_rows), matched, total]).astype(float)
    zeros = np.zeros(n_rows)
    rouge_l = rng.beta(6 * ease, 6 * (1 - ease), size=n_rows)
    others = {name: zeros for name in metrics.RowScores.__dataclass_fields__ if name not in ("bleu", "rougeL")}
    return metrics.RowScores(bleu=bleu, rougeL=rouge_l, **others)


def quietly(runs, **settings):
    return stats.bootstrap(runs, **{"resamples": 1000, **settings})


def test_values_are_the_plain_scores():
    rng = np.random.default_rng(0)
    runs = {"base": [simulated(rng, 150)], "qlora": [simulated(rng, 150), simulated(rng, 150)]}
    found = quietly(runs)
    assert found.value["base"]["bleu4"] == pytest.approx(runs["base"][0].scores()["bleu4"], abs=1e-12)
    mean = np.mean([rows.scores()["rougeL"] for rows in runs["qlora"]])
    assert found.value["qlora"]["rougeL"] == pytest.approx(mean, abs=1e-12)


def test_same_seed_same_intervals_and_another_seed_others():
    runs = {"base": [simulated(np.random.default_rng(1), 120)]}
    first, again, other = (quietly(runs, seed=s).interval("base", "bleu4") for s in (3, 3, 4))
    assert first == again != other
    assert first.low < first.value < first.high


@pytest.mark.parametrize("metric", ["bleu4", "rougeL"])
@pytest.mark.parametrize("n_rows", [48, pytest.param(150, marks=pytest.mark.slow)])
def test_interval_covers_the_true_score_near_95_percent(metric, n_rows):
    rng = np.random.default_rng(5)
    large = simulated(rng, 200_000)
    truth = large.scores()[metric]
    covered = 0
    for _ in range(ROUNDS):
        found = _quick_interval(simulated(rng, n_rows), metric, rng)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / ROUNDS <= 0.98


@pytest.mark.parametrize("metric", ["bleu4", "rougeL"])
@pytest.mark.parametrize("n_rows", [48, pytest.param(150, marks=pytest.mark.slow)])
def test_equal_systems_are_called_equal(metric, n_rows):
    rng = np.random.default_rng(17)
    equal = 0
    for _ in range(ROUNDS):
        shared = rng.normal(0, 0.15, size=n_rows)
        left, right = (simulated(rng, n_rows, shared=shared) for _ in range(2))
        equal += _quick_difference(left, right, metric, rng).is_noise
    assert equal / ROUNDS >= 0.94


def test_a_true_difference_is_found_because_rows_are_paired():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.2, size=300)
    better, worse = simulated(rng, 300, skill=0.55, shared=shared), simulated(rng, 300, skill=0.45, shared=shared)
    found = quietly({"a": [better], "b": [worse]})
    for metric in stats.METRICS:
        paired = found.difference("a", "b", metric)
        assert not paired.is_noise and paired.value > 0
        assert stats.swap_test([better], [worse], metric, resamples=1000) < 0.01
        one, two = found.interval("a", metric), found.interval("b", metric)
        assert paired.high - paired.low < (one.high - one.low) + (two.high - two.low)


def test_swap_test_of_equal_systems_rejects_about_one_in_twenty():
    rng = np.random.default_rng(23)
    rejected = sum(
        stats.swap_test([simulated(rng, 60)], [simulated(rng, 60)], "bleu4", resamples=200, seed=i) < 0.05
        for i in range(200)
    )
    assert rejected <= 20


def test_swap_test_agrees_with_sacrebleus_paired_test():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest
    from test_metrics import corpus

    answers, references = corpus(80, 1, shared=0.6)
    others = [metrics.cut_words(text, 9) for text in answers]
    rows, other = (hf_metrics.scored(texts, references)[1] for texts in (answers, others))
    ours = stats.swap_test([other], [rows], "bleu4", resamples=2000)
    _, theirs = PairedTest(
        [("a", answers), ("b", others)], {"BLEU": BLEU(references=[references])}, None, test_type="ar", n_samples=2000
    )()
    assert ours == pytest.approx(theirs["BLEU"][1].p_value, abs=0.03)


def test_swap_test_takes_one_run_against_several_seeds():
    rng = np.random.default_rng(4)
    base, better = simulated(rng, 200, skill=0.4), [simulated(rng, 200, skill=0.6) for _ in range(3)]
    assert stats.swap_test(better, [base], "rougeL", resamples=1000) == pytest.approx(1 / 1001)
    assert stats.swap_test([base], [base] * 3, "bleu4", resamples=1000) == 1


def test_the_ends_of_an_interval_over_seeds_do_not_hang_on_the_draw():
    rng = np.random.default_rng(5)
    runs = {name: [simulated(rng, 300) for _ in range(2)] for name in ("a", "b")}
    found = [stats.bootstrap(runs, resamples=1000, seed=seed).difference("a", "b", "rougeL") for seed in range(6)]
    width = found[0].high - found[0].low
    for end in ("low", "high"):
        ends = [getattr(interval, end) for interval in found]
        assert max(ends) - min(ends) < 0.08 * width  # one draw of t a resample: about a quarter


def test_several_seeds_widen_the_interval():
    rng = np.random.default_rng(8)
    low, high = simulated(rng, 400, skill=0.4), simulated(rng, 400, skill=0.6)
    found = quietly({"steady": [low, low, low], "moody": [low, high, low]})
    widths = {m: found.interval(m, "rougeL").high - found.interval(m, "rougeL").low for m in ("steady", "moody")}
    assert widths["moody"] > 2 * widths["steady"]


def test_runs_that_cannot_be_paired_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"different row counts.*'a': \[100\].*'b': \[101\]"):
        quietly({"a": [simulated(rng, 100)], "b": [simulated(rng, 101)]})
    rows = simulated(rng, 100)
    with pytest.raises(DataError, match="2 and 3 seeds"):
        stats.swap_test([rows] * 2, [rows] * 3, "bleu4")
    with pytest.raises(DataError, match="no scored rows"):
        stats.bootstrap({})


def test_the_mean_of_one_number_a_row_has_the_intervals_of_a_score():
    rng = np.random.default_rng(5)
    covered, widths = 0, []
    for seed in range(300):
        found = stats.mean_interval(rng.choice([0.0, 0.5, 1.0], size=60, p=[0.2, 0.3, 0.5]), resamples=1000, seed=seed)
        covered += found.low <= 0.65 <= found.high
        widths.append(found.high - found.low)
    assert 0.92 <= covered / 300 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.39 / 60**0.5, rel=0.1)
    assert stats.mean_interval([1.0, 1.0]) == stats.Interval(1.0, 1.0, 1.0)
    with pytest.raises(DataError, match="no rows"):
        stats.mean_interval([])


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(-0.002, 0.022, "inside the noise"), (-0.04, -0.02, "lower"), (0.02, 0.04, "higher")]
)
def test_the_verdict_of_a_difference_says_where_it_is_noise(low, high, verdict):
    assert stats.Interval((low + high) / 2, low, high).verdict == verdict


@pytest.mark.parametrize("degrees, exact", [(5, 2.570582), (47, 2.011741), (5999, 1.960364)])
def test_t_quantile(degrees, exact):
    assert stats.t_quantile(0.975, degrees) == pytest.approx(exact, abs=2e-3)


def _quick_interval(rows, metric, rng):
    seed = int(rng.integers(2**31))
    return quietly({"a": [rows]}, seed=seed).interval("a", metric)


def _quick_difference(left, right, metric, rng):
    seed = int(rng.integers(2**31))
    return quietly({"a": [left], "b": [right]}, seed=seed).difference("a", "b", metric)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 9])
def test_a_handful_of_rows_gives_an_interval_and_no_crash(n_rows):
    replicates = np.random.default_rng(0).normal(size=500)
    found = stats._interval(0.0, replicates, n_rows, 500)
    assert found.low <= np.quantile(replicates, 0.02) and found.high >= np.quantile(replicates, 0.98)


@pytest.mark.slow
def test_few_seeds_that_differ_are_covered_too():
    """Seeds apart by far more than rows are: three of them must not promise more than they know."""
    rng = np.random.default_rng(31)
    covered, equal = 0, 0
    for _ in range(ROUNDS):
        sides = [[simulated(rng, 120, skill=0.5 + rng.normal(0, 0.08)) for _ in range(3)] for _ in range(2)]
        found = quietly({"a": sides[0], "b": sides[1]}, seed=int(rng.integers(2**31)))
        one = found.interval("a", "rougeL")
        covered += one.low <= 0.5 <= one.high
        equal += found.difference("a", "b", "rougeL").is_noise
    assert covered / ROUNDS >= 0.93 and equal / ROUNDS >= 0.93


def seeded(rng, effects, *, n_rows=300):
    """Runs of one method whose skill is 0.5 and an effect of each seed."""
    return [simulated(rng, n_rows, skill=0.5 + effect) for effect in effects]


def test_what_a_seed_does_to_all_methods_is_no_difference():
    rng = np.random.default_rng(17)
    common = [-0.08, 0.0, 0.08]
    paired = {"a": seeded(rng, common), "b": seeded(rng, common)}
    turned = {"a": paired["a"], "b": paired["b"][::-1]}
    widths = [of.high - of.low for of in (quietly(runs).difference("a", "b", "rougeL") for runs in (paired, turned))]
    assert widths[0] < 0.4 * widths[1]
    alone = quietly(paired).interval("a", "rougeL")
    assert alone.high - alone.low > 2 * widths[0]


@pytest.mark.parametrize("counts", [(3, 3), (5, 3)])
def test_an_interval_over_paired_seeds_covers_the_true_difference(counts):
    """Two equal methods whose seeds share half of what they do; one method may have more of them."""
    rng, held = np.random.default_rng(23), 0
    for _ in range(ROUNDS):
        common = rng.normal(0, 0.05, size=5)
        sides = [seeded(rng, common[:n] + rng.normal(0, 0.05, size=n), n_rows=100) for n in counts]
        found = quietly({"a": sides[0], "b": sides[1]}, seed=int(rng.integers(2**31)), resamples=300)
        held += found.difference("a", "b", "rougeL").is_noise
    assert held / ROUNDS >= 0.92
