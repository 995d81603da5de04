"""The processes that train one run together, started by torchrun, `accelerate launch` or a notebook (`helpers`).

Tensors use torch.distributed (NCCL on GPUs, gloo on CPUs). Messages, and waiting for the main process, use the
launcher's key-value store: a wait there can be abandoned, and the reason why another process failed can be read.
"""

import atexit
import contextlib
import json
import os
import socket
import threading
import time

import psutil

from peftlib.core.env import resolve_device
from peftlib.core.errors import ConfigError, ParallelError
from peftlib.train.parallel.alone import OneProcess

_LOOK_EVERY_S = 0.05
_WATCH_EVERY_S = 1.0
_GRACE_S = 10.0  # a process whose exchange cannot complete is ended after this time
_HEARD_S = 5.0  # time for all others to read why the main process failed
_GONE = "process 0, the main process, is gone"
_LEAVE_S = 60.0  # others wait for the main one to write its record: the launcher kills it once one exits
_JOINED: dict = {}  # this process's group, once it has joined


def n_processes():
    """Number of processes that a launcher started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_one(what):
    """ConfigError if a launcher started several processes, because `what` needs a single one."""
    if n_processes() > 1:
        raise ConfigError(f"{n_processes()} processes: {what} runs in one process; start it without torchrun")


def join(device, *, end_others=None):
    """The processes of this run. device: as in a config. Imports nothing if there is only one.

    end_others: called if another process failed and this one still waits for it; by default this process is ended.
    ConfigError: more processes than GPUs on this machine.
    """
    if n_processes() == 1:
        return OneProcess()
    device = resolve_device(device)
    if device not in _JOINED:
        _JOINED[device] = Processes(device, end_others=end_others)
    return _JOINED[device]


def leave():
    """Leave the group that `join` formed, so that this process can join another."""
    while _JOINED:
        _JOINED.popitem()[1].close()


def words_of(store):
    """The part of a launcher's store that a run's processes use for messages."""
    from torch.distributed import PrefixStore

    launch = f"{os.environ.get('TORCHELASTIC_RUN_ID')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    return PrefixStore(f"peftlib/{launch}", store)


class Processes(OneProcess):
    """A process group. device: 'cuda' (this process uses GPU LOCAL_RANK) or 'cpu'. end_others: as in `join`."""

    echo_s = 5.0  # a launcher may forward within this time a signal that the terminal already sent to all processes

    def __init__(self, device, *, end_others=None):
        import torch
        import torch.distributed as dist

        self.rank, self.world = int(os.environ["RANK"]), n_processes()
        self.is_main, self._dist, self._torch, self._end_others = self.rank == 0, dist, torch, end_others
        if device == "cuda":
            here, cards = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
            if here >= cards:
                raise ConfigError(
                    f"process {here} of this machine has no GPU: torch sees {cards}; start at most one process per GPU "
                    f"(--nproc-per-node {cards})"
                )
            torch.cuda.set_device(here)
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._server = dist.TCPStore(*address, is_master=True, wait_for_workers=False)
        # One client per thread, because a waiting thread blocks others that share its client.
        clients = [dist.TCPStore(*address, is_master=False, wait_for_workers=False) for _ in range(3)]
        self._store, self._watched, group = map(words_of, clients)
        self._turn, self.failed, self._is_leaving, self._has_told = 0, None, False, False
        here = psutil.Process()
        self._store.set(f"process/{self.rank}", json.dumps([socket.gethostname(), here.pid, here.create_time()]))
        self._peers = [json.loads(self._wait(f"process/{rank}")) for rank in range(self.world)]
        if not dist.is_initialized():  # only now, because it waits for the others and cannot be interrupted
            kind, group = "nccl" if device == "cuda" else "gloo", dist.PrefixStore("group", group)
            dist.init_process_group(kind, store=group, rank=self.rank, world_size=self.world)
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        atexit.register(self._leave)

    def sum_(self, tensor):
        """As for one process. ParallelError: another has failed."""
        # NCCL reduces memory in its layout; a transposed gradient is summed as it was allocated.
        self._exchange(self._dist.all_reduce, tensor if tensor.is_contiguous() else tensor.T)

    def broadcast_(self, tensors, source=0):
        """As for one process; tensors of one dtype are sent as one. ParallelError: another has failed."""
        if not tensors:
            return
        flat = self._torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self._exchange(self._dist.broadcast, flat, source)
        if self.rank != source:
            parts = flat.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def _exchange(self, call, tensor, *args):
        self.require()
        try:
            call(tensor, *args)
        except RuntimeError as error:  # raised by gloo if a process is gone
            self._raise(self._reason(wait_s=5.0) or str(error).split("\n")[0], error)
        self.bytes_exchanged += tensor.numel() * tensor.element_size()

    def from_main(self, call):
        """As for one process. ParallelError: another has failed."""
        self._turn += 1
        key = f"told/{self._turn}"
        if self.is_main:
            self._store.set(key, json.dumps(call()))
        return json.loads(self._wait(key))

    @contextlib.contextmanager
    def main_first(self):
        """As for one process; the others wait. ParallelError: another has failed."""
        self._turn += 1
        key = f"first/{self._turn}"
        if not self.is_main:
            self._wait(key)
        with self._telling():
            yield
        if self.is_main:
            self._store.set(key, "1")

    def require_alike(self, facts):
        """As for one process; each process is compared with the main one."""
        ours = json.loads(json.dumps(facts))
        for name, value in self.from_main(lambda: facts).items():
            if ours[name] != value:
                here, there = socket.gethostname(), self._peers[0][0]
                raise ConfigError(
                    f"{name} is {ours[name]!r} in process {self.rank} ({here}) and {value!r} in process 0 ({there}): "
                    "it must be the same in all processes of a run"
                )

    @contextlib.contextmanager
    def together(self):
        """As for one process."""
        self._turn += 1
        key = f"done/{self._turn}"
        self._is_leaving = False
        try:
            with self._telling():
                yield
        finally:
            self._is_leaving = True
            with contextlib.suppress(RuntimeError):
                if self.is_main:
                    self._store.set(key, "1")
                until = time.monotonic() + _LEAVE_S
                while not self._store.check([key]) and time.monotonic() < until and _is_alive(self._peers[0]):
                    time.sleep(_LOOK_EVERY_S)

    @contextlib.contextmanager
    def exchanging(self):
        """As for one process."""
        try:
            yield
        finally:
            self._is_leaving = True

    @contextlib.contextmanager
    def _telling(self):
        """Tell the others why this process ends."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the store ended with the main process
                self._store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")
            self._has_told = True
            raise

    def require(self):
        """As for one process."""
        if self.failed:
            self._raise(self.failed)

    def _wait(self, key):
        """Wait for a key of the store, and return its text."""
        try:
            while not self._store.check([key]):
                self.require()
                time.sleep(_LOOK_EVERY_S)
            return self._store.get(key).decode()
        except ParallelError:
            raise
        except RuntimeError as error:  # from the store: without a launcher, the main process hosts it
            self._raise(self.failed or _GONE, error)

    def _raise(self, reason, cause=None):
        self.failed = reason
        raise ParallelError(
            f"process {self.rank} of {self.world} cannot continue: {reason}. The last checkpoint is kept; run the "
            "same command or cell again to resume"
        ) from cause

    def _reason(self, wait_s=0.0):
        """Why another process is no longer in the run, or None."""
        until = time.monotonic() + wait_s
        while True:
            for rank, peer in enumerate(self._peers):
                if rank == self.rank:
                    continue
                try:
                    if self._watched.check([f"failed/{rank}"]):
                        self._watched.set(f"heard/{self.rank}", "1")
                        return f"process {rank} failed with {self._watched.get(f'failed/{rank}').decode()}"
                except RuntimeError:
                    return _GONE
                if not _is_alive(peer):
                    return f"process {rank} ({peer[0]}, {peer[1]}) is gone"
            if time.monotonic() >= until:
                return None
            time.sleep(_LOOK_EVERY_S)

    def _watch(self):
        """End waits for a process that is gone; NCCL kernels would wait for minutes."""
        while not self._is_over.wait(_WATCH_EVERY_S):
            reason = None if self._is_leaving else self._reason()
            if reason is None:
                continue
            self.failed = reason
            with contextlib.suppress(Exception):
                self._dist.distributed_c10d._abort_process_group()
            until = time.monotonic() + _GRACE_S
            while time.monotonic() < until:
                if self._is_leaving or self._is_over.wait(_LOOK_EVERY_S):
                    return
            if self._end_others:
                self._end_others()  # gloo waits as long as the other end of a connection is alive
                return
            print(f"process {self.rank} exits: {reason}; the last checkpoint is kept", flush=True)
            os._exit(1)

    def close(self):
        """Leave the group in whatever state it is."""
        atexit.unregister(self._leave)
        self._leave()
        self._watcher.join()
        if self._dist.is_initialized():
            self._dist.distributed_c10d._abort_process_group()

    def _leave(self):
        self._is_over.set()
        if self.is_main and self._has_told:  # the store may end with this process
            others = [f"heard/{rank}" for rank in range(1, self.world)]
            until = time.monotonic() + _HEARD_S
            with contextlib.suppress(RuntimeError):
                while not self._store.check(others) and time.monotonic() < until:
                    time.sleep(_LOOK_EVERY_S)
        if not self.failed and self._dist.is_initialized():
            self._dist.destroy_process_group()


def _is_alive(peer):
    """Whether a process, [host, pid, start time], is alive; processes on other machines are assumed to be."""
    host, pid, began = peer
    if host != socket.gethostname():
        return True
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - began) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
