"""Disks that are full, read-only or failing: each command that writes ends in a named error, and nothing is lost."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import finished_study
import pytest
import torch
from fault_disk import FaultDisk
from safetensors.torch import save_file

from peftlib.cli import main
from peftlib.core import files
from peftlib.core.errors import DiskError, PeftlibError, StudyError, reading, writing
from peftlib.core.study import Study
from peftlib.evaluation.judging import judge
from peftlib.evaluation.judging import verdicts as judge_verdicts
from peftlib.report import build as report

ROOM_KIB = (0, 4, 16, 64, 256, 1024)  # left on the disk


def _judge_anew(root):
    study = Study.existing(finished_study.NAME)
    methods = ("base", "hybrid")
    names, cases = judge.cases_of_study(study, methods, 0, 0)
    verdicts = judge_verdicts.Verdicts(judge_verdicts.path_of(study, methods), names)
    judge.run(cases, verdicts, finished_study.Judge(), log=lambda line: None)
    return sorted((line["id"], line["order"], line["verdict"]) for line in verdicts.by_key.values())


# {name: (what to take away below the study so that the command has something to write, the command)}
WRITERS = {
    "report": ((), finished_study.COMMANDS["report"]),
    "export adapter": ((), finished_study.COMMANDS["export adapter"]),
    "export merged": ((), finished_study.COMMANDS["export merged"]),
    "evaluate": (("predictions/hybrid-s0.jsonl",), finished_study.COMMANDS["evaluate"]),
    "train, resumed": ((), finished_study.COMMANDS["train, resumed"]),
    "train, anew": (("checkpoints/apollo-s0",), finished_study.COMMANDS["train, resumed"]),
    "sweep": (("sweeps",), finished_study.COMMANDS["sweep"]),
    "data": (("data",), finished_study.COMMANDS["data"]),
    "judge": (("judge",), _judge_anew),
    "chat": ((), finished_study.COMMANDS["chat adapter"]),
    "compare": ((), finished_study.COMMANDS["compare"]),
}


class Writer:
    """A command with its study in a folder of its own."""

    def __init__(self, name, pristine, root):
        self.name, self.root = name, root
        taken, self._command = WRITERS[name]
        shutil.copytree(pristine, root / "runs")
        for path in (root / "runs" / finished_study.NAME / part for part in taken):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def attempt(self):
        """('ok', result), ('error', message), or ('raw', exception)."""
        try:
            return "ok", self._command(self.root)
        except PeftlibError as error:
            return "error", str(error)
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            return "raw", error

    def wrong(self, what, expected):
        """What is wrong with one attempt under a fault, in words, or None."""
        kind, found = self.attempt()
        if kind == "raw":
            return f"{self.name}, {what}: RAW {type(found).__name__}: {str(found)[:200]}"
        if kind == "error" and str(self.root) not in found:
            return f"{self.name}, {what}: NO PATH in {found[:200]}"
        if kind == "ok" and found != expected:
            return f"{self.name}, {what}: CHANGED"
        return None

    def wrong_after(self, what, expected):
        """The same of the attempt that follows once the disk is well again."""
        kind, found = self.attempt()
        return None if (kind, found) == ("ok", expected) else f"{self.name}, after {what}: {kind} {str(found)[:200]}"


@contextlib.contextmanager
def _tmpfs(folder, mib):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder, kib_left):
    """Take all of a disk but so much."""
    with open(folder / "filler", "wb") as out:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        with contextlib.suppress(OSError):
            out.write(b"\0" * max(0, free - (kib_left << 10)))


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A small disk that holds studies and temporary files."""
    with _tmpfs(tmp_path / "disk", 48) as folder:
        monkeypatch.setenv("PEFTLIB_ROOT", str(folder / "runs"))
        monkeypatch.setenv("PEFTLIB_MIRROR", "off")
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture
def expected(built_study, tmp_path, monkeypatch):
    """expected(name) -> what a command makes on a disk that is well."""

    def of(name):
        root = tmp_path / "well" / name.replace(" ", "-")
        monkeypatch.setenv("PEFTLIB_ROOT", str(root / "runs"))
        root.mkdir(parents=True)
        kind, found = Writer(name, built_study[0], root).attempt()
        assert kind == "ok", found
        return found

    return of


def _faults_of_the_disk(name, rooms, built_study, expected, disk, monkeypatch):
    result = expected(name)
    monkeypatch.setenv("PEFTLIB_ROOT", str(disk / "runs"))
    found = []
    for what in (*rooms, "read-only"):
        writer = Writer(name, built_study[0], disk)
        if what == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        else:
            _fill(disk, what)
        found.append(writer.wrong(f"{what} KiB left" if what != "read-only" else what, result))
        if what == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        (disk / "filler").unlink(missing_ok=True)
        shutil.rmtree(disk / "out", ignore_errors=True)
        found.append(writer.wrong_after(what, result))
        for path in disk.iterdir():
            shutil.rmtree(path)
    return [said for said in found if said]


