import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import peftlib.storage.lock
from peftlib.core.errors import DiskError, LockedError
from peftlib.storage.claims import Claims
from peftlib.storage.lock import STALE_S, StudyLock, claimed, held

HOLDER = """
import sys, time
from peftlib.storage.lock import StudyLock
with StudyLock(sys.argv[1], "training qlora"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_live_session_is_refused_with_who_holds_it(holder, tmp_path):
    with pytest.raises(LockedError, match=rf"process {holder.pid} \(training qlora, since .*last heartbeat 0 s ago"):
        StudyLock(tmp_path, "evaluating").__enter__()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid


def test_whether_it_is_free_can_be_asked_without_taking_it(holder, tmp_path):
    with pytest.raises(LockedError, match="training qlora"):
        StudyLock(tmp_path, "looking").require_free()
    StudyLock(tmp_path, "looking", name="runner-lock.json").require_free()
    holder.kill()
    holder.wait()
    StudyLock(tmp_path, "looking").require_free()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_session_leaves_a_lock_that_the_next_takes_at_once(holder, tmp_path, is_reaped):
    holder.kill()
    if is_reaped:
        holder.wait()
    else:
        _until(lambda: psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE)
    assert (tmp_path / "lock.json").exists()
    with StudyLock(tmp_path, "training qlora"):
        pass
    assert list(tmp_path.iterdir()) == []


FORKED = """
import os, sys, time, warnings
warnings.simplefilter("ignore")  # from Python 3.12 on of a fork beside threads
from peftlib.storage.lock import StudyLock
with StudyLock(sys.argv[1], "training qlora", settle_s=float(sys.argv[2])):
    os.write(1, b"held\\n" if os.fork() else b"forked\\n")  # whole lines, whoever is first
    time.sleep(60)
