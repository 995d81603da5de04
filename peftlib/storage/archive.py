"""A study folder as a few tar archives: which files belong together, change detection, packing, unpacking."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

from peftlib.core.errors import writing
from peftlib.core.files import MANIFEST, remove_tree, rename, sha256

# Folders with their own archives, here and in a sweep's trial; the compiler's cache is never copied or restored:
# loading it executes it.
_OWN = {"data", "compile", "weights", "checkpoints", "claims"}
# Folders whose files and folders are named after runs, as qlora-s0.
_OF_RUNS = ("records", "predictions", "rewind", "logs")
NOT_RESTORED = ("compile",)
# Suffixes excluded from the copies: lock files, in-progress notebooks, on-demand CSV exports.
_NOT_KEPT = ("lock.json", ".running.ipynb", ".download.csv")
_BUFFER = 4 << 20  # bytes per write to a remote
BUILDING = ".mirroring"  # folder of hard links to the files being copied


def units_of(folder):
    """{unit: [path, ...]} of a study folder, in the order to copy.

    Units: 'data'; 'weights-RUN'; 'checkpoint-RUN', its newest; 'study', the small shared files; 'sweep-METHOD';
    and last 'run-RUN', a run's record, answers and log, because a record implies that the others exist.
    """
    folder, units = Path(folder), {}
    if (folder / "data" / "manifest.json").exists():
        units["data"] = _files_below(folder / "data")
    for run in filter(Path.is_dir, _entries(folder / "weights")):
        units[f"weights-{run.name}"] = _files_below(run)
    for run in filter(Path.is_dir, _entries(folder / "checkpoints")):
        whole = [step for step in _entries(run) if step.match("step-*") and (step / MANIFEST).exists()]
        files = _files_below(whole[-1]) if whole else []
        if whole and (whole[-1] / MANIFEST).exists():  # training has not deleted it in the meantime
            units[f"checkpoint-{run.name}"] = files
    small = _files_below(folder, but=_OWN)
    for path in sorted(small, key=lambda path: _unit_of(path.relative_to(folder)) != "study"):
        units.setdefault(_unit_of(path.relative_to(folder)), []).append(path)
    return {unit: files for unit, files in units.items() if files}


def _unit_of(path):
    """The unit of a small file, by its path below the study: one worker writes it."""
    top, *rest = path.parts
    name = rest[0] if len(rest) > 1 else path.stem
    if top in _OF_RUNS and re.fullmatch(r".+-s\d+", name):
        return f"run-{name}"
    if top == "logs" and name.startswith("sweep-"):
        return name
    if top == "sweeps" and rest:  # METHOD.json, METHOD-FACTOR/
        return f"sweep-{name.rpartition('-')[0] if len(rest) > 1 else name}"
    return "study"


def is_small(unit):
    """Whether a unit has small files, which change often."""
    return unit == "study" or unit.startswith(("run-", "sweep-"))


def run_of(unit):
    """The run whose checkpoint or weights a unit holds; None for a unit that every worker needs."""
    kind, _, run = unit.partition("-")
    return run if kind in ("checkpoint", "weights") else None


def is_wanted(unit, runs):
    """Whether a worker on these runs (None: all) restores a unit."""
    return unit not in NOT_RESTORED and (runs is None or run_of(unit) in (None, *runs))


def superseded(listing, folder):
    """Names of a listing's checkpoints whose runs are finished and whose weights are listed too."""
    units = {facts["unit"] for facts in listing.values()}
    found = {name: facts["unit"].partition("-")[2] for name, facts in listing.items() if "checkpoint-" in facts["unit"]}
    return [name for name, run in found.items() if f"weights-{run}" in units and is_finished(folder, run)]


def in_order(units):
    """Units in the order to restore: records come last, so that they never claim more than exists here."""
    return sorted(units, key=lambda unit: (is_small(unit), unit != "study", unit))


def content(folder, files):
    """SHA-256 over names and contents of files: equal if two sessions made the same files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _entries(folder):
    """What a folder contains, sorted, without hidden entries; nothing if training has deleted it meanwhile."""
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files_below(folder, but=()):
    """Files below a folder, except hidden ones and those in folders named `but`, at any depth."""
    found = []
    for path in _entries(folder):
        if path.is_dir():
            found += [] if path.name in but else _files_below(path, but)
        elif not path.name.endswith(_NOT_KEPT):
            found.append(path)
    return found


def newest_first(unit, listing):
    """[(name, facts), ...] of a unit's archives in a remote's listing."""
    found = [(name, facts) for name, facts in listing.items() if facts["unit"] == unit]
    return sorted(found, key=lambda pair: -pair[1]["serial"])


def slot_of(unit, known):
    """The archive to write: a free slot of the unit, else its oldest. known: as returned by newest_first."""
    # Data can be rebuilt, and the checkpoint is kept until the weights are copied.
    slots = 1 if unit == "data" or unit.startswith("weights-") else 2
    names = [f"{unit}.{slot}" for slot in range(slots)]
    taken = [name for name, _ in known if name in names]
    free = [name for name in names if name not in taken]
    return free[0] if free else taken[-1]


def fingerprint(folder, files):
    """[[path below folder, bytes, mtime in ns], ...], to detect changed files."""
    rows = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            rows.append([path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns])
    return rows


@contextlib.contextmanager
def pinned(folder, files):
    """Keep files available while they are copied, by hard links in folder/BUILDING.

    Yields [(link, name below folder), ...]. FileNotFoundError: one of them is already deleted.
    """
    building = Path(folder) / BUILDING
    remove_tree(building)
    pairs = [(building / path.relative_to(folder), path.relative_to(folder).as_posix()) for path in files]
    for path, (link, _) in zip(files, pairs, strict=True):
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copy2(path, link)
    try:
        yield pairs
    finally:
        remove_tree(building)


def pack(pairs, out):
    """Write (path, name) pairs as an uncompressed tar to a file-like `out`, in order; links are followed."""
    with tarfile.open(fileobj=out, mode="w|", bufsize=_BUFFER, copybufsize=1 << 20, dereference=True) as tar:
        for path, name in pairs:
            tar.add(path, arcname=name, recursive=False)


def unpack(archive, folder, *, only_missing=False):
    """Extract a tar below `folder`, each file atomically; returns the files' names.

    only_missing: skip existing files.

    A checkpoint's folder is extracted as a whole, so that it is never seen incomplete.
    OSError: not an archive of a study (damaged, or with links, devices or paths outside); nothing of it was used.
    """
    folder = Path(folder)
    beside = folder / ".restoring"
    remove_tree(beside)
    try:
        with writing(beside):
            beside.mkdir(parents=True)
            _extract(archive, beside)
        names = [path.relative_to(beside).as_posix() for path in _files_below(beside)]
        names = [name for name in names if not (only_missing and (folder / name).exists())]
        for name in sorted(names, key=lambda name: Path(name).name == MANIFEST):
            with writing(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            rename(beside / name, folder / name)
    finally:
        remove_tree(beside)
    return names


def _extract(archive, folder):
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()) or member.name.startswith(("/", "\\")):
                    raise tarfile.ExtractError(f"{member.name!r} is not a file or folder of a study")
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise OSError(errno.EBADMSG, f"not an archive of a study: {error}") from error


def is_finished(folder, run):
    """Whether the record of the run 'METHOD-sSEED' of a study folder says that it finished."""
    path = Path(folder) / "records" / f"{run}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("status") == "ok"
    except (OSError, ValueError, AttributeError):
        return False
