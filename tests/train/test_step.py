import numpy as np
import pytest

from peftlib.train.batching import pack
from peftlib.train.step import StepPlan


def test_each_epoch_takes_every_row_once():
    plan = StepPlan(rows=21, batch_size=4, epochs=2, seed=0)
    for epoch in range(2):
        taken = [row for i in range(plan.steps_per_epoch) for row in plan.rows_of(epoch * plan.steps_per_epoch + i)]
        assert sorted(taken) == list(range(21))
    assert plan.rows_of(0) != plan.rows_of(plan.steps_per_epoch)


def test_order_depends_on_the_seed_alone():
    first, same, other = (StepPlan(64, 8, 1, seed) for seed in (0, 0, 1))
    assert first.rows_of(3) == same.rows_of(3) != other.rows_of(3)


def test_max_steps_cuts_the_plan():
    plan = StepPlan(rows=64, batch_size=8, epochs=1, seed=0, max_steps=3)
    assert plan.steps == 3
    with pytest.raises(IndexError, match="step 3 of 3"):
        plan.rows_of(3)


@pytest.mark.parametrize("multiple", [1, 64])
def test_packs_hold_every_row_once_within_the_limit(multiple):
    lengths = np.random.default_rng(0).integers(2, 600, 150)
    batches = pack(range(150), lengths, 2048, multiple=multiple)
    assert sorted(row for bins in batches for rows in bins for row in rows) == list(range(150))
    for bins in batches:
        width = -(-max(sum(lengths[row] for row in rows) for rows in bins) // multiple) * multiple
        assert len(bins) * width <= 2048


def test_packs_waste_little():
    lengths = np.random.default_rng(1).lognormal(5, 0.8, 16).astype(int) + 2
    padded = sum(
        len(bins) * max(sum(lengths[row] for row in rows) for rows in bins) for bins in pack(range(16), lengths, 8192)
    )
    assert padded < 1.1 * lengths.sum() < 16 * lengths.max()


def test_rows_of_one_length_stay_sequences_of_their_own_and_a_long_one_stands_alone():
    assert pack(range(4), [512] * 4, 2048) == [[[0], [1], [2], [3]]]
    assert pack([0, 1], [3000, 2000], 1000) == [[[0]], [[1]]]


def test_a_micro_batch_has_two_sequences_where_rows_and_limit_allow():
    lengths = np.random.default_rng(0).integers(2, 200, 40)
    assert all(len(bins) >= 2 for bins in pack(range(40), lengths, 1024, least=2))
    assert pack([3], lengths, 1024, least=2) == [[[3]]]
