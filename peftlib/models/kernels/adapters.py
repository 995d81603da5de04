"""Adapters on frozen layers, 4-bit or plain, fused into one operator; PEFT uses many small ones."""

import itertools
import math
import types
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftlib.models.inspect import is_four_bit

_SMALL = 2048  # rows of a weight
_ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called in sequence with the same input


def fuse_adapters(model):
    """Run linear layers with one plain adapter as one operator, `peftlib::adapted_products`; returns how many.

    PEFT and bitsandbytes repeat their checks in every call, copy the product, and cause graph breaks. Results and saved
    files, parameters and their names are the same as PEFT's. Layers with DoRA or several adapters keep PEFT's forward;
    if they are 4-bit, they return their input's dtype, see _as_given. Layers with the same input become one product,
    with their weights concatenated in memory.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    fused = 0
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _ALIKE:
            if all(_can_fuse(children.get(name)) and not _drops(children[name]) for name in names):
                fused += _fuse([children.pop(name) for name in names])
        fused += sum(_fuse([module]) for module in children.values() if _can_fuse(module))
    for module in model.modules():
        is_peft = isinstance(module, BaseTunerLayer) and not hasattr(module, "fused")
        if is_peft and is_four_bit(getattr(module.get_base_layer(), "weight", None)):
            module.register_forward_hook(_as_given)
    return fused


def _as_given(module, args, output):
    """Cast to the input's dtype, as 4-bit layers without adapter do: under autocast on a GPU, PEFT's DoRA, IA3 and RoAd
    return float32, and the whole residual stream would become float32."""
    return output.to(args[0].dtype)


def _can_fuse(module):
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    return (
        isinstance(module, Linear | Linear4bit)
        and list(module.lora_A) == ["default"]
        and not module.lora_variant
        and module.base_layer.bias is None
    )


def drop_waiting(model):
    """Drop products that no layer has requested, after a failed pass: they keep its activations in memory."""
    for module in model.modules() if model else ():
        if fused := getattr(module, "fused", None):
            fused.given, fused.waiting = None, ()


def _drops(module):
    return isinstance(module.lora_dropout["default"], torch.nn.Dropout)


def _fuse(modules):
    fused = _Fused(modules)
    for module in modules:
        module.fused = fused
        module.forward = types.MethodType(_adapted_forward, module)
    return len(modules)


def _adapted_forward(self, x):
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x)
    return self.fused.product(self, x)


class _Fused:
    """Adapted layers that are called in sequence with the same input: the first call computes all products."""

    def __init__(self, modules):
        self.modules, self.frozen = modules, _side_by_side([module.base_layer for module in modules])
        sizes = [module.base_layer.out_features for module in modules]
        # For small products, fusing saves a launch; for large ones, separate products avoid concatenating gradients.
        self.sizes, self.joins = sizes, max(sizes) <= _SMALL
        self.given, self.waiting = None, ()  # the input, and the products that have not been requested yet

    def product(self, module, x):
        if module is not self.modules[0] and (self.given is not x or not self.waiting):  # called out of sequence
            return self._products(x)[self.modules.index(module)]
        if module is self.modules[0]:
            self.waiting = self._products(x)
        found, *self.waiting = self.waiting
        self.given = x if self.waiting else None
        return found

    def _products(self, x):
        frozen, is_mixed = self.frozen, torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_mixed else frozen.dtype
        inputs = x.to(dtype)
        dropout = self.modules[0].lora_dropout["default"]
        drops = self.modules[0].training and _drops(self.modules[0])
        downs = [module.lora_A["default"].weight for module in self.modules]
        ups = [module.lora_B["default"].weight * module.scaling["default"] for module in self.modules]
        ups = [_block_diagonal(ups)] if self.joins else ups
        *products, _ = torch.ops.peftlib.adapted_products(
            inputs,
            dropout(inputs) if drops else None,
            frozen.weight if frozen.scales is not None else frozen.weight.to(dtype),
            frozen.scales,
            torch.cat(downs).to(dtype),
            [up.to(dtype) for up in ups],
            frozen.blocksize,
            frozen.quant_type,
        )
        products = products if is_mixed else [product.to(x.dtype) for product in products]
        return products[0].split(self.sizes, -1) if self.joins else products


def _block_diagonal(blocks):
    """Block-diagonal matrix of shape (sum of rows, sum of columns)."""
    ends = list(itertools.accumulate(block.shape[1] for block in blocks))
    return torch.cat(
        [F.pad(block, (end - block.shape[1], ends[-1] - end)) for block, end in zip(blocks, ends, strict=True)]
    )


class _Frozen(NamedTuple):
    """Vertically stacked weights (out, in): plain, or 4-bit as packed uint8 with (blocks,) float32 scales."""

    weight: Tensor
    dtype: torch.dtype
    scales: Tensor | None = None
    blocksize: int = 0
    quant_type: str = ""


def _side_by_side(layers):
    """The _Frozen of several layers, whose weights become views of it."""
    from bitsandbytes.functional import dequantize_blockwise

    # Plain tensors that share memory with the parameters, whose subclass may cause graph breaks.
    parts = [layer.weight.data.as_subclass(torch.Tensor) for layer in layers]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
        layer.weight.data = part
    if not is_four_bit(layers[0].weight):
        return _Frozen(whole, whole.dtype)
    scales = []
    for layer in layers:
        state = layer.weight.quant_state
        nested = state.nested and dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        scales.append(nested if state.nested else state.absmax)
    return _Frozen(whole, layers[0].compute_dtype, torch.cat(scales), state.blocksize, state.quant_type)


@torch.library.custom_op("peftlib::adapted_products", mutates_args=())
def adapted_products(
    x: Tensor,
    dropped: Tensor | None,
    frozen: Tensor,
    scales: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    """[x W^T + (x down^T) up^T for each part W (out, in) of a frozen weight and its up, and last x down^T].

    x: (..., in); dropped: the adapters' input if it differs from x, or None. frozen: the stacked parts, or their packed
    uint8 if there are scales: (blocks,) float32; dequantized again for the gradients. down: (r, in); ups: (out, its
    part of r), scaled. The last result is (tokens, r). Opaque to torch.compile, which would otherwise trace the
    dequantization of every layer.
    """
    flat, weight = x.flatten(0, -2), _weight(frozen, scales, down, ups, blocksize, quant_type)
    low, products = (flat if dropped is None else dropped.flatten(0, -2)) @ down.T, []
    for part, up, part_low in zip(_rows(weight, ups), ups, _columns(low, ups), strict=True):
        product = F.linear(flat, part)
        product.addmm_(part_low, up.T)  # in place: the product is large, and a separate sum would copy it
        products.append(product.view(*x.shape[:-1], len(up)))
    return [*products, low]


@adapted_products.register_fake
def _(x, dropped, frozen, scales, down, ups, blocksize, quant_type):
    low = x.new_empty((x.numel() // down.shape[1], down.shape[0]))
    return [*(x.new_empty((*x.shape[:-1], up.shape[0])) for up in ups), low]


@register_flop_formula(torch.ops.peftlib.adapted_products)
def _(x_shape, dropped_shape, frozen_shape, scales_shape, down_shape, up_shapes, *others, **settings):
    return 2 * math.prod(x_shape) * sum(rows for rows, _ in up_shapes)  # torch.compile's cost of recomputation


@torch.library.custom_op("peftlib::adapted_products_backward", mutates_args=())
def adapted_products_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    dropped: Tensor | None,
    low: Tensor,
    frozen: Tensor,
    scales: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    """Gradients of x, dropped (empty if it is None), down and each of ups."""
    flats = [grad.flatten(0, -2) for grad in grads]
    lows = [flat @ up for flat, up in zip(flats, ups, strict=True)]
    grad_low = lows[0] if len(lows) == 1 else torch.cat(lows, 1)
    first, *others = _rows(_weight(frozen, scales, down, ups, blocksize, quant_type), ups)
    grad_x = flats[0] @ first
    for flat, part in zip(flats[1:], others, strict=True):
        grad_x.addmm_(flat, part)
    given, grad_dropped = x, grad_x.new_empty(0)
    if dropped is None:
        grad_x.addmm_(grad_low, down)
    else:
        given, grad_dropped = dropped, (grad_low @ down).view(x.shape)
    grad_ups = [flat.T @ part for flat, part in zip(flats, _columns(low, ups), strict=True)]
    return [grad_x.view(x.shape), grad_dropped, grad_low.T @ given.flatten(0, -2), *grad_ups]


@adapted_products_backward.register_fake
def _(grads, x, dropped, low, frozen, scales, down, ups, blocksize, quant_type):
    grad_dropped = x.new_empty(0) if dropped is None else x.new_empty(x.shape)
    return [x.new_empty(x.shape), grad_dropped, torch.empty_like(down), *map(torch.empty_like, ups)]


def _keep(ctx, inputs, output):
    x, dropped, frozen, scales, down, ups, *ctx.format = inputs
    ctx.save_for_backward(x, dropped, output[-1], frozen, scales, down, *ups)


def _gradients(ctx, grads):
    x, dropped, low, frozen, scales, down, *ups = ctx.saved_tensors  # read once: checkpointing does not allow more
    grad_x, grad_dropped, grad_down, *grad_ups = torch.ops.peftlib.adapted_products_backward(
        list(grads[:-1]), x, dropped, low, frozen, scales, down, ups, *ctx.format
    )
    return grad_x, None if dropped is None else grad_dropped, None, None, grad_down, grad_ups, None, None


adapted_products.register_autograd(_gradients, setup_context=_keep)


def _weight(frozen, scales, down, ups, blocksize, quant_type):
    if scales is None:
        return frozen
    shape = [sum(map(len, ups)), down.shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(frozen, scales, blocksize, quant_type, shape, down.dtype)


def _rows(weight, ups):
    return weight.split([len(up) for up in ups])


def _columns(low, ups):
    return low.split([up.shape[1] for up in ups], 1)
