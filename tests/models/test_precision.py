import pytest
import torch

from peftlib.core.errors import NonFiniteLossError
from peftlib.models.precision import LossScaler, apply_step
from peftlib.optim.galore import GaLoreAdamW


def one_projected_weight():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 12))
    return weight, GaLoreAdamW([{"params": [weight], "rank": 2, "update_gap": 4, "scale": 1.0}], lr=1e-2)


@pytest.mark.parametrize("steps_before", [0, 1], ids=["first bases", "inside a gap"])
def test_overflow_in_fp16_skips_one_step_and_halves_the_scale(steps_before):
    weight, optimizer = one_projected_weight()
    scaler = LossScaler("cpu", init_scale=2.0)
    assert scaler.is_enabled()
    x = torch.ones(4, 12)

    def run(factor):
        with torch.autocast("cpu", torch.float16):
            out = torch.nn.functional.linear(x, weight)
        assert out.dtype == torch.float16
        scaler.scale((out * factor).float().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for _ in range(steps_before):
        run(1.0)
    before = weight.detach().clone()
    run(60000.0)  # gradients of 60000 x 4 rows pass fp16's 65504
    assert torch.equal(before, weight) and scaler.get_scale() == 1.0
    run(1.0)
    assert not torch.equal(before, weight)


def test_a_loss_that_no_scale_makes_finite_ends_the_run_and_changes_nothing():
    weight, optimizer = one_projected_weight()
    scaler, before = LossScaler("cpu", init_scale=3e-4), weight.detach().clone()
    for _ in range(2):
        scaler.scale(weight.sum()).backward()
        if scaler.get_scale() < 2e-4:
            with pytest.raises(NonFiniteLossError, match="fp16 overflows at every loss scale"):
                apply_step(optimizer, scaler, torch.tensor(float("nan")))
        else:
            assert not apply_step(optimizer, scaler, torch.tensor(float("nan"))).is_applied
    assert torch.equal(before, weight) and not optimizer.state[weight]
