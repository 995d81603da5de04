"""CUDA graphs need a GPU; here a stand-in runs a part again instead of replaying it, so that what the parts read, write
and hand on is tested, and what happens where nothing can be captured. tests/bench/methods.py runs the real ones."""

import contextlib

import numpy as np
import pytest
import tiny
import torch

from peftlib import methods
from peftlib.core import config
from peftlib.models.inspect import trainable
from peftlib.models.kernels import attention
from peftlib.models.load import load_base
from peftlib.models.precision import loss_scaler
from peftlib.train import placement
from peftlib.train.batching import Rows, padded_size
from peftlib.train.graphs import CAPTURE_PASSES, CaptureError, StepGraphs
from peftlib.train.loop import TrainingRun
from peftlib.train.step import Stepper

STEPS = 9


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setitem(attention.KERNELS, "rows", attention.attention_by_rows)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(StepGraphs, "on_stream", lambda self: contextlib.nullcontext())


class Rerun:
    """Stands for a CUDA graph: capturing runs nothing, a replay runs the call. `result` is what the call returned."""

    captured: list = []  # noqa: RUF012 - of a test

    def __init__(self, call, args):
        self.call, self.args = call, args
        self.captured.append(call.__name__)

    def replay(self):
        args = [arg.result if isinstance(arg, Rerun) else arg for arg in self.args]
        self.result = self.call(*args)
        return self.result


def rerun(self, pool, call, *args):
    graph = Rerun(call, args)
    if call.__name__ == "finish_accumulation":  # its results are read from where the graph leaves them
        results = torch.zeros(()), torch.zeros(())

        def replay():
            for kept, made in zip(results, call(*args), strict=True):
                kept.copy_(made)

        graph.replay = replay
        return graph, results
    return graph, graph


