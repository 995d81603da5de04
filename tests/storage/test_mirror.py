import errno
import io
import os
import shutil
import sys
import tarfile
import threading
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from fake_hub import FakeHub

from peftlib.core import files
from peftlib.core.errors import CheckpointError, ConfigError, LockedError
from peftlib.storage import archive, lock, mirror
from peftlib.storage import remotes as storage
from peftlib.storage.checkpoint import Checkpoint, CheckpointDir
from peftlib.storage.mirror import Mirror
from peftlib.storage.remotes import DriveRemote
from peftlib.storage.store import Remote


def checkpoint(value, numbers=5000):
    return Checkpoint({"w": torch.full((numbers,), float(value))}, {"state": {}, "param_groups": []}, {"at": value})


def save(folder, step, **more):
    CheckpointDir(folder / "checkpoints" / "qlora-s0", keep=1).save(step, checkpoint(step, **more))


def newest(folder):
    found, _ = CheckpointDir(folder / "checkpoints" / "qlora-s0", keep=1).newest()
    return found and found.state["at"]


@pytest.fixture
def study(tmp_path):
    """A study folder of every kind of file."""
    folder = tmp_path / "study"
    for name, text in {
        "config.json": "{}",
        "data/manifest.json": "{}",
        "data/train.parquet": "rows",
        "records/base-s0.json": '{"status": "ok"}',
        "predictions/base-s0.jsonl": "{}\n",
        "weights/galore-s0/model.safetensors": "weights",
        "compile/card.bin": "cache",
        "notebooks/01_data.ipynb": "{}",
        "notebooks/02_qlora.running.ipynb": "{}",
        "sweeps/qlora.json": "{}",
        "sweeps/qlora-1/records/qlora-s0.json": "{}",
        "sweeps/qlora-1/checkpoints/qlora-s0/step-000001/tensors.pt": "not kept",
        "lock.json": "{}",
        ".hidden": "x",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    save(folder, 3)
    return folder


@pytest.fixture
def remote(tmp_path):
    return Remote(tmp_path / "remote")


@pytest.fixture
def lines():
    return []


@pytest.fixture
def open_again(tmp_path, remote, lines):
    """open_again(name) -> the Mirror of a session on a new machine, after it has brought what there is."""

    def open_again(name="elsewhere", **settings):
        made = Mirror(tmp_path / name, remote, log=lines.append, **settings)
        made.restore()
        return made

    return open_again


def tree(folder):
    kept = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept if path.name[0] != "."}


def test_a_new_machine_gets_everything_that_was_copied(study, remote, open_again, lines):
    ours = Mirror(study, remote, log=lines.append)
    assert ours.flush(20) and ours.state() == f"all of the study is on {remote}"
    again = open_again()
    left_out = {
        "lock.json",
        "notebooks/02_qlora.running.ipynb",
        "compile/card.bin",
    }  # loading a compiler's cache runs it
    left_out |= {"sweeps/qlora-1/checkpoints/qlora-s0/step-000001/tensors.pt"}
    assert tree(again.folder) == {name: content for name, content in tree(study).items() if name not in left_out}
    assert newest(again.folder) == 3 and not again._waiting()
    assert len(list(remote.folder.glob("*.tar"))) == 6  # few files


def test_nothing_is_copied_twice_and_a_second_process_knows_what_the_first_has_copied(study, remote):
    assert Mirror(study, remote).flush(20)
    with mock.patch.object(remote, "put", side_effect=AssertionError):
        second = Mirror(study, remote)
        second.restore()
        second.copy_once(is_last=True)
        assert second.flush(20)
    for path in remote.folder.iterdir():
        path.unlink()
    third = Mirror(study, remote)
    third.restore()  # finds that the remote has lost it all
    assert third.flush(20) and len(list(remote.folder.glob("*.tar"))) == 6


def test_what_is_here_and_newer_is_never_overwritten(study, remote, open_again):
    assert Mirror(study, remote).flush(20)
    (study / "predictions" / "base-s0.jsonl").write_text("{}\n{}\n")
    save(study, 4)
    again = Mirror(study, remote)
    again.restore()
    assert (study / "predictions" / "base-s0.jsonl").read_text() == "{}\n{}\n" and newest(study) == 4
    assert again.flush(20) and newest(open_again().folder) == 4


