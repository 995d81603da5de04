"""Runs that start from the weights of another study."""

import pytest
import torch
from trainings import FAST, assert_equal_weights, trained

from peftlib import data
from peftlib.core.errors import CheckpointError, StudyError
from peftlib.models.inspect import trainable
from peftlib.train.loop import TrainingRun


def weights_at_start(study, method):
    """What a run's weights are when its first step begins."""
    run = TrainingRun(study, method, log=lambda line: None)
    seen = {}

    def first_step():
        seen.update({name: p.detach().clone() for name, p in trainable(run.model).items()})
        raise KeyboardInterrupt

    run._step = first_step
    with pytest.raises(KeyboardInterrupt):
        run.train()
    return seen, run.record


@pytest.mark.parametrize("method", ["qlora", "galore", "hybrid"])
def test_a_fork_starts_from_the_weights_another_study_has_reached(make_study, method):
    source = make_study(study="source", max_steps=4, max_seconds=1e-9, **FAST)
    run, record = trained(source, method)
    assert record["status"] == "stopped"
    reached = {name: p.detach().clone() for name, p in trainable(run.model).items()}
    start, forked = weights_at_start(make_study(study="fork-a", fork="source", lora_learning_rate=1e-5), method)
    assert_equal_weights(start, reached)
    assert forked["forked_from"] == f"source, {method}-s0, step 1"
    run, record = trained(make_study(study="source", max_steps=4, **FAST), method)
    start, forked = weights_at_start(make_study(study="fork-b", fork="source"), method)
    assert forked["forked_from"] == f"source, {method}-s0, finished" and record["status"] == "ok"
    for name, p in trainable(run.model).items():
        torch.testing.assert_close(start[name], p, atol=0, rtol=2**-8)  # a full model is kept in bf16


def test_a_fork_that_cannot_be_is_refused_with_the_way_out(make_study):
    with pytest.raises(StudyError, match="fork='nowhere': there is no such study"):
        make_study(study="a", fork="nowhere")
    source = make_study(study="b", max_steps=1)
    with pytest.raises(StudyError, match="fork='b': .* train it there first"):
        trained(make_study(study="a", fork="b"), "qlora")
    trained(source, "qlora")
    with pytest.raises(CheckpointError, match="use the same model, method and ranks"):
        trained(make_study(study="c", fork="b", lora_rank=2), "qlora")


def test_a_fork_that_has_learnt_its_test_rows_is_refused(make_study, monkeypatch):
    trained(make_study(study="source", max_steps=1), "qlora")
    forked = make_study(study="forked", fork="source")
    run = TrainingRun(forked, "qlora", log=lambda line: None)
    real = data.load_split
    leaky = {"test": "train", "valid": "valid", "train": "train"}
    monkeypatch.setattr("peftlib.train.run_state.data.load_split", lambda folder, split: real(folder, leaky[split]))
    with pytest.raises(StudyError, match=r"fork='source': 12 of the 12 test rows here were training rows there"):
        run.train()