@pytest.fixture
def trained(tiny_model):
    def train(method, *, is_graphed, lines=None, is_flat=True, tokens=300, is_limited=False):
        cfg = config.resolve(
            "demo", model=str(tiny_model), lora_rank=4, galore_rank=8, apollo_rank=8, galore_update_interval=4
        )
        found = methods.find(method)
        torch.manual_seed(0)
        base = load_base(str(tiny_model), precision="fp32", device="cpu", four_bit=found.four_bit)
        model = found.prepare(base, cfg).train()
        if is_flat:
            attention.use_kernel(model, "rows", longest=128)
        optimizer = found.build_optimizer(model, cfg)
        optimizer.gather_refreshes()
        log = (lines if lines is not None else []).append
        stepper = Stepper(model, optimizer, loss_scaler("cpu", "fp32"), device="cpu", precision="fp32", log=log)
        draw = np.random.default_rng(0)
        rows = [
            {"input_ids": draw.integers(5, tiny.WORDS, n), "is_scored": np.arange(n) > n // 3}
            for n in draw.integers(10, 120, 24)
        ]
        rows, losses = Rows(rows, is_flat=is_flat), []
        limits = {"remaining": 1, "capture": CAPTURE_PASSES, "longest": 128}
        limit = {"when_warm": lambda: rows.limit_shapes([range(6)], tokens, **limits)} if is_limited else {}
        if is_graphed:
            stepper.use_graphs(tokens, **limit)
        for step in range(STEPS):
            numbers = [(5 * step + i) % 24 for i in range(6 - step % 2)]
            batches = list(rows.batches(numbers, tokens, "cpu"))
            done = stepper.update(stepper.gradients(batches, int(rows.scored[numbers].sum()), seed=step))
            assert done.is_applied
            losses.append(done.loss)
        return losses, {name: p.detach().clone() for name, p in trainable(model).items()}, stepper

    Rerun.captured.clear()
    return train


def assert_alike(one, two):
    assert one[0] == pytest.approx(two[0], rel=1e-4)
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, two[1][name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["qlora", "galore", "hybrid", "full", "apollo", "muon"])
def test_flat_rows_and_captured_steps_train_as_rows_with_masks_do(trained, method, monkeypatch):
    with_masks = trained(method, is_graphed=False, is_flat=False)
    flat = trained(method, is_graphed=False)
    assert_alike(flat, with_masks)
    monkeypatch.setattr(StepGraphs, "_capture", rerun)
    graphed = trained(method, is_graphed=True)
    assert_alike(graphed, flat)
    captured = Rerun.captured
    assert captured.count("_run_forward") == captured.count("_run_backward") > 0
    is_captured = method not in ("apollo", "full", "muon")  # projections drawn on the host, 8-bit moments, host rates
    assert captured.count("finish_accumulation") == captured.count("_run_moves") == is_captured
    if method == "qlora":  # all its steps are alike: a length is captured once
        assert captured.count("_run_forward") == graphed[2].graphs.captured


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_steps_padded_to_few_sizes_train_as_others_do(trained, method, monkeypatch):
    monkeypatch.setattr(StepGraphs, "_capture", rerun)
    how = {"is_graphed": True, "tokens": 640}
    free, limited = (trained(method, **how, is_limited=is_limited) for is_limited in (False, True))
    assert_alike(limited, free)
    assert limited[2].graphs.captured < free[2].graphs.captured


def test_the_first_steps_are_padded_as_without_graphs(trained, monkeypatch):
    sizes = {True: [], False: []}

    def remember(self, batch, scored):
        is_captured = plain(self, batch, scored)
        sizes[is_captured].append(batch.ids.shape[1])
        return is_captured

    plain = StepGraphs.forward_backward
    monkeypatch.setattr(StepGraphs, "forward_backward", remember)
    monkeypatch.setattr(StepGraphs, "_capture", rerun)
    trained("qlora", is_graphed=True, tokens=640, is_limited=True)
    assert len(set(sizes[False])) > 1 and set(sizes[True]) == {640}


def test_a_step_that_refreshes_captures_each_size_of_its_micro_batches_twice_at_most(trained, monkeypatch):
    passes = []

    def begin(self):
        passes.append([])
        plain(self)

    def remember(self, pool, call, *args):
        if call.__name__ == "_run_forward" and not self._optimizer.is_steady():
            passes[-1].append(args)
        return rerun(self, pool, call, *args)

    plain = StepGraphs.begin_pass
    monkeypatch.setattr(StepGraphs, "begin_pass", begin)
    monkeypatch.setattr(StepGraphs, "_capture", remember)
    graphed = trained("galore", is_graphed=True, tokens=128)
    refreshing = [shapes for shapes in passes if shapes]
    assert refreshing and all(len(shapes) <= 1 + len(set(shapes)) for shapes in refreshing)
    assert_alike(graphed, trained("galore", is_graphed=False, tokens=128))


def test_what_a_pass_reads_is_made_before_any_capture(trained, monkeypatch):
    missing = []

    def look(self, pool, call, *args):
        missing.extend(view for view in self._optimizer._views.values() if view._narrow is None)
        return rerun(self, pool, call, *args)

    monkeypatch.setattr(StepGraphs, "_capture", look)
    graphs = trained("galore", is_graphed=True, tokens=128)[2].graphs  # of three passes and more in the first step
    assert graphs.captured and graphs._optimizer._views and not missing


def test_after_out_of_memory_nothing_longer_than_the_new_micro_batch_is_captured(make_study, monkeypatch):
    asked = []

    def capture(self, pool, call, *args):
        if call.__name__ == "_run_forward":
            asked.append(args[0])
            if args[0] > 1500:
                self.reset()
                raise torch.OutOfMemoryError("planted")
        return rerun(self, pool, call, *args)

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    monkeypatch.setattr(placement, "choose_kernel", lambda *args, **settings: ("rows", ""))
    fields = {"batch_size": 3, "micro_batch_size": 16, "max_length": 700, "max_steps": 8, "epochs": 10}
    lines = []
    run = TrainingRun(make_study(**fields), "qlora", log=lines.append)
    record = run.train()
    assert record["status"] == "ok" and record["placement"]["captured_lengths"] > 0
    assert [line.split(": ")[1] for line in lines if line.startswith("out of memory")] == [
        "continuing with micro_batch_size=2, activation_checkpointing=off"
    ]
    assert asked[0] == padded_size(3 * 700) and max(asked[1:]) == padded_size(2 * 700)
    assert max(run.rows.sizes) == padded_size(2 * 700)


def test_the_longest_pass_is_captured_first_so_that_others_find_room_in_its_memory(trained, monkeypatch):
    sizes = []

    def remember(self, pool, call, *args):
        sizes.extend(args[:1] if call.__name__ == "_run_forward" else [])
        return rerun(self, pool, call, *args)

    monkeypatch.setattr(StepGraphs, "_capture", remember)
    trained("qlora", is_graphed=True)
    assert sizes[0] == padded_size(300) == max(sizes) and len(set(sizes)) > 1


def test_what_runs_out_of_memory_beside_graphs_is_repeated_without_them(trained, monkeypatch):
    monkeypatch.setattr(StepGraphs, "_capture", rerun)
    stepper, calls = trained("qlora", is_graphed=True)[2], []

    def once_full():
        calls.append(stepper.graphs.captured)
        if stepper.graphs.captured:
            raise torch.OutOfMemoryError("planted")
        return "done"

    assert stepper.with_room(once_full) == "done" and calls[0] > 0 == calls[1]
    with pytest.raises(torch.OutOfMemoryError):
        stepper.with_room(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))


