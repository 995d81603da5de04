"""Where we run: device, precision with its reason, output root."""

import os
from pathlib import Path

from peftlib.core import paths as places
from peftlib.core.errors import ModelError

_T4_CLASS_BYTES = 17 * 2**30  # a card of up to 16 GB counts as the free T4


def profile_for_hardware():
    """demo without a GPU, t4 on a card of up to 16 GB or without bf16, gpu on anything larger."""
    import torch

    if not torch.cuda.is_available():
        return "demo"
    card = torch.cuda.get_device_properties(0)
    return "gpu" if card.total_memory > _T4_CLASS_BYTES and card.major >= 8 else "t4"


def resolve_device(device):
    """'cuda' or 'cpu' for a config's device. ModelError: cuda is asked for and there is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device='cuda', but torch sees no GPU: use device='cpu', or switch Colab's runtime to a T4")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def training_precision(device, asked="auto"):
    """(precision, reason) of training on a device: 'bf16', 'fp16' or 'fp32', and why; `asked` wins unless 'auto'.

    Decided by compute capability: torch.cuda.is_bf16_supported() is True on a T4, which only emulates it.
    """
    import torch

    if asked != "auto":
        return asked, "as set by precision"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return "bf16", f"compute capability {major}.{minor} has bf16"
        return "fp16", f"compute capability {major}.{minor} is below 8.0: no native bf16"
    if torch.cpu._is_avx512_bf16_supported():
        return "bf16", "this CPU has AVX512-BF16"
    return "fp32", "this CPU has no AVX512-BF16"


def output_root():
    """Folder on the local disk that holds the studies: PEFTLIB_ROOT, else runs/ of the checkout or, for
    a copy that pip installed, of the working folder (/content on Colab). Copies: see storage.
    """
    named = os.environ.get("PEFTLIB_ROOT")
    if named:
        return Path(named).expanduser()
    # An installed copy lies in site-packages, where nothing should be written.
    return (places.checkout() or Path.cwd()) / "runs"


def require_bitsandbytes(what):
    """ModelError unless bitsandbytes can be imported; `what` needs it."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{what} needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes, "
            "or take a method that needs none (lora, galore)"
        ) from error
