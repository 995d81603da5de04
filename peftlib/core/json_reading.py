"""JSON that may be damaged: read strictly, and checked against the shape that its readers rely on."""

import json
import math

from peftlib.core.disk_errors import MADE_AGAIN
from peftlib.core.errors import StudyError


class Fields(dict):
    """An object of a JSON file; a key that it lacks is a StudyError that names the file, not a KeyError."""

    path = None

    def __missing__(self, key):
        raise StudyError(f"{self.path} lacks {key!r}: {MADE_AGAIN}")


def require_shape(value, shape, path, way_out=MADE_AGAIN):
    """StudyError, naming the file and the value, unless a JSON value has a shape (see fault); returns the value."""
    found = fault(value, shape)
    if found:
        raise StudyError(f"{path} is damaged ({found}): {way_out}")
    return value


def parse(text, path=None):
    """The value of a JSON text; its objects are Fields of `path`.

    ValueError: no JSON, or what JSON has no word for (NaN, infinities, half a surrogate pair), or nested without end.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_hook=lambda found: _fields(found, path),
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair") from None
    return value


def _fields(found, path):
    made = Fields(found)
    made.path = path
    return made


def _refuse_constant(name):
    raise ValueError(f"{name} is no number")


def _finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


class Maybe:
    """A shape that null fits too."""

    def __init__(self, shape):
        self.shape = shape


class Map:
    """Objects whose keys are free and whose values have one shape."""

    def __init__(self, shape):
        self.shape = shape


_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def fault(value, shape, name="it"):
    """What of a JSON value does not have a shape, in words, or None.

    shape: a type (float takes whole numbers too), a tuple of allowed values, [shape of each], Maybe, Map, or an object
    {key: shape} whose keys ending in '?' may be absent; keys that it does not name are free.
    """
    if isinstance(shape, Maybe):
        return None if value is None else fault(value, shape.shape, name)
    if isinstance(shape, tuple):
        return None if value in shape else f"{name} is {_shown(value)}, not one of {', '.join(shape)}"
    kind = shape if isinstance(shape, type) else list if isinstance(shape, list) else dict
    if not _is(value, kind):
        return f"{name} is {_shown(value)}, not {_NAMES[kind]}"
    return next(filter(None, _faults_within(value, shape, name)), None)


def _faults_within(value, shape, name):
    start = "" if name == "it" else f"{name}."
    if isinstance(shape, list):
        yield from (fault(part, shape[0], f"{start}{at}") for at, part in enumerate(value))
    elif isinstance(shape, Map):
        yield from (fault(part, shape.shape, f"{start}{key}") for key, part in value.items())
    elif isinstance(shape, dict):
        for key, part in shape.items():
            if key.removesuffix("?") in value:
                yield fault(value[key.removesuffix("?")], part, f"{start}{key.removesuffix('?')}")
            elif not key.endswith("?"):
                yield f"{name} lacks {key!r}"


def _is(value, kind):
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
