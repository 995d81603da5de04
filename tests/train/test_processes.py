"""A run on several processes is the run on one: weights, history, checkpoints, and what a failure leaves."""

import os
import re
import signal
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from trainings import trained

from peftlib import methods
from peftlib.core import record as records
from peftlib.core.errors import ConfigError, ParallelError
from peftlib.core.files import GIB
from peftlib.models.inspect import trainable
from peftlib.models.shapes import SHAPES
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.train import memory_model, sweep
from peftlib.train.loop import TrainingRun
from peftlib.train.parallel.alone import OneProcess
from peftlib.train.parallel.exchange import divide
from peftlib.train.parallel.processes import Processes

# Ten steps with a refresh in them. Three rows a step, of unequal lengths: of four processes one has none.
FIELDS = {"max_steps": 10, "epochs": 20, "batch_size": 3, "galore_update_interval": 6, "eval_steps": 5}
FIELDS |= {"save_steps": 4, "max_save_overhead": 0.0}
SLOW = pytest.mark.slow


def test_what_is_summed_lies_in_memory_as_nccl_wants_it(monkeypatch):
    group, given = object.__new__(Processes), []
    group._dist = SimpleNamespace(all_reduce=None)
    monkeypatch.setattr(Processes, "_exchange", lambda self, call, tensor: given.append(tensor))
    turned = torch.zeros(5, 3).T
    for tensor in (torch.zeros(5, 3), turned):
        group.sum_(tensor)
        assert given[-1].is_contiguous() and given[-1].data_ptr() == tensor.data_ptr()


def test_a_process_that_ends_after_the_last_exchange_ends_no_other(monkeypatch):
    group = object.__new__(Processes)
    group.rank, group.failed, group._is_leaving, group._is_over = 0, None, False, threading.Event()
    ended, group._end_others = [], lambda: ended.append(group._is_leaving)
    monkeypatch.setattr(group, "_reason", lambda: "process 1 is gone", raising=False)
    group._dist = SimpleNamespace(distributed_c10d=SimpleNamespace(_abort_process_group=lambda: None))
    monkeypatch.setattr("peftlib.train.parallel.processes._WATCH_EVERY_S", 0.01)
    monkeypatch.setattr("peftlib.train.parallel.processes._GRACE_S", 0.05)
    with group.exchanging():
        pass
    watcher = threading.Thread(target=group._watch, daemon=True)
    watcher.start()
    time.sleep(0.3)  # the main process writes its weights
    assert group.failed is None and not ended
    group._is_leaving = False  # as while it exchanges
    watcher.join(5)
    assert group.failed == "process 1 is gone" and ended == [False]


def ways(methods_):
    """[(method, shard_optimizer), ...]: with moments divided where a method has any that are."""
    return [(m, shard) for m in methods_ for shard in (False, True)[: 1 + (m in ("galore", "hybrid"))]]


def weights_of(run):
    return {name: p.detach() for name, p in trainable(run.model).items()}


def weights_there(study, method, n):
    """What n processes have trained, which has to be the same to the bit in each."""
    first, *others = (torch.load(study.folder / f"{method}.{rank}.pt") for rank in range(n))
    assert all(torch.equal(each[name], first[name]) for each in others for name in first)
    return first


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
        (2, ("galore",)),
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
    alone = {name: trained(make_study(study="one", **FIELDS), name) for name in names}
    for method, shard in ways(names):
        run, record = alone[method]
        several = make_study(study=f"{method}-{shard}", **FIELDS)
        found = records.load(several, method, 0)
        assert found["status"] == "ok" and found["processes"] == n
        assert relative(weights_there(several, method, n), weights_of(run)) < 1e-5, (method, shard)
        for name in ("loss", "grad_norm", "tokens"):
            ours, theirs = ([entry[name] for entry in each["history"]] for each in (found, record))
            assert ours == pytest.approx(theirs, rel=1e-3), (method, name)
        ours, theirs = ([entry["valid_loss"] for entry in each["valid_history"]] for each in (found, record))
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert found["exchange"]["bytes"] >= 10 * found["exchange"]["bytes_a_step"] > 0
        assert found["saves"] == 2  # after 4 and 8 of 10 steps


