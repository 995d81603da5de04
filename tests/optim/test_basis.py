import pytest
import torch

from peftlib.optim.subspace import (
    COLD_ITERATIONS,
    WARM_ITERATIONS,
    energy,
    fit_basis,
    fit_basis_by_svd,
    gram,
    leading_space,
    random_start,
)


def gradient(m, n, power, seed=0):
    """A matrix whose singular values fall as i^-power."""
    g = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, m, generator=g))[0]
    right = torch.linalg.qr(torch.randn(n, m, generator=g))[0]
    return (left * torch.arange(1, m + 1).float().pow(-power)) @ right.T


def cold(grad, rank):
    start = random_start(grad.shape[0], rank, seed=1, device="cpu")
    return leading_space(gram(grad)[None], start[None], COLD_ITERATIONS)[0]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_cold_basis_keeps_99_percent_of_the_exact_ones_energy(power):
    grad = gradient(256, 512, power)
    assert energy(grad, cold(grad, 32)) >= 0.99 * energy(grad, fit_basis(grad, 32))


def test_a_warm_basis_follows_a_gradient_that_drifts():
    grad = gradient(256, 512, 0.5)
    basis = cold(grad, 32)
    noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(3))
    later = grad + noise * (0.3 * grad.norm() / noise.norm())
    warm = leading_space(gram(later)[None], basis[None], WARM_ITERATIONS)[0]
    assert energy(later, warm) >= 0.99 * energy(later, fit_basis(later, 32))


def test_a_warm_basis_keeps_each_column_in_its_place_where_svd_does_not():
    grad = gradient(64, 128, 2.0)
    basis = cold(grad, 8)
    warm = leading_space(gram(grad * -2.0)[None], basis[None], WARM_ITERATIONS)[0]
    assert ((basis * warm).sum(0) > 0.99).all()
    turned = fit_basis_by_svd(torch.roll(grad, 1, 0) * -1, 8, is_turned=False)
    assert not ((fit_basis_by_svd(grad, 8, is_turned=False) * turned).sum(0) > 0.99).all()


@pytest.mark.parametrize(
    "grad",
    [
        torch.zeros(64, 100),
        torch.randn(64, 3) @ torch.randn(3, 100),
        torch.randn(64, 100) * 1e30,
        torch.randn(64, 100) * 1e-30,
        (torch.rand(64, 100) * 6e4).half(),
    ],
    ids=["zero", "rank 3 of 8", "huge", "tiny", "fp16"],
)
def test_any_finite_gradient_gives_an_orthonormal_basis(grad):
    basis = cold(grad, 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)


def test_a_batch_gives_what_each_matrix_gives_alone():
    grads = [gradient(32, 64, 0.7, seed) for seed in range(4)]
    starts = torch.stack([random_start(32, 4, seed=9, device="cpu")] * 4)
    together = leading_space(torch.stack([gram(g) for g in grads]), starts, COLD_ITERATIONS)
    for basis, grad in zip(together, grads, strict=True):
        alone = leading_space(gram(grad)[None], starts[:1], COLD_ITERATIONS)[0]
        torch.testing.assert_close(basis, alone, atol=1e-4, rtol=0)


def in_tf32(x):
    """Rounded to the 10 bits of mantissa that a GPU's tensor cores read of a float32 number."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_projecting_in_tf32_costs_less_than_16_bit_gradients_do():
    """What optim/galore lets a GPU do, against the rounding of the gradient's own 16-bit products (8 bits)."""
    draw = torch.Generator().manual_seed(0)
    strengths = torch.arange(1.0, 65.0).rsqrt()  # a slow spectrum
    grad = torch.randn(64, 64, generator=draw) * strengths @ torch.randn(64, 300, generator=draw)
    basis = fit_basis(grad, 16)
    exact, coarse = basis.T @ grad, in_tf32(basis).T @ in_tf32(grad)
    in_16_bits = basis.T @ grad.bfloat16().float()
    error, allowed = (coarse - exact).norm() / exact.norm(), (in_16_bits - exact).norm() / exact.norm()
    assert error < 0.5 * allowed and error < 1e-3
    assert abs(coarse.square().sum() / exact.square().sum() - 1) < 1e-4  # the energy that the basis keeps
