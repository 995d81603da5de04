"""Where and how a run executes: device, precision and its reason, output folder, random seeds."""

import os
import random
from pathlib import Path

from peftlib.core import paths
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
    """'cuda' or 'cpu' for a config's device. ModelError: cuda is requested but not available."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device='cuda', but torch sees no GPU: use device='cpu', or switch Colab's runtime to a T4")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def training_precision(device, asked="auto"):
    """(precision, reason) for training on a device: 'bf16', 'fp16' or 'fp32', and why; `asked` wins unless 'auto'.

    Uses the compute capability: torch.cuda.is_bf16_supported() returns True on a T4, which only emulates bf16.
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
    """Folder on the local disk that holds the studies.

    PEFTLIB_ROOT if set; else runs/ in the checkout, or in the working folder (/content on Colab) if pip installed
    this copy.
    """
    named = os.environ.get("PEFTLIB_ROOT")
    if named:
        return Path(named).expanduser()
    # An installed copy is in site-packages, where we should not write.
    return (paths.checkout() or Path.cwd()) / "runs"


def require_bitsandbytes(what):
    """ModelError unless bitsandbytes can be imported; `what` needs it."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{what} needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes, "
            "or use a method that does not need it (lora, galore)"
        ) from error


def seed_of(*numbers):
    """A 32-bit seed that depends on every one of these integers.

    torch's CPU generator uses only the low 32 bits of a seed, so a number shifted above them would be lost.
    """
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator_states():
    """States of the Python, NumPy and torch generators, including CUDA's, as {name: plain tensor}."""
    import numpy as np
    import torch

    version, numbers, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_place": torch.tensor([place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states):
    """Restore what `generator_states` returned; CUDA's state only if there is a GPU now and there was one then."""
    import numpy as np
    import torch

    version, *numbers = states["python"].tolist()
    random.setstate((version, tuple(numbers), next(iter(states["python_gauss"].tolist()), None)))
    place, has_gauss = states["numpy_place"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, place, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
