import torch

from peftlib.core.env import seed_of


def test_every_number_changes_what_is_drawn():
    drawn = {
        float(torch.rand((), generator=torch.Generator().manual_seed(seed_of(*numbers))))
        for numbers in ((0, 0), (1, 0), (0, 1), (1, 1), (2**33, 0), (0, 0, 0))
    }
    assert len(drawn) >= 5 and seed_of(3, 4) == seed_of(3, 4)
