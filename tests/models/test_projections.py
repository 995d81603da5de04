import copy

import pytest
import torch
from two_layers import make, rows, train, weights

from peftlib.models.kernels.projections import train_in_views
from peftlib.optim.galore import GaLoreAdamW


def seen_through(**settings):
    model, optimizer = make(**settings)
    views = train_in_views(model, optimizer.param_groups[0]["params"], rank=3)
    optimizer.see_through(views)
    return model, optimizer, views


@pytest.mark.parametrize("pieces", [((0, 8),), ((0, 3), (3, 8))])
@pytest.mark.parametrize(
    "settings", [{}, {"whole_gradient_bytes": 1000}, {"on_refresh": "project"}, {"stagger": False}]
)
def test_layers_that_make_projected_gradients_train_as_whole_gradients_do(settings, pieces):
    plain, optimizer = make(**settings)
    seen, its_optimizer, views = seen_through(**settings)
    assert len(views) == 3
    norm = train(plain, optimizer, range(10), pieces)
    its_norm = train(seen, its_optimizer, range(10), pieces)
    assert float((weights(plain) - weights(seen)).norm() / weights(plain).norm()) < 1e-5
    torch.testing.assert_close(norm, its_norm, rtol=1e-4, atol=0)


def test_a_whole_gradient_is_made_only_where_a_basis_is_due(monkeypatch):
    made = []
    take = GaLoreAdamW._take

    def counting(self, view, g, x):
        low = take(self, view, g, x)
        made.append(low is not None)
        return low

    monkeypatch.setattr(GaLoreAdamW, "_take", counting)
    model, optimizer, _ = seen_through(gap=6)
    for step in range(12):
        made.clear()
        train(model, optimizer, [step])
        assert sum(made) == (3 if step == 0 else step % 2 == 0), step
        assert not optimizer._full and model.up.weight.grad is None


def test_a_saved_state_goes_on_bit_for_bit_where_layers_look_for_their_bases():
    straight, optimizer, _ = seen_through()
    train(straight, optimizer, range(6))
    kept = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    train(straight, optimizer, range(6, 12))
    resumed, its_optimizer, views = seen_through(seed=1)
    resumed.load_state_dict(kept[0])
    its_optimizer.load_state_dict(kept[1])
    for p, view in views.items():
        assert its_optimizer.state[p]["basis"] is view.basis
    train(resumed, its_optimizer, range(6, 12))
    assert torch.equal(weights(straight), weights(resumed))


def test_layers_for_which_the_projection_would_cost_more_keep_their_gradients():
    model, optimizer = make(rank=8)
    assert not train_in_views(model, optimizer.param_groups[0]["params"], rank=8)
    train(model, optimizer, range(2))


def test_compiled_and_recomputed_layers_give_the_same_projected_gradients():
    model, optimizer, views = seen_through()
    train(model, optimizer, range(1))
    x, y = rows(1)

    def low(call):
        for view in views.values():
            view.gradient.grad = None
        (call(x) - y).square().sum().backward()
        return [view.gradient.grad.clone() for view in views.values()]

    plain = low(model)
    again = low(lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))
    torch._dynamo.reset()
    compiled = low(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    for one, two, three in zip(plain, again, compiled, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three)
