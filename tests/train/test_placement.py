"""What a run takes of a machine it gives back, and a cache is never worth a run."""

import types

import pytest
import torch

from peftlib.core import config
from peftlib.models import compile as compiled
from peftlib.models.kernels import losses
from peftlib.train import placement
from peftlib.train.loop import TrainingRun


@pytest.fixture
def card(monkeypatch):
    """A made-up card of 16 GiB, of which this process may take 0.75: {"share": ...}."""
    state = {"share": 0.75}
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: state["share"])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: state.update(share=share))
    properties = types.SimpleNamespace(total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    return state


def test_the_memory_cap_holds_for_the_run_and_is_lifted_after_it_whatever_ends_it(card):
    capped = config.resolve("demo", memory_gib=4.0)
    with pytest.raises(KeyError), placement.memory_cap(capped, "cuda"):
        assert card["share"] == 0.25
        raise KeyError
    assert card["share"] == 0.75
    for cfg, device in ((config.resolve("demo"), "cuda"), (capped, "cpu")):
        with placement.memory_cap(cfg, device):
            assert card["share"] == 0.75


def test_a_run_lifts_its_cap_where_it_cannot_even_begin(make_study, card, monkeypatch):
    run = TrainingRun(make_study(memory_gib=4.0), "qlora", log=lambda line: None)
    real = placement.memory_cap
    monkeypatch.setattr("peftlib.train.loop.memory_cap", lambda cfg, device: real(cfg, "cuda"))

    def refuse(*args, **settings):
        assert card["share"] == 0.25
        raise KeyError("planted")

    monkeypatch.setattr("peftlib.train.loop.ExecutionPlan", refuse)
    with pytest.raises(KeyError, match="planted"):
        run.train()
    assert card["share"] == 0.75


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("not to be saved")])
def test_a_compile_cache_that_cannot_be_written_costs_a_line(make_study, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(compiled.CompileCache, "save", fail)
    monkeypatch.setattr(compiled.CompileCache, "load", lambda self: None)
    monkeypatch.setattr(compiled, "resolve", lambda *args: (True, "planted"))
    monkeypatch.setattr(compiled, "compile_layers", lambda model, **settings: model)
    monkeypatch.setattr("peftlib.models.kernels.losses._compiled_chunk_loss", lambda: losses._chunk_loss)
    lines = []
    record = TrainingRun(make_study(max_steps=2), "qlora", log=lines.append).train()
    assert record["status"] == "ok" and record["placement"]["is_compiled"]
    told = [line for line in lines if "compiled layers could not be kept" in line]
    assert len(told) == 1 and str(error) in told[0]
