"""JSON in which an object that names a field twice is an error: Python's reader would keep the last without a word."""

import json


class RepeatedField(ValueError):
    """An object names a field twice. name: the field's."""

    def __init__(self, name):
        super().__init__(f"the field {name!r} is given twice")
        self.name = name


def _unique(pairs):
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedField(next(name for name in names if names.count(name) > 1))
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def loads(text):
    """The value of a JSON text. RepeatedField, or the ValueError and RecursionError of json.loads."""
    return DECODER.decode(text)
