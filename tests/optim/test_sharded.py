"""Moments that processes share; tests/train/test_processes.py trains with them."""

from types import SimpleNamespace

import torch

from peftlib.optim.sharded import ShardedGaLoreAdamW


def test_a_save_leaves_the_moments_of_others_out_of_the_state_that_trains():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 16)) for _ in range(2)]
    group = {"params": weights, "rank": 4, "update_gap": 3, "scale": 1.0}
    optimizer = ShardedGaLoreAdamW([group], lr=1e-3, on_refresh="project")
    optimizer.processes = SimpleNamespace(rank=0, world=2, is_main=True, broadcast_=lambda *args: None)
    optimizer.use_flat_buffer(3)
    for p in weights:
        p.square().sum().backward()
    optimizer.finish_accumulation()
    optimizer.step()
    optimizer.zero_grad()
    before = [set(optimizer.state[p]) for p in weights]
    saved = optimizer.whole_state_dict()["state"]
    assert [set(optimizer.state[p]) for p in weights] == before and {"basis", "step"} in before
    assert all({"exp_avg", "exp_avg_sq", "basis", "step"} <= set(state) for state in saved.values())
