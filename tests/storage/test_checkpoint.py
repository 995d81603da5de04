import errno

import pytest
import torch

from peftlib.core import files
from peftlib.core.errors import CheckpointError
from peftlib.storage.checkpoint import Checkpoint, CheckpointDir


def checkpoint(value):
    weights = {"w": torch.full((4, 3), float(value))}
    return Checkpoint(weights, {"state": {0: {"step": torch.tensor(float(value))}}, "param_groups": []}, {"at": value})


def test_the_newest_comes_back_and_older_ones_go(tmp_path):
    folder = CheckpointDir(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        folder.save(step, checkpoint(step))
    found, skipped = folder.newest()
    assert found.state["at"] == 3 and torch.equal(found.weights["w"], torch.full((4, 3), 3.0)) and not skipped
    assert sorted(p.name for p in folder.folder.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("name", ["tensors.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "delete"])
def test_a_damaged_one_is_skipped_with_its_reason(tmp_path, name, damage):
    folder = CheckpointDir(tmp_path, keep=2)
    folder.save(1, checkpoint(1))
    folder.save(2, checkpoint(2))
    path = tmp_path / "step-000002" / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    found, skipped = folder.newest()
    assert found.state["at"] == 1
    assert skipped[0].startswith("step-000002: ") and ("manifest" in skipped[0] or name in skipped[0])


def test_a_cut_write_leaves_nothing_that_counts(tmp_path):
    folder = CheckpointDir(tmp_path, keep=1)
    folder.save(1, checkpoint(1))
    (tmp_path / ".writing-step-000002").mkdir()
    (tmp_path / ".writing-step-000002" / "tensors.pt").write_bytes(b"half")
    assert folder.newest()[0].state["at"] == 1
    folder.save(2, checkpoint(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_full_disk_is_named_and_the_one_before_stays(tmp_path, monkeypatch):
    folder = CheckpointDir(tmp_path, keep=1)
    folder.save(1, checkpoint(1))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peftlib.storage.checkpoint.torch.save", full)
    with pytest.raises(CheckpointError, match="step 2 could not be written.*No space left.*free some space"):
        folder.save(2, checkpoint(2))
    assert folder.newest()[0].state["at"] == 1


def test_a_damaged_newer_one_never_costs_the_last_good_one(tmp_path):
    CheckpointDir(tmp_path, keep=1).save(9, checkpoint(9))
    (tmp_path / "step-000009" / "tensors.pt").write_bytes(b"")
    folder = CheckpointDir(tmp_path, keep=1)
    for step in (4, 5):
        folder.save(step, checkpoint(step))
        assert CheckpointDir(tmp_path, keep=1).newest()[0].state["at"] == step
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_what_a_disk_changes_while_writing_is_found_before_older_ones_go(tmp_path, monkeypatch):
    folder = CheckpointDir(tmp_path, keep=1)
    folder.save(1, checkpoint(1))
    real = files.write_stream

    def flipping(path, write, **how):
        listed = real(path, write, **how)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return listed

    monkeypatch.setattr("peftlib.storage.checkpoint.write_stream", flipping)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*step-000001 is kept"):
        folder.save(2, checkpoint(2))
    assert folder.newest()[0].state["at"] == 1


def test_one_of_another_schema_version_is_refused_and_a_flipped_version_is_damage(tmp_path, monkeypatch):
    folder = CheckpointDir(tmp_path, keep=1)
    monkeypatch.setattr(files, "SCHEMA_VERSION", 7)
    folder.save(1, checkpoint(1))
    monkeypatch.setattr(files, "SCHEMA_VERSION", 1)
    with pytest.raises(CheckpointError, match="schema_version 7, but peftlib .* uses 1: resume with that version"):
        folder.newest()
    manifest = tmp_path / "step-000001" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"schema_version": 7', b'"schema_version": 5'))
    assert folder.newest()[1] == ["step-000001: no readable manifest (StudyError)"]


def test_no_checkpoint_is_none(tmp_path):
    assert CheckpointDir(tmp_path / "absent", keep=1).newest() == (None, [])
