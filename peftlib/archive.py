"""A study folder as a few archives: what belongs together, whether it has changed, packed and unpacked."""

import contextlib
import json
import os
import shutil
import tarfile
from pathlib import Path

from peftlib.files import MANIFEST, remove_tree, rename

# Folders that are archives of their own (a sweep's are its own affair), and the compiler's cache of earlier versions,
# which is neither copied nor brought: loading one runs it.
_OWN = ("data", "compile", "weights", "checkpoints")
NOT_BROUGHT = ("compile",)
# Endings: what only the moment means something for, and the explorer's large CSV, which a click makes again.
_NOT_KEPT = ("lock.json", ".running.ipynb", ".download.csv")
_BUFFER = 4 << 20  # bytes written to a remote at once
BUILDING = ".mirroring"  # folder of hard links to what is being copied


def units_of(folder):
    """{unit: [path, ...]} of what a study folder holds, in the order to copy it.

    'data'; 'weights-RUN'; 'checkpoint-RUN', its newest; and 'study', all small files,
    last, for its records say that the others are there.
    """
    folder, units = Path(folder), {}
    if (folder / "data" / "manifest.json").exists():
        units["data"] = _files_below(folder / "data")
    for run in _folders(folder / "weights"):
        units[f"weights-{run.name}"] = _files_below(run)
    for run in _folders(folder / "checkpoints"):
        whole = sorted(step for step in run.glob("step-*") if (step / MANIFEST).exists())
        if whole:
            units[f"checkpoint-{run.name}"] = _files_below(whole[-1])
    small = [path for path in _files_below(folder) if not set(_OWN) & set(path.relative_to(folder).parts[:-1])]
    units["study"] = small
    return {unit: files for unit, files in units.items() if files}


def fingerprint(folder, files):
    """What tells whether files have changed: [[path below folder, bytes, mtime in ns], ...]."""
    rows = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            rows.append([path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns])
    return rows


@contextlib.contextmanager
def pinned(folder, files):
    """Within it the files last: [(hard link below folder/BUILDING, name below folder), ...].

    FileNotFoundError: one of them is gone already.
    """
    building = Path(folder) / BUILDING
    remove_tree(building)
    pairs = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        link = building / name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            shutil.copy2(path, link)
        pairs.append((link, name))
    try:
        yield pairs
    finally:
        remove_tree(building)


def pack(pairs, out):
    """Write (path, name) pairs as an uncompressed tar to a file-like `out`, in order."""
    with tarfile.open(fileobj=out, mode="w|", bufsize=_BUFFER, copybufsize=1 << 20) as tar:
        for path, name in pairs:
            tar.add(path, arcname=name, recursive=False)


def unpack(archive, folder):
    """Put the files of a tar into their places below `folder`, each at once; returns their names.

    A checkpoint's folder comes as a whole, and is only then listed as one.
    """
    folder = Path(folder)
    beside = folder / ".restoring"
    remove_tree(beside)
    beside.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(beside, filter="data")
    names = [path.relative_to(beside).as_posix() for path in _files_below(beside)]
    for name in sorted(names, key=lambda name: Path(name).name == MANIFEST):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rename(beside / name, folder / name)
    remove_tree(beside)
    return names


def is_finished(folder, run):
    """Whether the run 'METHOD-sSEED' of a study folder has a record that says so."""
    path = Path(folder) / "records" / f"{run}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("status") == "ok"
    except (OSError, ValueError, AttributeError):
        return False


def _folders(folder):
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def _files_below(folder):
    """Files below a folder, hidden ones and links to folders left out."""
    found = []
    for path in sorted(Path(folder).glob("[!.]*")):
        if path.is_dir():
            found += _files_below(path)
        elif not path.name.endswith(_NOT_KEPT):
            found.append(path)
    return found
