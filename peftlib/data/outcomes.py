"""What happens to a source's rows: reasons for rejection, conversions, counts, and errors if rows are too few."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peftlib.core.errors import DataError

REASONS = {
    "not_utf8": "bytes that are not UTF-8: save the file as UTF-8",
    "not_json": "not JSON, or nested too deeply to be read",
    "too_large": "a single row that exceeds the size limit",
    "ragged_row": "a CSV row with more or fewer fields than the header",
    "bad_csv": "a CSV row with misplaced quotes",
    "bad_value": "a value that cannot be read, such as a date out of range",
    "repeated_field": "a JSON object that names a field twice",
    "not_an_object": "a row that is not a set of named fields",
    "other_schema": "a row without the fields of its file's schema",
    "preference_pair": "a preference pair (chosen, rejected), as for DPO: use messages that end with the chosen answer",
    "wrong_type": "turns that are not a list of role and text",
    "not_text": "a number, null, list or similar instead of text",
    "not_text_part": "an image, audio, file or other part that is not text",
    "lone_surrogate": "text with half a surrogate pair, which UTF-8 cannot encode",
    "unknown_role": "a turn with a role other than user, assistant or system",
    "ambiguous_turn": "a turn with two different roles or two different texts",
    "tool_use": "a tool call, a tool turn or a list of tools: Gemma's chat template does not support them",
    "bad_weight": "a weight other than 0 or 1",
    "mixed_weights": "adjacent assistant turns with different weights: give them the same weight",
    "bad_history": "a history that is not a list of [user, assistant] texts",
    "late_system": "a system turn after the conversation has begun",
    "no_exchange": "no user turn followed by an assistant turn",
    "nothing_scored": "no answer to train on: all have weight 0",
    "empty_turn": "a turn without text",
    "too_long": "more tokens than max_length up to the end of the first scored answer",
    "duplicate": "equal to an earlier row of its source",
    "prompt_in_test": "its prompt, or the prompt of one of its turns, is a test row's",
    "prompt_in_valid": "its prompt, or the prompt of one of its turns, is a validation row's",
    "prompt_repeated": "another row of the same split has its prompt",
    "near_duplicate_of_test": "nearly identical to a test row",
    "near_duplicate_of_valid": "nearly identical to a validation row",
    "near_duplicate": "nearly identical to another row of the same split",
}

NOTES = {
    "trimmed": "white space around a text removed",
    "joined_parts": "a text given as a list of parts, joined by line breaks",
    "merged_turns": "adjacent turns of one role joined by an empty line",
    "used_history": "earlier turns read from the field history",
    "folded_system": "system text prepended to the first user turn, as in the chat template",
    "dropped_empty_system": "empty system text dropped",
    "dropped_repeated_system": "repeated system text used once",
    "dropped_name": "a speaker's name dropped",
    "unscored_turn": "an answer with weight 0: used as context, not trained on",
    "weight_without_effect": "a weight of 1 on a user or system turn, which is never scored",
    "cut_leading_assistant": "assistant turns before the first user turn dropped",
    "cut_trailing_user": "user turns after the last assistant turn dropped",
    "cut_trailing_unscored": "turns after the last answer with weight 1 dropped",
    "cut_to_length": "later turns dropped to stay within max_length",
    "typed_control_tokens": "text that spells a control token, kept and encoded as plain text",
}

_EXAMPLES = 5  # rejected rows kept per reason, for inspection
_FIRST_SERVED = ("test", "train", "valid")  # order in which splits get their first row
_SHOWN = 3  # reasons for which an error shows a row


@dataclass(frozen=True)
class Broken:
    """Placeholder for a row that cannot be read. reason: a key of REASONS. excerpt: text that shows the row."""

    reason: str
    excerpt: str


class RowRejected(Exception):
    """A row that cannot be used. reason: a key of REASONS. field: where in the row, such as messages[2].content."""

    def __init__(self, reason, field=""):
        super().__init__(REASONS[reason])
        self.reason, self.field = reason, field


@dataclass
class Tally:
    """Counts of one source's rows. log: called with progress lines. ignored: {unused field that may matter: rows}."""

    source: Any
    log: Callable = print
    read: int = 0
    rejected: Counter = field(default_factory=Counter)
    ignored: Counter = field(default_factory=Counter)
    examples: list = field(default_factory=list)  # dicts for rejects.jsonl

    def reject(self, reason, *, copies=1, **shown):
        """Count `copies` rejected rows; the first few of each reason are kept as examples, described by `shown`."""
        if sum(e["reason"] == reason for e in self.examples) < _EXAMPLES:
            self.examples.append({"source": self.source.name, "reason": reason, **shown})
        self.rejected[reason] += copies

    def account(self):
        """Describe how many rows the source has, why some were rejected, and where the first of these are."""
        reasons = self.rejected.most_common()
        listed = ", ".join(f"{reason} {n:,}" for reason, n in reasons) or "none"
        examples = [
            f"; {reason}: {REASONS[reason]}, first in row {example['row']} of {self.source.label(example['stream'])}"
            f"{example['field'] and ', '}{example['field']}: {example['excerpt'][:100]}"
            for reason, _ in reasons[:_SHOWN]
            for example in [e for e in self.examples if e["reason"] == reason and "row" in e][:1]
        ]
        return f"{self.source.name} has {self.read:,} rows, rejected: {listed}{''.join(examples)}"


