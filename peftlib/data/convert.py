"""Rows of the known schemas as one kind of conversation: alternating user and assistant turns, user first.

What cannot be converted is rejected under a named reason; what conversion changes is noted under a named note. Both
are counted in the manifest, and neither ever happens without its name.
"""

import json
import re
from dataclasses import dataclass

SCHEMAS = {
    "alpaca": "Alpaca (instruction, input, output)",
    "tulu": "Tulu (dataset, id, messages of role and content)",
    "ultrachat": "UltraChat (prompt, prompt_id, messages of role and content)",
    "messages": "chat messages (messages of role and content)",
    "sharegpt": "ShareGPT (conversations of from and value)",
}

REASONS = {
    "not_utf8": "bytes that are not UTF-8",
    "not_json": "not JSON, or nested too deeply to be read",
    "too_large": "a single row of more bytes than one row may have",
    "ragged_row": "a CSV row with more or fewer fields than the header",
    "bad_csv": "a CSV row with misplaced quotes",
    "not_an_object": "a row that is not a set of named fields",
    "other_schema": "a row without the fields of its file's schema",
    "wrong_type": "turns that are not a list of role and text",
    "not_text": "a text that is a number, null, list or the like",
    "lone_surrogate": "text with half of a surrogate pair, which no UTF-8 file can hold",
    "unknown_role": "a turn of a role that is none of user, assistant and system",
    "late_system": "a system turn after the conversation has begun",
    "no_exchange": "no user turn that an assistant turn follows",
    "empty_turn": "a turn without text",
    "too_long": "a first exchange of more tokens than max_length",
    "duplicate": "equal to an earlier row of its source",
    "prompt_in_test": "its prompt, or that of one of its turns, is a test row's",
    "prompt_in_valid": "its prompt, or that of one of its turns, is a validation row's",
    "prompt_repeated": "its prompt is that of another row of the same split",
    "near_duplicate_of_test": "its words nearly equal a test row's",
    "near_duplicate_of_valid": "its words nearly equal a validation row's",
    "near_duplicate": "its words nearly equal those of another row of the same split",
}

NOTES = {
    "trimmed": "white space around a turn removed, as the chat template does",
    "merged_turns": "neighbouring turns of one role joined by an empty line",
    "folded_system": "system text put before the first user turn, as the chat template does",
    "dropped_empty_system": "a system turn without text left out",
    "cut_leading_assistant": "assistant turns before the first user turn left out",
    "cut_trailing_user": "user turns after the last assistant turn left out",
    "cut_to_length": "later turns left out to stay within max_length",
    "typed_control_tokens": "text that spells a control token, kept and encoded as plain letters",
}

_ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system"}
_ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant")
_CONTROL = re.compile(r"<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image)>")
_SURROGATE = re.compile("[\ud800-\udfff]")


class RowRejected(Exception):
    """One row that cannot be used; `reason` is a key of REASONS."""

    def __init__(self, reason):
        super().__init__(REASONS[reason])
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """texts: user, assistant, user, ... in turn, each trimmed and not empty, an even number of them.

    notes: keys of NOTES. origin: the row's own id, where it has one.
    """

    texts: list
    notes: tuple
    origin: str


def detect(row):
    """A key of SCHEMAS by the names of a row's fields, or None."""
    if not isinstance(row, dict):
        return None
    if "messages" in row:
        return "ultrachat" if "prompt_id" in row else "tulu" if "dataset" in row else "messages"
    if "conversations" in row:
        return "sharegpt"
    return "alpaca" if {"instruction", "output"} <= row.keys() else None


def convert(row, schema):
    """The Conversation of a row. RowRejected: it cannot be one; nothing is guessed."""
    if not isinstance(row, dict):
        raise RowRejected("not_an_object")
    found = detect(row)
    if found is None or (found == "alpaca") != (schema == "alpaca") or (found == "sharegpt") != (schema == "sharegpt"):
        raise RowRejected("other_schema")
    if schema == "alpaca":
        turns = _alpaca_turns(row)
    else:
        turns = _chat_turns(row["conversations" if schema == "sharegpt" else "messages"])
    texts, notes = _conversation(turns)
    if any(_CONTROL.search(text) for text in texts):
        notes.add("typed_control_tokens")
    return Conversation(texts, tuple(sorted(notes)), _origin(row))


def _alpaca_turns(row):
    question, context, answer = (_text(row.get(name, "")) for name in ("instruction", "input", "output"))
    return [("user", f"{question}\n\n{context}" if context.strip() else question), ("assistant", answer)]


def _chat_turns(items):
    if isinstance(items, str):  # a CSV cell holds the list as JSON
        try:
            items = json.loads(items)
        except (ValueError, RecursionError):
            raise RowRejected("not_json") from None
    if not isinstance(items, list):
        raise RowRejected("wrong_type")
    return [_turn(item) for item in items]


def _turn(item):
    if not isinstance(item, dict):
        raise RowRejected("wrong_type")
    role = item["role"] if item.get("role") is not None else item.get("from")
    text = item["content"] if item.get("content") is not None else item.get("value")
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise RowRejected("unknown_role")
    return known, _text(text)


def _text(value):
    if not isinstance(value, str):
        raise RowRejected("not_text")
    if _SURROGATE.search(value):
        raise RowRejected("lone_surrogate")
    return value


def _conversation(turns):
    """(texts, notes) of (role, text) turns in any order."""
    notes = set()
    n_system = next((i for i, (role, _) in enumerate(turns) if role != "system"), len(turns))
    system, turns = [text for _, text in turns[:n_system]], turns[n_system:]
    if any(role == "system" for role, _ in turns):
        raise RowRejected("late_system")
    turns = _exchanges(turns, notes)
    if any(text != text.strip() for _, text in turns):
        notes.add("trimmed")
    turns = [(role, text.strip()) for role, text in turns]
    if not all(text for _, text in turns):
        raise RowRejected("empty_turn")
    texts = _merged(turns, notes)
    return [_folded(system, notes) + texts[0], *texts[1:]], notes


def _exchanges(turns, notes):
    """The turns from the first of the user to the last of the assistant."""
    start = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
    end = next((i for i in range(len(turns), 0, -1) if turns[i - 1][0] == "assistant"), 0)
    if start >= end:
        raise RowRejected("no_exchange")
    if start:
        notes.add("cut_leading_assistant")
    if end < len(turns):
        notes.add("cut_trailing_user")
    return turns[start:end]


def _merged(turns, notes):
    texts, last = [], None
    for role, text in turns:
        if role == last:
            notes.add("merged_turns")
            texts[-1] += "\n\n" + text
        else:
            texts.append(text)
        last = role
    return texts


def _folded(system, notes):
    """What stands before the first user text."""
    kept = [text.strip() for text in system if text.strip()]
    if len(kept) < len(system):
        notes.add("dropped_empty_system")
    if not kept:
        return ""
    notes.add("folded_system")
    return "\n\n".join(kept) + "\n\n"


def _origin(row):
    for name in ("prompt_id", "id"):
        value = row.get(name)
        if isinstance(value, (str, int)) and not _SURROGATE.search(str(value)[:100]):
            return str(value)[:100]
    return ""
