"""Rows of JSON Lines, JSON, CSV and Parquet files, plain or gzip. All except JSON are streamed.

A row that cannot be read is yielded as `Broken`, and reading continues. A file that cannot be read, or is truncated,
raises DataError: the rows read so far would be another dataset under the same name. CSV is read by Python's csv
module in strict mode, because pandas accepts misplaced quotes and short rows and does not number the rows it skips.
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

MAX_ROW_BYTES = 64 * 2**20  # limit of a JSON Lines line or a CSV field
_ADVICE = "download or write the file again"
_BOM, _UTF16 = b"\xef\xbb\xbf", "UTF-16 text: save it as UTF-8"
# Other formats that a text file may turn out to have, by its first bytes.
_OTHER_CONTENT = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it, or save the spreadsheet as CSV",
    b"BZh": "compressed with bzip2: unpack it, or use gzip",
    b"\xfd7zXZ": "compressed with xz: unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it, or use gzip",
    b"\x1f\x8b": "compressed with gzip twice: unpack it once",
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
    """json.loads, but an object with a repeated field becomes Broken: Python would silently keep the last value.

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
    """Yield (row number from 1, row or Broken) of a file.

    fields: names of the fields whose values are needed, None for all. Other fields of a Parquet file are not read:
    numbers and times become None, everything else a placeholder text.
    DataError: the file is missing, a folder, empty, of an unknown type, damaged, or truncated.
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
        raise DataError(f"{path} is damaged or truncated after row {number} ({error}): {_ADVICE}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read after row {number} ({error})") from None
    if number == 0:
        raise DataError(f"{path} has no rows: {_ADVICE}, or remove the source")


def kind_of(path):
    """(file type by its name, whether its content is gzip). DataError: missing, a folder, empty, unknown type."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder: give one file in it ({', '.join(_KINDS)}, each plain or .gz)")
        if not path.exists():
            start = "" if path.is_absolute() else f" (it starts at {Path.cwd()})"
            raise DataError(f"{path} does not exist: check the path{start}, or use 'hub' or 'sample' as the source")
        with open(path, "rb") as stream:
            start = stream.read(2)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): check the path and its permissions") from None
    if not start:
        raise DataError(f"{path} is empty: {_ADVICE}")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if not suffixes or suffixes[-1] not in _KINDS:
        raise DataError(f"{path.name} has an unknown file type: use {', '.join(_KINDS)}, plain or with .gz")
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
    """Rows of one array, or of one object per line, as in some .json files. Reads the whole file into memory."""
    content = stream.read()
    try:
        value = loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not content.lstrip(_BOM + b" \t\r\n").startswith(b"["):
            return _jsonl_rows(io.BytesIO(content), path)
        raise DataError(
            f"{path}: it is not JSON ({error}): {_ADVICE}, or use JSON Lines, where a bad row affects only itself"
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
        raise DataError(f"{path}: its first line, the header, is not CSV ({error}): {_ADVICE}") from None
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
                raise DataError(f"{path}: the quote opened on line {line} is never closed: {_ADVICE}") from None
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
        if isinstance(stream, gzip.GzipFile):  # Parquet files are read from the end
            shutil.copyfileobj(stream, plain)
            stream = plain
        try:
            opened = parquet.ParquetFile(stream)
            schema = opened.schema_arrow
            _require_distinct(schema.names, path)
            # Python cannot represent every timestamp, and times do not affect the rows.
            read = [f.name for f in schema if fields is None or (f.name in fields and not types.is_temporal(f.type))]
            # Unread numbers do not affect them either; for other fields only their presence matters.
            others = {f.name: None if _is_number(f.type) else "(not read)" for f in schema if f.name not in read}
            for batch in opened.iter_batches(batch_size=256, columns=read):
                for i in range(batch.num_rows):
                    yield _parquet_row(batch, i, others)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a complete Parquet file ({error}): {_ADVICE}") from None


def _is_number(kind):
    from pyarrow import types

    return types.is_primitive(kind) or types.is_decimal(kind) or types.is_null(kind)


def _parquet_row(batch, i, others):
    try:
        return batch.slice(i, 1).to_pylist()[0] | others
    except UnicodeDecodeError as error:
        return Broken("not_utf8", str(error)[:200])
    except (OverflowError, ValueError, KeyError) as error:  # a time that Python cannot represent, or an unknown zone
        return Broken("bad_value", f"{type(error).__name__}: {error}"[:200])
