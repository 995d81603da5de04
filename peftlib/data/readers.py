"""Rows of JSON Lines, JSON, CSV and Parquet files, plain or gzip. All but JSON arrays are read a few rows at a time.

A row that cannot be read comes as `Broken`, and reading continues. A file that cannot be read, or that is cut short,
is a DataError: the rows read so far would be another data set under the same name. CSV files are read by Python's csv
module in strict mode, as pandas accepts misplaced quotes and short rows and does not number what it skips.
"""

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections import Counter
from pathlib import Path

from peftlib.core.errors import DataError
from peftlib.data.outcomes import Broken, Unread

MAX_ROW_BYTES = 64 * 2**20  # of a line of JSON Lines or a field of CSV
_ADVICE = "fetch or write the file again"
_BOM, _UTF16 = b"\xef\xbb\xbf", "UTF-16 text: save it as UTF-8"
# What a text file may turn out to be, by its first bytes.
_OTHER_CONTENT = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet): give what is in it, a spreadsheet as CSV",
    b"BZh": "compressed by bzip2: unpack it, or use gzip",
    b"\xfd7zXZ": "compressed by xz: unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it, or use gzip",
    b"\x1f\x8b": "compressed by gzip twice: unpack it once",
    b"PAR1": "Parquet: name it .parquet",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_UNDECODED = re.compile("[\udc80-\udcff]")


class RepeatedField(ValueError):
    """A JSON object names a field twice; Python's own reader would silently keep the last. name: the field's."""

    def __init__(self, name):
        super().__init__(f"the field {name!r} is given twice")
        self.name = name


def _unique(pairs):
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RepeatedField(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return made


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)
loads = _STRICT.decode  # json.loads, but RepeatedField where an object names a field twice


def read_rows(path, fields=None):
    """Yields (row number from 1, row or Broken) of a file.

    fields: names of the fields whose values are needed, None for all; the others of a Parquet file come as Unread.
    DataError: missing, a folder, empty, of an unknown kind, damaged, or cut short.
    """
    path = Path(path)
    kind, is_gzip = kind_of(path)
    number = 0
    try:
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as stream:
            if kind == "parquet":
                rows = _parquet_rows(stream, path, fields)
            else:
                _require_text(stream, path)
                rows = _TEXT_READERS[kind](stream, path)
            for number, row in enumerate(rows, start=1):
                yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut short after row {number} ({error}): {_ADVICE}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read after row {number} ({error})") from None
    if number == 0:
        raise DataError(f"{path} holds no rows: {_ADVICE}, or leave the source out")


