"""Seeds for random numbers that depend on where a run stands and on nothing it did before."""

import numpy as np


def seed_of(*numbers):
    """A 32-bit seed from whole numbers, every one of which counts.

    torch's generator on CPUs takes the low 32 bits of a seed alone, so shifting a number above them loses it.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
