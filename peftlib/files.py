"""Files that are either whole or absent: written beside their place, flushed, then renamed."""

import contextlib
import json
import os
from pathlib import Path

from peftlib import SCHEMA_VERSION
from peftlib.errors import StudyError


@contextlib.contextmanager
def atomic_path(path):
    """A path beside `path` to write to; renamed to `path` when the block ends well, removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    try:
        yield beside
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path, text):
    """Replace `path` with UTF-8 text, whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Replace `path` with a JSON object that carries the schema version."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path):
    """A JSON object of this project. StudyError: not JSON, or of another schema version."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}): delete it and run the notebook that writes it again") from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise StudyError(
            f"{path} has schema_version {version!r}, this peftlib reads {SCHEMA_VERSION}: use a new study name"
        )
    return value
