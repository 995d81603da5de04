"""The registry: a method is a module that says what becomes 4-bit, what trains, and by which optimizer.

Each module holds
  FOUR_BIT             projection names held in NF4
  TRAINS               {how ("adapters", "galore", "apollo", "full"): projection names}, for the planner
  RATES                names of its learning rates in the config
  prepare(model, cfg)  the model with what trains switched on
  build_optimizer(model, cfg)
                       an optimizer with finish_accumulation(scale) -> (grad_norm, found_inf)
"""

import importlib

from peftlib.core.errors import ConfigError

METHODS = {
    "qlora": "peftlib.methods.qlora",
    "galore": "peftlib.methods.galore",
    "hybrid": "peftlib.methods.hybrid",
    "lora": "peftlib.methods.lora",
    "full": "peftlib.methods.full",
    "apollo": "peftlib.methods.apollo",
}


def find(name):
    """The method's module. ConfigError: no such method."""
    if name not in METHODS:
        raise ConfigError(f"method={name!r} is unknown: use {', '.join(METHODS)}")
    return importlib.import_module(METHODS[name])


def require_rank(field, rank, shapes):
    """ConfigError: the rank that `field` sets is above the shorter side of one of the (rows, columns) in shapes."""
    shortest = min(min(shape) for shape in shapes)
    if rank > shortest:
        raise ConfigError(f"{field}={rank} is larger than a layer: use 1..{shortest}")
