"""A run on several processes by each way to start them: a notebook's kernel, torchrun, accelerate."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from tiny import TINY

from peftlib.core import record as records
from peftlib.core.errors import ConfigError, ParallelError
from peftlib.core.paths import PACKAGE
from peftlib.notebook.training_panel import train_live
from peftlib.train import run_record
from peftlib.train.loop import TrainingRun
from peftlib.train.parallel import helpers
from peftlib.train.parallel.processes import Processes, n_processes

FIELDS = {"max_steps": 6, "epochs": 20, "batch_size": 3, "eval_steps": 3}
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    # --multi_gpu, as it finds out by itself where GPUs are: with --cpu it starts one process, whatever number is asked.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}
# What a run measures of its machine, and what tells two studies and sessions apart.
MEASURED = {"first_step_s", "tokens_per_second", "train_seconds", "save_stall_seconds", "mfu", "matmul_tflops"}
MEASURED |= {"peak_memory_bytes", "schema_version", "config"}


def lived(study, **how):
    """(record, lines of the log) of a run as a notebook's cell trains it."""
    lines = []
    return train_live(TrainingRun(study, "galore", log=lines.append), **how), lines


def comparable(record):
    entries = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record["history"]]
    return {k: v for k, v in record.items() if k not in MEASURED} | {"history": entries}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_notebook_leaves_the_record_of_the_command_on_two_processes(make_study, tmp_path, launcher):
    ours, _ = lived(make_study(study="ours", processes=2, **FIELDS))
    fields = {**TINY, **FIELDS, "model": make_study(study="theirs", **FIELDS).cfg.model}
    words = [word for name, value in fields.items() for word in ("-p", f"{name}={value}")]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "peftlib", "train", "galore", "--study", "theirs"]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--profile", "demo", *words], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0 and "galore, seed 0: ok, 6 of 6 steps" in done.stdout, done.stdout + done.stderr
    theirs = records.load(make_study(study="theirs", **FIELDS), "galore", 0)
    differing = {name for name, value in ours["config"].items() if value != theirs["config"][name]}
    assert differing == {"study", "processes"} and ours["processes"] == theirs["processes"] == 2
    assert comparable(ours) == comparable(theirs)


def test_several_train_a_run_and_none_is_left(make_study):
    record, lines = lived(make_study(processes=2, **FIELDS))
    assert (record["status"], record["steps"], record["processes"]) == ("ok", 6, 2)
    assert lines[0] == "starting 1 more process to train with this one" and record["exchange"]["bytes"] > 0
    assert n_processes() == 1 and not psutil.Process().children()


def test_on_how_many_a_run_trains(monkeypatch, make_study):
    cfg = make_study().cfg
    assert helpers.wanted(cfg, "cpu") == 1 and helpers.wanted(cfg.replace(processes=2), "cpu") == 2
    for names, n in {"T4": 1, "T4 T4": 2, "H100 H100 T4 H100": 2}.items():
        cards = [SimpleNamespace(name=name, total_memory=16) for name in names.split()]
        monkeypatch.setattr("torch.cuda.device_count", lambda cards=cards: len(cards))
        monkeypatch.setattr("torch.cuda.get_device_properties", cards.__getitem__)
        assert helpers.wanted(cfg, "cuda") == n and helpers.wanted(cfg.replace(processes=1), "cuda") == 1


def test_a_process_that_cannot_start_is_told_and_none_is_left(make_study, monkeypatch):
    monkeypatch.setattr(helpers, "asdict", lambda cfg: {"lora_rank": 0})
    with pytest.raises(ParallelError, match="process 1 of 2 did not start: .*ConfigError: lora_rank=0.*processes=1"):
        lived(make_study(processes=2, **FIELDS))
    assert n_processes() == 1 and not psutil.Process().children()


@pytest.mark.slow
def test_a_process_with_other_settings_is_named(make_study, monkeypatch):
    real = helpers.asdict
    monkeypatch.setattr(helpers, "asdict", lambda cfg: real(cfg) | {"lr_scheduler": "linear"})
    study = make_study(processes=2, **FIELDS)
    said = r"process 1 failed with ConfigError: run_hash is '\w+' in process 1 \(\S+\) and '\w+' in process 0"
    with pytest.raises(ParallelError, match=said):
        lived(study)
    assert not psutil.Process().children() and records.load(study, "galore", 0) is None


def test_processes_have_to_be_alike_in_code_data_and_settings(make_study, monkeypatch):
    run, asked = TrainingRun(make_study(), "galore", log=lambda line: None), {}
    run.processes = SimpleNamespace(world=2, require_alike=asked.update)
    run_record.require_alike(run)
    assert {"run_hash", "split_hash", "precision", "peftlib's commit", "version of torch"} <= asked.keys()
    group = object.__new__(Processes)
    group.rank, group._peers = 1, [["first-node", 1, 0.0], ["second-node", 2, 0.0]]
    for name in asked:
        group.from_main = lambda call, name=name: call() | {name: "another"}
        with pytest.raises(ConfigError, match=f"{name} is .* in process 1 .* and 'another' in process 0 .first-node"):
            group.require_alike(asked)


def test_a_process_without_a_gpu_says_so(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"process 1 of this machine has no GPU: torch sees 1; .*--nproc-per-node 1"):
        Processes("cuda")


def test_a_finished_run_starts_no_process(finished, monkeypatch):
    monkeypatch.setattr(helpers, "_Helper", lambda *args: pytest.fail("a process was started"))
    record, lines = lived(finished("galore", processes=2))
    assert record["status"] == "ok" and "already finished" in lines[0]
