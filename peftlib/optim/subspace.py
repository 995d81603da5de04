"""Bases for projected gradients: the leading left singular vectors, without an SVD of the wide matrix.

A gradient G is (m, n) with m <= n. Its left singular vectors are the eigenvectors of the Gram matrix G G^T (m, m),
found by orthogonal (subspace) iteration from the old basis if there is one, else from seeded random columns. Iteration
keeps a direction's column in the basis as long as the gradients keep the direction, whereas an SVD or eigh may flip
signs and swap columns. So Adam's moments stay meaningful when the basis changes.
"""

import contextlib

import torch
from torch import Tensor

COLD_ITERATIONS = 8  # from random columns: 99.9 % of the exact basis's energy for a slowly decaying 1/sqrt(i) spectrum
WARM_ITERATIONS = 3
_SHIFT = 1e-6  # of the trace: keeps the iteration's product numerically full-rank even if the gradient is not
_ORTHONORMAL = 1e-5  # maximum deviation of a basis's inner products from 0 and 1


def gram(grad: Tensor) -> Tensor:
    """G G^T / trace, (m, m) float32, of a finite (m, n) gradient of any float dtype; zeros for a zero gradient."""
    wide = grad.float()
    # Squaring extreme gradients would overflow or underflow; a basis does not depend on their scale.
    wide = wide / wide.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    product = wide @ wide.T
    return product / product.diagonal().sum().clamp_min(torch.finfo(torch.float32).tiny)


def leading_space(grams: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Orthonormal columns that span the leading eigenvectors of each Gram matrix.

    grams: (k, m, m) from `gram`; start: (k, m, r) float32 of full column rank, r <= m. Returns (k, m, r) float32, the
    same for one matrix and for a batch up to rounding. Synchronises once: if a basis is not orthonormal, because its
    columns were too nearly dependent for the fast factorization, it is recomputed by the robust Householder one.
    """
    bases = _iterated(grams, start, iterations, _by_cholesky)
    exact = bases.double()
    errors = (exact.mT @ exact - torch.eye(start.shape[-1], device=start.device)).abs().amax((1, 2))
    for i in (~(errors < _ORTHONORMAL)).nonzero().flatten().tolist():
        bases[i : i + 1] = _iterated(grams[i : i + 1], start[i : i + 1], iterations, _by_householder)
    return bases


def _iterated(grams, start, iterations, orthonormal):
    basis = orthonormal(start)  # m random columns may be as nearly dependent as the gradient's
    for _ in range(iterations):
        basis = orthonormal(torch.baddbmm(basis, grams, basis, beta=_SHIFT))
    return orthonormal(basis)


def _by_cholesky(columns):
    """Cholesky QR, with float64 for the small products, because it squares the condition number."""
    wide = columns.double()
    factor = torch.linalg.cholesky_ex(wide.mT @ wide)[0]
    return torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.float().contiguous()


def _by_householder(columns):
    """Householder QR with the signs of Cholesky QR, for columns of any rank; several times slower on a GPU."""
    basis, factor = torch.linalg.qr(columns.double())
    return torch.where(factor.diagonal(dim1=-2, dim2=-1)[:, None] < 0, -basis, basis).float()


def random_start(m: int, r: int, *, seed: int, device) -> Tensor:
    """(m, r) float32 normal columns, the same on every device; no generator state needs to be saved."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator).to(device)


def fit_basis(grad: Tensor, rank: int) -> Tensor:
    """The exact basis (m, rank), float32, strongest column first, by eigh of the Gram matrix: the reference for the
    fast one."""
    return torch.linalg.eigh(gram(grad))[1][:, -rank:].flip(1).contiguous()


def fit_basis_by_svd(grad: Tensor, rank: int, *, is_turned: bool) -> Tensor:
    """The same space by SVD as in galore_torch, with its signs.

    is_turned: `grad` (m, n) is the transpose of the weight's gradient. Then the SVD runs on the original gradient,
    because column signs differ between a matrix and its transpose, which affects moments kept over a refresh.
    """
    if is_turned:
        return torch.linalg.svd(grad.float().T, full_matrices=False)[2][:rank].T.contiguous()
    return torch.linalg.svd(grad.float(), full_matrices=False)[0][:, :rank].contiguous()


def energy(grad: Tensor, basis: Tensor) -> float:
    """Fraction of ||G||^2 that a basis preserves, 0 to 1."""
    wide = grad.float()
    return float((basis.T @ wide).square().sum() / wide.square().sum())


def kept_energy(grad: Tensor, rank: int) -> float:
    """Fraction of ||G||^2 that the best rank-r basis preserves, 0 to 1. grad: (m, n) in either orientation."""
    wide = turned(grad)
    return energy(wide, fit_basis(wide, rank))


def is_turned(matrix) -> bool:
    """Whether the first side is not shorter. Square ones count: galore_torch projects them from the right."""
    return matrix.shape[0] >= matrix.shape[1]


def turned(matrix: Tensor) -> Tensor:
    """A view with the shorter side first."""
    return matrix.T if is_turned(matrix) else matrix


def low_gradient(g: Tensor, x: Tensor, basis: Tensor) -> Tensor:
    """R (r, n) float32 of a gradient g^T x, for a basis (m, r) of its shorter side. g: (T, out); x: (T, in)."""
    narrow, wide = (x, g) if g.shape[1] >= x.shape[1] else (g, x)
    return product_in_float32((narrow @ basis.to(narrow.dtype)).T, wide)


def product_in_float32(one: Tensor, two: Tensor) -> Tensor:
    """one @ two in float32: sums of 16-bit products are not rounded to 16 bits if the device supports it."""
    if one.dtype != torch.float32 and one.device.type == "cuda":
        return torch.mm(one, two, out_dtype=torch.float32)
    return (one @ two).float()


@contextlib.contextmanager
def tensor_cores(*, is_on):
    """Context in which a GPU uses TF32 for float32 products, which is enough for gradients of 16-bit products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if is_on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
