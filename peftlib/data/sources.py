"""Sources of rows: the Hugging Face hub at pinned revisions, the bundled sample, or the user's own files."""

import os
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from peftlib.core.errors import ConfigError, DataError
from peftlib.core.files import sha256
from peftlib.data.outcomes import Broken
from peftlib.data.readers import kind_of, read_rows
from peftlib.data.schemas import FIELDS_READ

SAMPLE = Path(__file__).resolve().parent / "sample"
_SAMPLE_LICENSE = "Apache-2.0 (written for this project)"
_FORM = "NAME=WHERE; ... where WHERE is hub, sample, or FILE[,TESTFILE], as in mine=rows.jsonl"


class HubSource(NamedTuple):
    """A hub dataset at one revision. splits: {stream: its split}."""

    id: str
    revision: str
    license: str
    splits: dict


_TRAIN = {"main": "train"}
_SFT = {"main": "train_sft", "test": "test_sft"}
HUB = {
    "alpaca": HubSource("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "CC BY-NC 4.0", _TRAIN),
    "tulu": HubSource("allenai/tulu-v2-sft-mixture", "6248b175d2ccb5ec7c4aeb22e6d8ee3b21b2c752", "ODC-BY 1.0", _TRAIN),
    "ultrachat": HubSource("HuggingFaceH4/ultrachat_200k", "8049631c405ae6576f93f445c6b8166f76f5505a", "MIT", _SFT),
}


@dataclass(frozen=True)
class Source:
    """One named source. where: 'hub', 'sample' or 'file'.

    streams: {'main', and 'test' if the test rows are separate: file or hub split}.
    most: read only this many rows of a stream; 0: all.
    """

    name: str
    where: str
    streams: dict
    most: int = 0

    def check(self):
        """DataError: one of its files is missing, empty, a folder, or of an unknown type."""
        for path in self.streams.values() if self.where != "hub" else ():
            kind_of(path)

    def rows(self, stream):
        """Yield (row number, row or Broken) of a stream. DataError: it cannot be read."""
        found = self._hub_rows(stream) if self.where == "hub" else read_rows(self.streams[stream], FIELDS_READ)
        return islice(found, self.most or None)

    def label(self, stream, *, is_public=False):
        """Describe the stream. is_public: omit the folder of a user's own file."""
        place, part = self.streams[stream], f", its first {self.most:,} rows" if self.most else ""
        if self.where == "hub":
            return f"{HUB[self.name].id} {place} at {HUB[self.name].revision[:12]}{part}"
        if self.where == "sample":
            return f"the bundled sample {place.name}{part}"
        return os.fsencode(place.name if is_public else place).decode(errors="backslashreplace") + part

    def identity(self):
        """What determines its rows: the hub revision, or each file's SHA-256. DiskError: a file cannot be read."""
        if self.where == "hub":
            return {"hub": HUB[self.name].id, "revision": HUB[self.name].revision}
        return {"sha256": {stream: sha256(path) for stream, path in self.streams.items()}}

    def provenance(self):
        """What the manifest and the card say about it, as JSON values."""
        known = {
            "hub": self.where == "hub" and HUB[self.name].license,
            "sample": "Apache-2.0 (written for this project)",
        }
        return {
            "where": {stream: self.label(stream, is_public=True) for stream in self.streams},
            "license": known.get(self.where, "as its owner says: not known to peftlib"),
            "test_rows_from": "separate rows" if "test" in self.streams else "the same rows, by hash",
        }

    def _hub_rows(self, stream):
        """Stream the rows without writing to disk. DataError: the hub cannot be reached, or reading was interrupted."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        # The hub client's own error, and the base error of its HTTP library, which depends on the client's version.
        http_errors = [base for base in HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException")]
        source, number = HUB[self.name], 0
        try:
            rows = load_dataset(source.id, revision=source.revision, split=self.streams[stream], streaming=True)
            for number, row in enumerate(rows, start=1):
                yield number, row if isinstance(row, dict) else Broken("not_an_object", ascii(row)[:200])
        except (OSError, DatasetsError, HfHubHTTPError, *http_errors) as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
            raise DataError(
                f"{self.label(stream)} could not be read from the hub after row {number} ({reason}): "
                f"check the network and run again, or use your own file: sources = '{self.name}=FILE; ...'"
            ) from error


def parse_sources(text, *, most=0):
    """[Source, ...] of a config's `sources`, in order of precedence: alpaca, tulu, ultrachat, then as given.

    most: as in Source.

    ConfigError: not of the form NAME=WHERE; ..., a repeated name, or hub/sample with a name they do not have.
    """
    found = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, equals, where = map(str.strip, part.partition("="))
        if not equals or not where or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            raise ConfigError(f"sources: {part!r} is not of the form {_FORM}")
        if name in found:
            raise ConfigError(f"sources: {name!r} is given twice")
        found[name] = replace(_source(name, where), most=most)
    if not found:
        raise ConfigError(f"sources={text!r} names no source: use {_FORM}")
    first = [found[name] for name in HUB if name in found]
    return [*first, *(source for name, source in found.items() if name not in HUB)]


def _source(name, where):
    if where in ("hub", "sample"):
        if name not in HUB:
            raise ConfigError(f"sources: {name}={where}, but {where} has only {', '.join(HUB)}: use a file")
        return Source(name, where, HUB[name].splits if where == "hub" else {"main": SAMPLE / f"{name}.jsonl"})
    files = [piece.strip() for piece in where.split(",")]
    if len(files) > 2 or not all(files):
        raise ConfigError(f"sources: {name}={where!r} is not FILE or FILE,TESTFILE (paths must not contain commas)")
    try:
        paths = [Path(file).expanduser() for file in files]
    except RuntimeError as error:  # ~name of an unknown user
        raise ConfigError(f"sources: {name}={where!r}: {error}: use the full path") from None
    return Source(name, "file", dict(zip(("main", "test"), paths)))
