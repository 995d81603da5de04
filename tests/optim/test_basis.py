import pytest
import torch

from peftlib.optim import subspace
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


def deficient(kind, m, n):
    """An (m, n) gradient of a kind that has fewer directions than rows, or is known to few digits."""
    draw = torch.Generator().manual_seed(0)
    grad = torch.randn(m, n, generator=draw)
    return {
        "full": grad,
        "zero": grad * 0,
        "one row repeated": grad[:1].expand(m, n),
        "rank 1": torch.randn(m, 1, generator=draw) @ grad[:1],
        "rank 3": torch.randn(m, 3, generator=draw) @ grad[:3],
        "rows of zeros": grad * (torch.arange(m) % 3 == 0)[:, None],
        "steep": gradient(m, n, 3.0),
        "bf16": gradient(m, n, 1.0).bfloat16(),
        "fp16": (grad.abs() * 2e4).clamp_max(6e4).half(),
        "huge": grad * 1e30,
        "tiny": grad * 1e-30,
    }[kind]


KINDS = [
    "full",
    "zero",
    "one row repeated",
    "rank 1",
    "rank 3",
    "rows of zeros",
    "steep",
    "bf16",
    "fp16",
    "huge",
    "tiny",
]


@pytest.mark.parametrize("m, n", [(4, 9), (64, 64), (64, 160)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_finite_gradient_gives_orthonormal_bases_of_any_rank(kind, m, n):
    """First and refreshed: from 120 starts, some of which are as nearly dependent as random columns come."""
    grad = deficient(kind, m, n)
    later = gram(grad.float() + grad.float().std() * torch.randn(m, n, generator=torch.Generator().manual_seed(5)))
    for rank in (1, m // 2, m - 1, m):
        starts = torch.stack([random_start(m, rank, seed=i, device="cpu") for i in range(120)])
        first = leading_space(gram(grad).expand(120, m, m), starts, COLD_ITERATIONS)
        for bases in (first, leading_space(later.expand(120, m, m), first, WARM_ITERATIONS)):
            errors = (bases.mT @ bases - torch.eye(rank)).abs()
            assert errors.max() < 1e-5, rank  # False for nan
        scaled = grad.float() / grad.float().abs().max()
        if grad.any() and energy(scaled, fit_basis(scaled, rank)) > 0.999:  # as always where the rank is m
            assert all(energy(scaled, basis) > 0.998 for basis in first[:20]), rank


def test_a_basis_that_cholesky_cannot_make_is_made_by_householder_and_no_other(monkeypatch):
    grams = torch.stack([gram(gradient(32, 64, 1.0, seed)) for seed in range(3)])
    starts = torch.stack([random_start(32, 8, seed=i, device="cpu") for i in range(3)])
    alone, made = leading_space(grams, starts, COLD_ITERATIONS), []
    keep = subspace._by_householder
    monkeypatch.setattr(subspace, "_by_householder", lambda columns: made.append(len(columns)) or keep(columns))
    starts[1, :, 5] = 0  # no start that is drawn, but one whose factorization fails on every device
    bases = leading_space(grams, starts, COLD_ITERATIONS)
    assert made and set(made) == {1} and torch.equal(bases[::2], alone[::2])
    torch.testing.assert_close(bases.mT @ bases, torch.eye(8).expand(3, 8, 8), atol=1e-5, rtol=0)
    # Of a start that both can take they make the same basis, signs included.
    one, two = (subspace._iterated(grams, alone, 3, f) for f in (subspace._by_cholesky, keep))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


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
