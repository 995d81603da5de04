"""predictions/<method>-s<seed>.jsonl: one answer per line, appended during generation and validated when read."""

import json
import time
from pathlib import Path

from peftlib.core import json_reading
from peftlib.core.errors import StudyError
from peftlib.core.files import append_text, read_text, sha256, write_text


class OtherAnswersError(StudyError):
    """A file has answers to other rows, or from other weights, than requested."""


_SYNC_SECONDS = 5.0  # between fsyncs: what a crash of the machine (not the process) may lose
_TEXTS = dict.fromkeys(("id", "source", "prompt_sha256", "answer", "split_hash"), str)
_SHAPE = {**_TEXTS, "n_tokens": int, "finish_reason": ("stop", "length")}


class Predictions:
    """The answers of one run, written during generation; a line truncated by a kill is dropped on opening.

    OtherAnswersError: the file has answers for another split; it is not changed.
    """

    def __init__(self, path, split_hash):
        self.path = Path(path)
        self.split_hash = split_hash
        self.rows = {}
        self._synced = 0.0
        lines = _lines_of(self.path) if self.path.exists() else []
        for row, fault in map(_parsed, lines):
            if fault:
                continue  # truncated by a kill, or damaged: will be answered again
            if row["split_hash"] != split_hash:
                raise OtherAnswersError(
                    f"{self.path} has split_hash {row['split_hash']}, the data {split_hash}: these answers are for "
                    "other rows; move the file away and run again"
                )
            self.rows[row["id"]] = row
        if lines and (len(self.rows) != len(lines) or not self.path.read_bytes().endswith(b"\n")):
            self._write()

    def add(self, test_row, answer):
        """Append a generate.Answer. A killed process loses none, a crashed machine the last few seconds."""
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
        """Rewrite the file in the order of the test rows and drop other rows."""
        self.rows = {row["id"]: self.rows[row["id"]] for row in test_rows}
        self._write()

    def _write(self):
        write_text(self.path, "".join(map(_line, self.rows.values())))


def _line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def require_unchanged(path, record):
    """StudyError if a run's predictions differ from those its evaluation wrote; older evaluations have no hash."""
    known = (record["evaluation"] or {}).get("predictions_sha256")
    if known is not None and sha256(path) != known:
        raise _wrong(path, "it is not what the evaluation wrote (its SHA-256 differs)")


def read_predictions(path, test_rows, split_hash):
    """[prediction, ...] in the order of the test rows.

    StudyError: a damaged line, or answers that do not match this split's test rows and prompts one to one.
    """
    found = []
    for number, line in enumerate(_lines_of(path), start=1):
        row, fault = _parsed(line)
        if fault:
            raise _wrong(path, f"line {number} is damaged ({fault})")
        if row["split_hash"] != split_hash:
            raise _wrong(path, f"line {number} has split_hash {row['split_hash']}, the test rows have {split_hash}")
        found.append(row)
    known, by_id = {row["id"]: row["prompt_sha256"] for row in test_rows}, {row["id"]: row for row in found}
    unlike = sorted(known.items() ^ {(name, row["prompt_sha256"]) for name, row in by_id.items()})
    if unlike or len(found) != len(known):
        named = f"; the first that differs is {unlike[0][0]!r}" if unlike else ""
        raise _wrong(path, f"{len(found)} answers do not match the {len(known)} test rows and prompts{named}")
    return [by_id[name] for name in known]


def _lines_of(path):
    """The lines of a file as texts, without their ends. StudyError: it is not UTF-8."""
    # Not splitlines: it also splits at U+2028 and other characters that an answer may contain.
    return read_text(path).removesuffix("\n").split("\n")


def _parsed(line):
    """(one answer as a dict, its fault as text or None)."""
    try:
        row = json_reading.parse(line)
    except ValueError as error:
        return None, str(error)
    return row, json_reading.fault(row, _SHAPE)


def _wrong(path, what):
    """The StudyError of a predictions file."""
    return StudyError(f"{path}: {what}. Nothing was written: delete this file and run 04_eval again")
