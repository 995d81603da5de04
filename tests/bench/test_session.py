"""The queue of session.py: one job a place, a time limit, and a kind that fails is not tried again."""

import json
import shlex
import sys
import time

import session
from typer.testing import CliRunner

from peftlib.cli import app


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
        job("long", "a", "import subprocess; subprocess.run(['/bin/sleep', '60'])", seconds=2),
        job("too_long", "a", "", seconds=10**6),
    ]
    end = time.monotonic() + 600
    results = session.run_all(waiting, [(5, {0})], tmp_path, end, env={"PATH": ""})
    assert list(results.values()) == [0, 3, "others of its kind failed", 4, 0, "out of time", "no time left"]
    assert (tmp_path / "logs" / "good.log").read_text() == "5 1\n"
    assert not (tmp_path / "logs" / "worse.log").exists()


def test_every_row_is_a_setting():
    names = {setting["name"] for setting in session.bench_settings.settings()}
    assert {*session.ROWS} <= names


def test_commands_of_a_file_go_on_after_one_failed(tmp_path):
    (tmp_path / "logs").mkdir()
    rows = [("bad", "exit 1"), ("good", '"$PYTHON" -c "import os; print(os.environ.get(\'PEFTLIB_ROOT\'))"')]
    listed = [{"name": name, "command": command, "seconds": 20} for name, command in rows]
    (tmp_path / "jobs.json").write_text(json.dumps(listed))
    where = {"PATH": "/usr/bin:/bin", "PEFTLIB_ROOT": "kept"}
    end = time.monotonic() + 60
    results = session.run_all(session.given(tmp_path / "jobs.json"), [(0, {0})], tmp_path, end, env=where)
    assert results == {"bad": 1, "good": 0}
    assert (tmp_path / "logs" / "good.log").read_text() == "kept\n"


def test_the_sides_of_the_reference_study_are_commands_that_peftlib_takes():
    listed = session.given(session.HERE.parents[1] / "results" / "reference" / "sides.json")
    assert len({job.name for job in listed}) == len(listed) == 11
    for job in listed:
        words = shlex.split(job.command[-1])
        assert words[:3] == ["$PYTHON", "-m", "peftlib"]
        subcommand = words[3:5] if words[3] == "study" else words[3:4]
        options = {word for word in words if word.startswith("--")}
        said = CliRunner().invoke(app, [*subcommand, "--help"], env={"COLUMNS": "200"}).output
        assert all(option in said for option in options), options
