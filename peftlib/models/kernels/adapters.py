"""Adapters on frozen layers, 4-bit or plain, as one operator: what PEFT computes in many small steps."""

import types
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlib.models.inspect import is_four_bit

_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called one after the other with one input


def fuse_adapters(model):
    """Let linear layers with one plain adapter run as one operator, `peftlib::adapted_products`; returns how many.

    PEFT and bitsandbytes repeat their checks at every call, copy the product, and cannot be compiled in one piece. The
    result is PEFT's, and parameters, their names and saved files stay PEFT's. Layers with DoRA or several adapters keep
    PEFT's forward. Layers that get the same input share the operator, whose small products then are fewer.
    """
    fused = 0
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _SHARED:
            if all(_can_fuse(children.get(name)) for name in names):
                fused += _fuse([children.pop(name) for name in names])
        fused += sum(_fuse([module]) for module in children.values() if _can_fuse(module))
    return fused


def _can_fuse(module):
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    return (
        isinstance(module, Linear | Linear4bit)
        and list(module.lora_A) == ["default"]
        and not module.lora_variant
        and module.base_layer.bias is None
    )


def _fuse(modules):
    shared = _Shared(modules)
    for module in modules:
        module.shared = shared
        module.forward = types.MethodType(_adapted_forward, module)
    return len(modules)


class _Shared:
    """Adapted layers that get the same input, one call after the other: the first call computes all products."""

    def __init__(self, modules):
        self.modules, self.weights = modules, [_frozen(module) for module in modules]
        self.given, self.made = None, ()  # the input and the products that wait for their call

    def product(self, module, x):
        if self.given is x and self.made:
            found, *self.made = self.made
        elif module is self.modules[0] and not self._drops():
            found, *self.made = self._products(x, range(len(self.modules)))
        else:
            (found,), self.made = self._products(x, [self.modules.index(module)]), ()
        self.given = x if self.made else None
        return found

    def _drops(self):
        return any(module.training and _dropout(module) for module in self.modules)

    def _products(self, x, numbers):
        modules, weights = [self.modules[i] for i in numbers], [self.weights[i] for i in numbers]
        is_mixed = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_mixed else weights[0].dtype
        inputs = x.to(dtype)
        dropout = _dropout(modules[0]) if modules[0].training else None
        down = torch.cat([module.lora_A["default"].weight for module in modules]).to(dtype)
        ups = [(module.lora_B["default"].weight * module.scaling["default"]).to(dtype) for module in modules]
        frozen = [
            module.base_layer.weight.to(dtype) if weight.packed is None else weight.packed
            for module, weight in zip(modules, weights, strict=True)
        ]
        *products, _ = torch.ops.peftlib.adapted_products(
            inputs,
            None if dropout is None else dropout(inputs),
            frozen,
            [weight.scales for weight in weights if weight.scales is not None],
            down,
            ups,
            weights[0].blocksize,
            weights[0].quant_type,
        )
        return products if is_mixed else [product.to(x.dtype) for product in products]


def _dropout(module):
    dropout = module.lora_dropout["default"]
    return dropout if isinstance(dropout, torch.nn.Dropout) else None


class _Frozen(NamedTuple):
    """What of a base weight the operator needs: as it is, or packed in 4 bits with (blocks,) float32 scales."""

    dtype: torch.dtype
    packed: Tensor | None = None
    scales: Tensor | None = None
    blocksize: int = 0
    quant_type: str = ""


def _frozen(module):
    from bitsandbytes.functional import dequantize_blockwise

    weight = module.base_layer.weight
    if not is_four_bit(weight):
        return _Frozen(weight.dtype)
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2).float() + state.offset
    # A plain tensor beside the parameter, which is a subclass that compilers stop at; they share its memory.
    packed = weight.data.as_subclass(torch.Tensor)
    return _Frozen(module.base_layer.compute_dtype, packed, scales, state.blocksize, state.quant_type)


def _adapted_forward(self, x):
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x)
    return self.shared.product(self, x)


