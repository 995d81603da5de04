"""Kernels of the versions that matter, and a front end for them that speaks in messages."""

import contextlib
import os
import queue
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED, IPYKERNEL6, COLAB = "installed", "ipykernel6", "colab_kernel"
# Other kernels than the installed one: a folder of .venv that stands first in PYTHONPATH, and the versions it holds.
OTHERS = {
    IPYKERNEL6: "ipykernel 6.31.0, ipywidgets 8.",
    COLAB: "ipykernel 6.17.1, ipywidgets 7.7.1",
}
_VERSIONS = (
    'import ipykernel, ipywidgets; print(f"ipykernel {ipykernel.__version__}, ipywidgets {ipywidgets.__version__}")'
)


@contextlib.contextmanager
def started(name):
    """(KernelManager, client) of a new kernel, INSTALLED or one of OTHERS; skips where its folder was not made."""
    folder = CHECKOUT / ".venv" / name
    if name in OTHERS and not folder.is_dir():
        pytest.skip(f"no {folder}: make .venv/{name} makes it")
    first = [str(folder)] if name in OTHERS else []
    path = os.pathsep.join([*first, str(CHECKOUT), str(CHECKOUT / "tests" / "fakes")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    env.pop("PEFTLIB_HEADLESS", None)
    manager, client = start_new_kernel(env=env)
    try:
        told = FrontEnd(client).ended(_VERSIONS)
        assert told.startswith(OTHERS.get(name, "ipykernel ")), told
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


class FrontEnd:
    """One client of a kernel that keeps what the kernel says."""

    def __init__(self, client):
        self.client, self.heard = client, []

    def run(self, code):
        """Send a cell; returns its message id at once."""
        return self.client.execute(code, allow_stdin=True)

    def hear(self, is_it, seconds=120):
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

    def set(self, comm_id, **state):
        """Tell a widget new values, as a front end does when somebody types or picks."""
        content = {"comm_id": comm_id, "data": {"method": "update", "state": state, "buffer_paths": []}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def states_of(self, comm_id):
        """[state, ...] that the kernel sent for a widget since it was opened."""
        sent = [
            m["content"]["data"]
            for m in self.heard
            if m["msg_type"] == "comm_msg" and m["content"]["comm_id"] == comm_id
        ]
        return [data["state"] for data in sent if data.get("method") == "update"]
