"""Adam's moments of one weight, in float32 or blockwise 8 bits, as plain tensors in an optimizer's state."""

import functools

import torch
from torch import Tensor

_BLOCK = 256
_SMALLEST = 4096  # elements; for fewer, the scales would outweigh the savings (bitsandbytes' limit)


def fresh(state, like: Tensor, *, bits, device=None):
    """Fill an empty state with a step count (on the CPU) and zero moments in the shape of `like`; returns it.

    device: for the moments, by default that of `like`.
    bits: 32, or 8 for bitsandbytes' dynamic blockwise quantization (Dettmers et al. 2022, arXiv:2110.02861): the
    first moment signed, the second unsigned, a float32 scale per 256 elements.
    """
    state["step"] = torch.zeros((), dtype=torch.float32)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros(like.shape, dtype=torch.float32, device=device or like.device)
        if bits == 8 and like.numel() >= _SMALLEST:
            state[name], state[f"{name}_scale"] = _quantized(name, state[name])
    return state


def read(state, name) -> Tensor:
    """The moment in float32: the state's own tensor if it is float32, else a new one."""
    value = state[name]
    if value.dtype != torch.uint8:
        return value
    scales, code = state[f"{name}_scale"], _code(name, value.device)
    return torch.ops.bitsandbytes.dequantize_blockwise(value, scales, code, _BLOCK, torch.float32)


def write(state, name, value: Tensor):
    """Store a new value of the moment in its existing tensors and format."""
    kept = state[name]
    if kept.dtype == torch.uint8:
        numbers, scales = _quantized(name, value)
        kept.copy_(numbers)
        state[f"{name}_scale"].copy_(scales)
    elif kept is not value:
        kept.copy_(value)


def _quantized(name, value):
    """(indices of the nearest code values, scales). We do not use bitsandbytes' operator, because it always launches on
    CUDA's default stream: it would not wait for a step on another stream, nor be part of its graph."""
    code = _code(name, value.device)
    blocks = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    numbers = torch.bucketize(shares, (code[1:] + code[:-1]) / 2, out_int32=True).to(torch.uint8)
    return numbers.view(-1)[: value.numel()].view(value.shape), scales


@functools.cache
def _code(name, device):
    """(256,) float32 values of the 8-bit code."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "exp_avg").to(device)


def parts_within(items, limit, *, size=lambda p: 4 * p.numel()):
    """Consecutive parts of `items` whose summed sizes stay within `limit`; a larger item gets its own part."""
    parts, room = [], 0
    for item in items:
        if size(item) > room or not parts:
            parts.append([])
            room = limit
        parts[-1].append(item)
        room -= size(item)
    return parts


def round_stochastically(value: Tensor, generator) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the mean exact.

    Updates below half of bfloat16's spacing (1/256 of the weight) are lost by rounding to nearest, but preserved in
    expectation here (Gupta et al. 2015, arXiv:1502.02551). inf and nan are unchanged.
    """
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(torch.bfloat16)
