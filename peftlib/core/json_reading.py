"""Strict reading of JSON that may be damaged, checked against the shape that its readers rely on."""

import json
import math
from dataclasses import dataclass

from peftlib.core.errors import MADE_AGAIN, StudyError


class Fields(dict):
    """An object from a JSON file; a missing key raises a StudyError that names the file, not a KeyError."""

    path = None

    def __missing__(self, key):
        raise StudyError(f"{self.path} lacks {key!r}: {MADE_AGAIN}")


def parse(text, path=None):
    """The value of a JSON text; its objects are Fields of `path`.

    ValueError: not JSON, values outside the standard (NaN, infinities, lone surrogates), or nested too deeply.
    """

    def fields(found):
        made = Fields(found)
        made.path = path
        return made

    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, object_hook=fields)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair") from None
    return value


def _finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number")
    return value


def require_shape(value, shape, path, way_out=MADE_AGAIN):
    """Return a JSON value that has a shape (see fault). StudyError: it does not; the file and the fault are named."""
    found = fault(value, shape)
    if found:
        raise StudyError(f"{path} is damaged ({found}): {way_out}")
    return value


@dataclass
class Maybe:
    """A shape that also allows null."""

    shape: object


@dataclass
class Map:
    """Objects with any keys, whose values have one shape."""

    shape: object


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {dict: "an object", list: "a list"}


def fault(value, shape, name="it"):
    """Describe the first part of a JSON value that does not have a shape; None if all of it does.

    shape: a type (float allows integers too), a tuple of allowed values, [shape of each item], Maybe, Map, or
    {key: shape}, where keys ending in '?' may be absent and keys that are not named are ignored.
    """
    if isinstance(shape, Maybe):
        return None if value is None else fault(value, shape.shape, name)
    if isinstance(shape, tuple):
        return None if value in shape else f"{name} is {json.dumps(value):.40}, not one of {', '.join(shape)}"
    kind = shape if isinstance(shape, type) else list if isinstance(shape, list) else dict
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        return f"{name} is {json.dumps(value):.40}, not {_NAMES[kind]}"
    if isinstance(shape, list):
        parts = [(at, part, shape[0]) for at, part in enumerate(value)]
    elif isinstance(shape, Map):
        parts = [(key, part, shape.shape) for key, part in value.items()]
    elif isinstance(shape, dict):
        lacking = [key for key in shape if not key.endswith("?") and key not in value]
        if lacking:
            return f"{name} lacks {lacking[0]!r}"
        bare = {key.removesuffix("?"): part for key, part in shape.items()}
        parts = [(key, value[key], part) for key, part in bare.items() if key in value]
    else:
        return None
    start = "" if name == "it" else f"{name}."
    return next(filter(None, (fault(part, own, f"{start}{key}") for key, part, own in parts)), None)
