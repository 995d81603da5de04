"""Attention over packed rows without masks: one flat sequence and the cumulative lengths of its rows.

Two torch kernels support row boundaries: varlen attention (FlashAttention 2, Dao 2023, arXiv:2307.08691; compute
capability 8.0 and newer) and memory-efficient attention (Rabe and Staats 2021, arXiv:2112.05682), which also runs on a
T4. Each is tested on a few short rows before it is used; if none is correct, rows are packed with masks.
"""

import contextlib
import functools
import inspect
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlib.models.inspect import core
from peftlib.models.precision import DTYPES

with contextlib.suppress(ImportError):  # torch before 2.10 repeats the heads, as for the other kernel
    from torch.nn.attention.varlen import varlen_attn

# Whether it supports fewer key and value heads than query heads.
_SHARES_HEADS = "varlen_attn" in globals() and "enable_gqa" in inspect.signature(varlen_attn).parameters
_TOLERANCE = 0.02  # relative L2 distance of outputs and gradients in 16 bits; a wrong mask gives far more
_LENGTHS, _WINDOW = (3, 45, 16), 8  # of the rows that a kernel is tested on


def _kernel(name, query, key, value, cu_seqlens, longest, window, scale):
    if not (name == "varlen" and _SHARES_HEADS):
        key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    return torch.ops.peftlib.packed_attention(query, key, value, cu_seqlens, window, longest, scale, name)[0]


KERNELS = {name: functools.partial(_kernel, name) for name in ("varlen", "efficient")}  # best first


def _repeated(t, heads):
    """(T, K, D) with each of the K heads repeated for the query heads that share it."""
    length, kept, width = t.shape
    return t[:, :, None].expand(length, kept, heads // kept, width).reshape(length, heads, width)


@torch.library.custom_op("peftlib::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    window: Tensor,
    longest: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """(output (T, H, D), log-sum-exp of the scores) of causal attention within rows of at most `longest` tokens.

    cu_seqlens: (rows + 1,) int32. window: tokens, including itself, that a token sees; 0: all before it. A CPU tensor,
    so that layers with and without a window share one compiled version. kernel: a key of KERNELS.
    """
    seen, lengths = int(window), (cu_seqlens, cu_seqlens, longest, longest)
    if kernel == "varlen":
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *lengths, 0.0, not seen, False, scale=scale, **_flash_window(seen)
        )
        return out, lse
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        query[None], key[None], value[None], None, *lengths, 0.0, 1, True, scale=scale, window_size=seen or None
    )
    return out[0].clone(memory_format=torch.contiguous_format), lse


def _flash_window(seen):
    return {"window_size_left": seen - 1 if seen else -1, "window_size_right": 0}


@packed_attention.register_fake
def _(query, key, value, cu_seqlens, window, longest, scale, kernel):
    rows, aligned = cu_seqlens.shape[0] - 1, -(-longest // 32) * 32
    heads = query.shape[1]
    lse = (heads, query.shape[0]) if kernel == "varlen" else (rows, heads, aligned)
    return torch.empty_like(query), query.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op("peftlib::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    window: Tensor,
    longest: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed_attention's query, key and value."""
    seen, lengths = int(window), (cu_seqlens, cu_seqlens, longest, longest)
    if kernel == "varlen":
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, out, lse, *lengths, 0.0, not seen, unused, unused[:0],
            scale=scale, **_flash_window(seen),
        )  # fmt: skip
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    found = torch.ops.aten._efficient_attention_backward(
        grad[None].contiguous(), query[None], key[None], value[None], None, out[None], *lengths,
        lse, 0.0, unused, unused, 1, False, scale=scale, window_size=seen or None,
    )  # fmt: skip
    return tuple(t[0].clone(memory_format=torch.contiguous_format) for t in found[:3])


@packed_attention_backward.register_fake
def _(grad, query, key, value, out, lse, cu_seqlens, window, longest, scale, kernel):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx, inputs, output):
    query, key, value, cu_seqlens, window, *ctx.how = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, window)