def test_what_cannot_be_captured_runs_kernel_by_kernel(trained, monkeypatch):
    def refuse(self, pool, call, *args):
        raise CaptureError from RuntimeError("operation not permitted when stream is capturing")

    plain, lines = trained("galore", is_graphed=False), []
    monkeypatch.setattr(StepGraphs, "_capture", refuse)
    monkeypatch.setattr("peftlib.train.step._CAPTURE_FAILURES", 2)
    assert_alike(trained("galore", is_graphed=True, lines=lines), plain)
    told = [line for line in lines if line.startswith("CUDA graphs are disabled (operation not permitted")]
    assert len(told) == 1 and told[0].endswith("training continues without them")


def test_an_update_that_cannot_be_captured_runs_kernel_by_kernel(trained, monkeypatch):
    def refuse_updates(self, pool, call, *args):
        if call.__name__ in ("finish_accumulation", "_run_moves"):
            raise CaptureError from RuntimeError("planted")
        return rerun(self, pool, call, *args)

    plain, lines = trained("qlora", is_graphed=False), []
    monkeypatch.setattr(StepGraphs, "_capture", refuse_updates)
    found = trained("qlora", is_graphed=True, lines=lines)
    assert_alike(found, plain)
    assert lines == ["the optimizer update runs without CUDA graphs (planted)"] and found[2].graphs.captured


def test_an_update_whose_capture_runs_out_of_memory_runs_kernel_by_kernel(trained, monkeypatch):
    def full(self, pool, call, *args):
        if call.__name__ == "finish_accumulation":
            self.reset()
            raise torch.OutOfMemoryError("planted")
        return rerun(self, pool, call, *args)

    plain, lines = trained("qlora", is_graphed=False), []
    monkeypatch.setattr(StepGraphs, "_capture", full)
    assert_alike(trained("qlora", is_graphed=True, lines=lines), plain)
    assert lines == ["the optimizer update runs without CUDA graphs (planted)"]


def test_out_of_memory_in_a_capture_reaches_the_loop(trained, monkeypatch):
    def fill(self, pool, call, *args):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(StepGraphs, "_capture", fill)
    with pytest.raises(torch.OutOfMemoryError):
        trained("qlora", is_graphed=True)
