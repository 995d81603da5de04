"""Turns of a chat row: who speaks, what is said, and whether an answer is learned."""

import re
from typing import NamedTuple

from peftlib.data.fields import ignored_fields, is_empty, is_missing
from peftlib.data.outcomes import RowRejected
from peftlib.data.strict_json import RepeatedField, loads

_ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system", "developer": "system"}
_ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bing", "bard"), "assistant")
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation")
_TOOL_ROLES += ("ipython",)
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos")
_OTHER_PARTS = ("image_url", "input_audio", *MEDIA_FIELDS)
_PLAIN = {"role", "from", "content", "value"}  # all that most turns have
_READ = {*_PLAIN, "weight", "name", *_TOOL_FIELDS, *MEDIA_FIELDS}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Turn(NamedTuple):
    """role: user, assistant or system. where: its place in the row. is_scored: whether the loss sees it, if it is the
    assistant's."""

    role: str
    text: str
    where: str
    is_scored: bool = True


def read_turns(items, field, notes, ignored):
    """[Turn, ...] of a list of {role, content} or {from, value}, or of such a list as JSON text.

    field: its name in the row. notes, ignored: sets that take keys of NOTES and names of fields that were not read.
    RowRejected: it cannot be used.
    """
    if isinstance(items, str):  # a CSV cell holds the list as JSON
        items = parsed(items, field)
    if not isinstance(items, list):
        raise RowRejected("wrong_type", field)
    turns = []
    for i, item in enumerate(items):
        where = f"{field}[{i}]"
        turns.append(_turn(item, where, notes))
        if not item.keys() <= _PLAIN:
            ignored.update(f"{field}[].{name}" for name in ignored_fields(item, _READ))
    return turns


def parsed(text, field):
    """The value of a JSON text in a field. RowRejected: it is none."""
    try:
        return loads(text)
    except RepeatedField as error:
        raise RowRejected("repeated_field", f"{field}: {error.name}") from None
    except (ValueError, RecursionError):
        raise RowRejected("not_json", field) from None


def plain_text(value, field):
    """A text as it is. RowRejected: it is none."""
    if not isinstance(value, str):
        raise RowRejected("not_text", field)
    if _SURROGATE.search(value):
        raise RowRejected("lone_surrogate", field)
    return value


def refuse_fields(row, names, reason, field=""):
    """RowRejected, for `reason`: one of the named fields holds something."""
    for name in names:
        if name in row and not is_empty(row[name]):
            raise RowRejected(reason, f"{field}.{name}" if field else name)


def _turn(item, where, notes):
    if not isinstance(item, dict):
        raise RowRejected("wrong_type", where)
    is_plain = item.keys() <= _PLAIN
    if not is_plain:
        refuse_fields(item, _TOOL_FIELDS, "tool_use", where)
        refuse_fields(item, MEDIA_FIELDS, "not_text_part", where)
    role = _role(*_one_of(item, "role", "from", where))
    content, place = _one_of(item, "content", "value", where)
    text = _text(content, place, notes)
    if is_plain:
        return Turn(role, text, place)
    if not is_empty(item.get("name")):
        notes.add("dropped_name")
    return Turn(role, text, place, _is_scored(item.get("weight"), role, f"{where}.weight", notes))


def _one_of(item, name, other, where):
    """(value, its place) of the one of two fields that holds something."""
    value, other_value = item.get(name), item.get(other)
    if other_value is None:
        return value, f"{where}.{name}"
    if value is None or value == other_value:
        return other_value, f"{where}.{other}"
    raise RowRejected("ambiguous_turn", f"{where}.{name} and .{other}")


def _role(value, where):
    name = value.strip().lower() if isinstance(value, str) else None
    if name in _TOOL_ROLES:
        raise RowRejected("tool_use", where)
    if name not in _ROLES:
        raise RowRejected("unknown_role", where)
    return _ROLES[name]


def _text(value, where, notes):
    if not isinstance(value, list) or not value:
        return plain_text(value, where)
    notes.add("joined_parts")
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))


def _part(part, where):
    if not isinstance(part, dict):
        raise RowRejected("not_text", where)
    if part.get("type", "text") not in ("text", None) or any(not is_empty(part.get(name)) for name in _OTHER_PARTS):
        raise RowRejected("not_text_part", where)
    return plain_text(part.get("text"), f"{where}.text")


def _is_scored(weight, role, where, notes):
    """OpenAI's weight of a message: 0 keeps an answer out of the loss, 1 or none at all is the rule."""
    if is_missing(weight):
        return True
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise RowRejected("bad_weight", where)
    if role != "assistant":
        if weight == 1:
            notes.add("weight_without_effect")
        return True
    if weight == 0:
        notes.add("unscored_turn")
    return weight == 1
