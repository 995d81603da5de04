"""The known schemas: detect a file's, and convert its rows to alternating user and assistant turns, user first.

A row that cannot be converted is rejected with a named reason; changes made by conversion have a named note. The
manifest counts both.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from peftlib.core.errors import DataError
from peftlib.data.outcomes import REASONS, Broken, RowRejected
from peftlib.data.turns import (
    MEDIA_FIELDS,
    NUMBERS_THAT_MATTER,
    SURROGATE,
    Turn,
    is_empty,
    is_missing,
    listed,
    plain_text,
    read_turns,
    refuse_fields,
    unused_fields,
)

SCHEMAS = {
    "alpaca": "Alpaca (instruction, input, output)",
    "tulu": "Tulu (dataset, id, messages with role and content)",
    "ultrachat": "UltraChat (prompt, prompt_id, messages with role and content)",
    "messages": "chat messages (messages with role and content)",
    "sharegpt": "ShareGPT (conversations with from and value)",
}

_TURNS_FIELD = {"tulu": "messages", "ultrachat": "messages", "messages": "messages", "sharegpt": "conversations"}
_SYSTEM_FIELDS = ("system", "system_prompt")
_TOOL_LISTS = ("tools", "functions")
_PAIR = ("chosen", "rejected")
_ORIGINS = ("prompt_id", "id")
_ALPACA_FIELDS = ("instruction", "input", "output", "history")
_ANY_FIELDS = (*_SYSTEM_FIELDS, *_TOOL_LISTS, *MEDIA_FIELDS, *_ORIGINS, "dataset")
# Every field whose value affects the converted row; readers may skip the values of all others.
FIELDS_READ = (*_ALPACA_FIELDS, "messages", "conversations", "prompt", *_PAIR, *_ANY_FIELDS, *NUMBERS_THAT_MATTER)

_CONTROL = re.compile(r"<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image)>")


@dataclass(slots=True)
class Row:
    """A conversation on its way from a source to a split.

    texts: user, assistant, user, ... alternating, stripped and non-empty, an even number of them. notes: keys of NOTES.
    origin: the row's own id, or ''. unscored: indices in `texts` of answers that are not trained on; never the last.
    ignored: names of unused fields that may matter.
    Sampling adds key: its place in the order, and copies: how many rows of the stream equal it. The split adds source,
    ids: (T,) int32, and is_scored: (T,) bool, True on all answers that are trained on.
    """

    texts: list
    notes: tuple
    origin: str
    unscored: tuple = ()
    ignored: tuple = ()
    key: int = -1
    copies: int = 1
    source: str = ""
    ids: np.ndarray | None = None
    is_scored: np.ndarray | None = None

    def content(self):
        """Bytes that are equal for equal conversations: their texts, and which answers are not trained on."""
        return json.dumps([self.texts, self.unscored] if self.unscored else self.texts, ensure_ascii=True).encode()

    @property
    def content_sha256(self):
        return hashlib.sha256(self.content()).hexdigest()

    @property
    def id(self):
        return f"{self.source}-{self.content_sha256[:16]}"


def detect(row):
    """The schema, a key of SCHEMAS, that matches a row's field names, or None. Null fields are considered last."""
    if not isinstance(row, dict):
        return None
    return _schema_of({name for name, value in row.items() if value is not None}) or _schema_of(row.keys())


def _schema_of(names):
    if "messages" in names:
        return "ultrachat" if "prompt_id" in names else "tulu" if "dataset" in names else "messages"
    if "conversations" in names:
        return "sharegpt"
    return "alpaca" if {"instruction", "output"} <= names else None


