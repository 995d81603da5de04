"""Load base models, optionally with NF4 layers, and tokenizers, safely.

We never run code that comes with weights and never read pickles: where transformers would ask at the terminal whether
to run a model's own code, we raise. Files that are damaged, incomplete or for another model raise ModelError.
"""

import contextlib
import functools
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from peftlib.core.env import require_bitsandbytes
from peftlib.core.errors import ModelError, PeftlibError
from peftlib.core.files import sha256
from peftlib.models import chat_template
from peftlib.models.inspect import PROJECTIONS, core, in_layers, is_four_bit, is_named, named_weights
from peftlib.models.layers import keep_residual_in_float32
from peftlib.models.locate import hub_errors, locate, token_for
from peftlib.models.precision import DTYPES
from peftlib.models.shapes import shape_of

_CODE = "auto_map"  # refers to classes in Python files next to the weights
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_NO_PICKLE = (
    "peftlib reads only safetensors, because pickle can run code when it is loaded: use a version of the model in that "
    "format"
)
_PEFT_WARNING = (  # PEFT reads an attribute that the newest transformers has renamed
    "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` instead."
)


def load_base(model, *, precision, device, four_bit=(), runs=True):
    """The base model on `device`, ready for training, with all weights frozen.

    precision: 'bf16', 'fp16' or 'fp32' for matrix products. four_bit: projections (see inspect.is_named) to store in
    NF4 with double quantization (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); never lm_head.
    Plain matrices have the precision's dtype. Norms, and with fp16 the whole residual stream, are in float32, because
    Gemma 3's residual exceeds fp16's 65,504; the MLP's product is guarded as well. runs: False to get only weights that
    will be converted to another precision, without the hooks that keep the residual in float32.
    ModelError: the model is unavailable (gated, no network, unknown), needs its own code, or is damaged; bitsandbytes
    is missing, or a 4-bit name matches no layer.
    """
    location, _ = locate(model)
    # With its index: files are read in other threads, where "cuda" means the first GPU.
    place = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    settings = {"dtype": DTYPES[precision], "device_map": {"": place}}
    without_advice()
    _without_loading_bar()
    if four_bit:
        require_bitsandbytes("a 4-bit model")
        by_layer = any("." in name for name in four_bit)
        known = in_layers(range(shape_of(model).layers)) if by_layer else PROJECTIONS
        settings["quantization_config"] = _nf4(precision, set(known) - set(four_bit))
    with hub_errors(model):
        loaded = causal_model(location, token=token_for(location), **settings)
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    for name, p in loaded.named_parameters():
        if p.ndim == 1 and "norm" in name:
            p.data = p.data.float()
    if precision == "fp16" and runs:
        keep_residual_in_float32(loaded)
    if four_bit:
        named_weights(loaded, four_bit)  # raises if no layer has such a name
        guard_four_bit(loaded, four_bit)
    return loaded


def _nf4(precision, kept_plain):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
        llm_int8_skip_modules=[*sorted(kept_plain), "lm_head"],  # this list replaces the default one
    )


def guard_four_bit(model, four_bit):
    """Require that exactly the named projections are 4-bit, and prevent repacking on CPUs.

    In the first eval() forward pass a CPU would repack 4-bit weights in place, which changes later losses.

    ModelError: a projection should be 4-bit but is not, or should not be but is; lm_head is 4-bit or untied.
    """
    from bitsandbytes.nn import Linear4bit

    head, embedding = core(model).get_output_embeddings(), core(model).get_input_embeddings()
    if isinstance(head, Linear4bit) or head.weight is not embedding.weight:
        raise ModelError(f"lm_head is a {type(head).__name__} that is not tied to the embedding, but should be")
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        is_projection = leaf in PROJECTIONS and isinstance(module, torch.nn.Linear)
        if is_projection and isinstance(module, Linear4bit) != is_named(name, four_bit):
            raise ModelError(f"{name} is a {type(module).__name__}: only {', '.join(four_bit)} should be 4-bit")


def load_tokenizer(model: str | Path) -> Any:
    """Tokenizer of 'packaged', a hub id or a folder, with the bundled chat template.

    ModelError: unavailable (gated, unknown, no network), damaged, or not a Gemma 3 tokenizer.
    """
    location, _ = locate(model)
    with hub_errors(model):
        if not Path(location).is_dir():
            return _opened_tokenizer(location)
        stats = {path.name: path.stat() for path in sorted(Path(location).iterdir())}
        return _kept_tokenizer(location, tuple((name, at.st_mtime_ns, at.st_size) for name, at in stats.items()))


