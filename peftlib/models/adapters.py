"""PEFT adapters: which types a run can train, reading and checking their configs, adding them to a model, and counting
their parameters."""

import contextlib
import difflib
import math
from typing import NamedTuple

import torch

from peftlib.core.errors import ConfigError
from peftlib.models.inspect import core, is_four_bit, trainable
from peftlib.models.kernels.adapters import fuse_adapters
from peftlib.models.load import peft_calls


class Kind(NamedTuple):
    """takes_4_bit: whether PEFT's layers support 4-bit weights. What a layer keeps for backward, counted for the 1B's
    shape: kept: elements per token, beyond fused LoRA's; copies: 16-bit copies of all its matrices."""

    takes_4_bit: bool
    kept: float = 1.0
    copies: float = 0.0


# Each is tested to train, save, load and merge (tests/models/test_adapters.py). Types are excluded if they change the
# base's own matrices in a way that loading again may not reproduce, or need calls between steps.
KINDS = {
    "LORA": Kind(True),
    "OFT": Kind(True, 1.06, 0.11),
    "BOFT": Kind(True, 1.33, 6.2),
    "IA3": Kind(True, 1.4),
    "VERA": Kind(True, 1.18, 0.3),
    "LOHA": Kind(False, 1.0, 1.0),
    "LOKR": Kind(False, 1.06, 1.0),
    "C3A": Kind(True, 1.34),
    "FOURIERFT": Kind(True, 1.06, 1.0),
    "HIRA": Kind(True, 1.06, 1.04),
    "LN_TUNING": Kind(True),
    "MISS": Kind(True, 1.0, 0.04),
    "RANDLORA": Kind(True, 1.0, 1.23),
    "ROAD": Kind(True, 2.23),
    "WAVEFT": Kind(True, 1.0, 2.0),
    "HRA": Kind(False, 1.0, 19.6),
    "DELORA": Kind(False, 1.07),
    "GRALORA": Kind(False, 1.07, 0.04),
    "VBLORA": Kind(False, 1.06, 0.02),
}
UNFUSED_LORA = Kind(True, 1.8)  # DoRA
_LOW_RANK = ("LORA", "LOHA", "HIRA", "DELORA")  # r is limited by the rank of the layer's matrix
_STARTS = (True, False, "gaussian", "orthogonal", "pissa", "olora")  # LoRA initialisations that loading reproduces
_OF_16_BITS = ("pissa", "olora")  # these change the frozen weights
# LoRA fields that need data, other models, or calls that training does not make.
_BEYOND: tuple[str, ...] = (
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
)


def config_of(fields, *, source):
    """The PeftConfig for the contents of an adapter_config.json, for training a causal model.

    source: its name in errors. ConfigError: not an object, an unknown or unsupported peft_type, task_type or field, or
    a value that PEFT rejects.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if not isinstance(fields, dict):
        raise ConfigError(f"{source} is a {type(fields).__name__}: use an object as in PEFT's adapter_config.json")
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{source}: peft_type={kind!r} {_why_not(kind)}: use {', '.join(KINDS)}")
    if fields.get("auto_map"):
        raise ConfigError(f"{source} refers to code in auto_map, which peftlib never runs: remove it")
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = made.__dataclass_fields__
    for name, value in fields.items():
        if name not in known and value:  # newer PEFT versions write unused fields as null or false
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise ConfigError(f"{source}: {name}={value!r} is not a field of {made.__name__}: use {' or '.join(near)}")
        if value and (name in _BEYOND or (name.endswith("_config") and kind == "LORA")):
            raise ConfigError(f"{source}: {name} needs more than a study's rows: remove it")
    task, start = fields.get("task_type"), fields.get("init_lora_weights", True)
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(f"{source}: task_type={task!r} is not for language models: use 'CAUSAL_LM'")
    if kind == "LORA" and start not in _STARTS:
        raise ConfigError(f"{source}: init_lora_weights={start!r} cannot be reproduced when loading: use {_STARTS}")
    given = {name: value for name, value in fields.items() if name in known and name != "runtime_config"}
    # As in saved adapters, and as a run needs them.
    given |= {"task_type": "CAUSAL_LM", "inference_mode": False, "base_model_name_or_path": None, "revision": None}
    with _as_config_error(source):
        return made(**{name: value for name, value in given.items() if name in known})


def _why_not(kind):
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind is None:
        return "is missing"
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if found is None:
        near = difflib.get_close_matches(str(kind).upper(), KINDS, n=2)
        return f"is unknown (did you mean {' or '.join(near)}?)" if near else "is unknown"
    if issubclass(found, PromptLearningConfig):
        return "trains a prompt before each row, not weights in the layers, which does not work with packed rows"
    return "is not supported by peftlib"


@contextlib.contextmanager
def _as_config_error(source):
    """Convert PEFT's errors about a value to a ConfigError that names the source."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{source}: PEFT rejects it ({' '.join(str(error).split())[:300]})") from error


