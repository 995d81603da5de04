"""The files of a study's data folder: Parquet splits, rejects, and the manifest, which is written last."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from peftlib.core.errors import StudyError, reading
from peftlib.core.files import MANIFEST, atomic_path, read_json, sha256, write_json, write_text
from peftlib.data.card import write_card
from peftlib.data.dedup import prompt_sha256
from peftlib.data.tokenize import as_messages

REJECTS = "rejects.jsonl"
_MADE_AGAIN = "delete it and run 01_data again, which builds the same rows"
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Split(Sequence):
    """The rows of a split, each a dict built on access.

    source, id: str. messages: [{role, content}, ...]. prompt_sha256: str, of the normalised history of the scored
    reply. n_tokens: int. input_ids: list of int. is_scored: list of bool. origin: the row's id in its source, or ''.
    """

    def __init__(self, table):
        self._columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        self._length = table.num_rows

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(self._length))]
        if not -self._length <= i < self._length:
            raise IndexError(f"row {i} of {self._length}")
        return {name: column[i % self._length].as_py() for name, column in self._columns.items()}

    def column(self, name):
        """One column as a list, without building rows."""
        return self._columns[name].to_pylist()


def load_split(folder: str | Path, split: str) -> Split:
    """Load split 'train', 'valid' or 'test' of a data folder. StudyError: missing, or not what the manifest lists."""
    path = Path(folder) / f"{split}.parquet"
    if not path.exists():
        name = path.absolute().parent.parent.name if path.parent.name == "data" else "NAME"
        raise StudyError(f"no {path.name} in {folder}: run 01_data first (python -m peftlib run 01 --study {name})")
    with reading(path, _MADE_AGAIN):
        # In memory that Arrow owns: if one of its threads releases a Python buffer while Python exits, that aborts.
        content, manifest = pa.OSFile(str(path)).read_buffer(), path.with_name(MANIFEST)
        listed = read_json(manifest).get("files", {}).get(path.name) if manifest.exists() else None
        if listed not in (None, hashlib.sha256(content).hexdigest()):
            raise StudyError(f"{path} is damaged (it is not what {MANIFEST} lists): {_MADE_AGAIN}")
        return Split(parquet.read_table(pa.BufferReader(content)))


def write_data(folder, splits, examples, manifest):
    """Write a complete data folder: splits, rejects, card and, last, the manifest; returns the manifest as written.

    splits: {split: [split.Row, ...]}. examples: dicts of rejected rows. OSError: the folder cannot be written.
    """
    folder = Path(folder)
    (folder / MANIFEST).unlink(missing_ok=True)  # it must never exist next to files that it does not describe
    for split, rows in splits.items():
        with atomic_path(folder / f"{split}.parquet") as beside:
            parquet.write_table(_table(split, rows), beside, compression="zstd")
    write_text(folder / REJECTS, "".join(json.dumps(example, ensure_ascii=True) + "\n" for example in examples))
    write_card(folder, manifest)
    write_json(folder / MANIFEST, {**manifest, "files": _file_hashes(folder)})
    return read_json(folder / MANIFEST)


def _table(split, rows):
    columns = {
        "source": pa.array([row.source for row in rows], pa.string()),
        "id": pa.array([row.id for row in rows], pa.string()),
        "messages": pa.array([as_messages(row.texts) for row in rows], _MESSAGES),
        "prompt_sha256": pa.array([prompt_sha256(row.texts[:-1]) for row in rows], pa.string()),
        "n_tokens": pa.array([row.ids.size for row in rows], pa.int32()),
        "input_ids": pa.array([row.ids for row in rows], pa.list_(pa.int32())),
        "is_scored": pa.array([_scored_in(split, row) for row in rows], pa.list_(pa.bool_())),
        "origin": pa.array([row.origin for row in rows], pa.string()),
    }
    return pa.table(columns)


def _scored_in(split, row):
    """(T,) bool: True on every answer to train on in train and valid, only on the last one in test."""
    if split != "test":
        return row.is_scored
    starts = np.flatnonzero(row.is_scored & ~np.concatenate([[False], row.is_scored[:-1]]))
    return row.is_scored & (np.arange(row.is_scored.size) >= starts[-1])


def split_hash(splits):
    """16 hex digits over the conversations of each split and their order; the same on any machine."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        for row in splits[split]:
            digest.update(f"{split}\t{row.source}\t{row.content_sha256}\n".encode())
    return digest.hexdigest()[:16]


def _file_hashes(folder):
    names = ("train.parquet", "valid.parquet", "test.parquet", REJECTS)
    return {name: sha256(folder / name) for name in names}


def standing_manifest(folder, inputs):
    """The manifest in `folder` if it was made from exactly these inputs and its files are unchanged, else None."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        is_ours = manifest["inputs"] == inputs and manifest["files"] == _file_hashes(path.parent)
    except (StudyError, KeyError, OSError):
        return None  # from another version, or damaged: rebuild
    return manifest if is_ours else None
