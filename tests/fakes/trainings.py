"""Trainings of a tiny study, and their weights."""

import pytest
import torch
from safetensors.torch import load_file

from peftlib import methods
from peftlib.train.loop import TrainingRun

# Those of methods.variants are in tests/methods/test_all_methods.py.
METHODS = tuple(name for name, spec in methods.METHODS.items() if not spec.is_counted)


def trained(study, method, **changes):
    run = TrainingRun(study, method, log=lambda line: None)
    return run, run.train(**changes)


def kept_weights(study, method):
    found = {}
    for path in sorted(study.weights_dir(method, study.cfg.seed).glob("*.safetensors")):
        found |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[name], b[name]) for name in a)


FAST = {
    "lora_learning_rate": 3e-3,
    "galore_learning_rate": 1e-2,
    "full_learning_rate": 3e-3,
    "apollo_learning_rate": 3e-3,
    "muon_learning_rate": 3e-3,
}


# The controls' long runs are left to `make test-slow`.
STUDIED = [pytest.param(m, marks=() if m in ("qlora", "galore", "hybrid") else pytest.mark.slow) for m in METHODS]


CUTS = [
    # lora trains as qlora does, full as galore.
    *(pytest.param(m, 4, marks=pytest.mark.slow if m in ("lora", "full") else ()) for m in METHODS),
    *(pytest.param(*method.values, 1, marks=method.marks) for method in STUDIED),
]
