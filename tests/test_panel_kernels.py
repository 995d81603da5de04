"""The live panel in real kernels, by the messages that a front end sends."""

import os
import queue
import re
import time
from pathlib import Path

import pytest
from conftest import TINY
from jupyter_client.manager import start_new_kernel

from peftlib import record as records
from peftlib.checkpoint import CheckpointDir
from peftlib.panel import __file__ as panel_file

CHECKOUT = Path(panel_file).resolve().parent.parent
OTHER_KERNEL = CHECKOUT / ".venv" / "ipykernel6"
STEPS = {"epochs": 3, "valid_every": 4}  # 18 steps
# A step of known length, so that there is time to press the button.
OPEN = """
import time, torch
torch.set_num_threads(1)
import ipykernel
from peftlib.study import Study
from peftlib.train import TrainingRun
from peftlib.panel import train_live
run = TrainingRun(Study.resolve(profile="demo", study="tiny", **{fields!r}), "qlora")
step, pause = run._step, {pause}
run._step = lambda: (time.sleep(pause), step())
print("kernel", ipykernel.__version__)
"""
TRAIN = 'record = train_live(run)\nprint("end", record["status"], record["steps"])'


def trains(message):
    """Whether a message tells the panel's reader of a first step."""
    return message["msg_type"] == "comm_msg" and re.search(r"seed 0: step [1-9]\d* of 18", str(message["content"]))


class FrontEnd:
    """One client of a kernel that keeps what the kernel says."""

    def __init__(self, client):
        self.client, self.heard = client, []

    def run(self, code, **settings):
        """Send a cell; returns its message id at once."""
        return self.client.execute(code, **{"allow_stdin": True, **settings})

    def hear(self, is_it, seconds=40):
        """The first message, heard already or soon, of which `is_it` holds."""
        end, at = time.monotonic() + seconds, 0
        while True:
            for message in self.heard[at:]:
                if is_it(message):
                    return message
            at = len(self.heard)
            try:
                self.heard.append(self.client.get_iopub_msg(timeout=max(0.1, end - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"not heard in {seconds} s: {[m['msg_type'] for m in self.heard]}") from None

    def end_of(self, cell):
        """Once a cell is over: all that it printed."""
        self.hear(
            lambda m: (
                m["parent_header"].get("msg_id") == cell
                and m["msg_type"] == "status"
                and m["content"]["execution_state"] == "idle"
            )
        )
        return self.printed(cell)

    def printed(self, cell):
        ours = [m for m in self.heard if m["parent_header"].get("msg_id") == cell]
        return "".join(m["content"].get("text", "") for m in ours if m["msg_type"] == "stream") + "".join(
            f"{m['content']['ename']}: {m['content']['evalue']}" for m in ours if m["msg_type"] == "error"
        )

    def reply_to(self, cell):
        while True:
            reply = self.client.get_shell_msg(timeout=60)
            if reply["parent_header"]["msg_id"] == cell:
                return reply["content"]

    def widget(self, name):
        """comm id of the first widget of a model name."""
        opened = self.hear(
            lambda m: m["msg_type"] == "comm_open" and m["content"]["data"]["state"].get("_model_name") == name
        )
        return opened["content"]["comm_id"]

    def click(self, comm_id):
        content = {"comm_id": comm_id, "data": {"method": "custom", "content": {"event": "click"}}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def states_of(self, comm_id):
        """[state, ...] that the kernel sent for a widget since it was opened."""
        sent = [
            m["content"]["data"]
            for m in self.heard
            if m["msg_type"] == "comm_msg" and m["content"]["comm_id"] == comm_id
        ]
        return [data["state"] for data in sent if data.get("method") == "update"]


@pytest.fixture(params=["installed", "ipykernel6"])
def front_end(request, make_study):
    """A FrontEnd of a new kernel in which a slow run is open."""
    if request.param == "ipykernel6" and not OTHER_KERNEL.is_dir():
        pytest.skip(f"no {OTHER_KERNEL}: make .venv/ipykernel6 makes it")
    study = make_study(**STEPS)
    first = [str(OTHER_KERNEL)] if request.param == "ipykernel6" else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*first, str(CHECKOUT)]), "HF_HUB_OFFLINE": "1"}
    env.pop("PEFTLIB_HEADLESS", None)
    manager, client = start_new_kernel(env=env)
    made = FrontEnd(client)
    made.study, made.interrupt = study, manager.interrupt_kernel
    fields = {**TINY, **STEPS, "model": study.cfg.model}
    made.opening = lambda pause: OPEN.format(fields=fields, pause=pause)
    opened = made.end_of(made.run(made.opening(pause=0.4)))
    assert f"kernel {'6.' if first else '7.'}" in opened, opened
    yield made
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_the_button_saves_and_stops_and_waiting_cells_run_once_in_order(front_end):
    training = front_end.run(TRAIN)
    waiting = [front_end.run(f'print("cell {n}", record["status"])') for n in (1, 2)]
    button = front_end.widget("ButtonModel")
    front_end.hear(trains)
    late = front_end.run('print("cell 3")')
    front_end.click(button)
    later = front_end.run('print("cell 4")')

    said = front_end.end_of(later)
    steps = int(front_end.printed(training).split("end stopped ")[1])
    assert 1 <= steps < 18
    assert [front_end.printed(cell) for cell in (*waiting, late)] == [
        "cell 1 stopped\n",
        "cell 2 stopped\n",
        "cell 3\n",
    ]
    assert said == "cell 4\n"
    ran = [m["content"]["code"][:13] for m in front_end.heard if m["msg_type"] == "execute_input"]
    assert ran[-5:] == ["record = trai", *(f'print("cell {n}' for n in (1, 2, 3, 4))]
    assert any(state.get("disabled") for state in front_end.states_of(button))

    kept, _ = CheckpointDir(front_end.study.checkpoint_dir("qlora", 0), keep=1).newest()
    assert kept.state["progress"]["step"] == steps
    record = records.load(front_end.study, "qlora", 0)
    assert (record["status"], record["steps"]) == ("stopped", steps)

    again = front_end.run(f"{front_end.opening(pause=0)}\n{TRAIN}")
    said = front_end.end_of(again)
    assert f"goes on at step {steps} of 18" in said and "end ok 18" in said


def test_cells_that_wait_do_not_run_after_a_training_that_failed(front_end):
    front_end.end_of(front_end.run("run._flush = lambda: 1 / 0 if run.progress.step == 7 else type(run)._flush(run)"))
    training = front_end.run(TRAIN)
    waiting = front_end.run('print("must not run")')
    front_end.hear(trains)
    late = front_end.run('print("must not run either")')
    assert "ZeroDivisionError" in front_end.end_of(training)
    assert [front_end.reply_to(cell)["status"] for cell in (waiting, late)] == ["aborted", "aborted"]
    after = front_end.end_of(front_end.run('print("lives")'))
    assert after == "lives\n" and "must not run" not in str(front_end.heard[-20:])


def test_the_interrupt_button_saves_and_stops_too(front_end):
    training = front_end.run(TRAIN)
    front_end.hear(trains)
    front_end.interrupt()
    assert "end stopped" in front_end.end_of(training)
