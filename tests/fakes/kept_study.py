"""Checkpoints and files of a study that tests copy."""

import torch

from peftlib.storage.checkpoint import Checkpoint, CheckpointDir


def checkpoint(value, numbers=5000):
    return Checkpoint({"w": torch.full((numbers,), float(value))}, {"state": {}, "param_groups": []}, {"at": value})


def save(folder, step, **more):
    CheckpointDir(folder / "checkpoints" / "qlora-s0", keep=1).save(step, checkpoint(step, **more))


def newest(folder):
    found, _ = CheckpointDir(folder / "checkpoints" / "qlora-s0", keep=1).newest()
    return found and found.state["at"]
