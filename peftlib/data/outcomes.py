"""Names for what can happen to a row: why it was rejected, and what its conversion changed."""

from dataclasses import dataclass

REASONS = {
    "not_utf8": "bytes that are not UTF-8: save the file as UTF-8",
    "not_json": "not JSON, or nested too deeply to be read",
    "too_large": "a single row of more bytes than one row may have",
    "ragged_row": "a CSV row with more or fewer fields than the header",
    "bad_csv": "a CSV row with misplaced quotes",
    "bad_value": "a value that cannot be read, such as a date out of range",
    "repeated_field": "a JSON object that names a field twice",
    "not_an_object": "a row that is not a set of named fields",
    "other_schema": "a row without the fields of its file's schema",
    "preference_pair": "a preference pair (chosen, rejected), as for DPO: give messages that end on the chosen answer",
    "wrong_type": "turns that are not a list of role and text",
    "not_text": "a text that is a number, null, list or the like",
    "not_text_part": "an image, audio, file or other part that is not text",
    "lone_surrogate": "text with half of a surrogate pair, which no UTF-8 file can hold",
    "unknown_role": "a turn of a role that is none of user, assistant and system",
    "ambiguous_turn": "a turn with two different roles or two different texts",
    "tool_use": "a tool call, a tool's turn or a list of tools: Gemma's chat template has no place for them",
    "bad_weight": "a weight that is neither 0 nor 1",
    "mixed_weights": "neighbouring assistant turns, only some of weight 0: give the turns one weight",
    "bad_history": "a history that is not a list of [user, assistant] texts",
    "late_system": "a system turn after the conversation has begun",
    "no_exchange": "no user turn that an assistant turn follows",
    "nothing_scored": "no answer to learn from: all have weight 0",
    "empty_turn": "a turn without text",
    "too_long": "more tokens than max_length up to the end of the first scored answer",
    "duplicate": "equal to an earlier row of its source",
    "prompt_in_test": "its prompt, or that of one of its turns, is a test row's",
    "prompt_in_valid": "its prompt, or that of one of its turns, is a validation row's",
    "prompt_repeated": "its prompt is that of another row of the same split",
    "near_duplicate_of_test": "its words nearly equal a test row's",
    "near_duplicate_of_valid": "its words nearly equal a validation row's",
    "near_duplicate": "its words nearly equal those of another row of the same split",
}

NOTES = {
    "trimmed": "white space around a text removed",
    "joined_parts": "a text given as a list of parts, joined by line breaks",
    "merged_turns": "neighbouring turns of one role joined by an empty line",
    "used_history": "earlier turns taken from the field history",
    "folded_system": "system text put before the first user turn, as the chat template does",
    "dropped_empty_system": "a system text of white space left out",
    "dropped_repeated_system": "a system text given twice used once",
    "dropped_name": "a speaker's name left out",
    "unscored_turn": "an answer of weight 0: read as context, not learned",
    "weight_without_effect": "a weight of 1 on a user or system turn, which is never scored",
    "cut_leading_assistant": "assistant turns before the first user turn left out",
    "cut_trailing_user": "user turns after the last assistant turn left out",
    "cut_trailing_unscored": "turns after the last answer of weight 1 left out",
    "cut_to_length": "later turns left out to stay within max_length",
    "typed_control_tokens": "text that spells a control token, kept and encoded as plain letters",
}


@dataclass(frozen=True)
class Broken:
    """What stands in place of a row that cannot be read. reason: a key of REASONS. excerpt: text that shows it."""

    reason: str
    excerpt: str


class RowRejected(Exception):
    """One row that cannot be used. reason: a key of REASONS. field: where in the row, such as messages[2].content."""

    def __init__(self, reason, field=""):
        super().__init__(REASONS[reason])
        self.reason, self.field = reason, field
