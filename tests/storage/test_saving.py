import errno
import random
import threading

import numpy as np
import pytest
import torch

from peftlib.core import session
from peftlib.core.config import resolve
from peftlib.core.env import generator_states, set_generator_states
from peftlib.core.errors import CheckpointError
from peftlib.storage.checkpoint import Checkpoint, CheckpointDir
from peftlib.storage.saver import Saver


def saver(folder, **settings):
    lines = []
    settings = {"every": 1, "stall_share": 0.0, "is_background": False, "log": lines.append, **settings}
    return Saver(CheckpointDir(folder, keep=1), **settings), lines


def checkpoint(weights):
    return Checkpoint({"w": weights}, {"state": {0: {"m": weights}}, "param_groups": []}, {"history": [1]})


def newest(folder):
    return CheckpointDir(folder, keep=1).newest()[0]


def test_a_background_save_holds_what_was_there_when_it_began(tmp_path, monkeypatch):
    ours, _ = saver(tmp_path, is_background=True)
    may_write, real = threading.Event(), CheckpointDir.save
    monkeypatch.setattr(CheckpointDir, "save", lambda *args: may_write.wait(20) and real(*args))
    weights = torch.zeros(3)
    given = checkpoint(weights)
    ours.save(1, given)
    weights.fill_(5.0)
    given.state["history"].append(2)
    may_write.set()
    ours.wait()
    found = newest(tmp_path)
    assert torch.equal(found.weights["w"], torch.zeros(3)) and torch.equal(
        found.optimizer["state"][0]["m"], torch.zeros(3)
    )
    assert found.state["history"] == [1]


@pytest.mark.parametrize("is_background", [False, True])
def test_a_disk_that_refuses_is_said_and_only_a_last_save_fails(tmp_path, monkeypatch, is_background):
    ours, lines = saver(tmp_path, is_background=is_background)
    ours.save(1, checkpoint(torch.ones(1)), must=True)
    with monkeypatch.context() as full:
        error = OSError(errno.ENOSPC, "No space left on device")
        full.setattr("peftlib.storage.checkpoint.write_stream", lambda *a, **k: (_ for _ in ()).throw(error))
        ours.save(2, checkpoint(torch.ones(1)))
        ours.wait()
        with pytest.raises(CheckpointError, match="step 3 .*No space left.*step-000001 is kept"):
            ours.save(3, checkpoint(torch.ones(1)), must=True)
    ours.save(4, checkpoint(torch.full((1,), 4.0)))
    ours.wait()
    assert float(newest(tmp_path).weights["w"]) == 4.0
    if not is_background:
        assert "training continues and will retry" in lines[0]


FAULTS = [RuntimeError("planted"), MemoryError("planted"), SystemExit("planted"), OSError(errno.EIO, "planted")]


def fail_with(monkeypatch, is_background, error):
    """Let the part of a save that runs in the thread fail, once the returned event is set."""
    may_fail = threading.Event()

    def fail(*args):
        may_fail.wait(20)
        raise error

    monkeypatch.setattr(CheckpointDir, "save" if is_background else "finish", fail)
    return may_fail


@pytest.mark.parametrize("is_background", [False, True])
@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_save_that_has_to_be_never_returns_as_if_it_was_whatever_the_thread_raised(
    tmp_path, monkeypatch, is_background, error
):
    ours, _ = saver(tmp_path, is_background=is_background)
    ours.save(1, checkpoint(torch.ones(1)), must=True)
    fail_with(monkeypatch, is_background, error).set()
    with pytest.raises(CheckpointError, match=rf"step 2 could not be written \({type(error).__name__}.*planted"):
        ours.save(2, checkpoint(torch.ones(1)), must=True)
    assert ours.saved.step == 1 and newest(tmp_path).state["history"] == [1]


@pytest.mark.parametrize("is_background", [False, True])
@pytest.mark.parametrize("error", FAULTS[:2], ids=lambda error: type(error).__name__)
def test_an_older_error_is_told_at_the_next_save_or_at_the_end_and_spoils_no_good_one(
    tmp_path, monkeypatch, is_background, error
):
    ours, lines = saver(tmp_path, is_background=is_background)
    for step in (1, 3):
        with monkeypatch.context() as patched:
            may_fail = fail_with(patched, is_background, error)
            ours.save(step, checkpoint(torch.ones(1)))
            may_fail.set()
            ours.wait()
        if step == 1:
            ours.save(2, checkpoint(torch.ones(1)), must=True)
            assert ours.saved.step == 2
    assert len(lines) == 1 and "step 1 could not be written" in lines[0] and "planted" in lines[0]
    ours.close()
    assert len(lines) == 2 and "step 3 could not be written" in lines[1]
    ours.close()
    assert len(lines) == 2


@pytest.mark.parametrize("is_background", [False, True])
def test_a_thread_that_cannot_be_started_is_told_and_training_goes_on(tmp_path, monkeypatch, is_background):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    ours, lines = saver(tmp_path, is_background=is_background)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    ours.save(1, checkpoint(torch.ones(1)))
    ours.close()
    assert len(lines) == 1 and "can't start new thread" in lines[0]
    with pytest.raises(CheckpointError, match="can't start new thread"):
        ours.save(2, checkpoint(torch.ones(1)), must=True)


def test_the_next_save_waits_until_the_last_ones_stall_is_paid_back(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("peftlib.storage.saver.time.monotonic", lambda: now[0])
    ours, _ = saver(tmp_path, every=2, stall_share=0.02, expected_bytes=2**30)
    monkeypatch.setattr(CheckpointDir, "begin", lambda *args: now.__setitem__(0, now[0] + 3.0))
    monkeypatch.setattr(CheckpointDir, "finish", lambda *args: None)
    ours.start(0)
    now[0] += 49.0
    assert not ours.is_due(2)  # a first save of 1 GiB is taken to hold training up for a second
    now[0] += 2.0
    assert not ours.is_due(1) and ours.is_due(2)
    ours.save(2, checkpoint(torch.ones(1)))
    assert ours.stall_seconds == 3.0
    now[0] += 149.0
    assert not ours.is_due(50)
    now[0] += 2.0
    assert ours.is_due(50) and not ours.is_due(3)


def test_generators_go_on_where_they_were():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))

    random.gauss(0, 1), np.random.randn()  # leaves a second normal number waiting in each
    kept = generator_states()
    first = draw()
    draw()
    set_generator_states(torch.load(_saved(kept), weights_only=True))
    assert draw() == first


def _saved(states):
    import io

    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return buffer


def test_what_ends_a_session(monkeypatch):
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    assert session.host() == "" and session.seconds_left() is None
    assert 0 < session.seconds_left(100.0) <= 100 * 3600
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert session.host() == "kaggle"  # whose image has both
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.setattr(session.psutil.Process, "create_time", lambda self: session.time.time() - 11.95 * 3600)
    assert session.host() == "colab" and session.seconds_left() < 0
    assert session.Deadline(resolve("t4")).passed() == "this session's 12 hours (see session_hours) end in 3 minutes"
    assert session.Deadline(resolve("t4", session_hours=24.0)).passed() is None
    assert (
        session.Deadline(resolve("t4", session_hours=24.0, max_seconds=1e-9)).passed() == "max_seconds=1e-09 is reached"
    )
    monkeypatch.setattr(session.psutil.Process, "create_time", lambda self: session.time.time() - 12.1 * 3600)
    assert session.Deadline(resolve("t4")).passed() is None  # a paid session lasts longer, and one that says so ends
    told = session.Deadline(resolve("t4", session_hours=12.0)).passed()
    assert told == "this session's 12 hours (see session_hours) end in 0 minutes"