@functools.lru_cache(maxsize=2)
def _kept_tokenizer(folder, state):
    """A folder's tokenizer, cached while the folder's files are unchanged, because loading takes seconds."""
    return _opened_tokenizer(folder)


def _opened_tokenizer(location):
    tokenizer = auto_tokenizer(location, token=token_for(location))
    chat_template.check_tokenizer(tokenizer)
    return chat_template.set_template(tokenizer)


def tokenizer_sha256(model):
    """SHA-256 of the tokenizer.json of `model`. ModelError: it is missing or unavailable."""
    from transformers.utils import cached_file

    location, _ = locate(model)
    with hub_errors(model):
        return sha256(cached_file(location, "tokenizer.json", token=token_for(location)))


def causal_model(location, **settings):
    """transformers' causal model of a folder or hub id; every weight comes from the files.

    ModelError: it needs its own code, has no safetensors files, or its files are damaged or lack a weight.
    """
    from transformers import AutoModelForCausalLM

    refuse_pickles(location)
    with readable(location):
        model, found = AutoModelForCausalLM.from_pretrained(
            location, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **settings
        )
    if getattr(model.config, _CODE, None):
        raise ModelError(_wants_code(location))
    wrong = [*sorted(found["missing_keys"]), *sorted(map(str, found["mismatched_keys"])), *_of_wrong_shape(model)]
    if wrong:
        names = ", ".join(wrong[:3]) + (" and others" if wrong[3:] else "")
        raise ModelError(
            f"{location} has no matching weights for {names}: its files belong to another model, or some are missing"
        )
    return model


def _of_wrong_shape(model):
    """Names of 4-bit weights quantized from a matrix of another shape, which bitsandbytes does not check."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if is_four_bit(weight) and tuple(weight.quant_state.shape) != (module.out_features, module.in_features):
            yield f"{name}.weight"


def auto_tokenizer(location, **settings):
    """transformers' tokenizer of a folder or hub id. ModelError: it needs its own code, or its files are damaged."""
    from transformers import AutoTokenizer

    with readable(location):
        found = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **settings)
    if found.init_kwargs.get(_CODE):
        raise ModelError(_wants_code(location))
    return found


def refuse_pickles(location):
    """ModelError: a folder has only pickled weights, which may run arbitrary code when loaded."""
    folder = Path(location)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelError(f"{folder} has pickled weights ({pickles[0]}); {_NO_PICKLE}")


@contextlib.contextmanager
def readable(source):
    """Convert a library's error about damaged or unexpected files of `source` to a ModelError that names them.

    Libraries raise all kinds of errors for damaged files. OSErrors from the system and the network pass through.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damage = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
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
    except (SafetensorError, StrictDataclassError, *damage) as error:
        wants_code = "trust_remote_code" in str(error)
        raise ModelError(_wants_code(source) if wants_code else _unreadable(source, error)) from error


def _unreadable(source, error):
    message = " ".join(str(error).split())[:300]
    return (
        f"{source} cannot be read ({type(error).__name__}: {message}): a file is damaged, or it is another kind of "
        "model; download or create it again"
    )


def _wants_code(source):
    return (
        f"{source} needs its own Python code ({_CODE} in its config), which peftlib never runs: use a "
        f"model that transformers supports, or remove {_CODE} from the folder's JSON files if its weights fit "
        "transformers' class"
    )


@contextlib.contextmanager
def peft_calls():
    """Context for PEFT calls: hides the one FutureWarning that PEFT's use of transformers triggers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"{re.escape(_PEFT_WARNING)}$", FutureWarning)
        yield


@functools.cache
def hide_log(logger, start):
    """Drop a library's log lines that begin with `start`."""
    logging.getLogger(logger).addFilter(lambda record: not str(record.msg).startswith(start))


def without_advice():
    """Silence bitsandbytes' advice to install `kernels`, which would download code from a hub."""
    hide_log("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community")


def _without_loading_bar():
    """Hide transformers' bar for loading weights, which would stay in a notebook; download bars stay on."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    is_quiet = are_progress_bars_disabled()
    disable_progress_bar()  # the hub's too
    if not is_quiet:
        enable_progress_bars()
