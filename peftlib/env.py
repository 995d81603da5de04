"""Where we run: device, precision with its reason, output root, Hugging Face token."""

import os
from pathlib import Path

from peftlib import places
from peftlib.errors import ModelError
from peftlib.session import host

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


def hf_token():
    """The Hugging Face token from HF_TOKEN, else from Colab's or Kaggle's secrets. ModelError: none is set."""
    token = os.environ.get("HF_TOKEN", "").strip() or (_kaggles_secret() if host() == "kaggle" else _colabs_secret())
    if token:
        return token
    raise ModelError(
        "no Hugging Face token: set the environment variable HF_TOKEN, or add the secret HF_TOKEN (on Colab the key icon, "
        "on Kaggle Add-ons > Secrets). "
        "Gemma is gated: accept its licence at https://huggingface.co/google/gemma-3-1b-it first, "
        "or set model to the id of a public mirror."
    )


def _colabs_secret():
    try:
        from google.colab import userdata
    except ImportError:
        return ""
    try:
        return (userdata.get("HF_TOKEN") or "").strip()
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError, userdata.TimeoutException) as error:
        print(f"Colab's secret HF_TOKEN could not be read ({type(error).__name__}).")
        return ""


def _kaggles_secret():
    try:
        import kaggle_secrets
    except ImportError:
        return ""
    try:
        return (kaggle_secrets.UserSecretsClient().get_secret("HF_TOKEN") or "").strip()
    except (kaggle_secrets.BackendError, kaggle_secrets.CredentialError, ConnectionError) as error:
        print(f"Kaggle's secret HF_TOKEN could not be read ({type(error).__name__}).")
        return ""


def require_bitsandbytes(what):
    """ModelError unless bitsandbytes can be imported; `what` needs it."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{what} needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes, "
            "or take a method that needs none (lora, galore)"
        ) from error