def kind_of(path):
    """(kind of file by its name, whether it is gzip by its content). DataError: missing, a folder, empty, unknown."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder: name one file in it ({', '.join(_KINDS)}, each plain or .gz)")
        if not path.exists():
            raise DataError(f"{path} does not exist: check the path, or use 'hub' or 'sample' as the source")
        with open(path, "rb") as stream:
            start = stream.read(2)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): check the path and who may read it") from None
    if not start:
        raise DataError(f"{path} is empty: {_ADVICE}")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if not suffixes or suffixes[-1] not in _KINDS:
        raise DataError(f"{path.name} is of no known kind: name it {', '.join(_KINDS)}, each plain or with .gz")
    return _KINDS[suffixes[-1]], start == b"\x1f\x8b"


def _require_text(stream, path):
    head = stream.peek(8)[:8]
    if head[:3:2] == b"\0\0" or head[1:4:2] == b"\0\0":
        head = b"\xff\xfe"  # UTF-16 of Latin letters without its mark
    for start, found in _OTHER_CONTENT.items():
        if head.startswith(start):
            raise DataError(f"{path} is {found}")


def _jsonl_rows(stream, path):
    while line := stream.readline(MAX_ROW_BYTES):
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            yield Broken("too_large", _excerpt(line))
            while (rest := stream.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
        elif line.strip(b" \t\r\n" + _BOM):
            yield _parsed_line(line)


def _parsed_line(line):
    try:
        return loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Broken("not_utf8", _excerpt(line))
    except RepeatedField as error:
        return Broken("repeated_field", f"{error}: {_excerpt(line)}")
    except (ValueError, RecursionError) as error:
        return Broken("not_json", f"{error}: {_excerpt(line)}")


def _excerpt(line):
    return line[:200].decode("utf-8", errors="backslashreplace")


def _json_rows(stream, path):
    """Rows of one array, or objects one after another. The text is held whole, its rows one at a time."""
    n_rows = 0
    try:
        text = stream.read().decode("utf-8-sig")
        at = _space_end(text, 0)
        is_array = text.startswith("[", at)
        at = _space_end(text, at + is_array)
        is_closed = is_array and text.startswith("]", at)
        while not is_closed and (is_array or at < len(text)):
            row, at = _json_row(text, at)
            n_rows += 1
            yield row
            at = _space_end(text, at)
            if is_array:
                is_closed = text.startswith("]", at)
                if not is_closed and not text.startswith(",", at):
                    raise ValueError("a comma or the closing bracket is missing")
                at = at if is_closed else _space_end(text, at + 1)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: after row {n_rows} it is not JSON ({error}): {_ADVICE}, or give JSON Lines, "
            "where a bad row costs only itself"
        ) from None
    if is_closed and _space_end(text, at + 1) < len(text):
        raise DataError(f"{path} goes on after the end of its array: a JSON file is one array, or one row a line")


def _space_end(text, at):
    return _JSON_SPACE.match(text, at).end()


def _json_row(text, at):
    """(value or Broken, end) of the JSON value that starts at `at`."""
    try:
        return _STRICT.raw_decode(text, at)
    except RepeatedField as error:
        _, end = json.JSONDecoder().raw_decode(text, at)
        return Broken("repeated_field", f"{error}: {ascii(text[at:end])[:200]}"), end


def _csv_rows(stream, path):
    # Undecodable bytes become surrogates, which are rejected row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(max(MAX_ROW_BYTES, csv.field_size_limit()))  # the module's default is 128 KiB
    reader = csv.reader(text, strict=True)
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}: its first line, the header, is no CSV ({error}): {_ADVICE}") from None
    _require_distinct(filter(None, names), path)
    header = [name or f"column {i}" for i, name in enumerate(names, start=1)]
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(f"{path}: the quote opened in line {line} is never closed: {_ADVICE}") from None
            yield Broken("bad_csv", f"line {line}: {error}")
            continue
        shown = ascii(values)[:200]
        if len(values) != len(header) and values:
            yield Broken("ragged_row", f"line {line}: {len(values)} fields, the header has {len(header)}: {shown}")
        elif any(map(_UNDECODED.search, values)):
            yield Broken("not_utf8", f"line {line}: {shown}")
        elif values:
            yield dict(zip(header, values, strict=True))


_TEXT_READERS = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows}


def _require_distinct(names, path):
    repeated = sorted(name for name, n in Counter(names).items() if n > 1)
    if repeated:
        shown = ", ".join(map(ascii, repeated))[:200]
        raise DataError(f"{path} has columns of the same name: {shown}. Rename or remove all but one of them")


def _parquet_rows(stream, path, fields):
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if isinstance(stream, gzip.GzipFile):  # Parquet is read from its end
            shutil.copyfileobj(stream, plain)
            stream = plain
        try:
            opened = parquet.ParquetFile(stream)
            schema = opened.schema_arrow
            _require_distinct(schema.names, path)
            leaves = None if fields is None else _needed_leaves(opened.schema, fields)
            read = schema.names if fields is None else {leaf.partition(".")[0] for leaf in leaves}
            others = {field.name: Unread(_is_number(field.type)) for field in schema if field.name not in read}
            for batch in opened.iter_batches(batch_size=256, columns=leaves):
                for i in range(batch.num_rows):
                    yield _parquet_row(batch, i, others)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is no whole Parquet file ({error}): {_ADVICE}") from None


def _needed_leaves(schema, fields):
    """Paths of the leaf columns to read: those below the named fields, without times.

    Python cannot hold every time, and no time decides what a row becomes, be it a column or a part of a turn.
    """
    return [
        column.path
        for column in map(schema.column, range(len(schema)))
        if column.path.partition(".")[0] in fields
        and column.logical_type.type not in ("TIMESTAMP", "DATE", "TIME")
        and column.physical_type != "INT96"
    ]


def _is_number(kind):
    from pyarrow import types

    tests = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_temporal)
    return any(is_so(kind) for is_so in tests)


def _parquet_row(batch, i, others):
    try:
        return batch.slice(i, 1).to_pylist()[0] | others
    except UnicodeDecodeError as error:
        return Broken("not_utf8", str(error)[:200])
    except (OverflowError, ValueError, KeyError) as error:  # a time that Python cannot hold, or in an unknown zone
        return Broken("bad_value", f"{type(error).__name__}: {error}"[:200])
