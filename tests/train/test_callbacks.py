import dataclasses

import pytest

from peftlib.notebook import training_panel as panel
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.train import callbacks
from peftlib.train.loop import TrainingRun


class Looker(callbacks.Callback):
    """Keeps what it is shown; asks for numbers after every step, and to stop after one."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def wants_numbers(self):
        return True

    def show(self, snapshot):
        self.seen.append(snapshot)

    def stop_asked(self):
        return self.seen[-1].step == self.stop_at


def watched(study, *watching):
    """(record, lines of the log) of a run with callbacks."""
    lines = []
    return TrainingRun(study, "qlora", log=lines.append).train(watching), lines


def test_a_watcher_sees_each_step_it_wants_and_the_end(make_study):
    looker = Looker()
    record, lines = watched(make_study(logging_steps=100, eval_steps=4, save_steps=2), looker)
    assert [seen.step for seen in looker.seen] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [seen.status for seen in looker.seen] == ["running"] * 7 + ["ok"]
    assert sum("loss" in line and "validation" not in line for line in lines) == 1  # its wishes bring no log lines
    *_, running, last = looker.seen
    assert list(last.history) == record["history"] and list(last.valid_history) == record["valid_history"]
    assert (running.planned_steps, running.method, running.seed, running.precision) == (6, "qlora", 0, "fp32")
    assert running.saved_step in (2, 4) and running.saved_at > 0 and running.copy is None
    assert 0 < running.memory_bytes < running.memory_limit_bytes
    assert running.tokens_per_second > 0 and looker.seen[0].tokens_per_second is None
    assert looker.seen[1].seconds_left == pytest.approx(5 * record["history"][0]["seconds"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.step = 0


def test_asked_to_stop_it_saves_the_step_at_hand_and_goes_on_to_the_same_end(make_study):
    straight, _ = watched(make_study(study="straight"))
    study = make_study()
    record, lines = watched(study, Looker(stop_at=3))
    assert (record["status"], record["steps"]) == ("stopped", 3)
    assert lines[-1] == "stopped after step 3 of 6 (stop requested) and saved: run again to resume"
    kept, _ = CheckpointDir(study.checkpoint_dir("qlora", 0), keep=1).newest()
    assert kept.state["progress"]["step"] == 3
    looker = Looker()
    again, _ = watched(study, looker)
    assert (looker.seen[0].step, looker.seen[0].saved_step, looker.seen[0].saved_at) == (3, 3, None)
    assert [e["loss"] for e in again["history"]] == [e["loss"] for e in straight["history"]]


@pytest.mark.parametrize("method", ["wants_numbers", "show", "stop_asked"])
def test_a_watcher_that_raises_is_told_once_and_dropped(make_study, method):
    broken, whole = Looker(), Looker()

    def fail(*args):
        raise RuntimeError("no such colour")

    setattr(broken, method, fail)
    record, lines = watched(make_study(logging_steps=100), broken, whole)
    assert record["status"] == "ok" and broken.is_dropped and not whole.is_dropped
    assert [line for line in lines if "Looker" in line] == [
        "Looker failed (RuntimeError: no such colour) and was disabled; training continues"
    ]
    assert whole.seen[-1].status == "ok" and len(whole.seen) == 8


def test_a_run_that_fails_shows_so(make_study):
    looker = Looker()
    run = TrainingRun(make_study(), "qlora", log=lambda line: None)
    step = run._step
    run._step = lambda: step() if run.progress.step < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train([looker])
    assert looker.seen[-1].status == "failed" and looker.seen[-1].step == 2
    assert "failed after step 2 of 6" in panel.summary(looker.seen[-1])


def test_outside_a_notebook_there_are_plain_lines_and_no_panel(make_study, monkeypatch):
    monkeypatch.setattr(panel, "Panel", lambda *args: pytest.fail("a panel was made"))
    lines = []
    record = panel.train_live(TrainingRun(make_study(), "qlora", log=lines.append))
    assert record["status"] == "ok" and sum(line.startswith("step ") for line in lines) >= 6


def test_the_line_tells_speed_what_is_left_and_what_was_skipped():
    history = [{"step": s, "loss": 2.0, "learning_rate": 1e-3, "tokens": 100, "seconds": 2.0} for s in (1, 2)]
    done = type("Done", (), {"step": 2, "skipped_steps": 1})
    line = callbacks.log_line({"history": history}, done, 102)
    assert line == "step 2/102  loss 2.0000  lr 1.00e-03  50 tok/s  ETA 3:20  skipped 1"


@pytest.fixture
def snapshot():
    entry = {"step": 12, "loss": 2.5, "learning_rate": 1e-3, "tokens": 10, "seconds": 1.0}
    return callbacks.Snapshot(
        status="running",
        method="galore",
        seed=1,
        step=12,
        planned_steps=48,
        history=(entry,),
        valid_history=(),
        tokens_per_second=1234.4,
        seconds_left=75.0,
        skipped_steps=2,
        memory_bytes=6 << 30,
        reserved_bytes=15 << 30,
        peak_memory_bytes=7 << 30,
        memory_limit_bytes=16 << 30,
        saved_step=10,
        saved_at=None,
        is_saving=True,
        copy="NOT on <Drive> yet: data",
        device="Tesla T4",
        precision="fp16",
    )


def test_the_facts_are_words_with_units(snapshot):
    assert panel.facts(snapshot) == {
        "speed": "1,234 tokens/s",
        "time left": "1:15",
        "loss": "2.5000",
        "memory": "6.00 of 16.0 GiB, 15.00 reserved, peak 7.00",
        "checkpoint": "step 10, from an earlier session (a new one is being written)",
        "copy": "NOT on <Drive> yet: data",
        "precision": "fp16 on Tesla T4",
        "skipped steps": "2 (fp16 overflow)",
    }


def test_the_state_is_escaped_and_its_bars_tell_progress_and_a_card_that_is_nearly_full(snapshot):
    shown = panel.state(snapshot)
    assert "&lt;Drive&gt;" in shown and "<Drive>" not in shown
    assert "width:25.0%;height:100%;background:#d55e00" in shown  # 12 of 48 steps in the method's colour
    assert "width:93.8%" in shown  # reserved
    roomy = dataclasses.replace(snapshot, reserved_bytes=7 << 30, method="qlora")
    assert "#d55e00" not in panel.state(roomy)


@pytest.mark.parametrize(
    "status, words",
    [
        ("ok", "finished, 12 steps"),
        ("stopped", "stopped at step 12 of 48; run this cell again to resume from step 10"),
        ("failed", "failed after step 12 of 48; the checkpoint of step 10 is kept"),
    ],
)
def test_what_stays_is_the_last_state_and_every_line_in_html_and_in_text(snapshot, status, words):
    left = panel.ending(dataclasses.replace(snapshot, status=status), ["line 1 <b>", "line 2"])
    assert set(left) == {"text/html", "text/plain"}
    assert words in left["text/html"] and words in left["text/plain"]
    assert "line 1 &lt;b&gt;\nline 2" in left["text/html"] and "line 1 <b>\nline 2" in left["text/plain"]
    assert "time left" not in left["text/plain"]


def test_drawing_waits_longer_where_it_takes_longer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(panel.time, "monotonic", lambda: now[0])
    pace = panel._Pace(2.0, 0.01)
    assert pace.is_due()
    for cost, wait in ((0.001, 2.0), (0.1, 10.0)):
        with pace:
            now[0] += cost
        now[0] += 0.99 * wait
        assert not pace.is_due()
        now[0] += 0.02 * wait
        assert pace.is_due()
