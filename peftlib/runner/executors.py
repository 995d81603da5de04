"""Where the commands of a study's runs are executed: child processes here, or tasks of a Ray cluster; a class each.

start(name, words) starts `peftlib WORDS` where has_room; ended() lists the Endings since the last call; avoid(node)
starts nothing there any more, False where that leaves none; stop() has the commands save and end; close() ends them.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from peftlib.core.errors import ConfigError
from peftlib.runner.execute import environment

GRACE_S = 45.0  # seconds that a command gets for saving before it is killed


class Ending(NamedTuple):
    """code: exit code, negative for a signal. last: its last line. seconds: it ran. node, place: where, to `avoid` and
    in words."""

    name: str
    code: int
    last: str
    seconds: float
    node: str = ""
    place: str = "here"


def attend(words, env, kill_at=lambda: None):
    """Run `python -m peftlib WORDS`; returns (exit code, last line, seconds). No process is left, however this ends.

    kill_at() -> None, or the time.monotonic() at which the command is killed; until then it may save and stop. So it
    may at a KeyboardInterrupt, by which Ray cancels a task.
    """
    started, cut = time.monotonic(), None
    how = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}  # Ctrl-C is ours alone
    argv = [sys.executable, "-m", "peftlib", *words, "--attended"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(argv, env={**os.environ, **env, "PYTHONUNBUFFERED": "1"}, stdout=said, **how)
        try:
            while process.poll() is None and not (cut and time.monotonic() > min(cut, kill_at() or cut)):
                try:
                    time.sleep(0.1)
                    asked = kill_at()
                except KeyboardInterrupt:
                    asked = time.monotonic() + GRACE_S
                if asked and not cut:
                    process.terminate()
                    cut = asked
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # the compiler's helpers too
            process.wait()
        said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
        lines = said.read().decode("utf-8", errors="replace").split("\n")
    return process.returncode, next((line for line in reversed(lines) if line.strip()), ""), time.monotonic() - started


class Local:
    """Child processes: at_once on each visible GPU, or one where there is none."""

    def __init__(self, cfg, settings):
        self._free, self._running, self._kill_at = workers_of(cfg, settings.at_once), {}, None
        self._pool = ThreadPoolExecutor(len(self._free))

    has_room = property(lambda self: bool(self._free))

    def start(self, name, words):
        worker = self._free.pop()
        task = self._pool.submit(attend, words, {**environment(), **worker}, lambda: self._kill_at)
        self._running[task] = name, worker

    def ended(self):
        done = {task: self._running.pop(task) for task in list(self._running) if task.done()}
        self._free += [worker for _, worker in done.values()]
        return [Ending(name, *task.result()) for task, (name, _) in done.items()]

    def avoid(self, node):
        return False

    def stop(self, grace_s=GRACE_S):
        self._kill_at = time.monotonic() + grace_s

    def close(self):
        self.stop(0.0)
        self._pool.shutdown()


class Ray:
    """Tasks at_once on each GPU of a cluster, which Ray runs again elsewhere when their node dies.

    ConfigError: no Ray here, no cluster at the address, or one without a GPU where device is not 'cpu'.
    """

    has_room = True  # Ray keeps the queue

    def __init__(self, cfg, settings):
        try:
            import ray
        except ImportError:
            raise ConfigError("--executor ray needs Ray, which is not here: pip install 'peftlib[cluster]'") from None
        try:
            ray.init(address=settings.address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"--address {settings.address}: no Ray cluster ({error}); `ray start --head` starts one"
            ) from None
        self._ray, self._running, self._avoided = ray, {}, set()
        self._kind, has = "CPU" if cfg.device == "cpu" else "GPU", ray.cluster_resources()
        if not has.get(self._kind):
            raise ConfigError(f"no {self._kind} in the Ray cluster:  start nodes, or set -p device=cpu")
        gpus = 0 if cfg.device == "cpu" else 1 / settings.at_once
        needs = {"num_gpus": gpus, "num_cpus": max(1, int(has.get("CPU", 1) / has["GPU"] * gpus)) if gpus else 1}
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node with other code is to say so itself
        self._task = ray.remote(_task).options(max_retries=3, scheduling_strategy="SPREAD", **needs)
        # What a node has itself goes before; its checkout is its own.
        places = {name: os.environ[name] for name in ("PEFTLIB_ROOT", "PEFTLIB_MIRROR") if name in os.environ}
        self._environment = {**{k: v for k, v in environment().items() if k != "PYTHONPATH"}, **places}

    def start(self, name, words):
        apart = {"label_selector": {"ray.io/node-id": f"!in({','.join(self._avoided)})"}} if self._avoided else {}
        self._running[self._task.options(name=name, **apart).remote(words, self._environment)] = name

    def ended(self):
        done, _ = (
            self._ray.wait([*self._running], num_returns=len(self._running), timeout=0) if self._running else ([], 0)
        )
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

    def stop(self, grace_s=GRACE_S):
        for task in self._running:
            self._ray.cancel(task)

    def close(self):
        self._ray.shutdown()


def _task(words, env):
    """On a node: what an Ending holds after the name."""
    import ray

    told = attend(words, {name: value for name, value in env.items() if name not in os.environ})
    return (*told, ray.get_runtime_context().get_node_id(), f"on {socket.gethostname()}")


def workers_of(cfg, at_once):
    """[{variable: value}, ...], the environment of each worker: every visible GPU at_once times, or the CPU once."""
    import torch

    n_gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()  # asks the driver alone, and takes no memory
    if not n_gpus:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(n_gpus)]
    share = max(1, (os.cpu_count() or 1) // (n_gpus * at_once))
    threads = {"OMP_NUM_THREADS": str(share), "TORCHINDUCTOR_COMPILE_THREADS": str(share)}
    return [{"CUDA_VISIBLE_DEVICES": name.strip(), **threads} for _ in range(at_once) for name in names[:n_gpus]]
