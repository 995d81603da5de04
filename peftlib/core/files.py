"""Files that are either complete or absent: written to a temporary name, synced to disk, then renamed.

Every write, rename, sync and deletion of files that a study must not lose goes through this module.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from pathlib import Path

from peftlib import SCHEMA_VERSION, __version__
from peftlib.core import paths
from peftlib.core.errors import MADE_AGAIN, SchemaError, StudyError, reading, writing
from peftlib.core.json_reading import parse

GIB = 2**30
MANIFEST = "manifest.json"  # written last: a folder without it does not count
_SEAL = "seal"  # key of a JSON object's own SHA-256


class HashingWriter:
    """A sequential binary writer that tracks `bytes` and `sha256` of the data it was given.

    Data are hashed before they are written, so damage by the disk is found when the file is read back.
    """

    def __init__(self, raw):
        self._raw = raw
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.error = None  # the OSError of a failed write

    def write(self, data):
        view = memoryview(data).cast("B")
        self._digest.update(view)
        try:
            written = 0
            while written < view.nbytes:  # a disk may write only a part
                written += self._raw.write(view[written:])
        except OSError as error:
            self.error = error
            raise
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self):
        """Does nothing: writes are unbuffered. Callers expect a file's interface."""

    @property
    def sha256(self):
        """Hex digest of the data so far."""
        return self._digest.hexdigest()


def write_stream(path, write, *, is_lasting=True):
    """Write a file by calling write(HashingWriter), and sync it; returns {'bytes', 'sha256'} of the data.

    is_lasting=False: skip the sync; call `sync_file` later. DiskError: the file cannot be written.
    """
    with writing(path), open(path, "wb", buffering=0) as raw:
        writer = HashingWriter(raw)
        try:
            write(writer)
        except RuntimeError:
            if writer.error is None:
                raise
            raise writer.error from None  # torch.save turns a failed write into an error of its own
        if is_lasting:
            os.fsync(raw.fileno())
    return {"bytes": writer.bytes, "sha256": writer.sha256}


def sync_file(path):
    """Wait until a file's contents are on the disk."""
    with open(path, "rb") as opened:
        os.fsync(opened.fileno())


def sha256(path):
    """Hex digest of a file. DiskError: the file cannot be read."""
    with reading(path), open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fault_of(path, listed):
    """How a file differs from the {'bytes', 'sha256'} that were written, as text, or None."""
    path = Path(path)
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != listed["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {listed['bytes']}"
    if sha256(path) != listed["sha256"]:
        return f"{path.name} is damaged (SHA-256 differs)"
    return None


def rename(old, new):
    """Rename `old` to `new` atomically and sync the folder. DiskError: it cannot be renamed."""
    with writing(new):
        os.replace(old, new)
        sync_folder(Path(new).parent)


def sync_folder(folder):
    """Sync the entries of a folder to disk, if the system supports it."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # Windows cannot open folders
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder):
    """Wait until every file below a folder, and its directory entry, is on the disk."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(folder)


def remove_tree(folder):
    """Delete a folder, its manifest first, so that a half-deleted folder does not count. A missing folder is fine.

    DiskError: something could not be deleted.
    """
    with writing(folder), contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name != MANIFEST):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                os.unlink(entry.path)
        os.rmdir(folder)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path next to `path`; it is renamed to `path` if the block succeeds, and removed otherwise.

    Concurrent writers of one file do not mix: the last to finish wins, with complete content.
    DiskError: the file cannot be written, or the block raised a disk error.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.writing")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            sync_file(beside)
            rename(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_text(path, text):
    """Replace `path` with UTF-8 text, completely or not at all."""
    _write_bytes(path, text.encode("utf-8"))


def _write_bytes(path, content):
    with atomic_path(path) as beside, open(beside, "wb") as raw:
        raw.write(content)


def append_text(path, text, *, is_lasting=True):
    """Append UTF-8 text to a file; is_lasting: wait until it is on the disk. DiskError: it cannot be written."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as out:
            out.write(text.encode("utf-8"))
            out.flush()
            if is_lasting:
                os.fsync(out.fileno())


def copy_tree(source, target, **how):
    """shutil.copytree. DiskError: a file cannot be written; files copied before that stay."""
    with writing(target):
        shutil.copytree(source, target, **how)


def read_text(path):
    """A UTF-8 file's text. StudyError: it is not UTF-8. DiskError: it is missing or cannot be read."""
    with reading(path):
        return Path(path).read_bytes().decode("utf-8")


def json_text(value):
    """A JSON object with the schema version, as text."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sealed(value):
    """A JSON object with schema version and its own SHA-256, as bytes, so that damage is detected when it is read."""
    value = json.loads(json_text(value))  # the form that will be read back
    return (json.dumps({**value, _SEAL: _seal(value)}, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def write_json(path, value):
    """Replace `path` with a sealed JSON object."""
    _write_bytes(path, sealed(value))


def read_json(path, *, is_sealed=False, way_out=MADE_AGAIN):
    """A JSON object of this project, as json_reading.Fields.

    is_sealed: require its SHA-256, which people may remove from files that they edit. way_out: what to do if it is
    damaged.
    StudyError: damaged. SchemaError: undamaged, but another schema version. DiskError: it cannot be read.
    """
    return json_of(read_text(path), Path(path), is_sealed=is_sealed, way_out=way_out)


def json_of(text, path, *, is_sealed=False, way_out=MADE_AGAIN):
    """As read_json, for text that was read from `path`."""
    with reading(path, way_out):
        value = parse(text, path)
    if not isinstance(value, dict):
        raise StudyError(f"{path} is damaged (it is not a JSON object): {way_out}")
    if is_sealed and _SEAL not in value:
        raise StudyError(f"{path} is damaged (it lacks its SHA-256): {way_out}")
    seal = value.pop(_SEAL, None)
    if seal is not None and seal != _seal(value):
        raise StudyError(
            f"{path} is damaged (its SHA-256 differs): {way_out}. If you edited it on purpose, remove its line "
            f"{_SEAL!r}"
        )
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        writer = f" ({value['written_by']})" if "written_by" in value else ""
        raise SchemaError(
            f"{path} has schema_version {version!r}, but peftlib {__version__} uses {SCHEMA_VERSION}: resume with "
            f"that version{writer}, or start over under another study name"
        )
    return value


def _seal(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def gib(n_bytes):
    """Bytes as GiB; None for None."""
    return None if n_bytes is None else n_bytes / GIB


def readable_path(path):
    """A path without its private part: relative to the working folder, the checkout or home."""
    path = Path(path).absolute()
    for base, shown in ((Path.cwd(), "."), (paths.checkout(), "."), (Path.home(), "~")):
        if base is not None and path.is_relative_to(base):
            return str(Path(shown) / path.relative_to(base))
    return str(path)


def size_text(size_bytes):
    """A size with a suitable unit, as in 11.1 KiB."""
    power = min(max(size_bytes, 1).bit_length() - 1, 30) // 10
    return f"{size_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{size_bytes} B"


# Control characters except newline and tab, C1 controls, bidirectional marks, and lone surrogates.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    r"""The text with characters that a terminal would act on escaped, as \x1b. Newlines and tabs stay."""
    return _ACTIVE.sub(lambda c: f"\\x{ord(c[0]):02x}" if ord(c[0]) < 0x100 else f"\\u{ord(c[0]):04x}", text)


def allow_odd(stream, errors):
    """Make stdin or stdout handle unencodable characters as `errors` says, instead of raising."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:  # a notebook's stream is not one
        stream.reconfigure(errors=errors)
