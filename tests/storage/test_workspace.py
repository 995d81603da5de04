"""What is made for a place has one maker at a time, and a killed one leaves nothing that stays and takes nothing
away."""

import subprocess
import sys
from pathlib import Path

import pytest

from peftlib.core.errors import LockedError
from peftlib.storage.workspace import Workspace

MAKER = """
import os, signal, sys, time
from peftlib.storage import workspace
folder, target, when = sys.argv[1:]
calls = []

def rename(old, new, real=workspace.rename):
    calls.append(new)
    if when == "first" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
    if when == "second" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

workspace.rename = rename
made = workspace.Workspace(os.path.join(folder, target), "exporting")
with made as new:
    (new / "weights").write_text("the new ones")
    print("made", flush=True)
    if when == "never":
        time.sleep(60)
    made.replace()
"""


def start(folder, target, when="never"):
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", MAKER, folder, target, when]
    process = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    return process


@pytest.fixture
def at_work(tmp_path):
    """A process that makes something for tmp_path/out."""
    process = start(tmp_path, "out")
    yield process
    process.kill()
    process.communicate()


def making(folder, target="out"):
    told = []
    return Workspace(folder / target, "again", log=told.append), told


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_made_comes_into_its_place_and_nothing_stays_beside(tmp_path):
    for text in ("one", "two"):
        made, told = making(tmp_path)
        with made as new:
            (new / "weights").write_text(text)
            made.replace()
        assert names(tmp_path) == ["out"] and told == []
        assert (tmp_path / "out" / "weights").read_text() == text


def test_a_second_maker_for_one_place_is_refused_by_name(at_work, tmp_path):
    made, told = making(tmp_path)
    with pytest.raises(
        LockedError, match=rf"the export to .*out is in use by .*process {at_work.pid} \(exporting, since"
    ):
        made.__enter__()
    made, told = making(tmp_path, "other")
    with made as new:
        (new / "weights").write_text("other")
        made.replace()
    assert at_work.poll() is None and told == [] and len(list(tmp_path.glob(".exporting-*/new/weights"))) == 1


def test_what_a_killed_maker_left_is_removed_by_the_next(at_work, tmp_path):
    at_work.kill()
    at_work.wait()
    (left,) = tmp_path.glob(".exporting-*")
    assert (left / "new" / "weights").exists()
    made, told = making(tmp_path)
    with made:
        assert told == [f"removed {left}, left by an interrupted export"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_kill_while_it_is_replaced_leaves_one_whole(tmp_path, when):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("the old ones")
    assert start(tmp_path, "out", when).wait(60) < 0
    made, told = making(tmp_path)
    with made:
        assert (tmp_path / "out" / "weights").read_text() == ("the old ones" if when == "first" else "the new ones")
    assert names(tmp_path) == ["out"]
    assert (f"restored the earlier export as {tmp_path / 'out'}: an interrupted export had moved it" in told) == (
        when == "first"
    )


def test_what_came_into_its_place_meanwhile_stays_and_so_does_the_earlier_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("the old ones")
    start(tmp_path, "out", "first").wait(60)
    (tmp_path / "out").write_text("a file of somebody's")
    made, told = making(tmp_path)
    with made:
        pass
    (earlier,) = tmp_path.glob("out.before-*")
    assert (earlier / "weights").read_text() == "the old ones" and str(earlier) in told[1]
    assert (tmp_path / "out").read_text() == "a file of somebody's" and len(names(tmp_path)) == 2


def test_a_rename_that_fails_puts_the_earlier_one_back(tmp_path, monkeypatch):
    from peftlib.storage import workspace

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("the old ones")
    real = workspace.rename

    def fail(old, new):
        if old.name == "new":
            raise OSError("no")
        real(old, new)

    monkeypatch.setattr(workspace, "rename", fail)
    made, _ = making(tmp_path)
    with pytest.raises(OSError, match="no"), made:
        made.replace()
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "weights").read_text() == "the old ones"


def test_names_that_are_odd_have_a_workspace_too(tmp_path):
    for target in ("x" * 255, "\udcff", "a b\n"):
        made, _ = making(tmp_path, target)
        with made as new:
            (new / "weights").write_text("x")
            made.replace()
        assert (tmp_path / target / "weights").exists()
