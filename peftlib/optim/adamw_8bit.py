"""AdamW with 8-bit moments from bitsandbytes."""

import contextlib

import torch

from peftlib.core.env import require_bitsandbytes
from peftlib.optim.adamw import Accumulating


def adamw_8bit(params, *, lr, weight_decay=0.0, max_grad_norm=0.0):
    """bitsandbytes' AdamW with blockwise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861), accumulating.

    Tensors with fewer than 4,096 elements keep float32 moments, as in bitsandbytes. ModelError: it is not installed.
    """
    require_bitsandbytes("8-bit moments")
    from bitsandbytes.optim import AdamW8bit

    class AccumulatingAdamW8bit(Accumulating, AdamW8bit):
        def step(self, closure=None):
            with _default_stream(self.param_groups[0]["params"][0].device):
                return super().step(closure)

        def _state_shapes(self, p, group):
            return {"state1": p.shape, "state2": p.shape}

    optimizer = AccumulatingAdamW8bit(params, lr=lr, weight_decay=weight_decay)
    optimizer.max_grad_norm = max_grad_norm
    return optimizer


@contextlib.contextmanager
def _default_stream(device):
    """Context that queues work on CUDA's default stream, after earlier and before later work of the current stream.

    bitsandbytes launches its optimizer kernels there, whatever the current stream is.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)