"""


@pytest.mark.parametrize("settle_s", [0.0, 0.01])
def test_a_forked_child_that_outlives_its_killed_session_holds_no_lock(tmp_path, settle_s):
    """As a worker of a process pool does. settle_s: as for a folder on Drive, whose lock is kept on this machine's
    disk."""
    process = _start(FORKED, tmp_path, settle_s)
    try:
        # Both have said so: a child that has not run yet has not let go of what it inherited.
        assert sorted(process.stdout.readline() for _ in range(2)) == ["forked\n", "held\n"]
        with pytest.raises(LockedError, match=rf"process {process.pid} \(training qlora"):
            StudyLock(tmp_path, "x", settle_s=settle_s).__enter__()
        process.kill()
        process.wait()
        with StudyLock(tmp_path, "x", settle_s=settle_s) as lock:
            lock.require()
        assert list(tmp_path.iterdir()) == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_another_machines_lock_is_stale_after_a_while_without_a_sign_of_life(tmp_path):
    lock = {"host": "elsewhere", "boot": 1.0, "pid": 7, "started": 2.0, "what": "training", "token": "t", "since": 0.0}
    (tmp_path / "lock.json").write_text(json.dumps(lock | {"heartbeat": time.time() - 30}))
    with pytest.raises(LockedError, match=r"elsewhere, process 7 .* 30 s ago"):
        StudyLock(tmp_path, "x").__enter__()
    (tmp_path / "lock.json").write_text(json.dumps(lock | {"heartbeat": time.time() - 91}))
    with StudyLock(tmp_path, "x"):
        assert json.loads((tmp_path / "lock.json").read_text())["what"] == "x"


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_torn_lock_is_taken_over(tmp_path, content):
    import os

    (tmp_path / "lock.json").write_text(content)
    os.utime(tmp_path / "lock.json", (1.0, 1.0))
    with StudyLock(tmp_path, "x"):
        pass


ELSEWHERE = {"host": "elsewhere", "boot": 1.0, "pid": 7, "started": 2.0, "what": "training", "token": "t", "since": 0.0}


class FakeTime:
    """The module `time`, whose clock only goes on in `sleep`, which then calls `each`."""

    strftime, localtime = staticmethod(time.strftime), staticmethod(time.localtime)

    def __init__(self, each=lambda: None):
        self.now, self.each = time.time(), each

    def time(self):
        return self.now

    monotonic = time

    def sleep(self, seconds):
        self.now += seconds
        self.each()


def test_a_lock_from_the_future_goes_stale_once_it_is_seen_not_to_change(tmp_path, monkeypatch, capsys):
    clock = FakeTime()
    monkeypatch.setattr(peftlib.storage.lock, "time", clock)
    (tmp_path / "lock.json").write_text(json.dumps(ELSEWHERE | {"heartbeat": clock.now + 3 * 86400}))
    before = clock.now
    with StudyLock(tmp_path, "x"):
        assert json.loads((tmp_path / "lock.json").read_text())["what"] == "x"
    assert STALE_S <= clock.now - before < STALE_S + 2
    assert "4,320 minutes ahead of this machine's clock: waiting up to 90 s" in capsys.readouterr().out


def test_a_session_whose_clock_is_ahead_is_not_robbed(tmp_path, monkeypatch):
    def beat():
        (tmp_path / "lock.json").write_text(json.dumps(ELSEWHERE | {"heartbeat": clock.now // 15 * 15 + 86400}))

    clock = FakeTime(beat)
    monkeypatch.setattr(peftlib.storage.lock, "time", clock)
    beat()
    before = clock.now
    for wanted in (StudyLock(tmp_path, "x").__enter__, StudyLock(tmp_path, "x").require_free):
        with pytest.raises(LockedError, match=r"elsewhere, process 7 \(training.*last heartbeat 0 s ago"):
            wanted()
    assert clock.now - before < 40  # two signs of life, not two waits
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "t"


def test_a_lock_a_little_ahead_is_a_live_one_and_says_when_it_clears(tmp_path):
    (tmp_path / "lock.json").write_text(json.dumps(ELSEWHERE | {"heartbeat": time.time() + 20}))
    with pytest.raises(LockedError, match=rf"0 s ago.*again in ({STALE_S + 20:.0f}|{STALE_S + 19:.0f}) s$"):
        StudyLock(tmp_path, "x").__enter__()


def test_a_process_here_that_is_gone_is_not_waited_for_whatever_its_clock_said(holder, tmp_path):
    owner = json.loads((tmp_path / "lock.json").read_text())
    holder.kill()
    holder.wait()
    (tmp_path / "lock.json").write_text(json.dumps(owner | {"heartbeat": time.time() + 1e6}))
    with StudyLock(tmp_path, "x"):
        pass


ODD = [
    "", "[]", "[" * 100_000, "null", "3", '"x"', "{}", "\x00" * 50, '{"token": "t"}', '{"token": "t", "host": "h"}',
    *(
        json.dumps(ELSEWHERE | {"heartbeat": time.time()} | change)
        for change in (
            {"heartbeat": math.nan}, {"heartbeat": math.inf}, {"heartbeat": 1e300}, {"heartbeat": 10**400},
            {"heartbeat": "now"}, {"heartbeat": None}, {"heartbeat": True}, {"heartbeat": -1}, {"since": 1e300},
            {"since": "x"}, {"since": None}, {"boot": []}, {"boot": math.nan},
            {"pid": "7"}, {"pid": -1}, {"pid": 2**80}, {"pid": 7.5}, {"pid": None}, {"host": 3}, {"host": None},
            {"host": ["h"]}, {"token": 4}, {"token": None}, {"what": {}},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("is_new", [False, True])
def test_an_odd_lock_is_damaged_and_taken_over_with_a_line(tmp_path, monkeypatch, capsys, is_new):
    clock = FakeTime()
    monkeypatch.setattr(peftlib.storage.lock, "time", clock)
    mtime = clock.now + 86400 if is_new else 1.0
    for number, content in enumerate(ODD):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "lock.json").write_bytes(content.encode())
        os.utime(folder / "lock.json", (mtime, mtime))
        StudyLock(folder, "looking").require_free()
        (folder / "lock.json").write_bytes(b"\xff" + content.encode())
        os.utime(folder / "lock.json", (mtime, mtime))
        with StudyLock(folder, "x"):
            assert json.loads((folder / "lock.json").read_text())["what"] == "x"
        assert list(folder.iterdir()) == [], content
        assert capsys.readouterr().out.count(f"{folder / 'lock.json'} is damaged and names no session") == 2


def test_what_stands_in_the_locks_place_and_is_none_is_named(tmp_path):
    (tmp_path / "lock.json").mkdir()
    with pytest.raises(LockedError, match=r"lock\.json cannot be read as a lock: .*move it away"):
        StudyLock(tmp_path, "x").__enter__()
    assert (tmp_path / "lock.json").is_dir()


def test_a_folder_that_cannot_be_made_is_named_as_such():
    with pytest.raises(DiskError, match="/proc/nothing.* cannot be written"):
        StudyLock(Path("/proc/nothing/study"), "x").__enter__()


def test_a_folder_that_goes_with_its_lock_is_made_again(tmp_path, monkeypatch):
    folder, real = tmp_path / "work", os.open

    def gone_once(path, *given, **named):
        monkeypatch.setattr(os, "open", real)
        folder.rmdir()
        return real(path, *given, **named)

    monkeypatch.setattr(os, "open", gone_once)
    with StudyLock(folder, "x"):
        assert (folder / "lock.json").exists()


def test_it_beats_and_notices_who_took_over(tmp_path):
    with StudyLock(tmp_path, "x", heartbeat_s=0.05) as lock:
        first = json.loads((tmp_path / "lock.json").read_text())["heartbeat"]
        _until(lambda: json.loads((tmp_path / "lock.json").read_text())["heartbeat"] > first)
        lock.require()
        other = {
            "host": "elsewhere",
            "pid": 7,
            "what": "training",
            "token": "t",
            "since": 0.0,
            "heartbeat": time.time(),
        }
        (tmp_path / "lock.json").write_text(json.dumps(other))
        _until(lambda: lock._taker is not None)
        with pytest.raises(LockedError, match="elsewhere, process 7 .* has taken over"):
            lock.require()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "t"  # the other's lock stays


def test_of_many_that_want_a_stale_lock_one_gets_it(tmp_path):
    (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "heartbeat": 0.0, "token": "t"}))
    got, refused, done = [], [], threading.Event()

    def want():
        try:
            with StudyLock(tmp_path, "x"):
                got.append(1)
                done.wait(20)
        except LockedError as error:
            refused.append(error)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    _until(lambda: len(got) + len(refused) == 8)
    done.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7


def _until(is_true, seconds=20):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def _start(code, *words):
    root = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(
        argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_claim_lets_its_holder_work_on_that_run_and_keeps_sessions_out(tmp_path):
    with Claims(tmp_path).take("qlora-s0") as claim, claimed(tmp_path, "qlora-s0", claim.require):
        with held(tmp_path, "training", run="qlora-s0") as require:
            require()
        with (
            pytest.raises(LockedError, match=r"study .* has running workers: qlora-s0 by .* \(working on qlora-s0"),
            held(tmp_path, "training", run="full-s0"),
        ):
            pass
        assert not (tmp_path / "lock.json").exists()
    assert Claims(tmp_path).owners() == {}
    with held(tmp_path, "training", run="qlora-s0"):
        assert (tmp_path / "lock.json").exists()


def test_work_under_a_claim_ends_once_it_is_lost(tmp_path):
    def lost():
        raise LockedError("another worker has taken over")

    with claimed(tmp_path, "qlora-s0", lost), pytest.raises(LockedError), held(tmp_path, "x", run="qlora-s0"):
        pass


def test_of_two_machines_that_start_at_once_without_system_locks_one_is_refused(tmp_path, monkeypatch):
    first, second = StudyLock(tmp_path, "first"), StudyLock(tmp_path, "second")
    for lock in (first, second):  # a network folder that knows no system locks
        monkeypatch.setattr(lock, "_acquire_local", lambda: None)
        monkeypatch.setattr(lock, "_release_local", lambda: None)
    # The other machine writes its lock after this one has seen that there is none.
    monkeypatch.setattr(second, "_clear_if_left_behind", lambda: first._write_first())
    with pytest.raises(LockedError, match="in use by .*first"):
        second.__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock.json"]


def test_a_file_system_without_hard_links_is_locked_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(PermissionError(1, "no hard links here")))
    with StudyLock(tmp_path, "work"):
        assert json.loads((tmp_path / "lock.json").read_text())["what"] == "work"
    assert list(tmp_path.iterdir()) == []