def test_a_machine_that_falls_behind_gets_what_another_has_made(study, remote, open_again, lines):
    first = Mirror(study, remote, log=lines.append)
    assert first.flush(20)
    other = open_again()
    save(other.folder, 7)
    assert other.flush(20)
    save(study, 5)
    first.copy_once(is_last=True)  # would put an older state over the newer one
    assert "another session writes to" in first.state() and not first.flush(5)
    back = Mirror(study, remote, log=lines.append)
    back.restore()
    assert newest(study) == 7


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


def test_a_checkpoint_stays_on_the_remote_until_record_and_weights_are_there(study, remote, open_again):
    assert Mirror(study, remote).flush(20)
    again = open_again()
    shutil.rmtree(again.folder / "checkpoints")
    again.copy_once(is_last=True)
    assert newest(open_again("third").folder) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOTCONN, errno.EIO, errno.EACCES])
def test_a_failing_remote_is_said_once_with_the_remedy_and_caught_up_with(study, remote, lines, number):
    ours = Mirror(study, remote, log=lines.append, every_s=0.01)
    with mock.patch.object(Remote, "put", side_effect=OSError(number, os.strerror(number))) as put:
        for _ in range(3):
            ours.copy_once(is_last=True)
        assert put.call_count == 6  # once a unit: then it pauses
        assert not ours.flush(20) and put.call_count > 6
    assert len(lines) == 6 and all(os.strerror(number) in line and "Work goes on" in line for line in lines)
    remedy = {errno.ENOSPC: "free some space", errno.ENOTCONN: "still mounted", errno.EIO: "still mounted"}
    assert remedy.get(number, "can be written to") in lines[0]
    assert ours.state().startswith(f"NOT on {remote} yet: ") and os.strerror(number) in ours.state()
    assert ours.flush(20) and ours.state().startswith("all of the study")


def test_a_full_remote_is_found_before_the_older_copy_is_touched(study, remote, open_again, lines):
    ours = Mirror(study, remote, log=lines.append)
    assert ours.flush(20)
    save(study, 4)
    with mock.patch.object(Remote, "free_bytes", return_value=100):
        ours.copy_once(is_last=True)
    assert "takes" in lines[-1] and "are free" in lines[-1]
    assert newest(open_again().folder) == 3


def test_a_mount_that_hangs_holds_nobody_up_longer_than_asked(study, remote):
    released = threading.Event()
    ours = Mirror(study, remote, every_s=0.01)
    with mock.patch.object(Remote, "put", side_effect=lambda *a: released.wait(30)):
        started = time.monotonic()
        assert not ours.flush(0.3) and time.monotonic() - started < 10
        assert "NOT on" in ours.state()
        released.set()


def test_a_mount_that_is_gone_leaves_the_study_usable(study, tmp_path, lines):
    (tmp_path / "mount").write_text("no folder")
    ours = Mirror(study, Remote(tmp_path / "mount" / "study"), log=lines.append, every_s=0.01)
    ours.restore()
    assert not ours.flush(20) and "NOT on" in ours.state()
    ours.require_space("qlora-s0", 1)


def test_a_damaged_copy_is_said_and_the_older_one_taken(study, remote, open_again, lines):
    ours = Mirror(study, remote)
    assert ours.flush(20)
    save(study, 4)
    assert ours.flush(20)
    names = {
        facts["serial"]: name for name, facts in remote.listing().items() if facts["unit"].startswith("checkpoint")
    }
    path = remote.folder / f"{names[2]}.tar"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100).replace(b"\0", b"x"))
    assert newest(open_again().folder) == 3
    assert any("not used" in line and "SHA-256" in line for line in lines)


def test_it_copies_in_the_background_while_files_change(study, remote, open_again):
    ours = Mirror(study, remote, every_s=0.01, small_files_s=0.0)
    ours.start()
    for step in range(4, 30):
        save(study, step)
    end = time.monotonic() + 20
    while ours._waiting() and time.monotonic() < end:
        time.sleep(0.01)
    ours._is_over.set()
    assert newest(open_again().folder) == 29 and not (study / ".mirroring").exists()


