"""SHA-256 digests that identify weights, of files and of base models, cached while the files do not change.

Names, shapes and versions do not identify a model; only the bytes of its tensors do.
"""

import contextlib
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

from peftlib.core import record as records
from peftlib.core.errors import ModelError
from peftlib.core.files import sha256, write_text
from peftlib.models.locate import hub_errors, locate, weight_paths
from peftlib.models.packaged import cache_root

# File system clocks are coarse: a file that was just written may change again without a newer timestamp.
_SETTLED_NS = 2_000_000_000
_WORTH_KEEPING_BYTES = 64 << 20  # smaller models are hashed faster than a cached digest is found
_BLOCK = 1 << 20
_KNOWN: dict[Any, str] = {}  # file stamps -> digest, in this process
_LOGGED: set[str] = set()  # messages about unchecked files already logged by this process


def known_sha256(path):
    """SHA-256 of a file; computed once per process while the file's size, times and inode stay the same."""
    return _remembered("file", [Path(path)], lambda: sha256(path))


def forget():
    """Clear the cache: recompute every digest, as a new process would."""
    _KNOWN.clear()
    _LOGGED.clear()


def base_facts(model, *, is_local=False):
    """{'model_sha256', 'model_revision'} of a config's `model`.

    model_sha256: over the name, dtype, shape and bytes of every tensor, independent of the sharding into files.
    model_revision: the commit of the hub repository, None for folders. is_local: as in weight_paths.
    ModelError: its weights cannot be loaded or are damaged.
    """
    from transformers.utils.hub import extract_commit_hash

    with hub_errors(model):
        paths = [Path(path) for path in weight_paths(model, is_local=is_local)]
    digest = _remembered("tensors", paths, lambda: _hash_tensors(paths), is_noted=True)
    revision = None if Path(locate(model)[0]).is_dir() else extract_commit_hash(str(paths[0]), None)
    return {"model_sha256": digest, "model_revision": revision}


def new_record(study, method, **how):
    """core.record.new_record with the provenance of the study's model. how: device, precision, precision_reason.

    ModelError: another run of the study used a different base model with this name, or see base_facts.
    """
    model = study.cfg.model
    for other in study.records():
        if other.get("model_sha256") and other.get("model") == model:
            what = f"{other['method']} (seed {other['seed']}) in study {study.folder.name}"
            require_base(other, model, what=what)
    provenance = {"model_provenance": locate(model)[1], **base_facts(model)}
    return records.new_record(study, method, provenance=provenance, **how)


def require_base(kept, model, *, what, log=print, error=ModelError, is_local=False):
    """Raise `error` if a config's `model` is not the one with the base_facts in `kept`.

    kept: a record, the facts of a trained folder or a checkpoint's state; without digests (first edition) nothing is
    checked, which is logged once. what: its name in messages. is_local: compare only with what is on this machine, for
    work that does not read the model.
    """
    if not kept.get("model_sha256"):
        _log_once(f"{what} has no digest of its base model, so the model is not checked", log)
        return
    try:
        here = base_facts(model, is_local=is_local)
    except ModelError:
        if is_local:
            return
        raise
    if here["model_sha256"] != kept["model_sha256"]:
        raise error(
            f"model={model!r} is not the base model of {what}: {_shown(here)} here, {_shown(kept)} there. "
            "Restore those weights, or choose another study name to start over with these"
        )


def require_weights(folder, record, *, log=print):
    """ModelError if the weights or settings in a trained folder are not those that the run's record lists.

    record: of the run that made them; with None nothing is checked, which is logged once.
    """
    listed = (record or {}).get("weights_sha256")
    if not listed:
        _log_once(f"{folder} has no record with digests, so its weights are not checked", log)
        return
    listed = {**listed, **(record.get("settings_sha256") or {})}
    foreign = sorted({path.name for path in folder.glob("*.safetensors")} - set(listed))
    faults = [f"{name} is not listed" for name in foreign]
    for name, digest in listed.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif known_sha256(folder / name) != digest:
            faults.append(f"{name} is damaged or was replaced (its SHA-256 differs)")
    if faults:
        raise ModelError(
            f"{folder} does not match the run's record: {'; '.join(faults)}. Run the method's notebook again, "
            "or restore the folder from a copy"
        )


def _shown(facts):
    revision = facts.get("model_revision")
    return f"SHA-256 {facts['model_sha256'][:16]}{f' (revision {revision[:12]})' if revision else ''}"


def _log_once(text, log):
    if text not in _LOGGED:
        _LOGGED.add(text)
        log(text)


def _hash_tensors(paths):
    rows = []
    for path in paths:
        try:
            rows += _rows_of(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not a complete safetensors file ({error}): replace it") from error
    return hashlib.sha256(json.dumps(sorted(rows)).encode("utf-8")).hexdigest()


def _rows_of(path):
    """[[name, dtype, shape, SHA-256 of the bytes], ...] of a safetensors file's tensors, read in the file's order."""
    with open(path, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        start, rows = opened.tell(), []
        tensors = [(name, facts) for name, facts in header.items() if name != "__metadata__"]
        for name, facts in sorted(tensors, key=lambda pair: pair[1]["data_offsets"]):
            begin, end = facts["data_offsets"]
            opened.seek(start + begin)
            rows.append([name, facts["dtype"], facts["shape"], _hash_bytes(opened, end - begin)])
    return rows


def _hash_bytes(opened, n_bytes):
    digest = hashlib.sha256()
    while n_bytes:
        block = opened.read(min(n_bytes, _BLOCK))
        if not block:
            raise ValueError("it is truncated")
        digest.update(block)
        n_bytes -= len(block)
    return digest.hexdigest()


def _remembered(kind, paths, compute, *, is_noted=False):
    """compute(), cached for these exact files, unless they changed very recently.

    is_noted: also cache the digest of large files in the user's cache, so that later sessions need not read
    gigabytes again.
    """
    stamps = [_stamp(path) for path in paths]
    key = (kind, *stamps)
    if key in _KNOWN:
        return _KNOWN[key]
    is_settled = all(time.time_ns() - max(times) > _SETTLED_NS for _, _, *times, _ in stamps)
    note = None
    if is_noted and is_settled and sum(size for _, size, *_ in stamps) >= _WORTH_KEEPING_BYTES:
        note = cache_root() / "digests" / hashlib.sha256(json.dumps(key).encode("utf-8")).hexdigest()
    digest = (note and _read_note(note)) or compute()
    if is_settled and stamps == [_stamp(path) for path in paths]:
        _KNOWN[key] = digest
        if note:
            with contextlib.suppress(OSError):  # the next session just computes it again
                write_text(note, digest)
    return digest


def _stamp(path):
    """Values that change with a file, including ctime, because mtime can be set at will."""
    status = Path(path).stat()
    return (str(Path(path).resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _read_note(path):
    """The digest in a cache note, or None if there is no note or no digest in it."""
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="ascii")
        return text if re.fullmatch("[0-9a-f]{64}", text) else None
