"""Fields of a row: which hold nothing, and which of those that are not read could change what the row means."""

import math
import re
from dataclasses import dataclass

# Names that say where a row comes from or what it is about, and 'text', the usual name of a rendering of the turns.
_ABOUT = re.compile(
    r"(.*_)?(ids?|idx|index|uuid|hash|sha256|urls?|sources?|dataset|split|lang|language|licen[cs]e|date|time|timestamp"
    r"|created|updated|created_at|updated_at|model|category|tags?|topic|task|type|quality|difficulty|meta|metadata"
    r"|author|user|version)|text|__index_level_\d+__|unnamed: \d+",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false", re.IGNORECASE)
NUMBERS_THAT_MATTER = ("label", "labels", "weight", "weights", "train", "mask", "kto_tag")


@dataclass(frozen=True)
class Unread:
    """Stands for a value of a Parquet column that was not read. is_number: a number, or a time."""

    is_number: bool = False

    def __repr__(self):
        return "(not read)"


def is_missing(value):
    """Whether a field is null; pandas writes that as NaN too."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value):
    """Whether a field holds nothing: null, white space, or an empty list or object."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in ("[]", "{}")
    return is_missing(value) or value == [] or value == {}


def ignored_fields(row, used):
    """Names of a row's fields that are not in `used`, hold something, and could change what the row means."""
    return [
        str(name)
        for name in row
        if name not in used and not is_empty(row[name]) and _could_matter(str(name), row[name])
    ]


def _could_matter(name, value):
    if _is_number(value):
        return name.lower() in NUMBERS_THAT_MATTER
    return not _ABOUT.fullmatch(name)


def _is_number(value):
    if isinstance(value, str):  # all values of a CSV file are texts
        return _NUMBER.fullmatch(value.strip()) is not None
    return isinstance(value, (bool, int, float)) or (isinstance(value, Unread) and value.is_number)