def test_space_for_two_checkpoints(study, remote):
    ours = Mirror(study, remote)
    with mock.patch.object(Remote, "free_bytes", return_value=300):
        ours.require_space("galore-s0", 150)
        with pytest.raises(CheckpointError, match="PEFTLIB_MIRROR=off to train without"):
            ours.require_space("galore-s0", 151)


def test_a_drive_takes_twelve_of_its_fifteen_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "DRIVE", tmp_path)
    drive, other = DriveRemote("study"), tmp_path / "MyDrive" / "peftlib" / "other"
    other.mkdir(parents=True)
    (other / "weights.tar").write_bytes(bytes(1000))
    assert drive.free_bytes() <= storage.DRIVE_LIMIT_BYTES - 1000


def test_the_lock_holds_on_the_remote_too(study, remote, open_again, monkeypatch):
    ours, other = Mirror(study, remote), open_again()
    monkeypatch.setattr(mirror, "_RUNNING", {study: ours, other.folder: other})
    refused = pytest.raises(LockedError, match="training qlora")
    with lock.held(study, "training qlora"), refused, lock.held(other.folder, "training galore"):
        pass
    with lock.held(other.folder, "training galore"):
        assert (remote.folder / "lock.json").exists() and (other.folder / "lock.json").exists()
    assert "lock" not in remote.listing()


def test_which_remote(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "DRIVE", tmp_path / "drive")
    monkeypatch.delenv("PEFTLIB_MIRROR", raising=False)
    assert storage.remote_of("s") is None
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    assert str(storage.remote_of("s")) == "Google Drive"
    monkeypatch.setenv("PEFTLIB_MIRROR", "off")
    assert storage.remote_of("s") is None
    monkeypatch.setenv("PEFTLIB_MIRROR", str(tmp_path / "disk"))
    assert storage.remote_of("s").folder == tmp_path / "disk" / "s"
    monkeypatch.setenv("PEFTLIB_MIRROR", "hf://me/runs")
    assert str(storage.remote_of("s")) == "hf://me/runs"
    monkeypatch.setenv("PEFTLIB_MIRROR", "hf://me")
    with pytest.raises(ConfigError, match="use hf://USER/REPO"):
        storage.remote_of("s")


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
    assert "all of the study is written to Google Drive; Colab uploads it in the background" in to_drive.state()
    assert to_drive.flush(20) and colab.asked == ["flush", "remount"]
    assert to_drive.state() == "all of the study is on Google Drive"
    (to_drive.folder / "report.md").write_text("new")
    to_drive.copy_once(is_last=True)
    assert "Colab uploads it in the background" in to_drive.state(), "the flush was of other files"


def test_a_flush_that_fails_is_said_and_nothing_more_is_claimed(colab, to_drive):
    colab.flush_fails = True
    assert to_drive.flush(20) and colab.asked == ["flush"], "a remount would kill what is still being uploaded"
    said = to_drive.state()
    assert "Drive did not say that it arrived (flush_and_unmount failed)" in said and "drive.google.com" in said
    assert "all of the study is on" not in said


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
    assert to_drive.flush(20) and to_drive.state() == "all of the study is on Google Drive"


def test_a_full_drive_is_not_mounted_again(colab, to_drive):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(Remote, "put", side_effect=full):
        to_drive.copy_once(is_last=True)
    assert colab.asked == []


def test_a_study_is_not_copied_into_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_MIRROR", str(tmp_path))
    with pytest.raises(ConfigError, match="where the study itself is kept"):
        mirror.restore(tmp_path / "study")


def hub_remote(hub):
    return Remote("hf://me/runs", "study", fs=hub.file_system(), api=hub)


def test_a_hub_repository_serves_as_well(study, tmp_path, lines):
    hub = FakeHub(tmp_path / "hub")
    remote = hub_remote(hub)
    ours = Mirror(study, remote, log=lines.append, every_s=0.01)
    hub.is_down = True
    ours.restore()
    assert not ours.flush(20) and "HF_TOKEN may write to hf://me/runs" in lines[-1]
    hub.is_down = False
    assert ours.flush(20) and hub.is_private
    again = Mirror(tmp_path / "elsewhere", remote, log=lines.append)
    again.restore()
    assert newest(again.folder) == 3
    remote.drop("data.0")
    assert "data.0" not in remote.listing()