def in_proportion(n_rows, asked):
    """{split: rows}: n_rows divided in the proportions of `asked`, {split: rows}.

    Every requested split gets at least one row; if there are too few for that, test comes first, then train.
    """
    served = [split for split in _FIRST_SERVED if asked.get(split)]
    if n_rows <= len(served):
        return dict.fromkeys(asked, 0) | dict.fromkeys(served[:n_rows], 1)
    total = sum(asked.values())
    shares = {split: n_rows * n // total for split, n in asked.items()}
    by_remainder = sorted(asked, key=lambda split: (-(n_rows * asked[split] % total), -asked[split], split))
    for split in by_remainder[: n_rows - sum(shares.values())]:
        shares[split] += 1
    for split in served:
        if not shares[split]:
            shares[max(shares, key=lambda s: (shares[s], s))] -= 1
            shares[split] = 1
    return shares


def shortfalls(counts, asked):
    """{source: {split: {"asked", "given"}}} of the sources with too few rows. counts: {split: {source: rows}}."""
    return {
        source: {split: {"asked": asked[split], "given": counts[split][source]} for split in sorted(asked)}
        for source in counts["test"]
        if any(counts[split][source] < n for split, n in asked.items())
    }


def shortfall_line(source, splits):
    """One line about a source with too few rows. splits: a value of shortfalls()."""
    given = ", ".join(f"{split} {n['given']:,} of {n['asked']:,}" for split, n in splits.items())
    return f"{source} has fewer rows than requested: {given}"


def require_rows(counts, asked, tallies, *, allow_short):
    """DataError if a source has no usable rows or, unless allow_short, fewer than requested.

    counts: {split: {source: rows}}. asked: {split: rows of each source}. tallies: {source: Tally}.
    """
    for name, tally in tallies.items():
        if not any(found[name] for found in counts.values()):
            way_out = ", or raise max_length" if tally.rejected["too_long"] else ""
            raise DataError(f"no usable rows. {tally.account()}. Use other data, or remove the source{way_out}")
    short = {} if allow_short else shortfalls(counts, asked)
    if short:
        lines = [
            f"{name}: {n['given']} of {n['asked']} {split} rows"
            for name, splits in short.items()
            for split, n in splits.items()
            if n["given"] < n["asked"]
        ]
        lines += [tallies[name].account() for name in short]
        fewer = "Request fewer (train_rows, valid_rows, test_rows), add data, or set allow_short = True"
        raise DataError(f"too few rows. {'; '.join(lines)}. {fewer}")


def require_row_per_split(counts, asked, tallies):
    """DataError if a requested split has no rows. Arguments: as for require_rows."""
    totals = {split: sum(counts[split].values()) for split in asked if asked[split]}
    empty = sorted(split for split, n in totals.items() if not n)
    if empty:
        raise DataError(
            f"too few rows for every split: only {sum(totals.values())} can be used, which leaves none for "
            f"{' and '.join(empty)}. {'; '.join(tally.account() for tally in tallies.values())}. "
            "Add data; only the validation split may be empty (valid_rows = 0)"
        )
