"""The queue of session.py: one job a place, a time limit, and a kind that fails is not tried again."""

import sys
import time

import session


def job(name, kind, code, seconds=20):
    return session.Job(name, kind, [sys.executable, "-c", code], seconds)


def test_jobs_run_in_order_and_a_kind_that_failed_is_not_tried_again(tmp_path):
    (tmp_path / "logs").mkdir()
    waiting = [
        job("good", "a", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], len(os.sched_getaffinity(0)))"),
        job("bad", "b", "raise SystemExit(3)"),
        job("worse", "b", "print('not reached')"),
        job("later", "a", "raise SystemExit(4)"),
        job("last", "a", "print('a kind that once passed goes on')"),
        job("long", "a", "import time; time.sleep(60)", seconds=1),
        job("too_long", "a", "", seconds=10**6),
    ]
    end = time.monotonic() + 600
    results = session.run_all(waiting, [(5, {0})], tmp_path, end, env={"PATH": ""})
    assert list(results.values()) == [0, 3, "others of its kind failed", 4, 0, "out of time", "no time left"]
    assert (tmp_path / "logs" / "good.log").read_text() == "5 1\n"
    assert not (tmp_path / "logs" / "worse.log").exists()


def test_every_row_is_a_setting_and_every_place_has_cores(monkeypatch):
    names = {setting["name"] for setting in session.bench_settings.settings()}
    assert {*session.ROWS} <= names
    assert all(cores for _, cores in session.places())
