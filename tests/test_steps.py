import pytest

from peftlib.steps import StepPlan, micro_batches


def test_each_epoch_takes_every_row_once():
    plan = StepPlan(rows=21, sequences_per_step=4, epochs=2, seed=0)
    for epoch in range(2):
        taken = [row for i in range(plan.steps_per_epoch) for row in plan.rows_of(epoch * plan.steps_per_epoch + i)]
        assert sorted(taken) == list(range(21))
    assert plan.rows_of(0) != plan.rows_of(plan.steps_per_epoch)


def test_order_depends_on_the_seed_alone():
    first, same, other = (StepPlan(64, 8, 1, seed) for seed in (0, 0, 1))
    assert first.rows_of(3) == same.rows_of(3) != other.rows_of(3)


def test_max_steps_cuts_the_plan():
    plan = StepPlan(rows=64, sequences_per_step=8, epochs=1, seed=0, max_steps=3)
    assert plan.steps == 3
    with pytest.raises(IndexError, match="step 3 of 3"):
        plan.rows_of(3)


def test_micro_batches_keep_every_row_longest_first():
    lengths = {7: 3, 1: 9, 4: 9, 2: 5, 9: 1}
    assert micro_batches([7, 1, 4, 2, 9], lengths, 2) == [[1, 4], [2, 7], [9]]
