"""A run on several processes is the run on one: weights, history, checkpoints, and what a failure leaves."""

from dataclasses import asdict

import numpy as np
import processes
import pytest
from test_train import kept_weights, trained

from peftlib import methods
from peftlib.core import record as records
from peftlib.train.parallel.exchange import divide

# Ten steps with a refresh in them. Seven rows a step of unequal lengths: no number of processes divides them evenly.
FIELDS = {"max_steps": 10, "epochs": 20, "batch_size": 3, "galore_update_interval": 6, "eval_steps": 5}
SLOW = pytest.mark.slow


def ways(methods_):
    """[(method, shard_optimizer), ...]: with moments divided where a method has any that are."""
    return [(m, shard) for m in methods_ for shard in (False, True)[: 1 + (m in ("galore", "hybrid"))]]


def relative(found, expected):
    away = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    return (away / sum(float(w.double().square().sum()) for w in expected.values())) ** 0.5


def test_rows_are_divided_by_tokens_and_each_once():
    lengths = np.random.default_rng(0).integers(2, 600, 16)
    for parts in (1, 2, 3, 8, 20):
        shares = divide(range(16), lengths, parts)
        assert sorted(row for share in shares for row in share) == list(range(16))
        loads = [int(lengths[share].sum()) for share in shares]
        assert max(loads) - min(loads) <= lengths.max()
    assert [len(share) for share in divide(range(16), [512] * 16, 4)] == [4] * 4


@pytest.mark.parametrize(
    "n, names",
    [
        (2, ("qlora", "galore")),
        pytest.param(2, tuple(methods.METHODS), marks=SLOW),
        pytest.param(4, tuple(methods.METHODS), marks=SLOW),
    ],
)
def test_several_processes_reach_the_weights_of_one(make_study, tmp_path, n, names):
    runs = []
    for method, shard in ways(names):
        study = make_study(study=f"{method}-{shard}", shard_optimizer=shard, **FIELDS)
        runs.append((method, asdict(study.cfg)))
    said = processes.train(n, runs, tmp_path / "runs", tmp_path)
    assert said.count(f"{n} processes divide the rows of each step and exchange") == len(runs)
    for method, shard in ways(names):
        one = make_study(study="one", **FIELDS)
        record = records.load(one, method, 0) or trained(one, method)[1]
        several = make_study(study=f"{method}-{shard}", **FIELDS)
        found = records.load(several, method, 0)
        assert found["status"] == "ok" and found["processes"] == n
        assert relative(kept_weights(several, method), kept_weights(one, method)) < 1e-5, (method, shard)
        for name in ("loss", "grad_norm", "tokens"):
            ours, theirs = ([entry[name] for entry in each["history"]] for each in (found, record))
            assert ours == pytest.approx(theirs, rel=1e-3), (method, name)
        ours, theirs = ([entry["valid_loss"] for entry in each["valid_history"]] for each in (found, record))
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert found["exchange"]["bytes"] >= 10 * found["exchange"]["bytes_a_step"] > 0
