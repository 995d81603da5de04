"""The lines of predictions/<method>-s<seed>.jsonl, read alike by those who score them and those who add some."""

from peftlib.core.errors import StudyError
from peftlib.core.files import read_text
from peftlib.core.json_reading import fault, parse

_SHAPE = {
    "id": str,
    "source": str,
    "prompt_sha256": str,
    "answer": str,
    "n_tokens": int,
    "finish_reason": ("stop", "length"),
    "split_hash": str,
}


def lines_of(path):
    """The lines of a file as texts, without their ends. StudyError: it is not UTF-8."""
    try:
        text = read_text(path)
    except StudyError as error:
        raise wrong(path, str(error.__cause__)) from None
    # Not splitlines: an answer may hold U+2028 and other characters that it takes for line ends.
    return text.removesuffix("\n").split("\n")


def parsed(line):
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


def wrong(path, what):
    """The StudyError of a predictions file."""
    return StudyError(f"{path}: {what}. Nothing was written: delete this file and run 04_eval again")
