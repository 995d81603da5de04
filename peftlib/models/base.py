"""Base models: where they come from, which layers become 4-bit, and what of them trains."""

import contextlib
import logging
import warnings
from collections import Counter
from pathlib import Path

import torch

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.env import require_bitsandbytes
from peftlib.core.errors import ModelError
from peftlib.core.hub_token import hf_token
from peftlib.models.layers import guard_products
from peftlib.models.packaged import PROVENANCE, packaged_model
from peftlib.models.safe_loading import causal_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + MLP
_TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def locate(model):
    """(folder or hub id, provenance in words) of a config's `model`."""
    if model == PACKAGED_MODEL:
        return str(packaged_model()), PROVENANCE
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser()), f"local folder {Path(model).name}"
    return model, f"Hugging Face hub, {model}"


@contextlib.contextmanager
def hub_errors(model):
    """Turns a library's failure to fetch `model` into a ModelError that names the ways out."""
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
            f"model={model!r} is neither a folder here nor a repository that this token can see on the hub: "
            "check the spelling, or use model='packaged'"
        ) from error
    except OSError as error:
        raise ModelError(
            f"model={model!r} could not be loaded ({_first_line(error)}): check the network and the name, "
            "give a local folder, or use model='packaged'"
        ) from error


def _first_line(error):
    return str(error).strip().split("\n")[0][:200]


def token_for(location):
    """The hub token where `location` is a hub id of a gated family, None for folders and where none is set."""
    if Path(location).is_dir():
        return None
    if location.startswith("google/"):
        return hf_token()  # gated: without one the hub's own message would be all that the user sees
    try:
        return hf_token()
    except ModelError:
        return None


def load_base(model, *, precision, device, four_bit=(), runs=True):
    """The base model, all weights frozen, in training layout on `device`.

    precision: 'bf16', 'fp16' or 'fp32' of the matrix products. four_bit: projection names to hold in NF4 with double
    quantization (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); lm_head never is.
    Plain matrices are in the precision's dtype; norms, and with fp16 the whole residual stream, are in float32, for
    Gemma 3's residual passes fp16's 65,504; the MLP's product is guarded against it too. runs: False for its weights
    alone, to be brought to another precision: without those hooks, which would give it a float32 residual there.
    ModelError: not to be had (gated, no network, unknown), not readable without running its code, damaged, bitsandbytes is
    missing, or a 4-bit name matches no layer.
    """
    location, _ = locate(model)
    settings = {"dtype": _TORCH_DTYPE[precision], "device_map": {"": device}}
    without_advice()
    _without_loading_bar()
    if four_bit:
        require_bitsandbytes("a 4-bit model")
        settings["quantization_config"] = _nf4(precision, set(PROJECTIONS) - set(four_bit))
    with hub_errors(model):
        loaded = causal_model(location, token=token_for(location), **settings)
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    _norms_to_float32(loaded)
    if precision == "fp16" and runs:
        keep_residual_in_float32(loaded)
    if four_bit:
        named_weights(loaded, four_bit)  # at least one layer bears such a name
        guard_four_bit(loaded, four_bit)
    return loaded


def _nf4(precision, kept_plain):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_TORCH_DTYPE[precision],
        llm_int8_skip_modules=[*sorted(kept_plain), "lm_head"],  # a given list replaces the default one
    )


def without_advice():
    """Have bitsandbytes not advise to install `kernels`, which would fetch code from a hub."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_reading)


def _is_worth_reading(log_record):
    return not str(log_record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


def _without_loading_bar():
    """Have transformers load weights without a bar, which would stay in a notebook; bars of downloads stay on."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    is_quiet = are_progress_bars_disabled()
    disable_progress_bar()  # the hub's too
    if not is_quiet:
        enable_progress_bars()


