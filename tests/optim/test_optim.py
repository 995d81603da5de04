import copy
import io
from functools import partial

import pytest
import torch
from two_layers import TwoLayers, make, rows, train, weights

from peftlib.core.errors import ConfigError
from peftlib.optim.adamw import AccumulatingAdamW
from peftlib.optim.galore import GaLoreAdamW
from peftlib.optim.subspace import fit_basis, fit_basis_by_svd


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reference_mode_agrees_with_galore_torch_over_two_refreshes(weight_decay):
    from galore_torch import GaLoreAdamW as Theirs

    ours, optimizer = make(reference=True, eps=1e-6, weight_decay=weight_decay)
    theirs = TwoLayers()
    theirs.load_state_dict(ours.state_dict())
    groups = [
        {
            "params": [theirs.up.weight, theirs.down.weight, theirs.square.weight],
            "rank": 3,
            "update_proj_gap": 4,
            "scale": 0.25,
            "proj_type": "std",
        },
        {"params": [theirs.norm]},
    ]
    reference = Theirs(groups, lr=1e-2, weight_decay=weight_decay, no_deprecation_warning=True)
    train(ours, optimizer, range(10))
    for step in range(10):
        x, y = rows(step)
        ((theirs(x) - y).square().sum() / len(x)).backward()
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("pieces", [((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 1), (1, 8))])
def test_accumulating_equals_one_batch(pieces):
    start = weights(make()[0])
    one, optimizer = make()
    train(one, optimizer, range(10))
    many, optimizer = make()
    train(many, optimizer, range(10), pieces)
    difference = (weights(one) - weights(many)).norm()
    assert difference <= 1e-5 * weights(one).norm()
    assert difference <= 1e-4 * (weights(one) - start).norm()


def test_whole_gradients_are_freed_in_the_backward_pass():
    model, optimizer = make(stagger=False)
    train(model, optimizer, range(1))
    x, y = rows(1)
    (model(x) - y).square().sum().backward()
    assert model.up.weight.grad is None and not optimizer._full
    assert all(low.shape[0] == 3 for low in optimizer._low.values())


@pytest.mark.parametrize("where", ["up", "norm"])
@pytest.mark.parametrize("step", [0, 1, 4], ids=["first bases", "inside a gap", "refresh"])
def test_an_inf_anywhere_is_found_and_changes_nothing(where, step):
    model, optimizer = make(stagger=False)
    if step:
        train(model, optimizer, range(step))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    x, y = rows(step)
    (model(x) - y).square().sum().backward(retain_graph=True)
    planted = {"up": model.up.weight, "norm": model.norm}[where]
    (planted.flatten()[0] * float("inf")).backward()
    _, found_inf = optimizer.finish_accumulation()
    optimizer.zero_grad()
    assert found_inf == 1
    assert torch.equal(before, weights(model))
    for i, kept in state["state"].items():
        for name, value in kept.items():
            assert torch.equal(value, optimizer.state_dict()["state"][i][name])


def test_loss_scaling_covers_every_buffer():
    plain, optimizer = make(max_grad_norm=0.5)
    train(plain, optimizer, range(6))
    scaled, optimizer = make(max_grad_norm=0.5)
    train(scaled, optimizer, range(6), scale=1024.0)
    assert torch.equal(weights(plain), weights(scaled))


