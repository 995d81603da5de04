"""Rows out of the two kinds of file that have columns: CSV and Parquet."""

import csv
import gzip
import io
import re
import shutil
import tempfile
from collections import Counter

from peftlib.core.errors import DataError
from peftlib.data.fields import Unread
from peftlib.data.outcomes import Broken

MAX_ROW_BYTES = 64 * 2**20
WAY_OUT = "fetch or write the file again"
_UNDECODED = re.compile("[\udc80-\udcff]")


def csv_rows(stream, path):
    """Yields rows of a CSV file, or Broken. DataError: its header, or a quote that never ends."""
    # Undecodable bytes become surrogates, which are rejected row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(max(MAX_ROW_BYTES, csv.field_size_limit()))  # the module's default is 128 KiB
    reader = csv.reader(text, strict=True)
    try:
        header = _header(next(reader, []), path)
    except csv.Error as error:
        raise DataError(f"{path}: its first line, the header, is no CSV ({error}): {WAY_OUT}") from None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(f"{path}: the quote opened in line {line} is never closed: {WAY_OUT}") from None
            yield Broken("bad_csv", f"line {line}: {error}")
            continue
        shown = ascii(fields)[:200]
        if len(fields) == len(header) and any(map(_UNDECODED.search, fields)):
            yield Broken("not_utf8", f"line {line}: {shown}")
        elif len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif fields:
            yield Broken("ragged_row", f"line {line}: {len(fields)} fields, the header has {len(header)}: {shown}")


def _header(names, path):
    """Names of a CSV file's columns, those without one by their number. DataError: two have the same."""
    _refuse_repeated([name for name in names if name], path)
    return [name or f"column {i}" for i, name in enumerate(names, start=1)]


def _refuse_repeated(names, path):
    repeated = sorted(name for name, n in Counter(names).items() if n > 1)
    if repeated:
        shown = ", ".join(map(ascii, repeated))[:200]
        raise DataError(f"{path} has columns of the same name: {shown}. Rename or remove all but one of them")


def parquet_rows(stream, path, fields):
    """Yields rows of a Parquet file, or Broken. fields: as in reading.read_rows. DataError: it is damaged."""
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if isinstance(stream, gzip.GzipFile):  # Parquet is read from its end
            shutil.copyfileobj(stream, plain)
            stream = plain
        try:
            opened = parquet.ParquetFile(stream)
            schema = opened.schema_arrow
            _refuse_repeated(schema.names, path)
            wanted = None if fields is None else _leaves(opened.schema, fields)
            read = schema.names if fields is None else {leaf.partition(".")[0] for leaf in wanted}
            others = {field.name: Unread(_is_number(field.type)) for field in schema if field.name not in read}
            for batch in opened.iter_batches(batch_size=256, columns=wanted):
                for i in range(batch.num_rows):
                    yield _parquet_row(batch, i, others)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is no whole Parquet file ({error}): {WAY_OUT}") from None


def _leaves(schema, fields):
    """Paths of the parts of a Parquet file's columns to read: of the named columns, all but times.

    Python cannot hold every time, and no time decides what a row becomes, be it a column or a part of a turn.
    """
    columns = [schema.column(i) for i in range(len(schema))]
    return [
        column.path
        for column in columns
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
