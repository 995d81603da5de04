"""Checkpoints that are whole or ignored: written beside, listed with sizes and SHA-256 last, renamed."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peftlib.errors import CheckpointError, StudyError
from peftlib.files import read_json, write_json

_WEIGHTS, _OPTIMIZER, _STATE, _MANIFEST = "weights.safetensors", "optimizer.pt", "state.json", "manifest.json"
_FILES = (_WEIGHTS, _OPTIMIZER, _STATE)


@dataclass
class Checkpoint:
    """weights: {name: tensor} of what trains. optimizer: its state dict. state: JSON values of the loop."""

    weights: dict
    optimizer: dict
    state: dict


class CheckpointDir:
    """The checkpoints of one run below `folder`, the newest `keep` of them."""

    def __init__(self, folder, *, keep):
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step, checkpoint):
        """Write step's checkpoint; older ones go once it stands. CheckpointError: the disk is full (older ones stay)."""
        beside = self.folder / f".writing-{step:06d}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            save_file(
                {name: t.detach().contiguous().cpu() for name, t in checkpoint.weights.items()}, beside / _WEIGHTS
            )
            torch.save(checkpoint.optimizer, beside / _OPTIMIZER)
            write_json(beside / _STATE, checkpoint.state)
            listed = {
                name: {"bytes": (beside / name).stat().st_size, "sha256": sha256(beside / name)} for name in _FILES
            }
            write_json(beside / _MANIFEST, {"files": listed})
            shutil.rmtree(self._path(step), ignore_errors=True)
            os.replace(beside, self._path(step))
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}): "
                "free some space and run again; training resumes from the one before"
            ) from error
        for old in self._all()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self):
        """(Checkpoint, ['folder: why it was skipped', ...]) of the newest one that verifies, or (None, [...])."""
        skipped = []
        for path in self._all():
            fault = _fault(path)
            if fault is None:
                optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
                return Checkpoint(load_file(path / _WEIGHTS), optimizer, read_json(path / _STATE)), skipped
            skipped.append(f"{path.name}: {fault}")
        return None, skipped

    def remove(self):
        """Delete the folder with all its checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def require_space(self, checkpoint_bytes):
        """CheckpointError, with the numbers, unless keep + 1 checkpoints of this size fit on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free + sum(_size(path) for path in self._all())
        needed = (self.keep + 1) * checkpoint_bytes
        if free < needed:
            raise CheckpointError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, keep_checkpoints={self.keep} needs "
                f"{needed / 2**30:.2f} GiB: free some space, lower keep_checkpoints, or set PEFTLIB_ROOT to another disk"
            )

    def _path(self, step):
        return self.folder / f"step-{step:06d}"

    def _all(self):
        return sorted(self.folder.glob("step-*"), reverse=True)


def _fault(path):
    """Why a checkpoint cannot be used, or None."""
    try:
        listed = read_json(path / _MANIFEST)["files"]
    except (OSError, StudyError, KeyError) as error:
        return f"no readable manifest ({type(error).__name__})"
    for name in _FILES:
        if name not in listed or not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != listed[name]["bytes"]:
            return f"{name} has {(path / name).stat().st_size} bytes, not {listed[name]['bytes']}"
        if sha256(path / name) != listed[name]["sha256"]:
            return f"{name} is damaged (SHA-256 differs)"
    return None


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _size(path):
    return sum(part.stat().st_size for part in path.iterdir())
