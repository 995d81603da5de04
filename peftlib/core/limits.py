"""Limits of settings: declared with each field of Config, and checked when a Config is made."""

import difflib
import math
import re
import unicodedata
from dataclasses import field

from peftlib.core.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # the linear layers of a Gemma layer
MLP = ("gate_proj", "up_proj", "down_proj")
_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_NAME_BYTES = 200  # limit of a study's name; file systems allow 255, and other names are derived from it
_NOT_IN_NAMES = '/\\:<>"|?*'
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # reserved


def setting(default, scope, unit, *, low=None, high=None, choices=None, above=None):
    """A dataclass field whose metadata hold its scope (see config), its unit or meaning, and its limits.

    low, high: smallest and largest value. above: the value must be greater than this. choices: the allowed values.
    """
    limits = {"scope": scope, "unit": unit, "low": low, "high": high, "choices": choices, "above": above}
    return field(default=default, metadata=limits)


def checked(f, value):
    """A value converted to the type of a `setting` field. ConfigError: wrong type, or outside the limits."""
    kind, limits = f.type, f.metadata
    low, high, above, choices, unit = (limits[name] for name in ("low", "high", "above", "choices", "unit"))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is bool and value in ("true", "false"):  # papermill passes on `-p make_missing true` as text
        value = value == "true"
    if type(value) is not kind:
        raise ConfigError(f"{f.name}={value!r} is a {type(value).__name__}: use a {_KINDS[kind]} ({unit})")
    if kind is str and "\0" in value:
        raise ConfigError(f"{f.name}={value!r} contains a null character: remove it ({unit})")
    if choices and value not in choices:
        allowed = ", ".join(str(choice) or "'' (none)" for choice in choices)
        raise ConfigError(f"{f.name}={value!r} is not allowed: use {allowed}")
    too_low = (low is not None and not value >= low) or (above is not None and not value > above)  # nan is too low
    if too_low or (high is not None and not value <= high):
        allowed = f"more than {above}" if above is not None else f"{low} or more"
        allowed += "" if high is None else f", at most {high}"
        raise ConfigError(f"{f.name}={value!r} is out of range: use {allowed} ({unit})")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{f.name}={value!r} is not finite: use a finite number ({unit})")
    return value


def parsed(f, text):
    """Parse command-line text as the type of a field. ConfigError: it cannot be parsed."""
    try:
        if f.type is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return f.type(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{f.name}={text!r} is not a {_KINDS[f.type]}") from None


def last_layers(text):
    """K of 'last_K_layers', or None for other text."""
    found = re.fullmatch(r"last_(\d+)_layers", text)
    return found and int(found[1])


def projections_of(name, text):
    """The projections, in order, that "attention", "mlp" or a comma-separated list of names stands for.

    name: the setting's. ConfigError: an unknown name, or none or all of the projections.
    """
    groups = {"attention": ATTENTION, "mlp": MLP, **{leaf: (leaf,) for leaf in ATTENTION + MLP}}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in groups:
            near = difflib.get_close_matches(part, [*groups, "last_4_layers"], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(groups)}"
            raise ConfigError(f"{name}={text!r}: {part!r} is not a projection: {hint} Or last_K_layers, K a number")
    chosen = tuple(leaf for leaf in ATTENTION + MLP if any(leaf in groups[part] for part in parts))
    if len(chosen) in (0, len(ATTENTION + MLP)):
        is_all = "every projection, so none is left in 4 bits: use the method galore for that"
        raise ConfigError(f"{name}={text!r} names {is_all if chosen else 'no projection: that is the method qlora'}")
    return chosen


def factors_of(name, text):
    """Parse comma-separated numbers from 0 to 1; () for empty text. name: the setting's.

    ConfigError: anything else, or a repeated number.
    """
    try:
        found = tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        found = (math.nan,)
    if len(set(found)) < len(found) or not all(0 <= factor <= 1 for factor in found):
        raise ConfigError(f"{name}={text!r}: use different numbers from 0 to 1, separated by commas, such as 0.25,0.5")
    return found


def require_folder_name(name, text):
    """ConfigError unless text is a valid one-line folder name on every system. name: the setting's."""
    size_bytes = len(text.encode("utf-8", "replace"))
    if size_bytes > _NAME_BYTES:
        raise ConfigError(f"{name}={text[:30]!r}... has {size_bytes} bytes: a study name has at most {_NAME_BYTES}")
    has_odd = any(c in _NOT_IN_NAMES or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
    is_reserved = text.split(".")[0].strip().lower() in _DEVICES
    # Windows drops trailing dots and spaces.
    if has_odd or is_reserved or text != text.strip() or text.endswith(".") or not text:
        why = " (Windows reserves it)" if is_reserved else ""
        raise ConfigError(f"{name}={text!r} is not a folder name{why}: use letters, digits, '-' and '_'")
