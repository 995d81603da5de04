"""Files that are either whole or absent: written beside their place, flushed to the disk, then renamed.

Every write, rename, flush and deletion of what a study must not lose goes through this module.
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
MANIFEST = "manifest.json"  # written last: what lacks it does not count
_SEAL = "seal"  # key of a JSON object's own SHA-256


class HashingWriter:
    """A binary file to write to in order, which knows `bytes` and `sha256` of what it was given.

    Hashed before it is written, so that what a disk changes on the way is found when the file is read back.
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
            while written < view.nbytes:  # a disk may take a part
                written += self._raw.write(view[written:])
        except OSError as error:
            self.error = error
            raise
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self):
        """For those who write to files; nothing is held back here."""

    @property
    def sha256(self):
        """Hex digest so far."""
        return self._digest.hexdigest()


def write_stream(path, write, *, is_lasting=True):
    """Write a file by write(HashingWriter), onto the disk; returns {'bytes', 'sha256'} of what was given.

    is_lasting=False: without waiting for the disk; `sync_file` does that. DiskError: the disk does not take it.
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
    """Wait until the disk has what was written to a file."""
    with open(path, "rb") as opened:
        os.fsync(opened.fileno())


def sha256(path):
    """Hex digest of a file. DiskError: it cannot be read."""
    with reading(path), open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fault_of(path, listed):
    """Why a file is not the {'bytes', 'sha256'} that was written, in words, or None."""
    path = Path(path)
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != listed["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, not {listed['bytes']}"
    if sha256(path) != listed["sha256"]:
        return f"{path.name} is damaged (SHA-256 differs)"
    return None


def rename(old, new):
    """Put `old` in the place of `new`, at once and lastingly. DiskError: it cannot be put there."""
    with writing(new):
        os.replace(old, new)
        sync_folder(Path(new).parent)


def sync_folder(folder):
    """Have the disk keep the names in a folder, where the system can."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # Windows opens no folders
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder):
    """Wait until the disk has every file in a folder and below, and their names."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(folder)


def remove_tree(folder):
    """Delete a folder, its manifest first, so that a half-deleted one does not count; one that is not there is fine.

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
    """A path beside `path` to write to; renamed to `path` when the block ends well, removed when it does not.

    Two that write the same file at once do not meet: the last to end has its content there, whole.
    DiskError: the disk does not take it, or the block ended in an error of the disk.
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
    """Replace `path` with UTF-8 text, whole or not at all."""
    _write_bytes(path, text.encode("utf-8"))


def _write_bytes(path, content):
    with atomic_path(path) as beside, open(beside, "wb") as raw:
        raw.write(content)


def append_text(path, text, *, is_lasting=True):
    """Add UTF-8 text to the end of a file; is_lasting: wait until the disk has it. DiskError: it does not take it."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as out:
            out.write(text.encode("utf-8"))
            out.flush()
            if is_lasting:
                os.fsync(out.fileno())


def copy_tree(source, target, **how):
    """shutil.copytree. DiskError: the disk does not take it; what was copied until then stays."""
    with writing(target):
        shutil.copytree(source, target, **how)


def read_text(path):
    """A UTF-8 file's text. StudyError: it is not UTF-8. DiskError: it cannot be read, or is not there."""
    with reading(path):
        return Path(path).read_bytes().decode("utf-8")


def json_text(value):
    """A JSON object with the schema version, as text."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sealed(value):
    """A JSON object with schema version and its own SHA-256, as bytes, so that damage shows when it is read."""
    value = json.loads(json_text(value))  # as it will be read
    return (json.dumps({**value, _SEAL: _seal(value)}, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def write_json(path, value):
    """Replace `path` with a sealed JSON object."""
    _write_bytes(path, sealed(value))


def read_json(path, *, is_sealed=False):
    """A JSON object of this project, made of json_reading.Fields.

    is_sealed: refuse one without its SHA-256, which people may take out of the files that they edit.
    StudyError: damaged. SchemaError: whole, but of another schema version. DiskError: it cannot be read.
    """
    return json_of(read_text(path), Path(path), is_sealed=is_sealed)


def json_of(text, path, *, is_sealed=False):
    """As read_json, of a text that stands at `path`."""
    with reading(path):
        value = parse(text, path)
    if not isinstance(value, dict):
        raise StudyError(f"{path} is damaged (it is no object): {MADE_AGAIN}")
    if is_sealed and _SEAL not in value:
        raise StudyError(f"{path} is damaged (it lacks its SHA-256): {MADE_AGAIN}")
    seal = value.pop(_SEAL, None)
    if seal is not None and seal != _seal(value):
        raise StudyError(
            f"{path} is damaged (its SHA-256 differs): {MADE_AGAIN}. If you have changed it on purpose, take its line "
            f"{_SEAL!r} out"
        )
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        writer = f" ({value['written_by']})" if "written_by" in value else ""
        raise SchemaError(
            f"{path} has schema_version {version!r}, this is peftlib {__version__} with {SCHEMA_VERSION}: resume with "
            f"that version{writer}, or start anew under another study name"
        )
    return value


def _seal(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def gib(n_bytes):
    """Bytes in GiB; None for None."""
    return None if n_bytes is None else n_bytes / GIB


def readable_path(path):
    """A path without what is private to this machine: below the working folder, the checkout or home."""
    path = Path(path).absolute()
    for base, shown in ((Path.cwd(), "."), (paths.checkout(), "."), (Path.home(), "~")):
        if base is not None and path.is_relative_to(base):
            return str(Path(shown) / path.relative_to(base))
    return str(path)


def size_text(size_bytes):
    """A size with a unit that fits, as in 11.1 KiB."""
    power = min(max(size_bytes, 1).bit_length() - 1, 30) // 10
    return f"{size_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{size_bytes} B"


# Control characters but newline and tab, those of C1, marks that turn the direction of writing, and half characters.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    r"""The text with escapes such as \x1b in place of what a terminal would act on. Newlines and tabs stay."""
    return _ACTIVE.sub(lambda c: f"\\x{ord(c[0]):02x}" if ord(c[0]) < 0x100 else f"\\u{ord(c[0]):04x}", text)


def allow_odd(stream, errors):
    """Have stdin or stdout handle characters that its encoding lacks as `errors` says, instead of raising."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:  # a notebook's own is none
        stream.reconfigure(errors=errors)
