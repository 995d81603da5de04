import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from peftlib.errors import LockedError
from peftlib.lock import StudyLock, child_environment, held

HOLDER = """
import sys, time
from peftlib.lock import StudyLock, child_environment, held
with StudyLock(sys.argv[1], "training qlora"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_live_session_is_refused_with_who_holds_it(holder, tmp_path):
    with pytest.raises(LockedError, match=rf"process {holder.pid} \(training qlora, since .*last sign of life 0 s ago"):
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


CHILD = """
import sys, time
from peftlib.lock import held
with held(sys.argv[1], "training", run=sys.argv[2]) as require:
    print("in", flush=True)
    while True:
        require()
        time.sleep(0.2)
"""


def _start(code, *words, env=None):
    root = Path(__file__).resolve().parent.parent
    argv = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(
        argv, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_children_work_under_their_parents_lock_and_a_second_session_does_not(tmp_path):
    with held(tmp_path, "reference"):
        env = {**os.environ, **child_environment(tmp_path)}
        first, second = (_start(CHILD, tmp_path, run, env=env) for run in ("qlora-s0", "galore-s0"))
        try:
            assert [process.stdout.readline() for process in (first, second)] == ["in\n", "in\n"]
            stranger = _start(CHILD, tmp_path, "full-s0")
            assert "in use by" in stranger.communicate(timeout=60)[0] and stranger.returncode
            twin = _start(CHILD, tmp_path, "qlora-s0", env=env)
            assert "in use by" in twin.communicate(timeout=60)[0] and twin.returncode
            assert first.poll() is None and second.poll() is None
        finally:
            for process in (first, second):
                process.kill()
                process.communicate()


def test_children_stop_once_another_session_has_the_study(tmp_path):
    with held(tmp_path, "reference"):
        env = {**os.environ, **child_environment(tmp_path)}
        process = _start(CHILD, tmp_path, "qlora-s0", env=env)
        assert process.stdout.readline() == "in\n"
    with StudyLock(tmp_path, "another session"):
        assert "holds" in process.communicate(timeout=60)[0] and process.returncode
    late = _start(CHILD, tmp_path, "qlora-s0", env=env)  # its parent's lock is gone: it takes none of its own
    assert "holds" in late.communicate(timeout=60)[0] and late.returncode


def test_only_the_holder_lets_children_in(holder, tmp_path):
    with pytest.raises(LockedError, match="not this process's"):
        child_environment(tmp_path)
