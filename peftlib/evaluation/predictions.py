"""predictions/<method>-s<seed>.jsonl: one answer a line, appended as they come, and read back checked."""

import json
import time
from pathlib import Path

from peftlib.core.errors import StudyError
from peftlib.core.files import append_text, read_text, sha256, write_text
from peftlib.core.json_reading import fault, parse

_SYNC_SECONDS = 5.0  # between two fsyncs: what a crash of the machine, not of the process, may lose
_SHAPE = {
    "id": str,
    "source": str,
    "prompt_sha256": str,
    "answer": str,
    "n_tokens": int,
    "finish_reason": ("stop", "length"),
    "split_hash": str,
}


class Predictions:
    """The answers of one run, written while they are made; a line that a kill cut is dropped on opening.

    StudyError: the file holds answers to the rows of another split; it stays as it is.
    """

    def __init__(self, path, split_hash):
        self.path = Path(path)
        self.split_hash = split_hash
        self.rows = {}
        self._synced = 0.0
        lines = _lines_of(self.path) if self.path.exists() else []
        for row in map(_parsed, lines):
            if isinstance(row, str):
                continue  # cut by a kill, or damaged: answered again
            if row["split_hash"] != split_hash:
                raise StudyError(
                    f"{self.path} has split_hash {row['split_hash']}, the data {split_hash}: these answers belong to "
                    "other rows; move the file away and run again"
                )
            self.rows[row["id"]] = row
        if lines and (len(self.rows) != len(lines) or not self.path.read_bytes().endswith(b"\n")):
            self._write(self.rows.values())

    def add(self, test_row, answer):
        """Append the generate.Answer to a test row. A kill of the process loses none, a crash of the machine
        seconds."""
        row = {
            **{name: test_row[name] for name in ("id", "source", "prompt_sha256")},
            "answer": answer.text,
            "n_tokens": answer.n_tokens,
            "finish_reason": answer.finish_reason,
            "split_hash": self.split_hash,
        }
        is_lasting = time.monotonic() - self._synced > _SYNC_SECONDS
        append_text(self.path, _line(row), is_lasting=is_lasting)
        self.rows[row["id"]] = row
        if is_lasting:
            self._synced = time.monotonic()

    def complete(self, test_rows):
        """Rewrite the file in the order of the test rows, whatever the order they were answered in; drop other rows."""
        self.rows = {row["id"]: self.rows[row["id"]] for row in test_rows}
        self._write(self.rows.values())

    def _write(self, rows):
        write_text(self.path, "".join(map(_line, rows)))


def _line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def require_unchanged(path, record):
    """StudyError where a run's predictions are not those that its evaluation left; older evaluations do not say."""
    known = (record["evaluation"] or {}).get("predictions_sha256")
    if known is not None and sha256(path) != known:
        raise _wrong(path, "it is not what the evaluation wrote (its SHA-256 differs)")


def read_predictions(path, test_rows, split_hash):
    """[prediction, ...] in the order of the test rows.

    StudyError: a damaged line, a missing field, another split, a row twice, rows that are missing, unknown, or of
    another prompt.
    """
    found = {}
    for number, line in enumerate(_lines_of(path), start=1):
        row = _parsed(line)
        if isinstance(row, str):
            raise _wrong(path, f"line {number} {row}")
        if row["split_hash"] != split_hash:
            raise _wrong(path, f"line {number} has split_hash {row['split_hash']}, the test rows have {split_hash}")
        if row["id"] in found:
            raise _wrong(path, f"line {number} answers row {row['id']!r} a second time")
        found[row["id"]] = row
    known = {row["id"]: row["prompt_sha256"] for row in test_rows}
    unknown, missing = [i for i in found if i not in known], [i for i in known if i not in found]
    if unknown:
        raise _wrong(path, f"{len(unknown)} of {len(found)} answers are to other rows, the first {unknown[0]!r}")
    if missing:
        raise _wrong(path, f"{len(missing)} of {len(known)} test rows are not answered, the first {missing[0]!r}")
    other = [i for i in known if found[i]["prompt_sha256"] != known[i]]
    if other:
        raise _wrong(path, f"{len(other)} answers are to another prompt, the first to row {other[0]!r}")
    return [found[row["id"]] for row in test_rows]


def _lines_of(path):
    """The lines of a file as texts, without their ends. StudyError: it is not UTF-8."""
    try:
        text = read_text(path)
    except StudyError as error:
        raise _wrong(path, str(error.__cause__)) from None
    # Not splitlines: an answer may hold U+2028 and other characters that it takes for line ends.
    return text.removesuffix("\n").split("\n")


def _parsed(line):
    """One answer as a dict, or in words what is wrong with the line, to follow 'line 3'."""
    try:
        row = parse(line)
    except ValueError as error:
        return f"is damaged ({error})"
    missing = [name for name in _SHAPE if not isinstance(row, dict) or row.get(name) is None]
    if missing:
        return f"lacks {', '.join(missing)}"
    if not isinstance(row["answer"], str):
        return f"has the answer {row['answer']!r}, no text"
    found = fault(row, _SHAPE)
    return f"is damaged ({found})" if found else row


def _wrong(path, what):
    """The StudyError of a predictions file."""
    return StudyError(f"{path}: {what}. Nothing was written: delete this file and run 04_eval again")
