"""Rows of JSON Lines, JSON, CSV and Parquet files, plain or gzip. All but JSON are read a few rows at a time.

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
from peftlib.data.outcomes import Broken

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
_UNDECODED = re.compile("[\udc80-\udcff]")


def loads(text):
    """json.loads, but an object that names a field twice comes as Broken: Python would silently keep the last.

    ValueError, RecursionError: not JSON.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs):
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    name = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return Broken("repeated_field", f"the field {name!r} is given twice: {ascii(made)[:200]}")


def read_rows(path, fields=None):
    """Yields (row number from 1, row or Broken) of a file.

    fields: names of the fields whose values are needed, None for all; of the others in a Parquet file numbers and times
    come as None and the rest as a text that says so.
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
            start = "" if path.is_absolute() else f" (it starts at {Path.cwd()})"
            raise DataError(f"{path} does not exist: check the path{start}, or use 'hub' or 'sample' as the source")
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
    except (ValueError, RecursionError) as error:
        return Broken("not_json", f"{error}: {_excerpt(line)}")


def _excerpt(line):
    return line[:200].decode("utf-8", errors="backslashreplace")


def _json_rows(stream, path):
    """Rows of one array, or one object a line, as some files of that name have it. The file is held whole."""
    content = stream.read()
    try:
        value = loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not content.lstrip(_BOM + b" \t\r\n").startswith(b"["):
            return _jsonl_rows(io.BytesIO(content), path)
        raise DataError(
            f"{path}: it is not JSON ({error}): {_ADVICE}, or give JSON Lines, where a bad row costs only itself"
        ) from None
    return value if isinstance(value, list) else [value]


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
    from pyarrow import parquet, types

    with tempfile.TemporaryFile() as plain:
        if isinstance(stream, gzip.GzipFile):  # Parquet is read from its end
            shutil.copyfileobj(stream, plain)
            stream = plain
        try:
            opened = parquet.ParquetFile(stream)
            schema = opened.schema_arrow
            _require_distinct(schema.names, path)
            # Python cannot hold every time, and no time decides what a row becomes.
            read = [f.name for f in schema if fields is None or (f.name in fields and not types.is_temporal(f.type))]
            # A number that is not read changes nothing either; of other fields it counts that they are there.
            others = {f.name: None if _is_number(f.type) else "(not read)" for f in schema if f.name not in read}
            for batch in opened.iter_batches(batch_size=256, columns=read):
                for i in range(batch.num_rows):
                    yield _parquet_row(batch, i, others)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is no whole Parquet file ({error}): {_ADVICE}") from None


def _is_number(kind):
    from pyarrow import types

    return types.is_primitive(kind) or types.is_decimal(kind) or types.is_null(kind)


def _parquet_row(batch, i, others):
    try:
        return batch.slice(i, 1).to_pylist()[0] | others
    except UnicodeDecodeError as error:
        return Broken("not_utf8", str(error)[:200])
    except (OverflowError, ValueError, KeyError) as error:  # a time that Python cannot hold, or in an unknown zone
        return Broken("bad_value", f"{type(error).__name__}: {error}"[:200])
