"""Child processes side by side: plain Python ones, which need no model."""

import itertools
import sys
import time

import pytest

from peftlib.runner import process_pool
from peftlib.runner.process_pool import Task

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
)


def child(name, code, **env):
    return Task(name, (sys.executable, "-c", code), env)


@pytest.fixture
def played():
    """played(tasks, **settings) -> (reason, {name: Ending}, lines) of running them."""

    def play(tasks, *, workers=({},), why_stop=lambda lines: None, **settings):
        waiting, endings, lines = list(tasks), {}, []
        reason = process_pool.run(
            lambda: waiting.pop(0) if waiting else None,
            lambda ending: endings.update({ending.task.name: ending}),
            workers=workers,
            why_stop=lambda: why_stop(lines),
            log=lines.append,
            **settings,
        )
        return reason, endings, lines

    return play


def test_lines_have_names_in_front_and_a_failing_child_stops_no_other(played):
    tasks = [
        child("a-s0", "print('one'); raise SystemExit(3)"),
        child("b-s0", "import os; print(os.environ['X'])", X="y"),
    ]
    reason, endings, lines = played(tasks)
    assert reason is None and [endings[n].code for n in ("a-s0", "b-s0")] == [3, 0]
    assert "a-s0 | one" in lines and "b-s0 | y" in lines and endings["a-s0"].tail == "one"
    assert not endings["a-s0"].is_cut


def test_each_place_has_one_child_at_a_time(played):
    code = "import os, time; print(os.environ['GPU'], time.time()); time.sleep(0.5); print('end', time.time())"
    _, endings, _ = played([child(f"r{n}", code) for n in range(4)], workers=[{"GPU": "0"}, {"GPU": "1"}])
    spans = {"0": [], "1": []}
    for ending in endings.values():
        (place, start), (_, end) = (line.split() for line in ending.tail.splitlines())
        spans[place].append((float(start), float(end)))
    assert all(spans.values())
    for found in map(sorted, spans.values()):
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(found))


def test_a_reason_to_stop_asks_the_children_and_kills_the_deaf(played):
    def why(lines):
        return "time is over" if "deaf | deaf" in lines and "good | up" in lines else None

    good = child("good", "import time; print('up', flush=True); time.sleep(60)")
    tasks = [good, child("deaf", STUBBORN), child("never", "print('started')")]
    started = time.monotonic()
    reason, endings, _ = played(tasks, workers=[{}, {}], why_stop=why, grace_s=1.0)
    assert reason == "time is over" and time.monotonic() - started < 50
    assert endings["good"].code == -15 and endings["deaf"].code == -9
    assert all(ending.is_cut for ending in endings.values()) and "never" not in endings


def test_silence_is_broken(played):
    _, _, lines = played([child("quiet", "import time; time.sleep(2)")], heartbeat_s=0.5)
    assert any(line.startswith("at work: quiet (") for line in lines)


def test_no_child_is_left_when_the_caller_fails(played, tmp_path):
    mark = tmp_path / "alive"
    code = f"import time, pathlib; print('up', flush=True); time.sleep(3); pathlib.Path({str(mark)!r}).write_text('x')"

    def why(lines):
        if "slow | up" in lines:
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        played([child("slow", code)], why_stop=why)
    time.sleep(3.5)
    assert not mark.exists()