def test_an_idle_mirror_asks_the_hub_nothing_and_an_unchanged_one_is_listed_by_one_call(study, tmp_path):
    hub = FakeHub(tmp_path / "hub")
    ours = Mirror(study, hub_remote(hub))
    assert ours.flush(20)
    ours.copy_once()
    before = hub.calls.copy()
    for _ in range(5):
        ours.copy_once()
    assert hub.calls == before
    first, again = ours.remote.listing(), ours.remote.listing()
    units = ("data", "weights-galore-s0", "checkpoint-qlora-s0", "study", "run-base-s0", "sweep-qlora")
    assert first == again and set(first) == {f"{unit}.0" for unit in units}
    assert hub.calls - before == {"list_repo_tree": 2}
    ours._look_at = 0.0  # five minutes later
    ours.copy_once()
    assert hub.calls - before == {"list_repo_tree": 3}


def test_a_public_repository_is_refused_unless_said(study, tmp_path, monkeypatch, lines):
    hub = FakeHub(tmp_path / "hub")
    hub._create_repo("me/runs", repo_type="model", private=False, exist_ok=True)
    remote = hub_remote(hub)
    ours = Mirror(study, remote, log=lines.append, every_s=0.01)
    assert not ours.flush(20) and not hub.commits
    assert "hf://me/runs is public" in lines[0] and "PEFTLIB_MIRROR_PUBLIC=1" in lines[0]
    monkeypatch.setattr(mirror, "remote_of", lambda name: remote)
    with pytest.raises(ConfigError, match="is public.*make it private"):
        mirror.restore(study)
    hub.is_down = True
    assert mirror.restore(study, log=lines.append)  # not to be asked: work goes on, and nothing is copied
    hub.is_down = False
    monkeypatch.setenv("PEFTLIB_MIRROR_PUBLIC", "1")
    assert mirror.restore(study).flush(20) and hub.commits


def test_a_repository_that_keeps_every_version_is_said_when_copying_starts(study, tmp_path, monkeypatch, lines):
    monkeypatch.setattr(mirror, "_RUNNING", {})
    monkeypatch.setattr(mirror, "remote_of", lambda name: hub_remote(FakeHub(tmp_path / "hub")))
    mirror.open_mirror(study, log=lines.append)._is_over.set()
    mirror.open_mirror(study, log=lines.append)
    assert len(lines) == 1 and "squashes its history" in lines[0]