def schema_of(numbered, label):
    """The schema, a key of SCHEMAS, that most of the first rows of a file have.

    numbered: [(row number, row or Broken), ...]. label: describes where they come from.
    DataError: none of them has a known schema; the message says what to do.
    """
    rows = [row for _, row in numbered]
    found = Counter(filter(None, map(detect, rows)))
    if found:
        return found.most_common(1)[0][0]
    fields = next((f"fields {', '.join(map(ascii, row))[:200]}" for row in rows if isinstance(row, dict)), "no fields")
    broken = [(number, row) for number, row in numbered if isinstance(row, Broken)]
    reasons = Counter(row.reason for _, row in broken)
    seen = fields + "".join(f"; {n} {reason}: {REASONS[reason]}" for reason, n in reasons.items())
    lines = [
        f"{label}: none of its first {len(rows)} rows has a known schema ({seen})",
        f"Supported schemas: {'; '.join(SCHEMAS.values())}",
        *list(dict.fromkeys(filter(None, map(_advice, rows))))[:3],
        *(f"The first unreadable row is row {number}: {row.excerpt}" for number, row in broken[:1]),
    ]
    raise DataError(". ".join(lines))


def _advice(row):
    """Advice for a row with an unknown schema, or None."""
    no_comma = "The header contains no comma: the columns of a CSV file must be separated by commas"
    if isinstance(row, Broken):
        if row.reason == "ragged_row" and "the header has 1:" in row.excerpt:
            return no_comma
        advice = "In JSON Lines each line is one object, without a trailing comma; put an array into a .json file"
        return advice if row.reason == "not_json" else None
    if not isinstance(row, dict):
        advice = "A row must be an object with named fields"
        return f"{advice}, not a list: use one array of objects, in a .json file" if isinstance(row, list) else advice
    if _is_preference_pair(row):
        return "These are preference pairs (prompt, chosen, rejected), as for DPO: end each row with the chosen answer"
    if any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values()):
        return "A field contains a list of objects: if these are the rows, save only that list"
    if detect({str(name).strip().lower(): value for name, value in row.items()}):
        return "Field names must be lower case, without surrounding spaces"
    if len(row) == 1 and re.search(r"[;\t|]", str(*row)):
        return no_comma
    others = [name for name, value in row.items() if isinstance(value, str) and name not in _ALPACA_FIELDS]
    wanted = [name for name in ("instruction", "output") if name not in row]
    if len(others) < len(wanted):
        return None
    names = dict(zip(others, wanted))
    return f"Rename the question and answer fields, for example in pandas: df.rename(columns={names})"


def _is_preference_pair(row):
    return not any(is_empty(row.get(name)) for name in _PAIR)


def convert(row, schema):
    """Convert a source's row to a Row. RowRejected: it cannot be converted; nothing is guessed."""
    if not isinstance(row, dict):
        raise RowRejected("not_an_object")
    if _is_preference_pair(row):
        raise RowRejected("preference_pair", "chosen, rejected")
    found, field = detect(row), _TURNS_FIELD.get(schema)
    if found is None or _TURNS_FIELD.get(found) != field:
        raise RowRejected("other_schema", ", ".join(map(str, row))[:200])
    refuse_fields(row, _TOOL_LISTS, "tool_use")
    refuse_fields(row, MEDIA_FIELDS, "not_text_part")
    notes, ignored = set(), set()
    turns = read_turns(row[field], field, notes, ignored) if field else _alpaca_turns(row, notes)
    turns = [*_system_turns(row, turns, notes), *turns]
    texts, unscored = _alternating(turns, notes, field or "output")
    if any(map(_CONTROL.search, texts)):
        notes.add("typed_control_tokens")
    used = {*_ANY_FIELDS, *((field,) if field else _ALPACA_FIELDS)}
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip() in texts[0]:
        used.add("prompt")  # same as the first turn
    ignored.update(unused_fields(row, used))
    return Row(texts, tuple(sorted(notes)), _origin(row), unscored, tuple(sorted(ignored)))


