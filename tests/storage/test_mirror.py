import errno
import os
import shutil
import threading
import time
from unittest import mock

import pytest
from kept_study import checkpoint, newest, save

from peftlib.core.errors import CheckpointError, LockedError
from peftlib.storage import archive, lock, mirror
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.storage.mirror import Mirror
from peftlib.storage.store import Remote


def tree(folder):
    kept = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept if path.name[0] != "."}


def test_a_new_machine_gets_everything_that_was_copied(study, remote, open_again, lines):
    ours = Mirror(study, remote, log=lines.append)
    assert ours.flush(20) and ours.state() == f"the whole study is on {remote}"
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
    assert "another session now writes to" in first.state() and not first.flush(5)
    back = Mirror(study, remote, log=lines.append)
    back.restore()
    assert newest(study) == 7


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
    assert len(lines) == 6 and all(os.strerror(number) in line and "Work continues" in line for line in lines)
    remedy = {errno.ENOSPC: "free some space", errno.ENOTCONN: "still mounted", errno.EIO: "still mounted"}
    assert remedy.get(number, "is writable") in lines[0]
    assert ours.state().startswith(f"NOT on {remote} yet: ") and os.strerror(number) in ours.state()
    assert ours.flush(20) and ours.state().startswith("the whole study")


def test_a_full_remote_is_found_before_the_older_copy_is_touched(study, remote, open_again, lines):
    ours = Mirror(study, remote, log=lines.append)
    assert ours.flush(20)
    save(study, 4)
    with mock.patch.object(Remote, "free_bytes", return_value=100):
        ours.copy_once(is_last=True)
    assert "needs" in lines[-1] and "GiB free" in lines[-1]
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


def test_it_copies_in_the_background_while_files_change(study, remote, open_again):
    ours = Mirror(study, remote, every_s=0.01, small_files_s=0.0)
    ours.start()
    for step in range(4, 30):
        save(study, step)
    end = time.monotonic() + 20
    while ours._waiting() and time.monotonic() < end:
        time.sleep(0.1)  # looking takes what the copies need
    ours._is_over.set()
    assert newest(open_again().folder) == 29 and not (study / ".mirroring").exists()


def test_a_checkpoint_that_training_deletes_during_a_look_is_only_left_out(study, monkeypatch):
    listed, removed = os.listdir, study / "checkpoints" / "qlora-s0" / "step-000003"
    assert "checkpoint-qlora-s0" in archive.units_of(study)

    def list_while_training_deletes(folder):
        if folder == removed:
            shutil.rmtree(removed)
        return listed(folder)

    monkeypatch.setattr(os, "listdir", list_while_training_deletes)
    units = archive.units_of(study)
    assert not removed.exists() and {"data", "study", "weights-galore-s0"} <= set(units)
    assert "checkpoint-qlora-s0" not in units


def test_a_unit_that_is_gone_when_its_turn_comes_is_not_copied_as_an_empty_one(study, remote, open_again):
    ours = Mirror(study, remote)
    assert ours.flush(20)
    save(study, 4)
    waiting = ours._waiting()
    with (
        mock.patch.object(ours, "_waiting", return_value=waiting),
        mock.patch.object(archive, "units_of", return_value={}),
    ):
        ours.copy_once(is_last=True)
    assert newest(open_again().folder) == 3 and ours._waiting() == waiting


def test_a_look_that_fails_is_told_once_and_copies_go_on(study, remote, open_again, lines):
    ours = Mirror(study, remote, log=lines.append, every_s=0.01)
    looks, looked = [], archive.units_of

    def fail_first(folder):
        looks.append(folder)
        if len(looks) <= 3:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return looked(folder)

    with mock.patch.object(archive, "units_of", fail_first):
        ours.start()
        end = time.monotonic() + 20
        while len(looks) < 5 and time.monotonic() < end:
            time.sleep(0.02)
    assert ours.flush(20) and newest(open_again().folder) == 3
    ours._is_over.set()
    assert len([line for line in lines if line.startswith(f"cannot copy to {remote} ")]) == 1


def test_space_for_two_checkpoints(study, remote):
    ours = Mirror(study, remote)
    with mock.patch.object(Remote, "free_bytes", return_value=300):
        ours.require_space("galore-s0", 150)
        with pytest.raises(CheckpointError, match="PEFTLIB_MIRROR=off to train without"):
            ours.require_space("galore-s0", 151)


def test_the_lock_holds_on_the_remote_too(study, remote, open_again, monkeypatch):
    ours, other = Mirror(study, remote), open_again()
    monkeypatch.setattr(mirror, "_RUNNING", {study: ours, other.folder: other})
    refused = pytest.raises(LockedError, match="training qlora")
    with lock.held(study, "training qlora"), refused, lock.held(other.folder, "training galore"):
        pass
    with lock.held(other.folder, "training galore"):
        assert (remote.folder / "lock.json").exists() and (other.folder / "lock.json").exists()
    assert "lock" not in remote.listing()


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
    assert "of run-galore-s1 are only in" in driver.state()
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


def test_a_linked_file_of_a_study_is_copied_as_what_it_leads_to(study, remote, tmp_path):
    (tmp_path / "rows").write_text("rows elsewhere")
    (study / "data" / "train.parquet").unlink()
    (study / "data" / "train.parquet").symlink_to(tmp_path / "rows")
    Mirror(study, remote).copy_once(is_last=True)
    Mirror(tmp_path / "other", remote).restore()
    assert (tmp_path / "other" / "data" / "train.parquet").read_text() == "rows elsewhere"
