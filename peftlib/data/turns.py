"""Turns of a chat row: the role, the text and whether an answer is trained on; and which fields are unused."""

import math
import re
from typing import NamedTuple

from peftlib.data.outcomes import Broken, RowRejected
from peftlib.data.readers import loads

_ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system", "developer": "system"}
_ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bing", "bard"), "assistant")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
_TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation"}
_TOOL_ROLES |= {"ipython"}
MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos")
_OTHER_PARTS = ("image_url", "input_audio", *MEDIA_FIELDS)
_READ = {"role", "from", "content", "value", "weight", "name", *_TOOL_FIELDS, *MEDIA_FIELDS}
SURROGATE = re.compile("[\ud800-\udfff]")

# Names of metadata about a row, and 'text', the usual name of the rendered turns.
_ABOUT = re.compile(
    r"(.*_)?(ids?|idx|index|uuid|hash|sha256|urls?|sources?|dataset|split|lang|language|licen[cs]e|date|time|timestamp"
    r"|created|updated|created_at|updated_at|model|category|tags?|topic|task|type|quality|difficulty|meta|metadata"
    r"|author|user|version)|text|__index_level_\d+__|unnamed: \d+",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false", re.IGNORECASE)
NUMBERS_THAT_MATTER = ("label", "labels", "weight", "weights", "train", "mask", "kto_tag")


class Turn(NamedTuple):
    """role: user, assistant or system. where: its place in the row. is_scored: an answer that counts in the loss."""

    role: str
    text: str
    where: str
    is_scored: bool = True


def read_turns(items, field, notes, ignored):
    """[Turn, ...] from a list of {role, content} or {from, value}, or from such a list as JSON text.

    field: its name in the row. notes, ignored: sets to which keys of NOTES and names of unused fields are added.
    RowRejected: the list cannot be used.
    """
    items = listed(items, field)
    if not isinstance(items, list):
        raise RowRejected("wrong_type", field)
    turns = [_turn(item, f"{field}[{i}]", notes) for i, item in enumerate(items)]
    for item in items:
        if not item.keys() <= _READ:
            ignored.update(f"{field}[].{name}" for name in unused_fields(item, _READ))
    return turns


def _turn(item, where, notes):
    if isinstance(item, Broken):
        raise RowRejected(item.reason, where)
    if not isinstance(item, dict):
        raise RowRejected("wrong_type", where)
    refuse_fields(item, _TOOL_FIELDS, "tool_use", where)
    refuse_fields(item, MEDIA_FIELDS, "not_text_part", where)
    said, place = _one_of(item, "role", "from", where)
    name = said.strip().lower() if isinstance(said, str) else None
    if name not in _ROLES:
        raise RowRejected("tool_use" if name in _TOOL_ROLES else "unknown_role", place)
    content, place = _one_of(item, "content", "value", where)
    text = _joined_parts(content, place, notes) if isinstance(content, list) and content else plain_text(content, place)
    if not is_empty(item.get("name")):
        notes.add("dropped_name")
    return Turn(_ROLES[name], text, place, _is_scored(item.get("weight"), _ROLES[name], f"{where}.weight", notes))


def _one_of(item, name, other, where):
    """(value, its place) of whichever of two fields is present."""
    value, other_value = item.get(name), item.get(other)
    if other_value is None:
        return value, f"{where}.{name}"
    if value is None or value == other_value:
        return other_value, f"{where}.{other}"
    raise RowRejected("ambiguous_turn", f"{where}.{name} and .{other}")


def _joined_parts(parts, where, notes):
    """The text of a list of text parts, as in OpenAI's messages."""
    notes.add("joined_parts")
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise RowRejected("not_text", f"{where}[{i}]")
        if part.get("type", "text") not in ("text", None) or any(not is_empty(part.get(name)) for name in _OTHER_PARTS):
            raise RowRejected("not_text_part", f"{where}[{i}]")
        texts.append(plain_text(part.get("text"), f"{where}[{i}].text"))
    return "\n".join(texts)


def _is_scored(weight, role, where, notes):
    """Whether OpenAI's `weight` of a message keeps it in the loss: 0 excludes an answer, 1 is the default."""
    if is_missing(weight):
        return True
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise RowRejected("bad_weight", where)
    if role == "assistant":
        notes.update(["unscored_turn"] if weight == 0 else [])
        return weight == 1
    notes.update(["weight_without_effect"] if weight == 1 else [])
    return True


def listed(value, field):
    """`value`, parsed if it is JSON text, as in a CSV cell. RowRejected: the text is not JSON."""
    try:
        return loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RowRejected("not_json", field) from None


def plain_text(value, field):
    """`value` unchanged. RowRejected: it is not text, or contains half a surrogate pair."""
    if not isinstance(value, str):
        raise RowRejected("not_text", field)
    if SURROGATE.search(value):
        raise RowRejected("lone_surrogate", field)
    return value


def refuse_fields(row, names, reason, field=""):
    """Raise RowRejected(reason) if one of the named fields is not empty. field: where `row` is in its row."""
    for name in names:
        if name in row and not is_empty(row[name]):
            raise RowRejected(reason, f"{field}.{name}" if field else name)


def is_missing(value):
    """Whether a field is null, or NaN, as written by pandas."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value):
    """Whether a field is empty: null, white space, or an empty list or object."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    return is_missing(value) or value == [] or value == {}


def unused_fields(row, used):
    """Names of a row's non-empty fields that are not in `used` and could change its meaning."""
    return [str(name) for name in row if name not in used and _could_matter(str(name), row[name])]


def _could_matter(name, value):
    if is_empty(value):
        return False
    # All values of a CSV file are text.
    is_number = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else isinstance(value, (bool, int, float))
    return name.lower() in NUMBERS_THAT_MATTER if is_number else not _ABOUT.fullmatch(name)
