"""Where rows come from: the hub at pinned revisions, the bundled sample, or the user's own files."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from peftlib.core.errors import ConfigError, DataError
from peftlib.data.hub import HUB, hub_rows
from peftlib.data.readers import kind_of, read_rows
from peftlib.data.schemas import FIELDS_READ

SAMPLE = Path(__file__).resolve().parent / "sample"
_SAMPLE_LICENSE = "Apache-2.0 (written for this project)"
_FORM = "NAME=WHERE; ... where WHERE is hub, sample, or FILE[,TESTFILE]"
_PRECEDENCE = ("alpaca", "tulu", "ultrachat")


@dataclass(frozen=True)
class Source:
    """One named source. where: 'hub', 'sample' or 'file'. paths: {stream: file}, empty for the hub.

    Its streams are 'main', and 'test' where test rows come from rows of their own.
    """

    name: str
    where: str
    paths: dict

    @property
    def streams(self):
        if self.where == "hub":
            return ("main", "test") if HUB[self.name].test_split else ("main",)
        return tuple(self.paths)

    def check(self):
        """DataError: one of its files is missing, empty, a folder, or of no known kind."""
        for path in self.paths.values():
            kind_of(path)

    def rows(self, stream):
        """Yields (row number, row or reading.Broken) of a stream. DataError: it cannot be read."""
        return hub_rows(self.name, stream) if self.where == "hub" else read_rows(self.paths[stream], FIELDS_READ)

    def label(self, stream):
        """The stream in words."""
        if self.where == "hub":
            return HUB[self.name].label(stream)
        name = self.paths[stream].name if self.where == "sample" else self.paths[stream]
        return f"the bundled sample {name}" if self.where == "sample" else _encodable(name)

    def _public_label(self, stream):
        return _encodable(self.paths[stream].name) if self.where == "file" else self.label(stream)

    def identity(self):
        """What makes its rows what they are: the hub's revision, or each file's SHA-256.

        DataError: a file cannot be read.
        """
        if self.where == "hub":
            return {"hub": HUB[self.name].id, "revision": HUB[self.name].revision}
        try:
            return {"sha256": {stream: _file_sha256(path) for stream, path in self.paths.items()}}
        except OSError as error:
            raise DataError(
                f"a file of {self.name} cannot be read ({error}): check the path and who may read it"
            ) from None

    def provenance(self):
        """What the manifest and the card say of it, JSON values."""
        own = "rows of their own" if "test" in self.streams else "the same rows, by hash"
        licence = {"hub": self.where == "hub" and HUB[self.name].license, "sample": _SAMPLE_LICENSE}
        return {
            "where": {stream: self._public_label(stream) for stream in self.streams},
            "license": licence.get(self.where, "as its owner says: not known to peftlib"),
            "test_rows_from": own,
        }


def parse_sources(text):
    """[Source, ...] of a config's `sources`, in order of precedence: alpaca, tulu, ultrachat, then as given.

    ConfigError: not of the form NAME=WHERE; ..., a name twice, or hub/sample for a name they do not have.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, where = (piece.strip() for piece in part.partition("="))
        if not equals or not where or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            raise ConfigError(f"sources: {part!r} is not of the form {_FORM}")
        if name in found:
            raise ConfigError(f"sources: {name!r} stands there twice")
        found[name] = _source(name, where)
    if not found:
        raise ConfigError(f"sources={text!r} names no source: use {_FORM}")
    return sorted(
        found.values(), key=lambda s: _PRECEDENCE.index(s.name) if s.name in _PRECEDENCE else len(_PRECEDENCE)
    )


def _source(name, where):
    if where in ("hub", "sample"):
        if name not in HUB:
            raise ConfigError(f"sources: {name}={where}, but {where} has only {', '.join(HUB)}: give a file")
        return Source(name, where, {"main": SAMPLE / f"{name}.jsonl"} if where == "sample" else {})
    try:
        files = [Path(piece.strip()).expanduser() for piece in where.split(",")]
    except RuntimeError as error:  # ~name of nobody here
        raise ConfigError(f"sources: {name}={where!r}: {error}: give the whole path") from None
    if len(files) > 2 or not all(piece.strip() for piece in where.split(",")):
        raise ConfigError(f"sources: {name}={where!r} is not FILE or FILE,TESTFILE (a path must hold no comma)")
    return Source(name, "file", dict(zip(("main", "test"), files, strict=False)))


def _encodable(path):
    """A path as text that any file can hold: bytes of its name that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _file_sha256(path):
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
