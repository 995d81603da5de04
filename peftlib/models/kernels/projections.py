"""Linear layers that compute a low-rank projection of their weight's gradient without computing the gradient.

GaLore (Zhao et al. 2024, arXiv:2403.03507) uses only R = P^T G of a weight's gradient G = g^T x, where x is the layer's
input and g the gradient of its output. R = (g P)^T x, or (x P)^T g if P is a basis of the other side: for a layer of
1,152 by 6,912 at rank 128 that is an eighth of the work, and G is never stored. When a basis is due for a refresh, the
optimizer requests G itself.
"""

import math
import types
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftlib.optim.subspace import low_gradient

# {address of a view's gradient: View}, because an operator that is opaque to compilers can take only tensors.
_VIEWS: weakref.WeakValueDictionary[int, "View"] = weakref.WeakValueDictionary()


class View:
    """An optimizer's view of one layer's gradient.

    basis: (m, r) float32, orthonormal columns over the weight's shorter side m; set by `adopt`.
    gradient: a leaf whose `grad` accumulates R (r, n), as in autograd.
    """

    def __init__(self, weight: Tensor, rank: int):
        self.basis = torch.zeros(min(weight.shape), rank, device=weight.device)
        self._narrow: Tensor | None = None  # the basis in the dtype of the products
        # Autograd needs a leaf of R's shape; its values are never read, so one element is expanded.
        self.gradient = torch.zeros(1, device=weight.device).expand(rank, max(weight.shape)).requires_grad_()
        self._take: weakref.WeakMethod | None = None
        _VIEWS[self.gradient.data_ptr()] = self

    def give_to(self, take: Callable[[Tensor, Tensor], Tensor | None]):
        """Call the bound method take(g (T, out), x (T, in)) in each backward pass; a tensor that it returns is R."""
        self._take = weakref.WeakMethod(take)

    def adopt(self, basis: Tensor) -> Tensor:
        """Copy a basis to `basis`, and return `basis`."""
        self.basis.copy_(basis)
        if self._narrow is not None:
            self._narrow.copy_(basis)
        return self.basis

    def low(self, g: Tensor, x: Tensor) -> Tensor:
        """R (r, n) float32 of the gradient g^T x."""
        if self._narrow is None or self._narrow.dtype != g.dtype:
            # Also where it is not needed: in a CUDA graph, which may never be replayed, it would stay unfilled.
            self._narrow = self.basis.to(g.dtype)
        take = self._take() if self._take else None
        taken = take(self, g, x) if take else None
        return low_gradient(g, x, self._narrow) if taken is None else taken


def train_in_views(model, weights, rank):
    """Make the linear layers of these weights compute R instead of the weight's gradient; returns {weight: View}.

    A layer with a bias, or whose R would cost more than its gradient, is left unchanged.
    """
    views, wanted = {}, set(weights)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight in wanted and module.bias is None:
            rows, columns = module.weight.shape
            if rank * (rows + columns) < rows * columns:
                module.view = views[module.weight] = View(module.weight, rank)
                module.forward = types.MethodType(_forward, module)
    return views


def _forward(self, x):
    if not torch.is_grad_enabled():
        return F.linear(x, self.weight)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return torch.ops.peftlib.viewed_product(x.to(dtype), self.weight.detach().to(dtype), self.view.gradient)


@torch.library.custom_op("peftlib::viewed_product", mutates_args=())
def viewed_product(x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """x W^T, whose backward pass adds R to a View's `gradient` (r, n). x: (..., in); weight: (out, in)."""
    return F.linear(x, weight)


@viewed_product.register_fake
def _(x, weight, gradient):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("peftlib::viewed_product_backward", mutates_args=())
def viewed_product_backward(grad: Tensor, x: Tensor, weight: Tensor, gradient: Tensor, needs_x: bool) -> list[Tensor]:
    """[gradient of x (empty if not needed), R (r, n) float32]."""
    low = _VIEWS[gradient.data_ptr()].low(grad.flatten(0, -2), x.flatten(0, -2))
    return [(grad @ weight) if needs_x else x.new_empty(0), low]


@viewed_product_backward.register_fake
def _(grad, x, weight, gradient, needs_x):
    return [x.new_empty(x.shape if needs_x else 0), gradient.new_empty(gradient.shape)]


@register_flop_formula(torch.ops.peftlib.viewed_product)
def _(x_shape, weight_shape, *others, **settings):
    return 2 * math.prod(x_shape) * weight_shape[0]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    needs_x, *_ = ctx.needs_input_grad
    grad_x, low = torch.ops.peftlib.viewed_product_backward(grad, *ctx.saved_tensors, needs_x)
    return grad_x if needs_x else None, None, low


viewed_product.register_autograd(_gradients, setup_context=_keep)
