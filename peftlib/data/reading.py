"""Rows out of JSON Lines, JSON, CSV and Parquet files, plain or gzip, a few at a time whatever the file's size.

A row that cannot be read comes as `Broken`, and reading goes on; a file that cannot be read, or that ends before its
end, is a DataError: taking what was read so far would be another data set under the same name.
"""

import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from peftlib.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
_BLOCK_CHARS = 2**20
_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_WAY_OUT = "fetch or write the file again"


@dataclass(frozen=True)
class Broken:
    """What stands in place of a row. reason: a key of convert.REASONS. excerpt: text that shows it."""

    reason: str
    excerpt: str


def read_rows(path):
    """Yields (row number from 1, row or Broken) of a file.

    DataError: missing, a folder, empty, of an unknown kind, damaged, or cut short.
    """
    path = Path(path)
    kind, is_gzip = kind_of(path)
    number = 0
    try:
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as stream:
            for row in _READERS[kind](stream, path):
                number += 1
                yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut short after row {number} ({error}): {_WAY_OUT}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read after row {number} ({error})") from None
    if number == 0:
        raise DataError(f"{path} holds no rows: {_WAY_OUT}, or leave the source out")


def kind_of(path):
    """(kind of file by its name, whether it is gzip by its content). DataError: missing, a folder, empty, unknown."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: name one file in it ({', '.join(_KINDS)}, each plain or .gz)")
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path, or use 'hub' or 'sample' as the source")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: {_WAY_OUT}")
    with open(path, "rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = _KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise DataError(f"{path.name} is of no known kind: name it {', '.join(_KINDS)}, each plain or with .gz")
    return kind, is_gzip


def _jsonl(stream, path):
    while line := stream.readline(MAX_ROW_BYTES):
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            yield Broken("too_large", _excerpt(line))
            while (rest := stream.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
        elif line.strip(b" \t\r\n\xef\xbb\xbf"):
            yield _parsed_line(line)


def _parsed_line(line):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Broken("not_utf8", _excerpt(line))
    except (ValueError, RecursionError):
        return Broken("not_json", _excerpt(line))


def _excerpt(line):
    return line[:200].decode("utf-8", errors="backslashreplace")


def _json(stream, path):
    """Rows of one array, or objects one after another."""
    text = _JsonText(io.TextIOWrapper(stream, encoding="utf-8-sig"), path)
    first = text.peek()
    if first == "[":
        text.at += 1
        if text.peek() == "]":
            text.at += 1
        else:
            yield from _array_rows(text)
        if text.peek():
            raise DataError(f"{path} goes on after the end of its array: a JSON file is one array, or one row a line")
    while text.peek():
        yield text.value()


def _array_rows(text):
    while True:
        yield text.value()
        separator = text.peek()
        text.at += 1
        if separator == "]":
            return
        if separator != ",":
            text.fail("a comma or the closing bracket is missing")


class _JsonText:
    """A sliding window on a JSON text. at: the place in it that is read next."""

    def __init__(self, stream, path):
        self.stream, self.path = stream, path
        self.window, self.at, self.rows = "", 0, 0
        self.decoder = json.JSONDecoder()

    def peek(self):
        """The next character that is no white space, '' at the end."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.window) or not self.more():
                return self.window[self.at : self.at + 1]

    def more(self):
        """Read on, at least doubling what is unread, so that a long row is not parsed again and again."""
        unread = len(self.window) - self.at
        try:
            block = self.stream.read(max(_BLOCK_CHARS, unread))
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8: {error.reason}")
        self.window, self.at = self.window[self.at :] + block, 0
        return bool(block)

    def value(self):
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.at)
            except RecursionError:
                self.fail("nested too deeply")
            except ValueError as error:
                if len(self.window) - self.at > MAX_ROW_BYTES or not self.more():
                    self.fail(str(error))
            else:
                # A number that touches the window's end may go on behind it.
                if end < len(self.window) or not self.more():
                    self.at = end
                    self.rows += 1
                    return value

    def fail(self, what):
        raise DataError(
            f"{self.path}: after row {self.rows} it is not JSON ({what}): {_WAY_OUT}, or give JSON Lines, "
            "where a bad row costs only itself"
        ) from None


def _csv(stream, path):
    # Undecodable bytes become surrogates, which conversion rejects row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(max(MAX_ROW_BYTES, csv.field_size_limit()))  # the module's default is 128 KiB
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}: its first line, the header, is no CSV ({error}): {_WAY_OUT}") from None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(f"{path}: the quote opened in line {line} is never closed: {_WAY_OUT}") from None
            yield Broken("bad_csv", f"line {line}: {error}")
            continue
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif fields:
            shown = ascii(fields)[:200]
            yield Broken("ragged_row", f"line {line}: {len(fields)} fields, the header has {len(header)}: {shown}")


def _parquet(stream, path):
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if isinstance(stream, gzip.GzipFile):  # Parquet is read from its end
            shutil.copyfileobj(stream, plain)
            stream = plain
        try:
            for batch in parquet.ParquetFile(stream).iter_batches(batch_size=256):
                for i in range(batch.num_rows):
                    yield _parquet_row(batch, i)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is no whole Parquet file ({error}): {_WAY_OUT}") from None


def _parquet_row(batch, i):
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Broken("not_utf8", str(error)[:200])


_READERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}
