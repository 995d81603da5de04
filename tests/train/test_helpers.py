"""A notebook's run on several processes: the kernel and those that it starts."""

import os
import signal

import psutil
import pytest
import torch
from test_train import trained

from peftlib.core import record as records
from peftlib.core.errors import ParallelError
from peftlib.notebook.training_panel import train_live
from peftlib.train.loop import TrainingRun
from peftlib.train.parallel import helpers, processes

FIELDS = {"max_steps": 6, "epochs": 20, "batch_size": 3, "eval_steps": 3}


def test_x(make_study):
    study = make_study(processes=2, **FIELDS)
    lines = []
    run = TrainingRun(study, "galore", log=lines.append)
    record = train_live(run)
    print("\n".join(lines))
    print(record["processes"], record["exchange"])
    assert record["status"] == "ok"
    assert not psutil.Process().children()
