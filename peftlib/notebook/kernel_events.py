"""Receive a widget's messages while its cell still runs: they are taken off the kernel's shell channel between steps.

A kernel reads its shell channel only between cells, so a click would wait for the end of the training that it should
stop. Training in a second thread is no way out: signals, and with them the interrupt button, reach the main thread
alone, and CUDA graphs want one thread. jupyter_ui_poll (1.1.0) needs Kernel.do_one_iteration, which ipykernel 7 does
not have. Other messages, above all waiting cells, reach the kernel in order: it keeps them until the cell ends.
"""

import asyncio
import inspect

import zmq

_COMM = ("comm_msg", "comm_close")


class KernelEvents:
    """The running kernel's messages for some comms. Call poll() in the main thread, inside a running cell."""

    def __init__(self, kernel, comm_ids):
        self._kernel, self._comm_ids = kernel, set(comm_ids)
        self._stream = _shell_messages(kernel)
        self._tasks = set()

    def poll(self):
        """Handle the messages that have arrived for the comms, without waiting."""
        if not self._stream.socket.poll(0, zmq.POLLIN):
            return
        usual = self._stream._recv_callback  # there is no public way to ask for it
        self._stream.on_recv(lambda frames: self._sort(frames, usual), copy=False)
        try:
            self._stream.flush(zmq.POLLIN)
        finally:
            self._stream.on_recv(usual, copy=False)

    def _sort(self, frames, usual):
        session = self._kernel.session
        idents, parts = session.feed_identities(frames, copy=False)
        # Only looked at: a message that is read twice counts as forged.
        header = session.deserialize(parts, content=False, copy=False)["header"]
        if header["msg_type"] in _COMM:
            content = session.unpack(parts[4].bytes)
            if content.get("comm_id") in self._comm_ids:
                self._handle(idents, session.deserialize(parts, copy=False))
                return
        waiting = usual(frames)
        if inspect.isawaitable(waiting):  # ipykernel 7: a task that waits for the cell's lock
            task = asyncio.ensure_future(waiting)
            self._tasks.add(task)  # asyncio itself keeps no reference
            task.add_done_callback(self._tasks.discard)

    def _handle(self, idents, message):
        kernel = self._kernel
        # Its sender waits for these two; the last line is for the front end's light: the cell is still at work.
        kernel._publish_status("busy", "shell", parent=message)
        kernel.shell_handlers[message["header"]["msg_type"]](self._stream, idents, message)
        kernel._publish_status("idle", "shell", parent=message)
        kernel._publish_status("busy", "shell")


def _shell_messages(kernel):
    """The stream that brings shell messages to the main thread; ipykernel 7 receives them in another."""
    thread = getattr(kernel, "shell_channel_thread", None)
    if thread is None:
        return kernel.shell_stream
    return thread.manager.get_shell_channel_to_subshell_pair(None).to_stream
