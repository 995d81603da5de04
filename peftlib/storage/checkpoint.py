"""Atomic checkpoints: written to a temporary folder, read back, sealed with sizes and SHA-256, then renamed."""

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftlib import __version__
from peftlib.core.errors import CheckpointError, SchemaError, StudyError
from peftlib.core.files import (
    MANIFEST,
    fault_of,
    gib,
    json_text,
    read_json,
    remove_tree,
    rename,
    sealed,
    sync_file,
    sync_folder,
    write_stream,
)

TENSORS, STATE = "tensors.pt", "state.json"
_PARTS = ("weights", "optimizer", "generators")  # of a Checkpoint, in tensors.pt
_BESIDE = ".writing-"


@dataclass
class Checkpoint:
    """What a run needs to resume.

    weights: {name: tensor} of trained weights. optimizer: its state dict. state: the loop's JSON values. generators:
    see env.generator_states.
    """

    weights: dict
    optimizer: dict
    state: dict
    generators: dict = field(default_factory=dict)


class CheckpointDir:
    """The newest `keep` checkpoints of one run, in `folder`.

    A checkpoint is a folder step-NNNNNN with tensors.pt (plain tensors, for torch.load(weights_only=True)), state.json
    and, written last, manifest.json. log: receives messages about recovered errors.
    """

    def __init__(self, folder, *, keep, log=print):
        self.folder = Path(folder)
        self.keep = keep
        self.log = log
        self._verified = set()  # paths that this object has read back or resumed from

    def save(self, step, checkpoint):
        """Write step's checkpoint; delete older ones once it is written and verified.

        CheckpointError: it could not be written, or verification failed (older ones are kept).
        """
        self.begin(step, checkpoint)
        self.finish(step)

    def begin(self, step, checkpoint):
        """The first part of `save`, which needs the tensors: write without waiting for the disk. Same errors."""
        with self._errors_of(step) as beside:
            remove_tree(beside)
            beside.mkdir(parents=True)
            tensors = {name: getattr(checkpoint, name) for name in _PARTS}
            state = json_text(checkpoint.state).encode("utf-8")
            torch.serialization.set_crc32_options(False)  # SHA-256 is stronger, and CRC-32 takes as long
            listed = {
                TENSORS: write_stream(beside / TENSORS, lambda out: torch.save(tensors, out), is_lasting=False),
                STATE: write_stream(beside / STATE, lambda out: out.write(state), is_lasting=False),
            }
            manifest = sealed({"written_by": f"peftlib {__version__}", "files": listed})
            write_stream(beside / MANIFEST, lambda out: out.write(manifest), is_lasting=False)

    def finish(self, step):
        """The second part of `save`, which waits for the disk: flush, read back, rename. Errors as in `save`."""
        path = self._path(step)
        with self._errors_of(step) as beside:
            for name in (TENSORS, STATE, MANIFEST):
                sync_file(beside / name)
            sync_folder(beside)
            fault = _fault(beside)
            if fault is not None:
                raise OSError(fault)
            remove_tree(path)
            rename(beside, path)
        self._verified.add(path)
        self._prune()

    @contextlib.contextmanager
    def _errors_of(self, step):
        beside = self.folder / f"{_BESIDE}{self._path(step).name}"
        try:
            yield beside
        except OSError as error:
            self._remove(beside)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}): "
                f"free some space or set PEFTLIB_ROOT to another disk; {self._what_stands()}"
            ) from error

    def _prune(self):
        """Delete all but the newest `keep` valid ones; failed deletions are retried after the next save."""
        good = []
        for path in self._all():
            with contextlib.suppress(SchemaError):
                if len(good) < self.keep and (path in self._verified or _fault(path) is None):
                    good.append(path)
                    continue
            self._remove(path)

    def _remove(self, path):
        try:
            remove_tree(path)
        except OSError as error:
            self.log(f"{path.name} could not be deleted ({error.strerror or error}); this only takes disk space")

    def newest(self):
        """(Checkpoint, ['folder: why it was skipped', ...]) of the newest valid one, or (None, [...]).

        CheckpointError: the newest has another schema version, or is undamaged but is not a checkpoint. That is not
        damage, so there is no fallback to an older one.
        """
        for left in self.folder.glob(f"{_BESIDE}*"):
            self._remove(left)
        skipped = []
        for path in self._all():
            try:
                fault = _fault(path)
            except SchemaError as error:
                raise CheckpointError(str(error)) from None
            if fault is None:
                self._verified.add(path)
                return _content(path), skipped
            skipped.append(f"{path.name}: {fault}")
        return None, skipped

    def last_step(self):
        """Step of the newest checkpoint by its name, not verified; 0: there is none."""
        numbers = [path.name.removeprefix("step-") for path in self._all()]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def remove(self):
        """Delete the folder with all its checkpoints."""
        if self.folder.exists():
            self._remove(self.folder)
        self._verified.clear()

    def require_space(self, checkpoint_bytes):
        """CheckpointError, with numbers, unless keep + 1 checkpoints of this size fit on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        free += sum(part.stat().st_size for path in self._all() for part in path.iterdir())
        needed = (self.keep + 1) * checkpoint_bytes
        if free < needed:
            raise CheckpointError(
                f"{self.folder} has {gib(free):.2f} GiB free, save_total_limit={self.keep} needs "
                f"{gib(needed):.2f} GiB: free some space, lower save_total_limit, or set PEFTLIB_ROOT to another disk"
            )

    def _what_stands(self):
        good = [path.name for path in self._all() if path in self._verified]
        return f"{good[0]} is kept" if good else "no checkpoint has been saved yet"

    def _path(self, step):
        return self.folder / f"step-{step:06d}"

    def _all(self):
        return sorted(self.folder.glob("step-*"), reverse=True)


def _fault(path):
    """Why a checkpoint is damaged, as text, or None. SchemaError: it is undamaged but has another schema version."""
    try:
        manifest = read_json(path / MANIFEST, is_sealed=True)
        return next(filter(None, (fault_of(path / name, manifest["files"][name]) for name in (TENSORS, STATE))), None)
    except SchemaError:
        raise
    except (OSError, StudyError, KeyError, TypeError) as error:
        return f"no readable manifest ({type(error).__name__})"


def _content(path):
    """The Checkpoint of a valid folder. CheckpointError: its files contain something else."""
    try:
        tensors = torch.load(path / TENSORS, map_location="cpu", weights_only=True)
        found = Checkpoint(**tensors, state=read_json(path / STATE))
        if not all(isinstance(part, torch.Tensor) for part in [*found.weights.values(), *found.generators.values()]):
            raise TypeError("a weight or a generator's state is not a tensor")
        return found
    except (OSError, MemoryError) as error:
        raise CheckpointError(
            f"{path} could not be read ({type(error).__name__}: {error}): check the disk and the free memory, "
            "then run again"
        ) from error
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no reason given'}"
        raise CheckpointError(
            f"{path} is undamaged, but cannot be loaded as a checkpoint ({said:.200}): delete that folder to resume "
            "from an older one or to start over, or restore a copy of it"
        ) from error
