"""Commands side by side: plain Python ones in the place of peftlib's, which need no model."""

import itertools
import sys
import time
import types

import pytest

from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError
from peftlib.runner import executors
from peftlib.runner.executors import Local, Ray
from peftlib.runner.suite_jobs import Settings

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """local(workers) -> a Local whose `peftlib WORD` runs the word as Python code."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$3"\n')  # of: python -m peftlib CODE --attended
    script.chmod(0o755)
    made = []

    def make(*workers):
        monkeypatch.setattr(executors.sys, "executable", str(script))
        made.append(Local(workers or ({},)))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def played(executor, tasks, seconds=30.0):
    """{name: Ending} of {name: code}, each started as soon as there is room."""
    waiting, endings, end = dict(tasks), {}, time.monotonic() + seconds
    while len(endings) < len(tasks):
        while waiting and executor.has_room:
            name = next(iter(waiting))
            executor.start(name, (waiting.pop(name),))
        endings |= {ending.name: ending for ending in executor.ended()}
        assert time.monotonic() < end
        time.sleep(0.02)
    return endings


def test_endings_tell_code_and_last_line_and_a_failing_command_stops_no_other(local):
    codes = {
        "a-s0": "print('one'); print('two'); raise SystemExit(3)",
        "b-s0": "import os; print(os.environ['X'])",
        "c-s0": "import os; os.kill(os.getpid(), 9)",
        "d-s0": "1 / 0",
    }
    found = played(local({"X": "y"}), codes)
    assert {name: ending[1:3] for name, ending in found.items()} == {
        "a-s0": (3, "two"),
        "b-s0": (0, "y"),
        "c-s0": (-9, ""),
        "d-s0": (1, "ZeroDivisionError: division by zero"),
    }


def test_each_place_has_one_command_at_a_time(local):
    code = "import os, time; s = time.time(); time.sleep(0.4); print(os.environ['GPU'], s, time.time())"
    spans = {"0": [], "1": []}
    for ending in played(local({"GPU": "0"}, {"GPU": "1"}), {f"r{n}": code for n in range(4)}).values():
        place, *span = ending.last.split()
        spans[place].append(tuple(map(float, span)))
    assert all(spans.values())
    for found in map(sorted, spans.values()):
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(found))


def test_stopping_asks_the_commands_and_kills_the_deaf(local, tmp_path, monkeypatch):
    up = tmp_path / "up"
    good = f"import time; open({str(up)!r}, 'w').close(); time.sleep(60)"
    executor = local({}, {})
    executor.start("good", (good,))
    executor.start("deaf", (STUBBORN.replace("print(", f"open({str(up) + '2'!r}, 'w').close(); print("),))
    while not (up.exists() and (tmp_path / "up2").exists()):
        time.sleep(0.02)
    monkeypatch.setattr(executors, "GRACE_S", 1.0)
    executor.stop()
    found, end = {}, time.monotonic() + 20
    while len(found) < 2 and time.monotonic() < end:
        found |= {ending.name: ending for ending in executor.ended()}
    assert found["good"].code == -15 and (found["deaf"].code, found["deaf"].last) == (-9, "deaf")


def test_no_command_is_left_once_the_executor_is_closed(local, tmp_path):
    up, alive = tmp_path / "up", tmp_path / "alive"
    executor = local()
    executor.start("slow", (f"import time; open({str(up)!r}, 'w'); time.sleep(2); open({str(alive)!r}, 'w')",))
    while not up.exists():
        time.sleep(0.02)
    executor.close()
    time.sleep(2.5)
    assert not alive.exists()


def test_without_ray_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--executor ray needs Ray.* pip install -e '.*\[cluster\]'"):
        Ray(resolve("demo"), Settings({}, address="auto"))


@pytest.mark.parametrize("moment", ["sleep", "ended"])
def test_a_cancelled_task_has_its_command_save_whenever_the_interrupt_comes(monkeypatch, moment):
    said, ending = [], executors.Ending("", 3, "saved", 1.0)

    def interrupted_once(*_):
        if not said:
            said.append("interrupted")
            raise KeyboardInterrupt

    class Stub:
        def __init__(self, workers):
            self.start = lambda name, words: None
            self.stop = lambda: said.append("asked to save")
            self.close = lambda: said.append("closed")

        def ended(self):
            if moment == "ended":
                interrupted_once()
            return [ending]

    ray = types.SimpleNamespace(get_runtime_context=lambda: types.SimpleNamespace(get_node_id=lambda: "n1"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(executors, "Local", Stub)
    if moment == "sleep":
        monkeypatch.setattr(executors.time, "sleep", interrupted_once)
    assert executors._task(["study"], {})[:4] == (3, "saved", 1.0, "n1")
    assert said == ["interrupted", "asked to save", "closed"]
