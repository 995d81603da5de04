"""What a run takes of a machine it gives back, and a cache is never worth a run."""

import functools
import types

import pytest
import torch

from peftlib.core import config
from peftlib.core.errors import ConfigError, ModelError
from peftlib.models import compile as compiled
from peftlib.models.kernels import losses
from peftlib.models.shapes import CARDS, SHAPES
from peftlib.train import batching, placement
from peftlib.train.loop import TrainingRun
from peftlib.train.step import Stepper


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
    told = [line for line in lines if "could not cache the compiled layers" in line]
    assert len(told) == 1 and str(error) in told[0]


def refuse(*args, **settings):
    raise RuntimeError("planted: no code for\nsm_75")


def refuses_backward(graph, inputs):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=refuse)(
        graph, inputs
    )


@pytest.fixture
def compiling(monkeypatch, tmp_path):
    """compiling(backend) -> runs are compiled by it, the layers alone, and no machine's cache is touched."""
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path / "cache"))
    real = compiled.compile_layers

    def use(backend):
        monkeypatch.setattr(compiled, "resolve", lambda *args: (True, "planted"))
        monkeypatch.setattr(compiled, "compile_layers", functools.partial(real, backend=backend))
        monkeypatch.setattr(losses, "_compiled_chunk_loss", lambda: losses._chunk_loss)

    torch._dynamo.reset()
    yield use
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["setting up", "forward", pytest.param("backward", marks=pytest.mark.slow), "loss"])
def test_where_compiling_fails_the_step_is_repeated_and_training_goes_on_uncompiled(
    make_study, compiling, monkeypatch, where
):
    rates = {"lora_learning_rate": 1e-2, "galore_learning_rate": 1e-2, "lora_dropout": 0.1, "max_steps": 4}
    plain = TrainingRun(make_study(study="plain", **rates), "hybrid", log=lambda line: None).train()
    compiling({"forward": refuse, "backward": refuses_backward}.get(where, "eager"))
    if where == "setting up":
        monkeypatch.setattr(compiled, "compile_layers", refuse)
    if where == "loss":
        fails = torch.compile(losses._chunk_loss_to_fuse, backend=refuse)
        monkeypatch.setattr(losses, "_compiled_chunk_loss", lambda: fails)
    lines = []
    run = TrainingRun(make_study(**rates), "hybrid", log=lines.append)
    record = run.train()
    assert record["status"] == "ok" and record["steps"] == 4 and record["placement"]["is_compiled"] is False
    assert record["placement"]["compile_error"] == "RuntimeError: planted: no code for sm_75"
    told = [line for line in lines if "compiling failed" in line]
    assert told == ["compiling failed (RuntimeError: planted: no code for sm_75): training continues uncompiled"]
    assert not run.stepper.loss_settings["is_compiled"] and not list(run.execution._cache.path.parent.glob("*.bin"))
    for ours, theirs in zip(record["history"], plain["history"], strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize(
    "error, step, is_compilers",
    [
        (RuntimeError("of Triton"), 2, True),
        (RuntimeError("of a later step"), 4, False),
        (torch._dynamo.exc.InternalTorchDynamoError("a new shape"), 4, True),
        (ModelError("ours"), 2, False),
    ],
)
def test_what_counts_as_the_compilers_error(make_study, compiling, monkeypatch, error, step, is_compilers):
    compiling("eager")
    monkeypatch.setattr(compiled, "compile_layers", lambda model, **settings: model)
    real = Stepper.forward_backward

    def fail_once(self, *args):
        if run.progress.step == step - 1 and run.execution.is_compiled:
            raise error
        return real(self, *args)

    monkeypatch.setattr(Stepper, "forward_backward", fail_once)
    run = TrainingRun(make_study(max_steps=4), "lora", log=lambda line: None)
    if is_compilers:
        assert run.train()["steps"] == 4 and run.execution.compile_error
        return
    with pytest.raises(type(error), match=str(error)):
        run.train()
    assert run.execution.is_compiled


def told_on_a_card(study, monkeypatch, method="qlora"):
    """(what a run would say of compiling on a GPU with Triton, its ExecutionPlan)."""
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compiled, "compile_layers", lambda model, **settings: model)
    monkeypatch.setattr(placement, "choose_kernel", lambda *args, **settings: (None, ""))
    lines = []
    real = placement.ExecutionPlan

    def on_cuda(*args, device, **settings):
        return real(*args, **settings, device="cuda")

    run = TrainingRun(study, method, log=lines.append)
    with monkeypatch.context() as patch:
        patch.setattr("peftlib.train.loop.ExecutionPlan", on_cuda)
        run._build_optimizer()
    return next(line for line in lines if "compiling the layers" in line), run.execution


