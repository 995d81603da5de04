"""Arithmetic of training, and the matrix-product speed it is held against."""

import time

import torch

from peftlib.models.inspect import PROJECTIONS


def flops_per_token(shape, method, *, length):
    """Floating-point operations that a token of training needs, without recomputation: the model's, not the machine's.

    shape: plan.Shape. method: a module of peftlib.methods. length: mean tokens of a row; a causal token attends to half
    of it. 2 per multiply-add; a projection runs forward and back to its input, a trained one also to its weight; the
    frozen head forward and back; attention forward and twice that back.
    """
    whole = {leaf for kind, leaves in method.trains.items() if kind != "adapters" for leaf in leaves}
    projections = sum(
        2 * rows * columns * (3 if leaf in whole else 2)
        for leaf in PROJECTIONS
        for rows, columns in shape.matrices([leaf])
    )
    attention = 3 * 2 * 2 * shape.attention[0] * length / 2
    return shape.layers * (projections + attention) + 2 * 2 * shape.vocabulary * shape.hidden


def matmul_ceiling(device, dtype, *, size=None, seconds=0.2):
    """Operations a second of a large square product on this device, measured now: the ceiling that MFU is a share of."""
    size = size or (8192 if device == "cuda" else 1024)
    a = torch.randn(size, size, device=device).to(dtype)
    (a @ a).sum().item()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        product = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
    del product
    return done * 2 * size**3 / (time.perf_counter() - started)
