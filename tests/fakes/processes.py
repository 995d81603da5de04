"""Starts several processes that train one run after another, as torchrun starts them, but without its agent.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/fakes/processes.py '[["qlora", {...}], ...]'
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve()


def start(n, runs, root, log_folder, full_rank=None):
    """[Popen, ...] of n processes that train `runs`, [(method, fields of the config), ...], below PEFTLIB_ROOT.

    full_rank: a process whose card is too small in step 3 for micro-batches of more than 2 rows.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(HERE.parents[2]), "PEFTLIB_ROOT": str(root), "PEFTLIB_MIRROR": "off"}
    shared |= {"HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # the store warns of whoever ends first
    started = []
    for rank in range(n):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(Path(log_folder) / f"{rank}.log", "w", encoding="utf-8") as log:
            command = [sys.executable, str(HERE), json.dumps(runs), *["full"] * (rank == full_rank)]
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    return started


def train(n, runs, root, log_folder, timeout_s=300, **how):
    """Train `runs` on n processes; returns what the main one said. AssertionError: one of them failed."""
    started = start(n, runs, root, log_folder, **how)
    codes = [process.wait(timeout_s) for process in started]
    said = [(Path(log_folder) / f"{rank}.log").read_text(encoding="utf-8") for rank in range(n)]
    assert codes == [0] * n, "\n".join(said)
    assert not any(said[1:]), said[1:]
    return said[0]


def main(runs, *, is_full):
    import torch

    torch.set_num_threads(1)
    from peftlib.core.config import Config
    from peftlib.core.study import Study
    from peftlib.models.inspect import trainable
    from peftlib.train import estimate
    from peftlib.train.loop import TrainingRun

    if is_full:
        fill_in_step_3()
    estimate.matmul_ceiling = lambda *args, **settings: 1e12
    for method, fields in runs:
        run = TrainingRun(Study.open(Config(**fields)), method, log=lambda line: print(line, flush=True))
        run.train()
        # What the run itself writes is in 16 bits, in which one rounding is more than what tests look for.
        weights = {name: p.detach().clone() for name, p in trainable(run.model).items()}
        torch.save(weights, run.study.folder / f"{method}.{os.environ['RANK']}.pt")


def fill_in_step_3():
    import torch

    from peftlib.train.loop import TrainingRun
    from peftlib.train.step import Stepper

    gradients, forward_backward, now = TrainingRun._gradients, Stepper.forward_backward, []

    def noted(run, numbers):
        now[:] = [run]
        return gradients(run, numbers)

    def full(*args):
        loss = forward_backward(*args)
        if now[0].progress.step == 3 and now[0].execution.micro_batch_size > 2:
            raise torch.OutOfMemoryError("planted")
        return loss

    TrainingRun._gradients, Stepper.forward_backward = noted, full


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), is_full="full" in sys.argv)
