"""Rows out of JSON Lines, JSON, CSV and Parquet files, plain or gzip, a few at a time whatever the file's size.

A row that cannot be read comes as `Broken`, and reading goes on; a file that cannot be read, or that ends before its
end, is a DataError: taking what was read so far would be another data set under the same name.
"""

import gzip
import io
import json
import zlib
from pathlib import Path

from peftlib.core.errors import DataError
from peftlib.data.outcomes import Broken
from peftlib.data.strict_json import DECODER, RepeatedField, loads
from peftlib.data.tables import MAX_ROW_BYTES, WAY_OUT, csv_rows, parquet_rows

_BLOCK_CHARS = 2**20
_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# What a text file may turn out to be, by its first bytes.
_OTHER_CONTENT = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet): give what is in it, a spreadsheet as CSV",
    b"BZh": "compressed by bzip2: unpack it, or use gzip",
    b"\xfd7zXZ": "compressed by xz: unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it, or use gzip",
    b"\x1f\x8b": "compressed by gzip twice: unpack it once",
    b"PAR1": "Parquet: name it .parquet",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


def read_rows(path, fields=None):
    """Yields (row number from 1, row or Broken) of a file.

    fields: names of those whose values are wanted, None for all; others may come as Unread.
    DataError: missing, a folder, empty, of an unknown kind, damaged, or cut short.
    """
    path = Path(path)
    kind, is_gzip = kind_of(path)
    number = 0
    try:
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as stream:
            rows = (
                parquet_rows(stream, path, fields)
                if kind == "parquet"
                else _TEXT_READERS[kind](_checked(stream, path), path)
            )
            for row in rows:
                number += 1
                yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut short after row {number} ({error}): {WAY_OUT}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read after row {number} ({error})") from None
    if number == 0:
        raise DataError(f"{path} holds no rows: {WAY_OUT}, or leave the source out")


def kind_of(path):
    """(kind of file by its name, whether it is gzip by its content). DataError: missing, a folder, empty, unknown."""
    try:
        return _kind_of(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): check the path and who may read it") from None


def _kind_of(path):
    if path.is_dir():
        raise DataError(f"{path} is a folder: name one file in it ({', '.join(_KINDS)}, each plain or .gz)")
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path, or use 'hub' or 'sample' as the source")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: {WAY_OUT}")
    with open(path, "rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = _KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise DataError(f"{path.name} is of no known kind: name it {', '.join(_KINDS)}, each plain or with .gz")
    return kind, is_gzip


def _checked(stream, path):
    """The stream of a text file. DataError: it holds something else."""
    head = stream.peek(8)[:8]
    if head[:3:2] == b"\0\0" or head[1:4:2] == b"\0\0":
        head = b"\xff\xfe"  # UTF-16 of Latin letters without its mark
    for start, found in _OTHER_CONTENT.items():
        if head.startswith(start):
            raise DataError(f"{path} is {found}")
    return stream


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
        return loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Broken("not_utf8", _excerpt(line))
    except RepeatedField as error:
        return Broken("repeated_field", f"{error}: {_excerpt(line)}")
    except (ValueError, RecursionError) as error:
        return Broken("not_json", f"{error}: {_excerpt(line)}")


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
                value, end = self._decoded()
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

    def _decoded(self):
        """(value, end) at the place that is read next; Broken for a value with a field given twice."""
        try:
            return DECODER.raw_decode(self.window, self.at)
        except RepeatedField as error:
            _, end = json.JSONDecoder().raw_decode(self.window, self.at)
            return Broken("repeated_field", f"{error}: {ascii(self.window[self.at : end])[:200]}"), end

    def fail(self, what):
        raise DataError(
            f"{self.path}: after row {self.rows} it is not JSON ({what}): {WAY_OUT}, or give JSON Lines, "
            "where a bad row costs only itself"
        ) from None


_TEXT_READERS = {"jsonl": _jsonl, "json": _json, "csv": csv_rows}
