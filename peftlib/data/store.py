"""The files of a study's data folder: Parquet splits, rejects, and the manifest that is written last."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftlib.core.errors import StudyError, reading
from peftlib.core.files import atomic_path, read_json, write_text
from peftlib.data.tokenize import as_messages

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
_MADE_AGAIN = "delete it and run 01_data again, which makes the same rows"


class Rows(Sequence):
    """A split's rows, each a dict made when it is asked for.

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
        """One column as a list, without making whole rows."""
        return self._columns[name].to_pylist()


def load_split(folder, split):
    """The Rows of a split ('train', 'valid' or 'test'). StudyError: it is not there, or not as the manifest has it."""
    import io

    from pyarrow import parquet

    path = Path(folder) / f"{split}.parquet"
    if not path.exists():
        name = path.absolute().parent.parent.name if path.parent.name == "data" else "NAME"
        raise StudyError(f"no {path.name} in {folder}: run 01_data first (python -m peftlib run 01 --study {name})")
    with reading(path, _MADE_AGAIN):
        content = path.read_bytes()
        _require_listed(path, content)
        return Rows(parquet.read_table(io.BytesIO(content)))


def _require_listed(path, content):
    """StudyError where the manifest beside a file has another SHA-256 of it."""
    manifest = path.with_name(MANIFEST)
    known = read_json(manifest).get("files", {}).get(path.name) if manifest.exists() else None
    if known is not None and known != hashlib.sha256(content).hexdigest():
        raise StudyError(f"{path} is damaged (it is not what {MANIFEST} lists): {_MADE_AGAIN}")


def write_split(folder, split, rows):
    """Write the split.Row list of a split as Parquet, whole or not at all."""
    from pyarrow import parquet

    with atomic_path(Path(folder) / f"{split}.parquet") as beside:
        parquet.write_table(_table(split, rows), beside, compression="zstd")


def _table(split, rows):
    import pyarrow as pa

    from peftlib.data.dedup import prompt_sha256

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = {
        "source": pa.array([row.source for row in rows], pa.string()),
        "id": pa.array([row.id for row in rows], pa.string()),
        "messages": pa.array([as_messages(row.texts) for row in rows], messages),
        "prompt_sha256": pa.array([prompt_sha256(row.texts[:-1]) for row in rows], pa.string()),
        "n_tokens": pa.array([row.ids.size for row in rows], pa.int32()),
        "input_ids": _lists([row.ids for row in rows], np.int32),
        "is_scored": _lists([scored_in(split, row) for row in rows], np.bool_),
        "origin": pa.array([row.origin for row in rows], pa.string()),
    }
    return pa.table(columns)


def _lists(arrays, dtype):
    import pyarrow as pa

    offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, dtype), *arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def scored_in(split, row):
    """(T,) bool: every answer to be learned in train and valid, the last one alone in test."""
    if split != "test":
        return row.is_scored
    starts = np.flatnonzero(row.is_scored & ~np.concatenate([[False], row.is_scored[:-1]]))
    return row.is_scored & (np.arange(row.is_scored.size) >= starts[-1])


def split_hash(chosen):
    """16 hex digits over which conversations stand where and in which order; the same on any machine."""
    digest = hashlib.sha256()
    for split in sorted(chosen):
        for row in chosen[split]:
            digest.update(f"{split}\t{row.source}\t{row.content_sha256}\n".encode())
    return digest.hexdigest()[:16]


def write_rejects(folder, examples):
    """Write the rejected rows that were kept to look at, one JSON object a line."""
    write_text(Path(folder) / REJECTS, "".join(json.dumps(example, ensure_ascii=True) + "\n" for example in examples))


def file_hashes(folder):
    """{name: SHA-256} of the files beside the manifest."""
    names = ("train.parquet", "valid.parquet", "test.parquet", REJECTS)
    return {name: hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest() for name in names}


def standing_manifest(folder, inputs):
    """The manifest in `folder` where it was made from just these inputs and its files are as written, else None."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        is_ours = manifest["inputs"] == inputs and manifest["files"] == file_hashes(folder)
    except (StudyError, KeyError, OSError):
        return None  # of another version, or damaged: made again
    return manifest if is_ours else None