def test_clipping_is_by_the_norm_of_what_is_applied():
    model, optimizer = make(max_grad_norm=0.1, stagger=False)
    train(model, optimizer, range(1))
    x, y = rows(1)
    loss = (model(x) - y).square().sum() / len(x)
    grads = torch.autograd.grad(loss, [model.up.weight, model.down.weight, model.square.weight, model.norm])
    turned = [g.T if g.shape[0] >= g.shape[1] else g for g in grads[:3]]
    bases = [optimizer.state[p]["basis"] for p in (model.up.weight, model.down.weight, model.square.weight)]
    applied = [basis.T @ g for basis, g in zip(bases, turned, strict=True)] + [grads[3]]
    by_hand = torch.cat([a.flatten() for a in applied]).norm()
    ((model(x) - y).square().sum() / len(x)).backward()
    norm, _ = optimizer.finish_accumulation()
    torch.testing.assert_close(norm, by_hand)
    left = torch.cat([*(low.flatten() for low in optimizer._low.values()), model.norm.grad])
    torch.testing.assert_close(left.norm(), torch.tensor(0.1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("moments", ["keep", "project"])
def test_resume_inside_a_gap_is_bit_equal(moments):
    straight, optimizer = make(on_refresh=moments)
    train(straight, optimizer, range(10))
    first, optimizer = make(on_refresh=moments)
    train(first, optimizer, range(6))
    stored = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    second, optimizer = make(seed=9, on_refresh=moments)
    second.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    train(second, optimizer, range(6, 10))
    assert torch.equal(weights(straight), weights(second))


def test_staggered_refreshes_are_spread_over_the_gap():
    model, optimizer = make(gap=3)
    train(model, optimizer, range(1))
    due = []
    for step in range(1, 7):
        x, y = rows(step)
        (model(x) - y).square().sum().backward()
        due.append(len(optimizer._full))
        optimizer.finish_accumulation()
        optimizer.step()
        optimizer.zero_grad()
    assert due == [1] * 6


def test_loss_falls_on_repeated_rows():
    model, optimizer = make(rank=8)
    x, y = rows(0)
    before = (model(x) - y).square().mean().item()
    for _ in range(100):
        ((model(x) - y).square().sum() / len(x)).backward()
        optimizer.finish_accumulation()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(x) - y).square().mean().item() < 0.8 * before


def test_full_rank_moments_projected_is_a_rotation_of_the_mean():
    model, optimizer = make(rank=12, on_refresh="project", stagger=False)
    train(model, optimizer, range(4))
    state = optimizer.state[model.square.weight]
    before = state["basis"] @ state["exp_avg"]
    fresh = fit_basis(torch.randn(12, 12, generator=torch.Generator().manual_seed(3)), 12)
    optimizer._adopt(state, fresh)
    torch.testing.assert_close(state["basis"] @ state["exp_avg"], before, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
def test_a_rank_of_the_shorter_side_keeps_the_whole_gradient_though_that_has_one_direction(on_refresh):
    """As of k_proj and v_proj of Gemma 3 270M, (256, 640), at rank 256: one start in 36 gave a basis of nan."""
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(4, 9)) for _ in range(200)]
    group = {"params": params, "rank": 4, "update_gap": 2, "scale": 1.0}
    optimizer = GaLoreAdamW([group], lr=0.1, on_refresh=on_refresh)
    for _ in range(5):
        grads = [torch.randn(4, 1, generator=draw) @ torch.randn(1, 9, generator=draw) for _ in params]
        sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()
        norm, found_inf = optimizer.finish_accumulation()
        assert not found_inf
        torch.testing.assert_close(norm, torch.stack(grads).norm(), atol=0, rtol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.stack(params).isfinite().all()


@pytest.mark.parametrize("fit", [fit_basis, partial(fit_basis_by_svd, is_turned=True)])
def test_basis_rebuilds_a_gradient_of_its_own_rank(fit):
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(6, 2, generator=g) @ torch.randn(2, 10, generator=g) * 1e-12
    basis = fit(grad, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis @ (basis.T @ grad) * 1e12, grad * 1e12, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rank", [0, 13])
def test_rank_that_does_not_fit_is_refused_with_the_allowed_range(rank):
    with pytest.raises(ConfigError, match=rf"galore_rank={rank}, weight \(20, 12\): use 1\.\.12"):
        make(rank=rank)


def test_vector_is_not_projected():
    with pytest.raises(ConfigError, match="only 2-D weights have a basis"):
        GaLoreAdamW([{"params": [torch.nn.Parameter(torch.ones(4))], "rank": 1, "update_gap": 1, "scale": 1.0}], lr=1.0)


def test_plain_groups_equal_torchs_adamw_with_clipping():
    torch.manual_seed(0)
    ours, theirs = TwoLayers(), TwoLayers()
    theirs.load_state_dict(ours.state_dict())
    optimizer = AccumulatingAdamW(ours.parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    train(ours, optimizer, range(5))
    for step in range(5):
        x, y = rows(step)
        ((theirs(x) - y).square().sum() / len(x)).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=1e-5)


def test_finish_without_a_gradient_says_so():
    with pytest.raises(RuntimeError, match="no gradient was accumulated"):
        make()[1].finish_accumulation()


def test_learning_rate_set_after_a_resume_is_the_one_used():
    model, optimizer = make()
    train(model, optimizer, range(3))
    other, resumed = make(seed=9)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    before = weights(other)
    for group in resumed.param_groups:
        group["lr"] = 0.0
    train(other, resumed, range(3, 5))
    assert torch.equal(before, weights(other))


def test_resumed_state_keeps_its_dtype_where_weights_are_bf16():
    weight = torch.nn.Parameter(torch.randn(8, 12, dtype=torch.bfloat16))
    group = {"params": [weight], "rank": 2, "update_gap": 5, "scale": 1.0}
    optimizer = GaLoreAdamW([group], lr=1e-2)
    weight.float().square().sum().backward()
    optimizer.finish_accumulation()
    optimizer.step()
    resumed = GaLoreAdamW([dict(group)], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[weight].items():
        assert resumed.state[weight][name].dtype == torch.float32
        assert torch.equal(value, resumed.state[weight][name])


@pytest.mark.parametrize("stagger", [True, False])
def test_bases_made_in_several_passes_are_those_made_at_once(stagger):
    one, whole = make(stagger=stagger)
    several, parted = make(stagger=stagger, whole_gradient_bytes=1600)  # one, then the two others
    passes = 0
    for step in range(6):
        x, y = rows(step)
        for model, optimizer in ((one, whole), (several, parted)):
            for _ in optimizer.basis_passes():
                (model(x) - y).square().sum().backward()
                held = sum(4 * grad.numel() for grad in optimizer._full.values())
                assert held <= 1600
                passes += 1
            (model(x) - y).square().sum().backward()
            optimizer.finish_accumulation()
            optimizer.step()
            optimizer.zero_grad()
    assert passes == (2 if stagger else 4)
    torch.testing.assert_close(weights(several), weights(one), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("moment_bits, dtype", [(8, torch.float32), (32, torch.bfloat16), (8, torch.bfloat16)])
def test_light_states_and_weights_resume_bit_equal_and_still_learn(moment_bits, dtype):
    def wide(seed):
        torch.manual_seed(seed)
        weight = torch.nn.Parameter((torch.randn(80, 256) / 16).to(dtype))
        group = {"params": [weight], "rank": 32, "update_gap": 3, "scale": 1.0}
        return weight, GaLoreAdamW([group], lr=1e-2, moment_bits=moment_bits)

    def loss(weight, step):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 256, generator=g)
        return (x @ weight.float().T - x[:, :80]).square().mean()

    def go(weight, optimizer, steps):
        for step in steps:
            loss(weight, step).backward()
            optimizer.finish_accumulation()
            optimizer.step()
            optimizer.zero_grad()

    straight, optimizer = wide(0)
    before = float(loss(straight, 0))
    go(straight, optimizer, range(8))
    assert float(loss(straight, 0)) < 0.9 * before
    cut, optimizer = wide(0)
    go(cut, optimizer, range(4))
    kept = io.BytesIO()
    torch.save(optimizer.state_dict(), kept)
    kept.seek(0)
    resumed, again = wide(5)
    resumed.data.copy_(cut.data)
    again.load_state_dict(torch.load(kept, weights_only=True))
    go(resumed, again, range(4, 8))
    assert torch.equal(resumed, straight)


def test_float16_weights_are_refused():
    weight = torch.nn.Parameter(torch.zeros(8, 16, dtype=torch.float16))
    with pytest.raises(ConfigError, match="float16 weight.*keep it in float32 or bfloat16"):
        GaLoreAdamW([{"params": [weight], "rank": 2, "update_gap": 3, "scale": 1.0}], lr=1e-2)
