"""Seeds for random numbers that depend on where a run stands, and the generators' states for all others."""

import random

import numpy as np
import torch


def seed_of(*numbers):
    """A 32-bit seed from whole numbers, every one of which counts.

    torch's generator on CPUs takes the low 32 bits of a seed alone, so shifting a number above them loses it.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator_states():
    """States of Python's, NumPy's and torch's generators, CUDA's included, as {name: plain tensor}."""
    version, numbers, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_place": torch.tensor([place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states):
    """Put the generators where `generator_states` found them; a GPU's is left alone where there is none now or then."""
    version, *numbers = states["python"].tolist()
    random.setstate((version, tuple(numbers), next(iter(states["python_gauss"].tolist()), None)))
    place, has_gauss = states["numpy_place"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, place, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