def _alpaca_turns(row, notes):
    question, answer = (plain_text(row.get(name, ""), name) for name in ("instruction", "output"))
    context = _optional_text(row, "input")
    if context.strip():
        question = f"{question}\n\n{context}"
    elif context:
        notes.add("trimmed")
    history = _history_turns(row.get("history"), notes)
    return [*history, Turn("user", question, "instruction"), Turn("assistant", answer, "output")]


def _optional_text(row, name):
    value = row.get(name)
    return "" if is_missing(value) else plain_text(value, name)


def _history_turns(history, notes):
    """Earlier turns from a list of [user, assistant], as defined by LLaMA-Factory, or from that list as JSON text."""
    if is_empty(history):
        return []
    pairs, turns = listed(history, "history"), []
    for i, pair in enumerate(pairs if isinstance(pairs, list) else [None]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRejected("bad_history", f"history[{i}]")
        for k, role in enumerate(("user", "assistant")):
            where = f"history[{i}][{k}]"
            turns.append(Turn(role, plain_text(pair[k], where), where))
    notes.add("used_history")
    return turns


def _system_turns(row, turns, notes):
    """The row's own system text as turns, unless it is also the first turn."""
    own = [Turn("system", text, name) for name in _SYSTEM_FIELDS if (text := _optional_text(row, name))]
    known = {turn.text.strip() for turn in turns[:1] if turn.role == "system"}
    new = [turn for turn in own if turn.text.strip() not in known]
    if len(new) < len(own):
        notes.add("dropped_repeated_system")
    return new


def _alternating(turns, notes, field):
    """(texts, indices of unscored answers) from turns in any order; adds to notes. field: where the turns come from."""
    n_system = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    system, turns = [turn.text for turn in turns[:n_system]], turns[n_system:]
    for turn in turns:
        if turn.role == "system":
            raise RowRejected("late_system", turn.where)
    turns = _exchanges(turns, notes, field)
    trimmed = [turn._replace(text=turn.text.strip()) for turn in turns]
    if trimmed != turns or any(text != text.strip() for text in filter(str.strip, system)):
        notes.add("trimmed")
    turns = _merged(trimmed, notes)
    unscored = tuple(i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.is_scored)
    if not unscored:
        notes.discard("unscored_turn")  # all of them were cut
    # System texts go before the first user text, as in Gemma's template.
    kept = [text.strip() for text in system if text.strip()]
    if len(kept) < len(system):
        notes.add("dropped_empty_system")
    if kept:
        notes.add("folded_system")
    return ["\n\n".join([*kept, turns[0].text]), *(turn.text for turn in turns[1:])], unscored


def _exchanges(turns, notes, field):
    """The turns from the first user turn to the last scored assistant turn."""
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    scored = [i for i in answers if turns[i].is_scored]
    if not users or not answers or answers[-1] < users[0]:
        raise RowRejected("no_exchange", field)
    if not scored or scored[-1] < users[0]:
        raise RowRejected("nothing_scored", field)
    changes = {
        "cut_leading_assistant": users[0] > 0,
        "cut_trailing_user": answers[-1] + 1 < len(turns),
        "cut_trailing_unscored": scored[-1] < answers[-1],
    }
    notes.update(note for note, is_so in changes.items() if is_so)
    return turns[users[0] : scored[-1] + 1]


def _merged(turns, notes):
    """Merge adjacent turns of one role. RowRejected: one is empty, or their weights differ."""
    for turn in turns:
        if not turn.text:
            raise RowRejected("empty_turn", turn.where)
    merged = []
    for turn in turns:
        if merged and turn.role == merged[-1].role:
            if turn.is_scored != merged[-1].is_scored:
                raise RowRejected("mixed_weights", turn.where)
            notes.add("merged_turns")
            turn = turn._replace(text=f"{merged.pop().text}\n\n{turn.text}")
        merged.append(turn)
    return merged


def _origin(row):
    for name in _ORIGINS:
        value = row.get(name)
        if isinstance(value, (str, int)) and not SURROGATE.search(str(value)[:100]):
            return str(value)[:100]
    return ""
