"""Training is stopped from the page and goes on when its cell is run again, under both lines of ipykernel."""

import re
import shutil

import pytest
from lab_server import KERNEL_6, KERNEL_6_FOLDER
from tiny import TINY

from peftlib.core import config
from peftlib.core.study import Study
from peftlib.storage.checkpoint import CheckpointDir

pytestmark = pytest.mark.browser

# Long enough to interrupt, short enough to wait for.
LONG = {"epochs": 40, "logging_steps": 5, "save_steps": 50, "eval_steps": 1000}
STEPS = 240
TRAINING = "train_live(run)"


@pytest.fixture(params=["python3", KERNEL_6])
def training(request, lab, tiny_model, built_data):
    """(the open 02_qlora, its training cell, the run's CheckpointDir), all cells above having run."""
    if request.param == KERNEL_6 and not KERNEL_6_FOLDER.is_dir():
        pytest.skip(f"no {KERNEL_6_FOLDER}: make {KERNEL_6_FOLDER.relative_to(KERNEL_6_FOLDER.parent.parent)} makes it")
    name = f"{request.function.__name__.split('_')[2]}-{request.param}"  # a study of its own for each test and kernel
    fields = {"profile": "demo", "study": name, "model": str(tiny_model), **TINY, **LONG}
    study = Study(lab.server.runs / fields["study"], config.resolve(**fields))
    shutil.copytree(built_data, study.data_dir)
    study.freeze()
    copy = lab.server.put("02_qlora", fields=fields, kernel=request.param, copy=f"02_qlora-{name}")
    with lab.opened(copy) as opened:
        cell = opened.cell(TRAINING)
        opened.run_above(cell, seconds=120)
        yield opened, cell, CheckpointDir(study.checkpoint_dir("qlora", 0), keep=1)


def started(cell):
    """Start the cell; what `start` returned, once the panel shows a step."""
    before = cell.start()
    cell.wait_for(rf"seed 0: step [1-9]\d* of {STEPS}")
    return before


def require_whole_checkpoint(checkpoints, cell):
    """The step at which the cell says that it stopped, of which a checkpoint that verifies stands; no widget is
    left."""
    step = int(cell.wait_for(rf"stopped: (\d+) of {STEPS} steps")[1])
    kept, skipped = checkpoints.newest()
    assert 0 < step < STEPS and skipped == [] and kept.state["progress"]["step"] == step
    assert f"stopped at step {step} of {STEPS}; run this cell again to resume from step {step}" in cell.text
    assert not cell.has_widgets() and cell.problems() == []
    return step


def require_it_goes_on(cell, step):
    """Run again, the cell takes up its work at that step and comes to its end."""
    cell.run(seconds=240)
    assert f"resumes at step {step} of {STEPS}" in cell.text
    assert f"ok: {STEPS} of {STEPS} steps" in cell.text
    assert not cell.has_widgets() and cell.problems() == []


def test_the_interrupt_button_saves_and_the_cell_goes_on_when_run_again(training):
    opened, cell, checkpoints = training
    before = started(cell)
    opened.interrupt()
    cell.wait_until_over(before)
    step = require_whole_checkpoint(checkpoints, cell)
    assert not re.search("KeyboardInterrupt|Traceback", cell.text)
    require_it_goes_on(cell, step)