def with_adapter(model, config, *, source):
    """A PeftModel with the adapter of a PeftConfig, in float32; everything else is frozen. Fuses layers if possible.

    source: its name in errors. ConfigError: 4-bit weights that this type does not support, targets that match no layer
    (with near names) or that include the embedding, a rank above a layer's shorter side, or whatever PEFT rejects.
    """
    from peft import get_peft_model

    kind = getattr(config.peft_type, "value", config.peft_type)
    if any(map(is_four_bit, model.parameters())):
        if not KINDS[kind].takes_4_bit:
            raise ConfigError(f"{source}: peft_type={kind!r} does not support 4-bit weights: use the 16-bit model")
        if getattr(config, "init_lora_weights", None) in _OF_16_BITS:
            raise ConfigError(
                f"{source}: init_lora_weights={config.init_lora_weights!r} needs the singular values of 16-bit "
                "weights: train it on the 16-bit model, or use true"
            )
    _require_targets(model, config, source)
    ends = [core(model).get_input_embeddings(), core(model).get_output_embeddings()]
    is_meta = next(model.parameters()).is_meta
    with _as_config_error(source), peft_calls():
        adapted = get_peft_model(model, config, low_cpu_mem_usage=is_meta)
    if [core(adapted).get_input_embeddings(), core(adapted).get_output_embeddings()] != ends:
        raise ConfigError(f"{source}: target_modules or modules_to_save include the embedding, which stays frozen")
    if not trainable(adapted):
        raise ConfigError(f"{source}: none of its parameters train: check target_modules and layers_to_transform")
    _require_rank(adapted, kind, source)
    for p in trainable(adapted).values():
        p.data = p.data.float()  # some types use the base's 16-bit dtype, which would lose small updates
    fuse_adapters(adapted)
    return adapted


def _require_targets(model, config, source):
    """ConfigError: a listed target or module to save matches no layer. PEFT only raises if none of them matches."""
    names = [name for name, _ in model.named_modules() if name]
    leaves = {name.rsplit(".", 1)[-1] for name in names} - {"model", "layers"}
    for field in ("target_modules", "modules_to_save", "feedforward_modules"):
        wanted = getattr(config, field, None)
        for target in () if wanted is None or isinstance(wanted, str) else sorted(wanted):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                near = difflib.get_close_matches(target, leaves, n=3) or sorted(x for x in leaves if not x.isdigit())
                raise ConfigError(f"{source}: {field} has {target!r}, which is not a layer: use {', '.join(near)}")


def _require_rank(adapted, kind, source):
    from peft.tuners.tuners_utils import BaseTunerLayer

    if kind not in _LOW_RANK:
        return
    for name, layer in adapted.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            rank, base = layer.r["default"], layer.get_base_layer()
            most = min(base.in_features, base.out_features)
            if rank > most:
                raise ConfigError(f"{source}: r={rank} is larger than {name.rsplit('.', 1)[-1]}: use 1..{most} there")


def adapter_path(model):
    """'fused', 'peft' or both: whose forward pass a model's adapted layers use. None: it has no adapted layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    found = {"fused" if hasattr(layer, "fused") else "peft" for layer in layers}
    return " and ".join(sorted(found)) or None


class Size(NamedTuple):
    """Trained elements, elements stored in addition to the base's, and what layers keep, as in Kind."""

    trained: int
    held: int
    kept: float
    copies: float


def adapter_size(shape, prepare):
    """The Size of the adapter that prepare(model) adds to a Gemma with a shapes.Shape.

    Counted on a model on the meta device, from the actual layers.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    query, key, _ = shape.attention
    width = math.gcd(query, key)
    config = Gemma3TextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=query // width,
        num_key_value_heads=key // width,
        head_dim=width,
    )
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config).requires_grad_(False)
    before = _held(model)
    adapted = prepare(model)
    name = adapted.peft_config["default"].peft_type
    kind = KINDS[getattr(name, "value", name)]
    if kind is KINDS["LORA"] and adapter_path(adapted) != "fused":
        kind = UNFUSED_LORA
    trained = sum(p.numel() for p in trainable(adapted).values())
    return Size(trained, _held(adapted) - before, kind.kept, kind.copies)


def _held(model):
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
