"""Everything about a method in one object, used by training, planner, report, model card and command line."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from peftlib.core.config import Config
from peftlib.core.errors import ConfigError

BASE = "base"  # the untrained model, first in tables

LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_init", "lora_use_rslora", "lora_use_dora")
GALORE_SETTINGS: tuple[str, ...] = (
    "galore_rank",
    "galore_update_interval",
    "galore_scale",
    "galore_weights",
    "galore_on_refresh",
    "galore_engine",
)
_RANK_FIELDS = {
    "adapters": "lora_rank",
    "galore": "galore_rank",
    "galore_torch": "galore_rank",
    "apollo": "apollo_rank",
}

METHODS: dict[str, "MethodSpec"] = {}  # {name: MethodSpec} in study order


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One way to fine-tune a model.

    name: in commands, files and tables. label: in prose. description: one phrase for model cards, with the paper.
    colors: hex, for light and dark backgrounds. marker: matplotlib's.
    trains: {how ("adapters", "galore", "galore_torch", "apollo", "muon" or "full"): projections}, which the memory
        model counts. A projection is named as in inspect.is_named, alone for all layers or with its layer.
    rates: its learning-rate fields in the config. settings: its other fields there.
    prepare(model, cfg): the model with trainable parameters set up.
    build_optimizer(model, cfg): an optimizer with finish_accumulation(scale) -> (grad_norm, found_inf).
    four_bit: projections stored in NF4.
    variants: settings whose value tables show if it is not the default.
    by_config(cfg, layers): {field of this: value} changed by a config, for a model with this many layers.
    is_default: whether a study, a sweep and a plan include it if no methods are named.
    is_counted: the memory model adds its adapter to an empty model instead of counting LoRA of lora_rank.
    peft_config: the adapter_config.json it came from.
    """

    name: str
    label: str
    description: str
    colors: tuple[str, str]
    marker: str | tuple[int, int, float]
    trains: dict[str, tuple[str, ...]]
    rates: tuple[str, ...]
    settings: tuple[str, ...] = ()
    prepare: Callable
    build_optimizer: Callable
    four_bit: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    by_config: Callable | None = None
    is_default: bool = True
    is_counted: bool = False
    peft_config: dict | None = None

    def resolve(self, cfg, layers):
        """This method with a config's changes, for a model with this many layers. ConfigError: it is not possible."""
        return replace(self, **self.by_config(cfg, layers)) if self.by_config else self

    def variant(self, config):
        """'hybrid_galore=mlp' for a run's config {field: value}: the `variants` that are not the default; else ''."""
        defaults = {f.name: f.default for f in fields(Config)}
        chosen = {name: config.get(name, defaults[name]) for name in self.variants}
        return ", ".join(f"{name}={value}" for name, value in chosen.items() if value != defaults[name])

    def require_ranks(self, cfg, shapes_of):
        """ConfigError: a rank in cfg is too large for a matrix.

        shapes_of(projections): (rows, columns) of each in one layer.
        """
        for how, projections in self.trains.items():
            field = _RANK_FIELDS.get(how)
            if field in self.settings:
                require_rank(field, getattr(cfg, field), shapes_of(projections))


def register(spec):
    """Register a method, last in the study order; returns it. ConfigError: the name is taken."""
    if spec.name == BASE or spec.name in METHODS:
        raise ConfigError(f"method={spec.name!r} already exists: choose another name")
    METHODS[spec.name] = spec
    return spec


def unregister(name):
    """Remove a registered method. ConfigError: no such method."""
    if name not in METHODS:
        raise ConfigError(f"method={name!r} is unknown: use {', '.join(METHODS)}")
    del METHODS[name]


def default_methods():
    """Names of a study's default methods, in study order."""
    return tuple(name for name, spec in METHODS.items() if spec.is_default)


def study_order(name):
    """A sort key by method: the base first, then registration order, then unknown names alphabetically."""
    names = (BASE, *METHODS)
    return (names.index(name) if name in names else len(names), name)


def require_rank(field, rank, shapes):
    """ConfigError: the rank in `field` exceeds the shorter side of one of the (rows, columns) in shapes."""
    shortest = min(min(shape) for shape in shapes)
    if rank > shortest:
        raise ConfigError(f"{field}={rank} is larger than a layer: use 1..{shortest}")
