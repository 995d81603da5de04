"""Which schema a file's rows are of, by its first rows; where they are of none, what to do about it."""

import re
from collections import Counter

from peftlib.core.errors import DataError
from peftlib.data.outcomes import REASONS, Broken
from peftlib.data.schemas import SCHEMAS, detect, is_preference_pair


def schema_of(numbered, label):
    """The key of SCHEMAS that most of these rows have.

    numbered: [(row number, row or Broken), ...]. label: where they come from, in words. DataError: not one row is of a known schema.
    """
    found = Counter(filter(None, (detect(row) for _, row in numbered)))
    if found:
        return found.most_common(1)[0][0]
    rows = [row for _, row in numbered]
    lines = [
        f"{label}: none of its first {len(rows)} rows is of a known schema ({_seen(rows)})",
        f"Rows must be one of {'; '.join(SCHEMAS.values())}",
        *(advice for is_so, advice in _ADVICE if any(map(is_so, rows))),
        *(f"The first that cannot be read is row {n}: {row.excerpt}" for n, row in _broken(numbered)[:1]),
    ]
    raise DataError(". ".join(lines))


def _seen(rows):
    fields = next((f"fields {', '.join(map(ascii, row))[:200]}" for row in rows if isinstance(row, dict)), "no fields")
    reasons = Counter(row.reason for row in rows if isinstance(row, Broken))
    return fields + "".join(f"; {n} {reason}: {REASONS[reason]}" for reason, n in reasons.items())


def _broken(numbered):
    return [(number, row) for number, row in numbered if isinstance(row, Broken)]


def _is_wrapped(row):
    return isinstance(row, dict) and any(
        isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values()
    )


def _is_one_column(row):
    return isinstance(row, dict) and len(row) == 1 and re.search(r"[;\t|]", str(*row)) is not None


def _is_nearly_named(row):
    return (
        isinstance(row, dict) and detect({str(name).strip().lower(): value for name, value in row.items()}) is not None
    )


def _is_no_json(row):
    return isinstance(row, Broken) and row.reason == "not_json"


# (whether a row looks so, what to do about it)
_ADVICE = (
    (
        is_preference_pair,
        """These are preference pairs (prompt, chosen, rejected), as for DPO: make of each a row of messages that end \
with the chosen answer""",
    ),
    (_is_wrapped, "A field holds a list of objects: if these are the rows, give that list alone"),
    (_is_nearly_named, "Names of fields are lower case, without spaces around them"),
    (lambda row: isinstance(row, list), "A row is a list: give one array of objects, in a file named .json"),
    (lambda row: row is None or isinstance(row, (str, int, float)), "A row is an object of named fields"),
    (_is_one_column, "The header holds no comma: commas part the columns of a CSV file"),
    (
        _is_no_json,
        """Each line of JSON Lines is one object, without a comma behind it; an array goes into a file named .json""",
    ),
)
