"""A training cell on two processes: in a kernel with its panel, and headless under papermill."""

import os
import re
import subprocess
import sys

import nbformat
import psutil
import pytest
from front_end import CHECKOUT, INSTALLED, FrontEnd
from tiny import TINY

from peftlib.core import record as records
from peftlib.storage.checkpoint import CheckpointDir

FIELDS = {"epochs": 1000, "max_steps": 800, "save_steps": 5, "eval_steps": 200, "processes": 2}
OPEN = """
import os, torch
torch.set_num_threads(1)
os.environ["PEFTLIB_ROOT"] = {root!r}
from peftlib import Study, TrainingRun
from peftlib.notebook import train_live
study = Study.resolve(profile="demo", study="tiny", **{fields!r})
run = TrainingRun(study, "qlora")
"""
TRAIN = 'record = train_live(run)\nprint("end", record["status"], record["steps"], record["processes"])'


def shown_step(message):
    """The step that a message has the panel show, or 0."""
    found = re.search(r"seed 0: step (\d+) of 800", str(message["content"]))
    return int(found[1]) if found and message["msg_type"] == "update_display_data" else 0


@pytest.mark.slow
def test_a_cell_trains_on_two_stops_survives_the_others_death_and_goes_on(kernel_of, make_study):
    manager, client = kernel_of(INSTALLED)
    front_end, study = FrontEnd(client), make_study(**FIELDS)
    fields = {**TINY, **FIELDS, "model": study.cfg.model}
    assert front_end.ended(OPEN.format(fields=fields, root=os.environ["PEFTLIB_ROOT"])) == ""
    kernel = psutil.Process(manager.provisioner.process.pid)
    checkpoints = CheckpointDir(study.checkpoint_dir("qlora", 0), keep=1)

    cell = front_end.run(TRAIN)
    front_end.hear(lambda message: shown_step(message) > 0)
    assert len(kernel.children()) == 1
    manager.interrupt_kernel()
    stopped = int(re.search(r"end stopped (\d+) 2", front_end.end_of(cell))[1])
    assert 1 <= stopped < 800 and checkpoints.last_step() == stopped and not kernel.children()
    assert records.load(study, "qlora", 0)["status"] == "stopped"

    cell = front_end.run(TRAIN)
    front_end.hear(lambda message: shown_step(message) > stopped + 20)
    [other] = kernel.children()
    other.kill()
    said = front_end.end_of(cell)
    assert re.search(r"ParallelError: process 0 of 2 cannot continue: process 1 \(\S+, \d+\) is gone", said), said
    assert "run the same command or cell again to resume" in said
    record, kept = records.load(study, "qlora", 0), checkpoints.last_step()
    assert record["status"] == "failed" and record["error"].startswith("ParallelError") and kept >= stopped + 5

    cell = front_end.run(TRAIN)  # in the same kernel, with another process
    front_end.hear(lambda message: shown_step(message) > record["steps"])  # the panel begins with the failed run
    manager.interrupt_kernel()
    assert int(re.search(r"end stopped (\d+) 2", front_end.end_of(cell))[1]) > kept
    assert front_end.ended('print(os.environ.get("WORLD_SIZE"), run.processes.world)') == "None 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("name, method", [("02_qlora", "qlora"), ("03_galore", "galore")])
def test_papermill_trains_on_two(make_study, tmp_path, name, method):
    study = make_study()
    given = {**TINY, "profile": "demo", "study": "tiny", "model": study.cfg.model, "processes": 2}
    words = [word for field, value in given.items() for word in ("-p", field, str(value))]
    command = [sys.executable, "-m", "papermill", str(CHECKOUT / "notebooks" / f"{name}.ipynb")]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    made = tmp_path / "executed.ipynb"
    done = subprocess.run([*command, str(made), *words], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = str([cell.get("outputs") for cell in nbformat.read(made, as_version=4).cells])
    assert "2 processes divide the rows of each step" in told and "step 6/6  loss" in told
    record = records.load(study, method, 0)
    assert (record["status"], record["processes"], record["steps"]) == ("ok", 2, 6)