def _gradients(ctx, grad, _):
    grads = torch.ops.peftlib.packed_attention_backward(grad, *ctx.saved_tensors, *ctx.how)
    return (*grads, None, None, None, None, None)


packed_attention.register_autograd(_gradients, setup_context=_keep)


def _interface(name, longest):
    """A transformers attention function that runs a kernel on packed rows, and SDPA if there is no cu_seqlens."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kernel = KERNELS[name]

    def attend(module, query, key, value, attention_mask, *, scaling, sliding_window=None, cu_seqlens=None, **settings):
        # module.window, not sliding_window: a number would make two compiled versions of one.
        if cu_seqlens is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        # As SDPA under autocast: FlashAttention supports only 16 bits, and some PEFT adapters return float32.
        kind = value.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        flat = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))  # each (T, heads, D)
        return kernel(*flat, cu_seqlens, longest, module.window, scaling)[None], None

    return attend


def use_kernel(model, name, *, longest):
    """Make a model use one of KERNELS if its call passes `cu_seqlens`; results are the same as with masks.

    longest: tokens of the longest row to expect, including padding: the kernels process this many per row.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for layer in core(model).model.layers:
        layer.self_attn.window = torch.tensor(layer.self_attn.sliding_window or 0)  # no buffer: stays on the CPU
    ALL_ATTENTION_FUNCTIONS.register(f"peftlib_{name}", _interface(name, longest))
    ALL_MASK_ATTENTION_FUNCTIONS.register(f"peftlib_{name}", sdpa_mask)
    core(model).set_attn_implementation(f"peftlib_{name}")


def choose_kernel(model, *, device, precision):
    """(name, reason) of the first of KERNELS that works correctly on this device; name is None if rows need masks."""
    if device != "cuda":
        return None, "no GPU"
    reasons = []
    for name in KERNELS:
        try:
            fault = _fault(name, core(model).config, DTYPES[precision])
        except Exception as error:  # noqa: BLE001 - kernels reject GPUs, dtypes and head sizes with all kinds of errors
            fault = " ".join(str(error).split())[:120] or type(error).__name__
        if fault is None:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {fault}")
    return None, "; ".join(reasons)


def _fault(name, config, dtype, device="cuda"):
    """What is wrong with a kernel's output or gradients on three short rows, or None."""
    draw = torch.Generator(device).manual_seed(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    total, scale = sum(_LENGTHS), config.head_dim**-0.5
    given = [torch.randn(total, n, config.head_dim, generator=draw, device=device).to(dtype) for n in heads]
    cu_seqlens = torch.tensor([0, *_LENGTHS], device=device).cumsum(0).to(torch.int32)
    for window in (torch.tensor(0), torch.tensor(_WINDOW)):
        how = (cu_seqlens, max(_LENGTHS), window, scale)
        found, wanted = (_outputs(call, given, *how) for call in (KERNELS[name], attention_by_rows))
        for one, two in zip(found, wanted, strict=True):
            distance = float((one - two).norm() / two.norm())
            if not distance < _TOLERANCE:
                return f"differs from plain attention by {distance:.2g}"
    return None


def _outputs(kernel, given, *how):
    """A kernel's output and the gradients of the sum of its squares, each in float32."""
    given = [t.detach().clone().requires_grad_() for t in given]
    with torch.enable_grad():
        out = kernel(*given, *how)
        grads = torch.autograd.grad(out.float().square().sum(), given)
    return [t.detach().float() for t in (out, *grads)]


def attention_by_rows(query, key, value, cu_seqlens, longest, window, scale):
    """Reference for the kernels, by SDPA one row at a time: (T, H, D) from query (T, H, D), key and value (T, K, D).

    cu_seqlens: (rows + 1,) int32. longest: unused. window: tokens, including itself, that a token sees; 0: all before
    it.
    """
    key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    edges, parts = cu_seqlens.tolist(), []
    for start, end in itertools.pairwise(edges):
        rows = [t[start:end].transpose(0, 1) for t in (query, key, value)]
        position = torch.arange(end - start, device=query.device)
        back = position[:, None] - position
        seen = (back >= 0) & (back < (int(window) or end))
        parts.append(F.scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(parts)
