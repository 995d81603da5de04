"""Helper processes that a notebook's kernel starts to train its run, one per additional GPU.

The kernel itself is the main process: it has the model, the panel and the interrupt. Forking does not work after CUDA
is initialised, and a launcher's child as the main process would need a second copy of the model on the kernel's GPU.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from peftlib.core.config import Config
from peftlib.core.errors import ParallelError
from peftlib.core.study import Study
from peftlib.train.parallel import processes

_LOOK_EVERY_S = 0.1
_END_S = 20.0  # time for the others to exit once training is over


def wanted(cfg, device):
    """Number of processes for a run: cfg.processes, else one for each GPU like the first; one on a CPU."""
    if cfg.processes or device != "cuda":
        return cfg.processes or 1
    import torch

    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    kinds = [(card.name, card.total_memory) for card in cards]
    return sum(1 for _ in itertools.takewhile(lambda kind: kind == kinds[0], kinds))


@contextlib.contextmanager
def helping(run):
    """Context in which run.train() uses as many processes as wanted. run: a TrainingRun; a finished one needs none.

    ParallelError: a process exited before it could train.
    """
    n = wanted(run.cfg, run.device)
    if n == 1 or run.finished_record() is not None:
        yield
        return
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0", "LOCAL_RANK": "0"}
    place |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}  # its watchdog would kill this process when another fails
    before, alone = {name: os.environ.get(name) for name in place}, run.processes
    with contextlib.ExitStack() as stack:
        stack.callback(_set, before)
        _set(place)
        run.log(f"starting {n - 1} more process{'es' * (n > 2)} to train with this one")
        others = [stack.enter_context(_Helper(run, rank, n)) for rank in range(1, n)]
        for other in others:
            other.await_in(processes.words_of(store))
        stack.callback(processes.leave)
        run.processes = processes.join(run.device, end_others=lambda: [other.kill() for other in others])
        stack.callback(setattr, run, "processes", alone)
        with run.processes.main_first():  # the others load the model, which is already here
            pass
        yield


def _set(variables):
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class _Helper:
    """Process `rank` of n. The context manager ends it on exit."""

    def __init__(self, run, rank, n):
        self._rank, self._n, self._grace_s = rank, n, 0.0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n))} if run.device == "cpu" else {}
        env |= os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", __name__, json.dumps([str(run.study.folder), asdict(run.cfg), run.name])]
        how = {"stdin": subprocess.DEVNULL, "stdout": self._said, "stderr": subprocess.STDOUT, "env": env}
        self._process = subprocess.Popen(command, **how, start_new_session=True)  # interrupts go to the main process

    def await_in(self, words):
        """Wait until it has joined the group."""
        while not words.check([f"process/{self._rank}"]):
            if self._process.poll() is not None:
                self._said.seek(0)
                lines = self._said.read().decode("utf-8", errors="replace").strip().split("\n")
                raise ParallelError(
                    f"process {self._rank} of {self._n} did not start: {lines[-1] or 'no output'}. "
                    "Set processes=1 to train without it"
                )
            time.sleep(_LOOK_EVERY_S)
        self._grace_s = _END_S

    def kill(self):
        """Kill it immediately."""
        self._process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(subprocess.TimeoutExpired), self._said:
            self._process.wait(self._grace_s)
        self.kill()
        self._process.wait()


def _main(folder, fields, method):
    from peftlib.train.loop import TrainingRun

    TrainingRun(Study(Path(folder), Config(**fields)), method).train()


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
