"""Sizes that flat batches are padded to: few, so that few CUDA graphs are captured, and cheapest over the whole run."""

import itertools

import numpy as np
import pytest

from peftlib.train.batching import Rows, cheapest_sizes, padded_size
from peftlib.train.graphs import CAPTURE_PASSES
from peftlib.train.step import StepPlan


def cost(chosen, needed, weight, capture):
    padding = sum(weight * (min(size for size in chosen if size >= n) - n) for n in needed)
    return padding + capture * sum(chosen)


@pytest.mark.parametrize("weight", [0.1, 1, 7.5, 100])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_of_sizes_is_cheaper(weight, seed):
    draw = np.random.default_rng(seed)
    needed = (128 * draw.integers(1, 12, 20)).tolist()
    sizes = sorted(set(needed))
    others = (
        cost([*some, sizes[-1]], needed, weight, 5)
        for n in range(len(sizes))
        for some in itertools.combinations(sizes[:-1], n)
    )
    chosen = cheapest_sizes(needed, weight=weight, capture=5)
    assert list(chosen) == sorted(chosen) and cost(chosen, needed, weight, 5) == pytest.approx(min(others))


def test_the_more_passes_the_more_sizes():
    needed = [128 * n for n in range(10, 40)]
    few, more, all_of_them = (cheapest_sizes(needed, weight=weight, capture=5) for weight in (0.01, 1, 1e6))
    assert few == (max(needed),) and 1 < len(more) < len(needed) and all_of_them == tuple(needed)
    assert cheapest_sizes([], weight=1, capture=5) == ()


@pytest.fixture
def rows():
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.geometric(1 / 200, 640) + 8, 1024)
    return Rows(
        [{"input_ids": draw.integers(5, 90, n), "is_scored": np.arange(n) > n // 3} for n in lengths], is_flat=True
    )


def test_a_runs_batches_have_few_shapes_and_the_rows_they_had(rows):
    plan = StepPlan(len(rows), 16, 1, seed=0)
    steps = [plan.rows_of(step) for step in range(plan.steps)]
    free = [batch for numbers in steps for batch in rows.batches(numbers, 6144, "cpu")]
    rows.limit_shapes(steps[::2], 6144, remaining=plan.steps, capture=CAPTURE_PASSES, longest=1024)
    limited = [batch for numbers in steps for batch in rows.batches(numbers, 6144, "cpu")]
    assert len(free) == len(limited)
    for one, two in zip(free, limited, strict=True):
        edges = two.cu_seqlens.numpy()
        total = one.cu_seqlens[one.cu_seqlens < one.ids.shape[1]].max()  # the last row's end, or before it
        assert (one.ids[0, :total] == two.ids[0, :total]).all() and (
            one.places[0, :total] == two.places[0, :total]
        ).all()
        scored = int((one.targets >= 0).sum())
        assert (one.targets[:scored] == two.targets[:scored]).all() and (two.targets[scored:] < 0).all()
        assert edges[0] == 0 and edges[-1] == two.ids.shape[1] and np.diff(edges).min() >= 0
        assert np.diff(edges).max() <= 1024  # the padding's rows too
    shapes = [{(b.ids.shape[1], len(b.cu_seqlens)) for b in batches} for batches in (free, limited)]
    assert len(shapes[1]) <= 6 < len(shapes[0])
    assert len({len(b.targets) for b in limited}) < len({len(b.targets) for b in free})


def test_a_batch_larger_than_all_chosen_sizes_is_padded_as_without_them(rows):
    rows.limit_shapes([[0, 1]], 256, remaining=1, capture=CAPTURE_PASSES, longest=1024)
    longest = int(rows.lengths.argmax())
    batch = rows.flat_batch([longest])
    assert batch.ids.shape[1] == padded_size(int(rows.lengths[longest])) > max(rows.sizes)


def test_no_steps_left_is_no_fault(rows):
    rows.limit_shapes([], 4096, remaining=0, capture=CAPTURE_PASSES, longest=1024)
    assert rows.sizes == (4096,) and rows.counts == ()
    assert rows.flat_batch([0, 1]).ids.shape[1] == 4096
