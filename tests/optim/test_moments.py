import torch

from peftlib.optim import moments


def test_8_bit_moments_come_back_within_their_code_and_take_a_quarter():
    state = moments.fresh({}, torch.empty(64, 128), bits=8)
    value = torch.randn(64, 128) * 1e-3
    moments.write(state, "exp_avg", value)
    moments.write(state, "exp_avg_sq", value.square())
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg"].shape == (64, 128)
    assert (moments.read(state, "exp_avg") - value).norm() < 0.02 * value.norm()
    assert (moments.read(state, "exp_avg_sq") - value.square()).norm() < 0.02 * value.square().norm()
    assert sum(t.numel() * t.element_size() for t in state.values()) < 2 * 64 * 128 * 1.05


def test_small_moments_stay_float32():
    state = moments.fresh({}, torch.empty(8, 8), bits=8)
    assert state["exp_avg"].dtype == torch.float32 and moments.read(state, "exp_avg") is state["exp_avg"]


def test_stochastic_rounding_keeps_the_mean_of_updates_that_nearest_loses():
    generator = torch.Generator().manual_seed(0)
    stochastic = nearest = torch.ones(4096).bfloat16()
    for _ in range(100):
        stochastic = moments.round_stochastically(stochastic.float() + 1e-4, generator)
        nearest = (nearest.float() + 1e-4).bfloat16()
    assert abs(float(stochastic.float().mean()) - 1.01) < 5e-4
    assert (nearest == 1).all()


def test_stochastic_rounding_is_exact_where_bfloat16_is_and_keeps_inf_and_nan():
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("-inf")])
    assert torch.equal(moments.round_stochastically(value, generator).float(), value)
    assert moments.round_stochastically(torch.tensor([float("nan")]), generator).isnan().all()


def test_8_bits_are_the_codes_nearest_value_as_close_as_bitsandbytes_own():
    for name, value in (("exp_avg", torch.randn(100, 77)), ("exp_avg_sq", torch.randn(40, 1000).pow(6))):
        numbers, scales = moments._quantized(name, value)
        code = moments._code(name, value.device)
        theirs = torch.ops.bitsandbytes.quantize_blockwise(value, code, 256)
        assert torch.equal(scales, theirs[1])
        errors = []
        for part in ((numbers, scales), theirs):
            back = torch.ops.bitsandbytes.dequantize_blockwise(*part, code, 256, torch.float32)
            errors.append((back - value).abs())
        assert (errors[0] <= errors[1] + 1e-6 * scales.max()).all()


def test_zeros_in_8_bits_come_back_as_zeros():
    state = moments.fresh({}, torch.empty(64, 128), bits=8)
    assert not moments.read(state, "exp_avg").any() and not moments.read(state, "exp_avg_sq").any()
