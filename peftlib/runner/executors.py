"""Executors of a study's runs: local child processes or tasks of a Ray cluster.

start(name, words) starts `peftlib WORDS` if has_room; ended() lists the Endings since the last call; avoid(node) stops
using a node and returns False if none is left; stop() makes the commands save and exit; close() kills them.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from peftlib.core.errors import ConfigError
from peftlib.core.paths import pip_line
from peftlib.runner.execute import environment

GRACE_S = 45.0  # seconds that a command has to save before it is killed


class Ending(NamedTuple):
    """How a command ended."""

    name: str
    code: int  # exit code, negative for a signal
    last: str  # its last line
    seconds: float  # duration
    node: str = ""  # to `avoid`
    place: str = "here"


class Local:
    """Child processes, one at a time on each worker: {variable: value}, its additional environment variables."""

    def __init__(self, workers):
        self._free, self._running, self._kill_at = list(workers), {}, float("inf")

    has_room = property(lambda self: bool(self._free))

    def start(self, name, words):
        worker, said = self._free.pop(), tempfile.TemporaryFile()  # noqa: SIM115 - `_ending` closes it
        argv, env = [sys.executable, "-m", "peftlib", *words, "--attended"], {**os.environ, **worker}
        how = {
            "stdin": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
        }  # this process handles Ctrl-C
        process = subprocess.Popen(argv, env={**env, "PYTHONUNBUFFERED": "1"}, stdout=said, **how)
        self._running[name] = process, worker, said, time.monotonic()

    def ended(self):
        if time.monotonic() > self._kill_at:
            self.close()
        done = [name for name, (process, *_) in self._running.items() if process.poll() is not None]
        return [self._ending(name, *self._running.pop(name)) for name in done]

    def _ending(self, name, process, worker, said, started):
        self._free.append(worker)
        with said:
            said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
            lines = said.read().decode("utf-8", errors="replace").strip().split("\n")
        return Ending(name, process.returncode, lines[-1], time.monotonic() - started)

    def avoid(self, node):
        return False

    def stop(self):
        self._kill_at = time.monotonic() + GRACE_S
        for process, *_ in self._running.values():
            process.terminate()

    def close(self):
        for process, *_ in self._running.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # including the compiler's helpers
            process.wait()


class Ray:
    """Tasks, at_once of them on each GPU of a cluster; Ray reruns them elsewhere when their node dies.

    ConfigError: Ray is not installed, no cluster at the address, or one without a GPU although device is not 'cpu'.
    """

    has_room = True  # Ray keeps the queue

    def __init__(self, cfg, settings):
        try:
            import ray

            ray.init(address=settings.address, log_to_driver=False)
        except ImportError:
            raise ConfigError(f"--executor ray needs Ray, which is missing: {pip_line('cluster')}") from None
        except (ConnectionError, ValueError) as error:
            how = f"no Ray cluster ({error}); start one with `ray start --head`"
            raise ConfigError(f"--address {settings.address}: {how}") from None
        self._ray, self._running, self._avoided = ray, {}, set()
        self._kind, has = "CPU" if cfg.device == "cpu" else "GPU", ray.cluster_resources()
        if not has.get(self._kind):
            ray.shutdown()
            raise ConfigError(f"no {self._kind} in the Ray cluster: start nodes that have one, or set -p device=cpu")
        gpus = 0 if cfg.device == "cpu" else 1 / settings.at_once
        cpus = int(has.get("CPU", 1) / has["GPU"] * gpus) if gpus else 1
        self._how = {"max_retries": 3, "scheduling_strategy": "SPREAD", "num_gpus": gpus, "num_cpus": max(1, cpus)}
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node with other code reports that itself
        self._task = ray.remote(_task)
        # A node's own values take precedence, and it has its own checkout.
        places = {name: os.environ[name] for name in ("PEFTLIB_ROOT", "PEFTLIB_MIRROR") if name in os.environ}
        self._environment = {**{k: v for k, v in environment().items() if k != "PYTHONPATH"}, **places}

    def start(self, name, words):
        apart = {"label_selector": {"ray.io/node-id": f"!in({','.join(self._avoided)})"}} if self._avoided else {}
        self._running[self._task.options(name=name, **self._how, **apart).remote(words, self._environment)] = name

    def ended(self):
        tasks = [*self._running]
        done = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0] if tasks else []
        return [self._ending(task, self._running.pop(task)) for task in done]

    def _ending(self, task, name):
        try:
            return Ending(name, *self._ray.get(task))
        except self._ray.exceptions.RayError as error:
            said = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
            return Ending(name, 1, said, 0.0, place="in the cluster")

    def avoid(self, node):
        able = {node["NodeID"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get(self._kind)}
        is_known = bool(able - self._avoided - {node})
        self._avoided |= {node} if is_known else set()
        return is_known

    def stop(self):
        for task in self._running:
            self._ray.cancel(task)

    def close(self):
        self._ray.shutdown()


def _task(words, env):
    """Runs on a node: returns an Ending's fields after the name. Ray cancels it with a KeyboardInterrupt."""
    import ray

    with contextlib.closing(Local([{name: value for name, value in env.items() if name not in os.environ}])) as local:
        local.start("", words)
        ended = []
        while not ended:
            try:
                time.sleep(0.1)
                ended = local.ended()
            except KeyboardInterrupt:
                local.stop()
    return (*ended[0][1:4], ray.get_runtime_context().get_node_id(), f"on {socket.gethostname()}")


def workers_of(cfg, at_once):
    """The workers of a Local: each visible GPU at_once times, or the CPU once."""
    import torch

    n_gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()  # only asks the driver, and takes no memory
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    share = str(max(1, (os.cpu_count() or 1) // (n_gpus * at_once or 1)))
    threads = {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share}
    gpus = [{"CUDA_VISIBLE_DEVICES": name.strip(), **threads} for name in names.split(",")[:n_gpus]]
    return [{**environment(), **worker} for worker in gpus * at_once or [{}]]