@torch.library.custom_op("peftlib::adapted_products", mutates_args=())
def adapted_products(
    x: Tensor,
    dropped: Tensor | None,
    frozen: Sequence[Tensor],
    scales: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    """[x W^T + (x down^T) up^T for each W (out, inner), frozen, and its adapter], and last x down^T, (tokens, r).

    x: (..., inner); dropped: what the adapters get in place of x, or None. frozen: W, or its packed uint8 where there
    are scales: (blocks,) float32; it is dequantized again for the gradients. down: (r, inner), the adapters' one below
    the other; ups: (out, their part of r), scaled. Opaque to torch.compile, which would trace each dequantization.
    """
    flat = x.flatten(0, -2)
    low, products = (flat if dropped is None else dropped.flatten(0, -2)) @ down.T, []
    for i, (part, up) in enumerate(zip(_parts(low, ups), ups, strict=True)):
        product = F.linear(flat, _weight(frozen, scales, i, up, down, blocksize, quant_type))
        product.addmm_(part, up.T)  # in place: the product is large, and a sum beside it would be a copy
        products.append(product.view(*x.shape[:-1], up.shape[0]))
    return [*products, low]


@adapted_products.register_fake
def _(x, dropped, frozen, scales, down, ups, blocksize, quant_type):
    low = x.new_empty((x.numel() // down.shape[1], down.shape[0]))
    return [*(x.new_empty((*x.shape[:-1], up.shape[0])) for up in ups), low]


@torch.library.custom_op("peftlib::adapted_products_backward", mutates_args=())
def adapted_products_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    dropped: Tensor | None,
    low: Tensor,
    frozen: Sequence[Tensor],
    scales: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    blocksize: int,
    quant_type: str,
) -> list[Tensor]:
    """Gradients of x, dropped (empty where it is None), down and each of ups."""
    flats = [grad.flatten(0, -2) for grad in grads]
    grad_low = torch.cat([flat @ up for flat, up in zip(flats, ups, strict=True)], 1)
    grad_x = flats[0] @ _weight(frozen, scales, 0, ups[0], down, blocksize, quant_type)
    for i in range(1, len(flats)):
        grad_x.addmm_(flats[i], _weight(frozen, scales, i, ups[i], down, blocksize, quant_type))
    given, grad_dropped = x, grad_x.new_empty(0)
    if dropped is None:
        grad_x.addmm_(grad_low, down)
    else:
        given, grad_dropped = dropped, (grad_low @ down).view(x.shape)
    grad_ups = [flat.T @ part for flat, part in zip(flats, _parts(low, ups), strict=True)]
    return [grad_x.view(x.shape), grad_dropped, grad_low.T @ given.flatten(0, -2), *grad_ups]


@adapted_products_backward.register_fake
def _(grads, x, dropped, low, frozen, scales, down, ups, blocksize, quant_type):
    grad_dropped = x.new_empty(0) if dropped is None else x.new_empty(x.shape)
    return [x.new_empty(x.shape), grad_dropped, torch.empty_like(down), *map(torch.empty_like, ups)]


def _keep(ctx, inputs, output):
    x, dropped, frozen, scales, down, ups, *ctx.format = inputs
    ctx.sizes = len(frozen), len(scales), len(ups)
    ctx.save_for_backward(x, dropped, output[-1], *frozen, *scales, down, *ups)


def _gradients(ctx, grads):
    x, dropped, low, *rest = ctx.saved_tensors  # read once: checkpointing allows no more
    n_frozen, n_scales, _ = ctx.sizes
    frozen, scales = rest[:n_frozen], rest[n_frozen : n_frozen + n_scales]
    down, *ups = rest[n_frozen + n_scales :]
    found = torch.ops.peftlib.adapted_products_backward(
        list(grads[:-1]), x, dropped, low, frozen, scales, down, ups, *ctx.format
    )
    grad_x, grad_dropped, grad_down, *grad_ups = found
    nothing = [None] * n_frozen, [None] * n_scales
    return grad_x, None if dropped is None else grad_dropped, *nothing, grad_down, grad_ups, None, None


adapted_products.register_autograd(_gradients, setup_context=_keep)


def _parts(low, ups):
    return low.split([up.shape[1] for up in ups], 1)


def _weight(frozen, scales, i, up, down, blocksize, quant_type):
    if not scales:
        return frozen[i]
    shape = [up.shape[0], down.shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(frozen[i], scales[i], blocksize, quant_type, shape, down.dtype)
