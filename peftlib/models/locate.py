"""Locate a config's `model`: the packaged weights, a folder, or the Hugging Face hub."""

import contextlib
import json
from pathlib import Path

from safetensors import safe_open

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.errors import ModelError
from peftlib.core.hub_token import hf_token
from peftlib.models.packaged import PROVENANCE, packaged_model


def locate(model):
    """(folder or hub id, provenance as text) of a config's `model`. ModelError: see packaged_model."""
    if model == PACKAGED_MODEL:
        return str(packaged_model()), PROVENANCE
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder), f"local folder {Path(model).name}"
    return model, f"Hugging Face hub, {model}"


def token_for(location):
    """The hub token for a location; None for folders, or if no token is set and the model family is not gated.

    ModelError: the model is gated and there is no token. The hub's own message would not say how to set one.
    """
    if Path(location).is_dir():
        return None
    try:
        return hf_token()
    except ModelError as error:
        if location.startswith("google/"):
            raise ModelError(
                f"{error}. Gemma is gated: accept its licence at https://huggingface.co/google/gemma-3-1b-it first, "
                "or set model to a public mirror such as unsloth/gemma-3-1b-it, or to 'packaged', which needs no token"
            ) from None
        return None


def weight_paths(model, *, is_local=False):
    """Paths of the safetensors files of a config's `model`, downloaded if necessary. OSError: there are none.

    is_local: look only on this machine; download nothing.
    """
    from transformers.utils import cached_file

    location, _ = locate(model)
    settings = {"local_files_only": True} if is_local else {"token": token_for(location)}
    index = cached_file(
        location, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **settings
    )
    if index is None:
        return [cached_file(location, "model.safetensors", **settings)]
    names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return [cached_file(location, name, **settings) for name in sorted(names)]


class BaseWeights:
    """The tensors of a config's `model`, read from its files one at a time. OSError: it has no safetensors files."""

    def __init__(self, model):
        self._files = {}  # tensor's name -> path
        for path in weight_paths(model):
            with safe_open(path, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), path)

    @property
    def names(self):
        """Names of the tensors in the files."""
        return list(self._files)

    def get(self, name, dtype):
        """A parameter's initial value, on the host in `dtype`, or None if the files have no tensor with its name."""
        key = name.removeprefix("base_model.model.")
        if key not in self._files:
            return None
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key).to(dtype)


@contextlib.contextmanager
def hub_errors(model):
    """Convert a library's failure to download `model` to a ModelError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"model={model!r} is gated and this account has no access: accept its licence at "
            f"https://huggingface.co/{model}, or set model to the id of a public mirror ({_first_line(error)})"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model={model!r} is neither a local folder nor a hub repository that this token can access: "
            "check the spelling, or use model='packaged'"
        ) from error
    except OSError as error:
        raise ModelError(
            f"model={model!r} could not be loaded ({_first_line(error)}): check the network and the name, "
            "use a local folder, or use model='packaged'"
        ) from error


def _first_line(error):
    return str(error).strip().split("\n")[0][:200]
