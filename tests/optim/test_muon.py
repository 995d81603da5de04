"""Muon as torch has it, under the contract of our loop."""

import copy
import io

import pytest
import torch
from two_layers import TwoLayers, rows, train, weights

from peftlib.core.errors import CheckpointError
from peftlib.optim.muon import MuonAdamW


def make(seed=0, **settings):
    torch.manual_seed(seed)
    model = TwoLayers()
    matrices = [model.up.weight, model.down.weight, model.square.weight]
    return model, MuonAdamW(matrices, [model.norm], lr=1e-2, **settings)


def test_it_moves_as_torchs_muon_and_adamw_do():
    ours, optimizer = make(weight_decay=0.1)
    theirs = copy.deepcopy(ours)
    matrices = [theirs.up.weight, theirs.down.weight, theirs.square.weight]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([theirs.norm], lr=1e-2, weight_decay=0.0)
    train(ours, optimizer, range(6))
    for step in range(6):
        x, y = rows(step)
        ((theirs(x) - y).square().sum() / len(x)).backward()
        for one in (muon, adam):
            one.step()
            one.zero_grad()
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=1e-5)


def test_a_scaled_loss_changes_nothing_and_pieces_of_a_batch_sum_to_it():
    (one, optimizer), (scaled, other), (cut, third) = (make(max_grad_norm=0.5) for _ in range(3))
    train(one, optimizer, range(5))
    train(scaled, other, range(5), scale=1024.0)
    assert torch.equal(weights(one), weights(scaled))
    train(cut, third, range(1), pieces=((0, 3), (3, 8)))
    whole, optimizer = make(max_grad_norm=0.5)
    train(whole, optimizer, range(1))
    # What its bfloat16 products make of this differs by their rounding.
    for matrix, part in zip(optimizer.param_groups[0]["params"], third.param_groups[0]["params"]):
        found = third.state[part]["momentum_buffer"]
        torch.testing.assert_close(optimizer.state[matrix]["momentum_buffer"], found, atol=1e-6, rtol=1e-5)


def test_a_resume_is_bit_equal_and_a_foreign_state_is_refused():
    straight, optimizer = make()
    train(straight, optimizer, range(6))
    first, optimizer = make()
    train(first, optimizer, range(3))
    stored = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], stored)
    stored.seek(0)
    state, kept = torch.load(stored, weights_only=True)
    second, optimizer = make(seed=9)
    second.load_state_dict(state)
    optimizer.require_state(kept)
    optimizer.load_state_dict(kept)
    train(second, optimizer, range(3, 6))
    assert torch.equal(weights(straight), weights(second))
    kept["state"][0]["momentum_buffer"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match="momentum_buffer of weight 0 should have the shape"):
        optimizer.require_state(kept)


def test_an_inf_is_found_before_anything_moves_and_gradients_can_stay_where_they_are():
    model, optimizer = make()
    optimizer.keeps_buffers = True
    train(model, optimizer, range(2))
    before, place = weights(model), model.up.weight.grad.data_ptr()
    (model.up.weight.sum() * float("inf")).backward()
    _, found_inf = optimizer.finish_accumulation()
    optimizer.zero_grad()
    assert found_inf == 1 and torch.equal(weights(model), before)
    train(model, optimizer, range(2, 3))
    assert model.up.weight.grad.data_ptr() == place and not optimizer.can_capture()
