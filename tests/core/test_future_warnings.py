"""What transformers, PEFT and torch have deprecated is not called: neither by training nor by generation."""

import warnings

import pytest
import torch

from peftlib.evaluation.evaluate import load_model
from peftlib.evaluation.inference.engines import generate_rows
from peftlib.evaluation.inference.forward import _cache_argument
from peftlib.train.loop import TrainingRun


@pytest.fixture(autouse=True)
def deprecations_are_errors():
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", kind)
        yield


@pytest.mark.parametrize("method, checkpointing", [("qlora", "on"), ("galore", "offload"), ("full", "off")])
def test_training_and_answering_call_nothing_deprecated(make_study, method, checkpointing):
    study = make_study(max_steps=1, activation_checkpointing=checkpointing)
    TrainingRun(study, method, log=lambda line: None).train()
    model = load_model(study, method, 0, device="cpu", dtype=torch.float32)
    prompts = [[2, 30, 31, 32], [2, 33]]
    for engine in ("slots", "plain"):
        assert len(list(generate_rows(model, prompts, [3, 3], engine=engine, log=lambda line: None))) == 2


def test_the_cache_goes_by_the_name_that_a_release_of_transformers_gives_it():
    class Older:
        def forward(self, input_ids=None, past_key_values=None): ...

    class Newer:
        def forward(self, input_ids=None, cache=None): ...

    assert [_cache_argument(kind) for kind in (Older, Newer)] == ["past_key_values", "cache"]