def test_old_versions_are_squashed_out_of_a_repository_of_copies_alone(study, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    assert Mirror(study, hub_remote(hub)).flush(20) and hub.commits == ["peftlib: older versions are gone"]
    monkeypatch.setattr("peftlib.storage.store._SQUASH_BYTES", 20_000)
    for step in range(4, 9):
        save(study, step)
        Mirror(study, hub_remote(hub)).copy_once(is_last=True)
        assert len(hub.commits) <= 3
    hub.commits.append("Upload README.md with huggingface_hub")
    save(study, 9)
    assert Mirror(study, hub_remote(hub)).flush(20) and len(hub.commits) > 3


def test_workers_on_one_remote_write_runs_of_their_own(study, remote, open_again, lines):
    driver = Mirror(study, remote, log=lines.append)
    assert driver.flush(20)
    one, two = open_again("one"), open_again("two")
    for worker, run in ((one, "galore-s1"), (two, "hybrid-s1"), (one, "galore-s2")):
        (worker.folder / "records" / f"{run}.json").write_text('{"status": "stopped"}')
        (worker.folder / "predictions" / f"{run}.jsonl").write_text("{}\n")
        (worker.folder / "logs").mkdir(exist_ok=True)
        (worker.folder / "logs" / f"{run}.log").write_text("log")
        CheckpointDir(worker.folder / "checkpoints" / run, keep=1).save(3, checkpoint(3))
        assert worker.flush(20), worker.state()
    driver.restore([])
    assert sorted(path.stem for path in (study / "records").iterdir()) == [
        "base-s0",
        "galore-s1",
        "galore-s2",
        "hybrid-s1",
    ]
    assert [path.name for path in (study / "checkpoints").iterdir()] == ["qlora-s0"]
    driver.restore(["hybrid-s1"])
    assert (study / "checkpoints" / "hybrid-s1").exists() and not (study / "checkpoints" / "galore-s1").exists()
    (study / "predictions" / "galore-s1.jsonl").write_text("older")
    (one.folder / "predictions" / "galore-s1.jsonl").write_text("newer")
    (study / "report.md").write_text("report")
    assert one.flush(20) and not driver.flush(5)
    assert "of run-galore-s1 is only in" in driver.state()
    one.restore()
    assert (one.folder / "report.md").exists(), "the other units are copied as ever"


def test_shared_small_files_of_two_workers_are_both_kept_and_equal_ones_are_no_conflict(study, remote, open_again):
    for own in ("weights", "checkpoints"):
        shutil.rmtree(study / own)
    same, other = Mirror(study, remote), Mirror(shutil.copytree(study, study.parent / "copy"), remote)
    assert same.flush(20) and other.flush(20), other.state()
    assert all(facts["serial"] == 1 for facts in remote.listing().values())
    (same.folder / "one.md").write_text("1")
    (other.folder / "two.md").write_text("2")
    assert same.flush(20) and other.flush(20), other.state()
    again = open_again().folder
    assert (again / "one.md").exists() and (again / "two.md").exists()


def test_an_archive_of_all_small_files_as_older_versions_wrote_it_is_restored(study, remote, open_again):
    files = [path for path in archive._files_below(study) if "records" in str(path) or path.name == "config.json"]
    with archive.pinned(study, files) as pairs:
        facts = {"unit": "study", "serial": 9, "origin": "an older version"}
        remote.put("study.1", lambda out: archive.pack(pairs, out), 100, facts)
    again = open_again()
    assert (again.folder / "records" / "base-s0.json").exists()
    (again.folder / "records" / "base-s0.json").write_text('{"status": "failed"}')
    assert again.flush(20)
    assert "failed" in (open_again("third").folder / "records" / "base-s0.json").read_text()


@pytest.mark.parametrize(
    "named, match",
    [
        ("s3://", "s3://BUCKET"),
        ("odd://x", "use a folder, hf://USER/REPO, s3://BUCKET or gs://BUCKET"),
        ("gs://bucket", "pip install gcsfs"),
        ("hf://buckets/me", "hf://buckets/USER/BUCKET"),
    ],
)
def test_a_place_that_cannot_be_opened_is_named_with_the_way_out(named, match, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=match):
        Remote(named, "study")


def test_a_compile_cache_on_a_remote_stays_there(study, remote, open_again):
    facts = {"unit": "compile", "serial": 1, "origin": "a stranger", "written_by": "peftlib"}
    with archive.pinned(study, [study / "compile" / "card.bin"]) as pairs:
        remote.put("compile.0", lambda out: archive.pack(pairs, out), 100, facts)
    assert "compile.0" in remote.listing()
    assert not (open_again().folder / "compile").exists()


def test_files_that_vanish_while_they_are_listed_are_left(study):
    units = archive.units_of(study)
    (study / "config.json").unlink()
    assert not any(row[0] == "config.json" for row in archive.fingerprint(study, units["study"]))
    with pytest.raises(FileNotFoundError), archive.pinned(study, units["study"]):
        pass


def test_sealed_files_show_their_damage(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(files.sealed({"a": 1}))
    assert files.read_json(path, is_sealed=True)["a"] == 1
    path.write_bytes(path.read_bytes().replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(files.StudyError, match="SHA-256 differs"):
        files.read_json(path, is_sealed=True)


def test_a_command_finds_a_study_on_its_remote_and_leaves_what_it_makes_there(
    study, remote, tmp_path, monkeypatch, capsys
):
    from peftlib import cli as command_line
    from peftlib.core.config import resolve
    from peftlib.core.study import Study

    monkeypatch.setattr(mirror, "_RUNNING", {})
    monkeypatch.setenv("PEFTLIB_MIRROR", str(remote.folder.parent / "copies"))
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "first"))
    shutil.copytree(study, tmp_path / "first" / "mine")
    (tmp_path / "first" / "mine" / "config.json").unlink()
    Study(tmp_path / "first" / "mine", resolve("demo", study="mine")).freeze()
    assert Mirror(tmp_path / "first" / "mine", storage.remote_of("mine")).flush(20)
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "second"))

    def work(args):
        found = mirror.open_study("mine")
        (found.folder / "records" / "new.json").write_text("{}")

    monkeypatch.setattr("peftlib.runner.console.call", lambda app, argv: work(argv))
    command_line.main(["report", "--study", "mine"])
    assert "all of the study is on" in capsys.readouterr().err
    third = Mirror(tmp_path / "third" / "mine", storage.remote_of("mine"))
    third.restore()
    assert (third.folder / "records" / "new.json").exists() and newest(third.folder) == 3


