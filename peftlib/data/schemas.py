"""Rows of the known schemas as one kind of conversation: alternating user and assistant turns, user first.

What cannot be converted is rejected under a named reason; what conversion changes is noted under a named note. Both
are counted in the manifest, and neither ever happens without its name.
"""

import re
from dataclasses import dataclass

from peftlib.data.fields import NUMBERS_THAT_MATTER, ignored_fields, is_empty, is_missing
from peftlib.data.outcomes import RowRejected
from peftlib.data.turns import MEDIA_FIELDS, Turn, parsed, plain_text, read_turns, refuse_fields

SCHEMAS = {
    "alpaca": "Alpaca (instruction, input, output)",
    "tulu": "Tulu (dataset, id, messages of role and content)",
    "ultrachat": "UltraChat (prompt, prompt_id, messages of role and content)",
    "messages": "chat messages (messages of role and content)",
    "sharegpt": "ShareGPT (conversations of from and value)",
}

_TURNS_FIELD = {"tulu": "messages", "ultrachat": "messages", "messages": "messages", "sharegpt": "conversations"}
_SYSTEM_FIELDS = ("system", "system_prompt")
_TOOL_LISTS = ("tools", "functions")
_PAIR = ("chosen", "rejected")
_ORIGINS = ("prompt_id", "id")
_ALPACA_FIELDS = ("instruction", "input", "output", "history")
_ANY_FIELDS = (*_SYSTEM_FIELDS, *_TOOL_LISTS, *MEDIA_FIELDS, *_ORIGINS, "dataset")
# Every field whose value decides what a row becomes; a reader may leave out the values of all others.
FIELDS_READ = (*_ALPACA_FIELDS, "messages", "conversations", "prompt", *_PAIR, *_ANY_FIELDS, *NUMBERS_THAT_MATTER)

_CONTROL = re.compile(r"<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image)>")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Conversation:
    """texts: user, assistant, user, ... in turn, each trimmed and not empty, an even number of them.

    notes: keys of NOTES. origin: the row's own id, where it has one. unscored: places in `texts` of answers that are
    not learned; never the last. ignored: names of fields that were not read and may mean something.
    """

    texts: list
    notes: tuple
    origin: str
    unscored: tuple = ()
    ignored: tuple = ()


def detect(row):
    """A key of SCHEMAS by the names of a row's fields, those that are not null first, or None."""
    if not isinstance(row, dict):
        return None
    given = {name for name, value in row.items() if value is not None}
    return _schema_of(given) or _schema_of(row.keys())


def _schema_of(names):
    if "messages" in names:
        return "ultrachat" if "prompt_id" in names else "tulu" if "dataset" in names else "messages"
    if "conversations" in names:
        return "sharegpt"
    return "alpaca" if {"instruction", "output"} <= names else None


def is_preference_pair(row):
    """Whether a row is one for DPO and its like: two answers, one of them to be preferred."""
    return isinstance(row, dict) and not any(is_empty(row.get(name)) for name in _PAIR)


def convert(row, schema):
    """The Conversation of a row. RowRejected: it cannot be one; nothing is guessed."""
    if not isinstance(row, dict):
        raise RowRejected("not_an_object")
    if is_preference_pair(row):
        raise RowRejected("preference_pair", "chosen, rejected")
    found = detect(row)
    if found is None or _TURNS_FIELD.get(found) != _TURNS_FIELD.get(schema):
        raise RowRejected("other_schema", ", ".join(map(str, row))[:200])
    refuse_fields(row, _TOOL_LISTS, "tool_use")
    refuse_fields(row, MEDIA_FIELDS, "not_text_part")
    notes, ignored = set(), set()
    field = _TURNS_FIELD.get(schema)
    turns = read_turns(row[field], field, notes, ignored) if field else _alpaca_turns(row, notes)
    turns = [*_system_turns(row, turns, notes), *turns]
    texts, unscored = _conversation(turns, notes, field or "output")
    if any(_CONTROL.search(text) for text in texts):
        notes.add("typed_control_tokens")
    ignored.update(_ignored(row, field, texts[0]))
    return Conversation(texts, tuple(sorted(notes)), _origin(row), unscored, tuple(sorted(ignored)))


def _alpaca_turns(row, notes):
    question, answer = (plain_text(row.get(name, ""), name) for name in ("instruction", "output"))
    context = _optional_text(row, "input")
    if context and not context.strip():
        notes.add("trimmed")
    question = Turn("user", f"{question}\n\n{context}" if context.strip() else question, "instruction")
    return [*_history_turns(row.get("history"), notes), question, Turn("assistant", answer, "output")]