@pytest.mark.parametrize("name", ["report", "export adapter", "judge"])
def test_a_sample_of_full_and_read_only_disks_is_named(name, built_study, expected, disk, monkeypatch):
    assert _faults_of_the_disk(name, (4,), built_study, expected, disk, monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_full_and_read_only_disks_are_named_and_nothing_is_lost(name, built_study, expected, disk, monkeypatch):
    assert _faults_of_the_disk(name, ROOM_KIB, built_study, expected, disk, monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "evaluate", "sweep", "data", "export adapter"])
def test_a_fault_at_any_operation_is_named_and_nothing_is_lost(name, built_study, expected, tmp_path, monkeypatch):
    result, found = expected(name), []
    root = tmp_path / "counted"
    root.mkdir()
    monkeypatch.setenv("PEFTLIB_ROOT", str(root / "runs"))
    writer, counted = Writer(name, built_study[0], root), FaultDisk(root)
    with counted.plugged_in():
        writer.attempt()
    for at in range(0, len(counted.operations), max(1, len(counted.operations) // 12)):
        for kind in ("ENOSPC", "EIO"):
            root = tmp_path / f"{kind}-{at}"
            root.mkdir()
            monkeypatch.setenv("PEFTLIB_ROOT", str(root / "runs"))
            writer = Writer(name, built_study[0], root)
            with FaultDisk(root, at=at, kind=kind).plugged_in():
                found.append(writer.wrong(f"{kind} at {at}", result))
            shutil.rmtree(root / "out", ignore_errors=True)
            found.append(writer.wrong_after(f"{kind} at {at}", result))
            shutil.rmtree(root)
    assert [said for said in found if said] == []


@pytest.mark.parametrize(
    "number, way_out",
    [
        (errno.ENOSPC, "free some space there"),
        (errno.EDQUOT, "free some space there"),
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "check the permissions"),
        (errno.EIO, "still mounted and healthy"),
        (errno.ENAMETOOLONG, "a shorter study name"),
        (errno.EISDIR, "move it away first"),
    ],
)
def test_each_error_of_a_disk_has_a_path_and_a_way_out(number, way_out, tmp_path):
    said = rf"x\.json cannot be written \({os.strerror(number)}\): .*{way_out}"
    with pytest.raises(DiskError, match=said) as caught, files.atomic_path(tmp_path / "x.json"):
        raise OSError(number, os.strerror(number))  # as a write has it: without a path
    assert caught.value.errno == number and isinstance(caught.value, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_hides_the_number_is_understood(disk):
    _fill(disk, 0)
    with (
        pytest.raises(DiskError, match=r"model.*cannot be written \(No space left on device\)"),
        writing(disk / "model"),
    ):
        save_file({"w": torch.zeros(1 << 20)}, disk / "model")  # an error of its own, with a number in its text


def test_errors_of_many_files_are_one(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a").symlink_to("/no/such/file")
    with pytest.raises(DiskError, match=r"to cannot be written \(No such file or directory\)"):
        files.copy_tree(tmp_path / "from", tmp_path / "to")


def test_errors_that_are_no_disks_stay_what_they_are(tmp_path):
    for error in (ValueError("a bug"), OSError("no number, as of the network"), KeyError("x")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(StudyError, match="here first"), reading(tmp_path):
        raise StudyError("here first")


def test_the_last_net_names_a_path_and_lets_bugs_through(monkeypatch, capsys):
    monkeypatch.setattr("peftlib.runner.console.call", lambda app, argv: Path("/no/such/place").read_text())
    assert main(["plan"]) == 2 and "/no/such/place cannot be used (No such file" in capsys.readouterr().err
    monkeypatch.setattr("peftlib.runner.console.call", lambda app, argv: {}["a bug"])
    with pytest.raises(KeyError):
        main(["plan"])


def test_a_full_standard_output_is_said(built_study, monkeypatch, tmp_path, capsys):
    shutil.copytree(built_study[0], tmp_path / "runs")
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["compare", finished_study.NAME, finished_study.OTHER]) == 2
    said = capsys.readouterr().err
    assert "error: standard output cannot be used (No space left on device): free some space" in said


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Each ends well, the file is one of theirs, whole, and nothing is left beside it."""
    texts = [str(n) * 200_000 for n in range(4)]

    def write(text):
        for _ in range(10):
            files.write_text(tmp_path / "report.md", text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert (tmp_path / "report.md").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_two_reports_at_once_both_end_well(built_study, monkeypatch, tmp_path):
    shutil.copytree(built_study[0], tmp_path / "runs")
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr("peftlib.report.charts.charts_of", lambda *_: {})
    study = Study.existing(finished_study.NAME)
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(report.build_report, [study] * 3))
    assert len({tuple(r.findings) for r in reports}) == 1
    assert not list(study.folder.rglob("*.writing")) and study.report_path.read_text().startswith("#")