@SLOW
def test_a_run_goes_on_with_another_number_of_processes(make_study, tmp_path):
    """2 -> 1 -> 4, with moments divided where there are several; the record says who trained."""
    fields = {**FIELDS, "shard_optimizer": True, "save_steps": 2}
    whole = make_study(study="whole", **FIELDS)
    run, straight = trained(whole, "galore")
    cut = make_study(study="cut", **fields)
    for n in (2, 1, 4):
        limited = asdict(cut.cfg.replace(max_seconds=0.0 if n == 4 else 1e-6))
        if n > 1:
            said = processes.train(n, [("galore", limited)], tmp_path / "runs", tmp_path)
        else:
            trained(make_study(study="cut", **fields, max_seconds=1e-6), "galore")
        record = records.load(cut, "galore", 0)
        assert record["processes"] == n
    assert "resumes at step 2 of 10" in said and record["status"] == "ok" and record["steps"] == 10
    told = [(c["step"], c["from"], c["to"]) for c in record["changes"] if c["what"] == "processes"]
    assert told == [(1, 2, 1), (2, 1, 4)]
    assert relative(weights_there(cut, "galore", 4), weights_of(run)) < 1e-5
    losses = [[entry["loss"] for entry in each["history"]] for each in (record, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert record["train_tokens"] == straight["train_tokens"]


@pytest.mark.parametrize("killed", [pytest.param(0, marks=SLOW), 1])
def test_a_killed_process_ends_the_others_and_the_checkpoint_stays(make_study, tmp_path, killed):
    study = make_study(**{**FIELDS, "max_steps": 2000, "epochs": 4000, "save_steps": 1, "eval_steps": 500})
    started = processes.start(2, [("qlora", asdict(study.cfg))], tmp_path / "runs", tmp_path)
    checkpoints = CheckpointDir(study.checkpoint_dir("qlora", 0), keep=1)
    try:
        until = time.monotonic() + 120
        while checkpoints.last_step() < 3:
            assert time.monotonic() < until and all(p.poll() is None for p in started), said_by(tmp_path)
            time.sleep(0.05)
        os.kill(started[killed].pid, signal.SIGKILL)
        began = time.monotonic()
        assert started[1 - killed].wait(30) != 0
        assert time.monotonic() - began < 30
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert re.search(rf"process {killed}\b.* is gone", said_by(tmp_path))
    kept = checkpoints.last_step()
    if killed:
        record = records.load(study, "qlora", 0)
        assert record["status"] == "failed" and record["error"].startswith(
            "ParallelError: process 0 of 2 cannot continue"
        )
    lines = []
    again = make_study(**{**FIELDS, "max_steps": 2000, "epochs": 4000, "eval_steps": 500}, max_seconds=1e-6)
    record = TrainingRun(again, "qlora", log=lines.append).train()
    assert record["steps"] == kept + 1 and record["status"] == "stopped"


def said_by(folder):
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.log")))


def test_what_an_exchange_that_was_given_up_has_left_is_not_saved(make_study):
    study = make_study(save_steps=2)
    run, step = TrainingRun(study, "qlora", log=lambda line: None), TrainingRun._step

    class Group(OneProcess):
        """Its other process dies in step 3, whose exchange comes to no end but to garbage."""

        def require(self):
            if run.progress.step == 3:
                raise ParallelError("process 1 is gone")

    run.processes, run._step = Group(), lambda: (step(run), run.save() if run.progress.step == 3 else None)
    with pytest.raises(ParallelError, match="process 1 is gone"):
        run.train()
    assert CheckpointDir(study.checkpoint_dir("qlora", 0), keep=1).last_step() == 2
    record = records.load(study, "qlora", 0)
    assert (record["status"], record["error"]) == ("failed", "ParallelError: process 1 is gone")


@SLOW
def test_what_ends_the_main_process_is_said_by_the_others(make_study, tmp_path):
    study = make_study(**FIELDS)
    folder = study.checkpoint_dir("qlora", 0)
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    started = processes.start(2, [("qlora", asdict(study.cfg))], tmp_path / "runs", tmp_path)
    assert all(process.wait(120) != 0 for process in started)
    assert "process 1 of 2 cannot continue: process 0 failed with" in (tmp_path / "1.log").read_text()


@SLOW
def test_out_of_memory_on_one_process_is_its_own_affair(make_study, tmp_path):
    one = make_study(study="one", **FIELDS)
    run, _ = trained(one, "galore")
    several = make_study(study="several", **FIELDS)
    fields = asdict(several.cfg) | {"micro_batch_size": 4}
    said = processes.train(2, [("galore", fields)], tmp_path / "runs", tmp_path, full_rank=0)
    assert "out of memory at step 3: continuing with micro_batch_size=2" in said
    assert relative(weights_there(several, "galore", 2), weights_of(run)) < 1e-5


def test_what_several_cards_cannot_do_is_refused_with_the_arithmetic(make_study, monkeypatch):
    cfg = make_study().cfg.replace(galore_rank=128, shard_optimizer=True)
    whole = memory_model.optimizer_bytes(SHAPES["gemma-3-1b"], "galore", cfg)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert 0.25 * whole < memory_model.optimizer_bytes(SHAPES["gemma-3-1b"], "galore", cfg) < 0.6 * whole
    with pytest.raises(ConfigError, match=r"4 GPUs do not help: each holds all weights \(\d\.\d\d GiB\)"):
        memory_model.choose(SHAPES["gemma-3-1b"], "galore", cfg, device_bytes=2 * GIB, precision="bf16")
    with pytest.raises(ConfigError, match="4 processes: a sweep runs in one process"):
        sweep.sweep(make_study(), "qlora", log=lambda line: None)
