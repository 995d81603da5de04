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
import os, time, torch
torch.set_num_threads(1)
os.environ["PEFTLIB_ROOT"] = {root!r}
from peftlib.study import Study
from peftlib.train import TrainingRun
from peftlib.panel import train_live
run = TrainingRun(Study.resolve(profile="demo", study="tiny", **{fields!r}), "qlora")
step, pause = run._step, {pause}
run._step = lambda: (time.sleep(pause), step())
print("opened")
"""
TRAIN = 'record = train_live(run)\nprint("end", record["status"], record["steps"])'


def trains(message):
    """Whether a message tells the panel's reader of a first step."""
    return message["msg_type"] == "comm_msg" and re.search(r"seed 0: step [1-9]\d* of 18", str(message["content"]))


class FrontEnd:
    """One client of a kernel that keeps what the kernel says."""

    def __init__(self, client):
        self.client, self.heard = client, []

    def run(self, code):
        """Send a cell; returns its message id at once."""
        return self.client.execute(code, allow_stdin=True)

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

    def ended(self, code):
        """Run a cell to its end: all that it printed."""
        return self.end_of(self.run(code))

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


@pytest.fixture(scope="module", params=["installed", "ipykernel6"])
def kernel(request):
    """(KernelManager, client) of a new kernel."""
    if request.param == "ipykernel6" and not OTHER_KERNEL.is_dir():
        pytest.skip(f"no {OTHER_KERNEL}: make .venv/ipykernel6 makes it")
    first = [str(OTHER_KERNEL)] if request.param == "ipykernel6" else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*first, str(CHECKOUT)]), "HF_HUB_OFFLINE": "1"}
    env.pop("PEFTLIB_HEADLESS", None)
    manager, client = start_new_kernel(env=env)
    told = FrontEnd(client).ended("import ipykernel; print(ipykernel.__version__)")
    assert told.startswith("6." if first else "7."), told
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def front_end(kernel, make_study):
    """A FrontEnd of a kernel in which a slow run is open; `opening` is the cell for another one."""
    manager, client = kernel
    made = FrontEnd(client)
    made.study, made.interrupt = make_study(**STEPS), manager.interrupt_kernel
    fields = {**TINY, **STEPS, "model": made.study.cfg.model}
    made.opening = lambda pause: OPEN.format(fields=fields, pause=pause, root=os.environ["PEFTLIB_ROOT"])
    assert "opened" in made.ended(made.opening(pause=0.4))
    made.heard.clear()
    return made


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

    def told(kind):
        return [
            m["content"] for m in front_end.heard if m["msg_type"] == kind and m["parent_header"]["msg_id"] == training
        ]

    assert {c["comm_id"] for c in told("comm_open")} == {c["comm_id"] for c in told("comm_close")}  # no widget is left
    [left] = told("update_display_data")
    assert set(left["data"]) == {"text/html", "text/plain"} and "stopped after step" in left["data"]["text/plain"]

    kept, _ = CheckpointDir(front_end.study.checkpoint_dir("qlora", 0), keep=1).newest()
    assert kept.state["progress"]["step"] == steps
    record = records.load(front_end.study, "qlora", 0)
    assert (record["status"], record["steps"]) == ("stopped", steps)

    said = front_end.ended(f"{front_end.opening(pause=0)}\n{TRAIN}")
    assert f"goes on at step {steps} of 18" in said and "end ok 18" in said


def test_cells_that_wait_do_not_run_after_a_training_that_failed(front_end):
    front_end.ended("run._flush = lambda: 1 / 0 if run.progress.step == 7 else type(run)._flush(run)")
    training = front_end.run(TRAIN)
    waiting = front_end.run('print("must not run")')
    front_end.hear(trains)
    late = front_end.run('print("must not run either")')
    assert "ZeroDivisionError" in front_end.end_of(training)
    assert [front_end.reply_to(cell)["status"] for cell in (waiting, late)] == ["aborted", "aborted"]
    assert front_end.ended('print("lives")') == "lives\n" and "must not run" not in str(front_end.heard[-20:])


def test_the_interrupt_button_saves_and_stops_too(front_end):
    training = front_end.run(TRAIN)
    front_end.hear(trains)
    front_end.interrupt()
    assert "end stopped" in front_end.end_of(training)