def _tar(path, *members):
    """A tar of (TarInfo, content) pairs."""
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _member(name, kind=tarfile.REGTYPE, **more):
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in more.items():
        setattr(made, field, value)
    return made


_ODD_MEMBERS = {
    "a place above": _member("../outside"),
    "a place far above": _member("data/../../../outside"),
    "an absolute place": _member("/tmp/peftlib-outside/file"),
    "a link": _member("data/link", tarfile.SYMTYPE, linkname="/etc"),
    "a link inside": _member("data/link", tarfile.SYMTYPE, linkname="other"),
    "a hard link": _member("data/link", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": _member("data/device", tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": _member("data/pipe", tarfile.FIFOTYPE),
    "a time out of range": _member("data/x", mtime=2**62),
    "a name too long": _member("data/" + "n" * 300),
}
_ODD_BYTES = {
    "nothing": b"",
    "text": b"no archive at all\n" * 100,
    "gzip": b"\x1f\x8b\x08\x00garbage" * 100,
    "xz": b"\xfd7zXZ\x00" + b"garbage" * 200,
    "zeros": b"\0" * 3000,
    "odd bytes": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("what", [*_ODD_MEMBERS, *_ODD_BYTES, "cut"])
def test_an_archive_of_something_else_is_said_and_the_study_goes_on(what, study, remote, tmp_path, lines):
    """Nothing gets outside, nothing of it is used, and what is sound still comes."""
    Mirror(study, remote).copy_once(is_last=True)
    name = next(name for name, facts in remote.listing().items() if facts["unit"] == "data")
    crafted = tmp_path / "crafted.tar"
    if what in _ODD_MEMBERS:
        _tar(crafted, (_member("data/train.parquet"), b"other rows"), (_ODD_MEMBERS[what], b""))
    elif what == "cut":
        _tar(crafted, (_member("data/train.parquet"), b"other rows" * 1000))
        crafted.write_bytes(crafted.read_bytes()[:3000])
    else:
        crafted.write_bytes(_ODD_BYTES[what])
    facts = {**remote.listing()[name], "bytes": crafted.stat().st_size, "sha256": files.sha256(crafted)}
    shutil.copyfile(crafted, remote.folder / f"{name}.tar")
    (remote.folder / f"{name}.json").write_bytes(files.sealed(facts))
    here = tmp_path / "other machine" / "study"
    Mirror(here, remote, log=lines.append).restore()
    is_harmless = what in ("a time out of range", "zeros", "nothing")  # tarfile takes them, as empty or at another time
    assert is_harmless or any(f"{name} not used" in line for line in lines), lines
    assert is_harmless or not (here / "data").exists()
    assert (here / "records" / "base-s0.json").exists() and not (here / ".restoring").exists()
    outside = [tmp_path / "outside", tmp_path / "other machine" / "outside", Path("/tmp/peftlib-outside")]
    assert not any(path.exists() for path in outside) and not any(path.is_symlink() for path in here.rglob("*"))


def test_a_listing_without_its_facts_does_not_count(study, remote):
    Mirror(study, remote).copy_once(is_last=True)
    known = len(remote.listing())
    (remote.folder / "odd.0.json").write_bytes(files.sealed({"unit": "data", "serial": "many"}))
    assert len(remote.listing()) == known


def test_a_linked_file_of_a_study_is_copied_as_what_it_leads_to(study, remote, tmp_path):
    (tmp_path / "rows").write_text("rows elsewhere")
    (study / "data" / "train.parquet").unlink()
    (study / "data" / "train.parquet").symlink_to(tmp_path / "rows")
    Mirror(study, remote).copy_once(is_last=True)
    Mirror(tmp_path / "other", remote).restore()
    assert (tmp_path / "other" / "data" / "train.parquet").read_text() == "rows elsewhere"
