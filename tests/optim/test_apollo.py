import pytest
import torch

from peftlib.core.errors import ConfigError
from peftlib.optim.apollo import ApolloAdamW


def groups(weights, **settings):
    return [{"params": weights, "rank": 4, "update_gap": 3, "scale": 4.0, **settings}]


def grads(step, shapes):
    g = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=g) * (1 + step) for shape in shapes]


SHAPES = [(12, 20), (20, 12)]


def reference(weights, projections, *, lr, scale, steps):
    """apollo-torch 1.0.3's step (channel scaling, limiter, scale at the back), with given projections, eps 0."""
    weights, states = [w.clone() for w in weights], [{} for _ in weights]
    for step in range(steps):
        for w, state, grad, (p, group) in zip(weights, states, grads(step, SHAPES), projections, strict=True):
            is_wide = grad.shape[0] < grad.shape[1]
            a = group(p, step)
            low = a @ grad if is_wide else grad @ a.T
            m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * low
            v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * low.square()
            factor = (m / v.sqrt()).norm(dim=0 if is_wide else 1) / (low.norm(dim=0 if is_wide else 1) + 1e-8)
            scaled = grad * (factor if is_wide else factor[:, None])
            if "norm" in state:
                limiter = max(float(scaled.norm() / (state["norm"] + 1e-8)), 1.01) / 1.01
                scaled = scaled / limiter
            state["norm"] = scaled.norm()
            t = step + 1
            w -= lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * scale**0.5 * scaled
    return weights


def test_the_step_is_the_packages_where_both_draw_the_same_projection():
    start = grads(99, SHAPES)
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = ApolloAdamW(groups(weights), lr=1e-2, eps=0.0)
    draw = [(p, lambda p, step: optimizer.projection(p, optimizer.param_groups[0], step)) for p in weights]
    wanted = reference(start, draw, lr=1e-2, scale=4.0, steps=7)
    for step in range(7):
        for p, grad in zip(weights, grads(step, SHAPES), strict=True):
            p.grad = grad
        optimizer.finish_accumulation()
        optimizer.step()
        optimizer.zero_grad()
    for p, w in zip(weights, wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, atol=1e-5, rtol=1e-5)


def test_the_projection_changes_with_the_gap_alone_and_needs_no_state():
    p = torch.nn.Parameter(torch.zeros(12, 20))
    one, other = (ApolloAdamW(groups([p]), lr=1e-2, seed=seed) for seed in (0, 1))
    drawn = [one.projection(p, one.param_groups[0], step) for step in range(4)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], other.projection(p, other.param_groups[0], 0))


def test_a_rank_above_the_weight_is_refused():
    with pytest.raises(ConfigError, match=r"apollo_rank=13, weight \(12, 20\): use 1\.\.12"):
        ApolloAdamW(groups([torch.nn.Parameter(torch.zeros(12, 20))], rank=13), lr=1e-2)
