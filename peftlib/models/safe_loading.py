"""Models and tokenizers read from files without running anything of theirs: no code beside them, no pickle.

Transformers would ask at the terminal whether to run a model's own code; here that is no question. Files that are
damaged or fit another model end in a ModelError, never in a model with some weights left as they were drawn.
"""

import contextlib
from pathlib import Path

import torch

from peftlib.core.errors import ModelError, PeftlibError

_CODE = "auto_map"  # names classes in Python files beside the weights
_NO_PICKLE = "peftlib reads safetensors alone, for pickle can run code when it is read: take a version of the model in that format"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@contextlib.contextmanager
def readable(source):
    """Turns what a library makes of odd files of `source` into a ModelError that names it.

    Libraries meet a damaged file with errors of any kind. OSErrors of the system pass, and those of the network.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (PeftlibError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if "use_safetensors=True" in str(error):
            raise ModelError(f"{source} has no safetensors files; {_NO_PICKLE}") from error
        if error.errno is None and Path(source).exists():
            raise ModelError(_unreadable(source, error)) from error
        raise
    except (
        SafetensorError,
        StrictDataclassError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(_wants_code(source)) from error
        raise ModelError(_unreadable(source, error)) from error


def _unreadable(source, error):
    said = " ".join(str(error).split())[:300]
    return (
        f"{source} cannot be read ({type(error).__name__}: {said}): a file of it is damaged, or it is another kind of "
        "model; fetch or make it again"
    )


def causal_model(location, **settings):
    """transformers' causal model of a folder or hub id; every weight of it comes from the files.

    ModelError: it wants code of its own to be run, has no safetensors files, or its files are damaged or lack a weight.
    """
    from transformers import AutoModelForCausalLM

    refuse_pickles(location)
    with readable(location):
        model, found = AutoModelForCausalLM.from_pretrained(
            location, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **settings
        )
    if getattr(model.config, _CODE, None):
        raise ModelError(_wants_code(location))
    wrong = [
        *sorted(found["missing_keys"]),
        *sorted(str(key) for key in found["mismatched_keys"]),
        *_of_wrong_shape(model),
    ]
    if wrong:
        raise ModelError(
            f"{location} has no fitting weights for {', '.join(wrong[:3])}{' and others' if wrong[3:] else ''}: its files "
            "belong to another model, or are not all there"
        )
    return model


def tokenizer(location, **settings):
    """transformers' tokenizer of a folder or hub id. ModelError: it wants code of its own, or its files are damaged."""
    from transformers import AutoTokenizer

    with readable(location):
        found = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **settings)
    if found.init_kwargs.get(_CODE):
        raise ModelError(_wants_code(location))
    return found


def refuse_pickles(location):
    """ModelError: a folder holds its weights as pickle alone, which runs what its maker wrote when it is read."""
    folder = Path(location)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(f"{folder} holds its weights as pickle ({pickles[0]}); {_NO_PICKLE}")


def _wants_code(source):
    return (
        f"{source} wants Python code of its own to be run ({_CODE} in its config), which peftlib never does: take a model "
        f"that transformers knows, or remove {_CODE} from the JSON files of a folder whose weights fit transformers' class"
    )


def _of_wrong_shape(model):
    """Names of 4-bit weights that were quantized from a matrix of another shape, which bitsandbytes does not mind."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            yield f"{name}.weight"