@contextlib.contextmanager
def peft_calls():
    """Around calls of PEFT, which asks transformers for an attribute that the newest transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _norms_to_float32(model):
    for name, p in model.named_parameters():
        if p.ndim == 1 and "norm" in name:
            p.data = p.data.float()


def keep_residual_in_float32(model):
    """Let a model of fp16 matrices carry its residual stream in float32 and guard the MLP's product, see load_base."""
    model.get_input_embeddings().register_forward_hook(_to_float32)
    guard_products(model)


def _to_float32(module, args, output):
    return output.float()


def guard_four_bit(model, four_bit):
    """Keep CPUs from repacking 4-bit weights in place at the first eval() forward, which would change later losses.

    ModelError: a projection that should be 4-bit is not, or one that should not be is; lm_head is 4-bit or untied.
    """
    from bitsandbytes.nn import Linear4bit

    head, embedding = core(model).get_output_embeddings(), core(model).get_input_embeddings()
    if isinstance(head, Linear4bit) or head.weight is not embedding.weight:
        raise ModelError(f"lm_head is a {type(head).__name__} that is not tied to the embedding: it should share it")

    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        is_projection = leaf in PROJECTIONS and isinstance(module, torch.nn.Linear)
        if is_projection and isinstance(module, Linear4bit) != (leaf in four_bit):
            raise ModelError(f"{name} is a {type(module).__name__}: {', '.join(four_bit)} alone should be 4-bit")


def core(model):
    """The transformer without adapter wrapper, whose `.model` gives hidden states and `.lm_head` the vocabulary."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model, batch):
    """(B, T, D) last hidden states, after the final norm, of a rows.Batch.

    No padding mask: attention is causal, so a real token never sees the padding to its right. Rows packed into one
    sequence do not see each other and count their positions from 0.
    """
    inner, packed = core(model).model, {}
    if batch.documents is not None:
        packed = {
            "position_ids": batch.places,
            "attention_mask": packed_masks(batch.documents, inner.config.sliding_window),
        }
    return inner(input_ids=batch.ids, use_cache=False, **packed).last_hidden_state


def packed_masks(documents, window):
    """{layer type: (B, 1, T, T) bool}, True where a token sees another of its own document, as Gemma 3 names them.

    documents: (B, T). window: tokens, itself included, that a sliding layer's token sees.
    """
    place = torch.arange(documents.shape[1], device=documents.device)
    back = place[:, None] - place
    seen = (documents[:, None, :, None] == documents[:, None, None, :]) & (back >= 0)
    return {"full_attention": seen, "sliding_attention": seen & (back < window)}


def head_weight(model):
    """(V, D) output embedding, tied to the input embedding in Gemma 3."""
    return core(model).get_output_embeddings().weight


def trainable(model):
    """{name: parameter} of what trains, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def named_weights(model, leaves):
    """{name: weight} of the plain projections in `leaves`. ModelError: none matches."""
    found = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in leaves and isinstance(module, torch.nn.Linear):
            found[f"{name}.weight"] = module.weight
    if not found:
        raise ModelError(f"no layer is named {', '.join(leaves)}: this is not a Gemma-like model")
    return found


def count_parameters(model):
    """(trainable, total) as numbers of weights; a 4-bit weight counts as the matrix it stands for."""
    trained = sum(p.numel() for p in trainable(model).values())
    return trained, sum(_true_numel(p) for p in model.parameters())


def _true_numel(p):
    return p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel()


def layer_table(model):
    """[{layer, class, dtype, trains, count, weights}, ...]: what each kind of layer is held as."""
    rows = Counter()
    weights = Counter()
    for name, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            parts = [part for part in f"{name}.{leaf}".split(".") if not part.isdigit() and part != "default"]
            kind = ".".join(parts[-3:-1] if parts[-1] == "weight" else parts[-2:])
            dtype = "nf4" if getattr(p, "quant_state", None) is not None else str(p.dtype).removeprefix("torch.")
            key = (kind, type(module).__name__, dtype, p.requires_grad)
            rows[key] += 1
            weights[key] += _true_numel(p)
    columns = ("layer", "class", "dtype", "trains")
    return [dict(zip(columns, key, strict=True)) | {"count": n, "weights": weights[key]} for key, n in rows.items()]
