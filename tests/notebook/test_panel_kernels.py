"""The live panel in real kernels, by the messages that a front end sends."""

import os
import re

import pytest
from front_end import COLAB, INSTALLED, IPYKERNEL6, FrontEnd
from tiny import TINY

from peftlib.core import record as records
from peftlib.storage.checkpoint import CheckpointDir

STEPS = {"epochs": 3, "eval_steps": 4}  # 18 steps
# A step of known length, so that there is time to interrupt.
OPEN = """
import os, time, torch, warnings
warnings.resetwarnings()  # other tests in this kernel make errors of some
torch.set_num_threads(1)
os.environ["PEFTLIB_ROOT"] = {root!r}
from peftlib import Study, TrainingRun
from peftlib.notebook import train_live
run = TrainingRun(Study.resolve(profile="demo", study="tiny", **{fields!r}), "qlora")
step, pause = run._step, {pause}
run._step = lambda: (time.sleep(pause), step())
print("opened")
"""
TRAIN = 'record = train_live(run)\nprint("end", record["status"], record["steps"])'


def trains(message):
    """Whether a message tells the panel's reader of a first step."""
    return message["msg_type"] == "update_display_data" and re.search(
        r"seed 0: step [1-9]\d* of 18", str(message["content"])
    )


@pytest.fixture(scope="module", params=[INSTALLED, pytest.param(IPYKERNEL6, marks=pytest.mark.slow), COLAB])
def kernel(request, kernel_of):
    return kernel_of(request.param)


@pytest.fixture
def front_end(kernel, make_study):
    """A FrontEnd of a kernel in which a slow run is open; `opening` is the cell for another one."""
    manager, client = kernel
    made = FrontEnd(client)
    made.study, made.interrupt = make_study(**STEPS), manager.interrupt_kernel
    fields = {**TINY, **STEPS, "model": made.study.cfg.model}
    made.opening = lambda pause: OPEN.format(fields=fields, pause=pause, root=os.environ["PEFTLIB_ROOT"])
    assert "opened" in made.ended(made.opening(pause=0.25))
    made.heard.clear()
    return made


def test_an_interrupt_saves_and_stops_and_waiting_cells_run_once_in_order(front_end):
    training = front_end.run(TRAIN)
    waiting = [front_end.run(f'print("cell {n}", record["status"])') for n in (1, 2)]
    front_end.hear(trains)
    front_end.interrupt()
    later = front_end.run('print("cell 3")')

    assert front_end.end_of(later) == "cell 3\n"
    steps = int(front_end.printed(training).split("end stopped ")[1])
    assert 1 <= steps < 18
    assert [front_end.printed(cell) for cell in waiting] == ["cell 1 stopped\n", "cell 2 stopped\n"]
    ran = [m["content"]["code"][:13] for m in front_end.heard if m["msg_type"] == "execute_input"]
    assert ran[-4:] == ["record = trai", *(f'print("cell {n}' for n in (1, 2, 3))]

    told = [m for m in front_end.heard if m["parent_header"]["msg_id"] == training]
    assert not any(m["msg_type"] == "comm_open" for m in told)  # no widget is left in the notebook
    left = [m["content"]["data"] for m in told if m["msg_type"] == "update_display_data"][-1]
    assert set(left) == {"text/html", "text/plain"} and "stopped after step" in left["text/plain"]

    kept, _ = CheckpointDir(front_end.study.checkpoint_dir("qlora", 0), keep=1).newest()
    assert kept.state["progress"]["step"] == steps
    record = records.load(front_end.study, "qlora", 0)
    assert (record["status"], record["steps"]) == ("stopped", steps)

    said = front_end.ended(f"{front_end.opening(pause=0)}\n{TRAIN}")
    assert f"resumes at step {steps} of 18" in said and "end ok 18" in said


def test_cells_that_wait_do_not_run_after_a_training_that_failed(front_end):
    front_end.ended("slow = run._step\nrun._step = lambda: 1 / 0 if run.progress.step == 7 else slow()")
    training = front_end.run(TRAIN)
    waiting = front_end.run('print("must not run")')
    front_end.hear(trains)
    late = front_end.run('print("must not run either")')
    assert "ZeroDivisionError" in front_end.end_of(training)
    assert [front_end.reply_to(cell)["status"] for cell in (waiting, late)] == ["aborted", "aborted"]
    # ipykernel 6 may abort what arrives in the moment after the failure too: the next try runs.
    assert "lives\n" in (front_end.ended('print("lives")'), front_end.ended('print("lives")'))
    assert "must not run\n" not in [m["content"].get("text") for m in front_end.heard]
