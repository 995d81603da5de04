"""Google Drive as the remote: mounted, full, dead, flushed."""

import errno
import os
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
from kept_study import save

from peftlib.core.errors import ConfigError
from peftlib.storage import remotes as storage
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.storage.mirror import Mirror
from peftlib.storage.remotes import DriveRemote
from peftlib.storage.store import Remote


class Drive:
    """Google Drive's way with deleted files: they lie in its trash and count. peak_bytes: live and trashed, at most."""

    def __init__(self, folder):
        self.folder, self.trashed, self.peak_bytes = Path(folder), 0, 0

    def __getattr__(self, name):
        return getattr(os, name)

    def live(self):
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def unlink(self, path):
        self._trash(path)
        os.unlink(path)

    def replace(self, old, new):
        self._trash(new)
        os.replace(old, new)

    def fsync(self, opened):
        os.fsync(opened)
        self.peak_bytes = max(self.peak_bytes, self.live() + self.trashed)

    def _trash(self, path):
        if Path(path).is_relative_to(self.folder) and Path(path).exists():
            self.trashed += Path(path).stat().st_size


def test_many_checkpoints_never_fill_the_drive_and_a_finished_run_frees_it(tmp_path):
    folder, remote = tmp_path / "study", Remote(tmp_path / "drive" / "study")
    drive = Drive(tmp_path / "drive")
    ours = Mirror(folder, remote)
    with mock.patch("peftlib.core.files.os", drive), mock.patch("peftlib.storage.store.os", drive):
        for step in range(1, 16):
            save(folder, step)
            ours.copy_once()
        one = max(path.stat().st_size for path in remote.folder.glob("*.tar"))
        assert drive.peak_bytes <= 2 * one + 20_000
        assert drive.trashed == 0
        (folder / "weights" / "qlora-s0").mkdir(parents=True)
        (folder / "weights" / "qlora-s0" / "adapter_model.safetensors").write_text("w")
        (folder / "records").mkdir()
        (folder / "records" / "qlora-s0.json").write_text('{"status": "ok"}')
        CheckpointDir(folder / "checkpoints" / "qlora-s0", keep=1).remove()
        assert ours.flush(20)
        ours.copy_once(is_last=True)
    assert sorted(path.stem for path in remote.folder.glob("*.tar")) == ["run-qlora-s0.0", "weights-qlora-s0.0"]
    assert drive.trashed < 1000


def test_a_drive_takes_twelve_of_its_fifteen_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "DRIVE", tmp_path)
    drive, other = DriveRemote("study"), tmp_path / "MyDrive" / "peftlib" / "other"
    other.mkdir(parents=True)
    (other / "weights.tar").write_bytes(bytes(1000))
    assert drive.free_bytes() <= storage.DRIVE_LIMIT_BYTES - 1000


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Colab's module as far as it is used: what it was asked for, in order.

    mount_fails, flush_fails: make it raise as Colab's does. is_watched: whether a page looks on. `root` is MyDrive.
    """
    module = types.ModuleType("google.colab")
    module.asked, module.mount_fails, module.flush_fails, module.is_watched = [], False, False, True
    monkeypatch.setattr(storage, "DRIVE", tmp_path / "drive")
    module.root = storage.DRIVE / "MyDrive"

    def mount(path, force_remount=False):
        module.asked.append("remount" if force_remount else "mount")
        if module.mount_fails:
            raise ValueError("mount failed")
        module.root.mkdir(parents=True, exist_ok=True)

    def flush_and_unmount():
        module.asked.append("flush")
        if module.flush_fails:
            raise ValueError("flush_and_unmount failed")
        module.root.rename(tmp_path / "in-the-cloud")

    module.drive = types.SimpleNamespace(mount=mount, flush_and_unmount=flush_and_unmount)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.setattr(storage, "is_watched", lambda: module.is_watched)
    monkeypatch.setattr(storage, "_mounted_by_us", False)
    return module


@pytest.fixture
def to_drive(colab, study, lines, monkeypatch):
    """A Mirror of the study on Drive, as a notebook's setup makes it."""
    monkeypatch.delenv("PEFTLIB_MIRROR", raising=False)
    storage.mount_drive()
    colab.asked.clear()
    return Mirror(study, storage.remote_of("study"), log=lines.append, every_s=0.01)


def test_drive_is_mounted_or_its_absence_said(colab, capsys, monkeypatch):
    storage.mount_drive()
    colab.mount_fails = True
    storage.mount_drive()
    assert colab.asked == ["mount", "mount"]
    assert "not mounted (mount failed): results stay on this machine" in capsys.readouterr().out
    colab.is_watched = False
    with pytest.raises(ConfigError, match="only Colab can mount it"):
        storage.mount_drive()
    monkeypatch.delitem(sys.modules, "google.colab")
    colab.is_watched = True
    with pytest.raises(ConfigError, match="only Colab can mount it"):
        storage.mount_drive()


def test_the_last_copy_on_drive_is_flushed_and_drive_mounted_again(colab, to_drive):
    assert "NOT on Google Drive" in to_drive.state()
    to_drive.copy_once(is_last=True)
    assert "the whole study is written to Google Drive; Colab uploads it in the background" in to_drive.state()
    assert to_drive.flush(20) and colab.asked == ["flush", "remount"]
    assert to_drive.state() == "the whole study is on Google Drive"
    (to_drive.folder / "report.md").write_text("new")
    to_drive.copy_once(is_last=True)
    assert "Colab uploads it in the background" in to_drive.state(), "the flush was of other files"


def test_a_flush_that_fails_is_said_and_nothing_more_is_claimed(colab, to_drive):
    colab.flush_fails = True
    assert to_drive.flush(20) and colab.asked == ["flush"], "a remount would kill what is still being uploaded"
    said = to_drive.state()
    assert "Drive did not confirm the upload (flush_and_unmount failed)" in said and "drive.google.com" in said
    assert "the whole study is on" not in said


def test_drive_is_not_unmounted_in_a_headless_run_nor_where_somebody_else_has_mounted_it(colab, to_drive, monkeypatch):
    colab.is_watched = False
    assert to_drive.flush(20) and "Colab uploads it in the background" in to_drive.state()
    colab.is_watched = True
    monkeypatch.setattr(storage, "_mounted_by_us", False)
    storage.mount_drive()  # it is mounted already
    assert to_drive.flush(20) and colab.asked == ["mount"]
    assert "Colab uploads it in the background" in to_drive.state()


def test_a_dead_mount_is_mounted_again_and_nothing_is_written_below_it(colab, to_drive, lines):
    shutil.rmtree(colab.root)
    colab.mount_fails = True
    to_drive.copy_once(is_last=True)
    assert not colab.root.exists() and set(colab.asked) == {"remount"}
    assert "Google Drive is not mounted" in lines[0] and "force_remount=True" in lines[0]
    colab.mount_fails = False
    to_drive.remote.reconnect()
    assert to_drive.flush(20) and to_drive.state() == "the whole study is on Google Drive"


def test_a_full_drive_is_not_mounted_again(colab, to_drive):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(Remote, "put", side_effect=full):
        to_drive.copy_once(is_last=True)
    assert colab.asked == []