def test_auto_weighs_what_compiling_takes_against_what_it_saves_and_says_so(make_study, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(placement, "step_seconds", lambda *args, **how: 0.6)  # compiled; else 1.0
    long, short = (make_study(study=f"{n}", epochs=200, max_steps=n) for n in (400, 40))
    told, execution = told_on_a_card(long, monkeypatch)
    assert told == "compiling the layers: about 25 s, saves about 160 s over 400 steps" and execution.is_compiled
    told, execution = told_on_a_card(short, monkeypatch)
    assert (
        told == "not compiling the layers: about 25 s, would save about 16 s over 40 steps"
        and not execution.is_compiled
    )
    assert "about 20 s, saves about 160 s" in told_on_a_card(long, monkeypatch, "galore")[0]
    execution._cache.keep_seconds(8.0)  # as this machine has done it before
    told, execution = told_on_a_card(short, monkeypatch)
    assert told == "compiling the layers: about 8 s, saves about 16 s over 40 steps" and execution.is_compiled
    execution._cache.path.write_bytes(b"of an earlier session")
    assert "about 5 s, saves" in told_on_a_card(short, monkeypatch)[0]


def test_a_resumed_run_counts_the_steps_left(make_study, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(placement, "step_seconds", lambda *args, **how: 0.6)
    study = make_study(epochs=200, max_steps=400)
    (study.checkpoint_dir("qlora", 0) / "step-000370").mkdir(parents=True)
    (study.checkpoint_dir("qlora", 0) / "step-of-nobody").mkdir()
    told, execution = told_on_a_card(study, monkeypatch)
    assert (
        told == "not compiling the layers: about 25 s, would save about 12 s over 30 steps"
        and not execution.is_compiled
    )


def test_the_first_compiled_step_is_what_compiling_took(make_study, compiling, monkeypatch):
    compiling("eager")
    run = TrainingRun(make_study(max_steps=2), "lora", log=lambda line: None)
    record = run.train()
    assert run.execution._cache.expected_seconds(25.0) == pytest.approx(record["first_step_s"], abs=0.01)
    assert "-lora-2x64-fp32.bin" in run.execution._cache.path.name


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_seconds_of_a_step_are_those_of_the_measured_speed(monkeypatch, method):
    shape, how = SHAPES["gemma-3-1b"], {"precision": "bf16", "tokens": 16 * 1024, "rows": 16}
    monkeypatch.setattr(placement, "card_at_hand", lambda: ("h100", CARDS["h100"]))
    fast = placement.step_seconds(shape, method, **how)
    assert 0.2 < fast < 0.5  # some 50,000 tokens/s were measured
    assert placement.step_seconds(shape, method, **(how | {"tokens": 16 * 512})) < 0.55 * fast
    monkeypatch.setattr(placement, "card_at_hand", lambda: ("t4", CARDS["t4"]))
    assert placement.step_seconds(shape, method, **how) > 5 * fast
    monkeypatch.setattr(placement, "card_at_hand", lambda: None)  # a card that is not listed
    assert placement.step_seconds(shape, method, **how) > fast


def test_after_a_failed_step_the_device_is_waited_for_before_gradients_are_forgotten():
    done = []
    optimizer = types.SimpleNamespace(drop_gradients=lambda: done.append("drop_gradients"))
    graphs = types.SimpleNamespace(reset=lambda: done.append("reset"))
    stepper = Stepper(None, optimizer, None, device="cpu", precision="fp32", is_compiled=True)
    stepper.graphs = graphs
    stepper.start_over(is_compiled=False)
    assert done == ["reset", "drop_gradients"] and stepper.loss_settings["is_compiled"] is False


def test_running_out_of_memory_never_leads_to_a_plan_that_takes_more(make_study):
    execution = object.__new__(placement.ExecutionPlan)
    execution.cfg = make_study(batch_size=1, activation_checkpointing="offload").cfg
    execution.micro_batch_size, execution.recomputed, execution.method = 1, 2, "qlora"
    with pytest.raises(ConfigError, match="activation_checkpointing=offload: lower max_length"):
        execution.recover_from(torch.OutOfMemoryError("planted"), 7)


def test_validation_that_runs_out_of_memory_leaves_the_model_in_training(make_study, monkeypatch):
    run, losses_ = TrainingRun(make_study(eval_steps=2, max_steps=4, epochs=9), "qlora", log=str), []
    real, modes, forward_backward = batching.batch_loss_sum, [], Stepper.forward_backward

    def full_once(*args):
        losses_.append(args)
        if len(losses_) == 1:
            raise torch.OutOfMemoryError("planted")
        return real(*args)

    def with_room(self, call):  # as if graphs were captured
        try:
            return call()
        except torch.OutOfMemoryError:
            return call()

    def noted(self, *args):
        modes.append(self.model.training)
        return forward_backward(self, *args)

    monkeypatch.setattr(batching, "batch_loss_sum", full_once)
    monkeypatch.setattr(Stepper, "with_room", with_room)
    monkeypatch.setattr(Stepper, "forward_backward", noted)
    assert len(run.train()["valid_history"]) == 2 and all(modes)


def test_a_failed_pass_leaves_no_products_waiting(make_study, monkeypatch):
    run = TrainingRun(make_study(max_steps=1), "lora", log=str)
    fused = [module.fused for module in run.model.modules() if hasattr(module, "fused")]
    real, left = Stepper.forward_backward, []

    def full_once(self, *args):
        if not left:
            left.append(fused[0])
            fused[0].given, fused[0].waiting = torch.ones(1), [torch.ones(1)]
            raise torch.OutOfMemoryError("planted")
        assert all(not part.waiting and part.given is None for part in fused)
        return real(self, *args)

    monkeypatch.setattr(Stepper, "forward_backward", full_once)
    assert run.train()["status"] == "ok" and left