def _optional_text(row, name):
    """A text that may be missing."""
    value = row.get(name)
    return "" if is_missing(value) else plain_text(value, name)


def _history_turns(history, notes):
    """Earlier turns, a list of [user, assistant] as LLaMA-Factory defines it, or that list as JSON text."""
    if is_empty(history):
        return []
    if isinstance(history, str):
        history = parsed(history, "history")
    turns = []
    for i, pair in enumerate(history if isinstance(history, list) else [None]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRejected("bad_history", f"history[{i}]")
        for k, text in enumerate(pair):
            where = f"history[{i}][{k}]"
            turns.append(Turn(("user", "assistant")[k], plain_text(text, where), where))
    notes.add("used_history")
    return turns


def _system_turns(row, turns, notes):
    """Turns of the row's own system text, unless it is also the first of its turns."""
    own = [Turn("system", text, name) for name in _SYSTEM_FIELDS if (text := _optional_text(row, name))]
    told = {turn.text.strip() for turn in turns[:1] if turn.role == "system"}
    new = [turn for turn in own if turn.text.strip() not in told]
    if len(new) < len(own):
        notes.add("dropped_repeated_system")
    return new


def _conversation(turns, notes, field):
    """(texts, places of unscored ones) of turns in any order; adds to notes. field: what the turns came from."""
    n_system = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    system, turns = [turn.text for turn in turns[:n_system]], turns[n_system:]
    for turn in turns:
        if turn.role == "system":
            raise RowRejected("late_system", turn.where)
    turns = _exchanges(turns, notes, field)
    trimmed = [turn if turn.text == (text := turn.text.strip()) else turn._replace(text=text) for turn in turns]
    if trimmed != turns or any(text != text.strip() for text in filter(str.strip, system)):
        notes.add("trimmed")
    turns = trimmed
    for turn in turns:
        if not turn.text:
            raise RowRejected("empty_turn", turn.where)
    turns = _merged(turns, notes)
    texts = [turn.text for turn in turns]
    unscored = tuple(i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.is_scored)
    if not unscored:
        notes.discard("unscored_turn")  # they were all cut
    return [_folded(system, notes) + texts[0], *texts[1:]], unscored


def _exchanges(turns, notes, field):
    """The turns from the first of the user to the last of the assistant that is scored."""
    start = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    end = _end(turns, lambda turn: turn.role == "assistant")
    if start >= end:
        raise RowRejected("no_exchange", field)
    if start:
        notes.add("cut_leading_assistant")
    if end < len(turns):
        notes.add("cut_trailing_user")
    scored_end = _end(turns[:end], lambda turn: turn.role == "assistant" and turn.is_scored)
    if start >= scored_end:
        raise RowRejected("nothing_scored", field)
    if scored_end < end:
        notes.add("cut_trailing_unscored")
    return turns[start:scored_end]


def _end(turns, is_last):
    return next((i for i in range(len(turns), 0, -1) if is_last(turns[i - 1])), 0)


def _merged(turns, notes):
    """The turns with neighbours of one role joined."""
    merged = []
    for turn in turns:
        if merged and turn.role == merged[-1].role:
            if turn.is_scored != merged[-1].is_scored:
                raise RowRejected("mixed_weights", turn.where)
            notes.add("merged_turns")
            turn = turn._replace(text=f"{merged.pop().text}\n\n{turn.text}")
        merged.append(turn)
    return merged


def _folded(system, notes):
    """What stands before the first user text."""
    kept = [text.strip() for text in system if text.strip()]
    if len(kept) < len(system):
        notes.add("dropped_empty_system")
    if not kept:
        return ""
    notes.add("folded_system")
    return "\n\n".join(kept) + "\n\n"


def _ignored(row, field, first_text):
    """Names of the row's fields that were not read; a prompt that the first turn repeats is no news."""
    used = {*_ANY_FIELDS, *((field,) if field else _ALPACA_FIELDS)}
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip() in first_text:
        used.add("prompt")
    return ignored_fields(row, used)


def _origin(row):
    for name in _ORIGINS:
        value = row.get(name)
        if isinstance(value, (str, int)) and not _SURROGATE.search(str(value)[:100]):
            return str(value)[:100]
    return ""
