"""Kills real training processes at random moments and compares what they end with, bit by bit.

    python tests/stress/chaos.py --kills 100 [--seed 0] [--processes 1]

A run of each method is trained once without a break; then again with SIGKILLs, each between its first and its last
step, and started anew after each until it ends by itself. After some kills the local disk is lost as well, as when a
Colab machine goes, and the run comes back from its copy. Weights, optimizer state and loss history have to be equal.
A process is first stopped (SIGSTOP), so that the moment it dies in can be told: while it writes a checkpoint,
validates, copies to the remote, or steps. Of several processes that train one run together (gloo) one is killed, and
the others have to end by themselves within 30 s. The last line is '<n> kills, <m> differences'.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS.parent), str(_TESTS / "fakes"), str(_TESTS / "stress")]

METHODS = ("qlora", "galore", "hybrid")
SEED_MODULES = [
    "peftlib.train.loop",
    "peftlib.evaluation.generate",
    "peftlib.data",
    "accelerate",
    "bitsandbytes",
    "peft",
]
# Dropout on; a step of two micro-batches, two epochs, a validation every third step, saves inside GaLore's gap.
FIELDS = {
    "train_rows": 12,
    "valid_rows": 2,
    "test_rows": 1,
    "max_length": 400,
    "max_new_tokens": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "epochs": 2,
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "galore_rank": 8,
    "galore_update_interval": 5,
    "moment_bits": 8,
    "precision": "fp32",
    "device": "cpu",
    "workers": 1,
    "logging_steps": 1,
    "save_steps": 1,
    "max_save_overhead": 0.0,
    "eval_steps": 3,
}


def life(root, method, log_path, ending_path, place):
    """One life of a training process: train to the end and write down what the run ended with.

    place: its RANK, WORLD_SIZE and the like among several, {} alone.
    """
    import torch

    torch.set_num_threads(1)
    os.environ.update(place)
    os.environ.update(PEFTLIB_ROOT=str(root), PEFTLIB_MIRROR=str(Path(root) / "mirror"), HF_HUB_OFFLINE="1")
    from peftlib.evaluation.generate import ask
    from peftlib.train.loop import TrainingRun
    from peftlib.train.parallel.processes import join

    def log(line):
        with open(log_path, "a", encoding="utf-8") as out:
            out.write(line + "\n")

    members = join("cpu")
    with members.main_first():
        study = bring_study(root, log) if members.is_main else study_of(root)
    run = TrainingRun(study, method, log=log)
    ask(run.model, run.tokenizer, ["before"], max_new_tokens=4)
    record = run.train()
    ask(run.model, run.tokenizer, ["after"], max_new_tokens=4)
    if not members.is_main:
        return
    if not mirror_of(study).flush(60):
        raise RuntimeError(mirror_of(study).state())
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record["history"]]
    ending = {
        "weights": record["weights_sha256"],
        "optimizer": digest(run.optimizer.state_dict()),
        "history": history,
        "valid_history": record["valid_history"],
        "tokens": record["train_tokens"],
    }
    beside = Path(f"{ending_path}.writing")
    beside.write_text(json.dumps(ending))
    os.replace(beside, ending_path)


def mirror_of(study):
    from peftlib.storage.mirror import running

    return running(study.folder)


def bring_study(root, log):
    """The study as a notebook opens it: what only its remote has is brought, and copying goes on in the background."""
    from peftlib.storage import mirror
    from peftlib.storage.remotes import remote_of

    folder = Path(root) / "chaos"
    ours = mirror.Mirror(folder, remote_of("chaos"), log=log, every_s=0.05, small_files_s=0.2)
    ours.restore()
    ours.start()
    mirror._RUNNING[folder] = ours
    return study_of(root)


def study_of(root):
    from peftlib.core.config import resolve
    from peftlib.core.study import Study

    return Study.open(resolve("demo", study="chaos", model=str(Path(root) / "model"), **FIELDS))


def digest(value):
    """SHA-256 over a nested state of tensors and numbers."""
    import torch

    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(key): digest(entry) for key, entry in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [digest(entry) for entry in value]
    return repr(value)


class Chaos:
    """Starts, kills and compares below `root`."""

    def __init__(self, root, seed, processes):
        self.processes = processes
        self.root, self.random = Path(root), random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")  # the libraries are imported once for all lives
        self.context.set_forkserver_preload(SEED_MODULES)
        self.phases, self.differences = Counter(), 0
        self.expected = {}

    def prepare(self):
        """The model, the data, and what each method ends with when nobody kills it."""
        work = self.context.Process(target=make_inputs, args=(self.root,))
        work.start()
        work.join()
        shutil.copytree(self.root / "chaos", self.root / "fresh")
        for method in METHODS:
            self._forget(method)
            for child in self._start(method):
                child.join()
            self.expected[method] = self._ending(method)
            assert self.expected[method] is not None, self._log_of(method).read_text()

    def kill(self, kills):
        """Spread `kills` over runs of all methods; how many runs ended by themselves."""
        done = finished = 0
        while done < kills:
            method = METHODS[finished % len(METHODS)]
            self._forget(method)
            until = min(kills, done + self.random.randint(2, 6))
            while self._ending(method) is None:
                children = self._start(method)
                child = self.random.choice(children) if self.processes > 1 else children[0]
                was_killed = done < until and self._kill_some_time(child, method)
                done += was_killed
                self._join(children, 30 if was_killed else None)
                if was_killed and self.random.random() < 0.2 and self._is_copied():
                    shutil.rmtree(self.root / "chaos")
                    self.phases["(local disk lost with it)"] += 1
                if not was_killed and any(each.exitcode for each in children):
                    sys.exit(f"{method} died by itself:\n{self._log_of(method).read_text()[-3000:]}")
            finished += 1
            if self._ending(method) != self.expected[method]:
                self.differences += 1
                print(f"{method}: DIFFERS {unlike(self._ending(method), self.expected[method])}", flush=True)
            print(f"{method}: ended after {done} kills so far", flush=True)
        return finished

    def _join(self, children, seconds):
        """Wait for all; after the death of one the others have so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        for child in children:
            child.join(None if until is None else max(0.0, until - time.monotonic()))
        late = [child for child in children if child.is_alive()]
        for child in late:
            child.kill()
            child.join()
        if late:
            self.differences += 1
            print(f"{len(late)} processes did not end within {seconds} s of another's death", flush=True)

    def _kill_some_time(self, child, method):
        """Kill the child somewhere between its run's first and last step; False if it ended before."""
        steps = self.random.randint(1, 3)
        wants_write = self.random.random() < 0.5
        lines, seen = self._log_of(method), 0
        while child.is_alive():
            step, seen_now = progress_of(lines)
            seen = seen or seen_now
            if step >= 1 and (
                seen_now - seen >= steps or (wants_write and seen_now > seen and self._is_writing(method))
            ):
                break
            time.sleep(0.0002)
        time.sleep(self.random.random() * (0.002 if wants_write else 0.06))
        try:
            os.kill(child.pid, signal.SIGSTOP)
        except ProcessLookupError:
            return False
        step, _ = progress_of(lines)
        is_between = 1 <= step < self._steps(method) and child.is_alive()
        if is_between:
            self.phases[self._phase(method)] += 1
        os.kill(child.pid, signal.SIGKILL if is_between else signal.SIGCONT)
        return is_between

    def _phase(self, method):
        if self._is_writing(method):
            return "writing a checkpoint"
        if (self.root / "chaos" / ".mirroring").exists():
            return "copying to the remote"
        last = (self._log_of(method).read_text().splitlines() or [""])[-1]
        step = int(last.split()[1].split("/")[0]) if last.startswith("step ") else 0
        if "validation" not in last and step and step % FIELDS["eval_steps"] == 0:
            return "validating"
        return "in a step"

    def _is_copied(self):
        """Whether the remote has data and config, without which no session could go on."""
        return all((self.root / "mirror" / "chaos" / f"{unit}.0.json").exists() for unit in ("data", "study"))

    def _is_writing(self, method):
        return any((self.root / "chaos" / "checkpoints" / f"{method}-s0").glob(".writing-*"))

    def _steps(self, method):
        return self.expected[method]["history"][-1]["step"]

    def _start(self, method):
        if not (self.root / "chaos").exists() and not self._is_copied():
            shutil.copytree(self.root / "fresh", self.root / "chaos")
        arguments = (self.root, method, self._log_of(method), self._ending_of(method))
        children = [self.context.Process(target=life, args=(*arguments, place)) for place in self._places()]
        for child in children:
            child.start()
        return children

    def _places(self):
        """The environment of each process of a run, as torchrun sets it."""
        if self.processes == 1:
            return [{}]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        shared = {"WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.processes)]

    def _forget(self, method):
        for name in ("chaos", "mirror"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in (self._log_of(method), self._ending_of(method)):
            path.unlink(missing_ok=True)
        self._log_of(method).touch()

    def _log_of(self, method):
        return self.root / f"{method}.log"

    def _ending_of(self, method):
        return self.root / f"{method}.json"

    def _ending(self, method):
        path = self._ending_of(method)
        return json.loads(path.read_text()) if path.exists() else None


def progress_of(log_path):
    """(last step done in the log, number of lines that tell of a step)."""
    told = [line for line in log_path.read_text().splitlines() if line.startswith("step ") and "loss" in line]
    return (int(told[-1].split()[1].split("/")[0]) if told else 0), len(told)


def unlike(found, expected):
    """Which parts of two endings differ, in words."""
    return [name for name in expected if found[name] != expected[name]]


def make_inputs(root):
    """A tiny random Gemma 3 and the data of the study."""
    import tiny

    os.environ.update(PEFTLIB_ROOT=str(root), HF_HUB_OFFLINE="1")
    from peftlib import data

    tiny.model_folder(Path(root) / "model", hidden_size=128, intermediate_size=256)
    study = study_of(root)
    data.build_data(study.cfg, study.data_dir)
    study.freeze()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that train each run together")
    args = parser.parse_args(argv)
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    with tempfile.TemporaryDirectory() as root:
        chaos = Chaos(root, args.seed, args.processes)
        chaos.prepare()
        runs = chaos.kill(args.kills)
    print(f"{runs} runs; killed " + ", ".join(f"{phase} {n}" for phase, n in chaos.phases.most_common()))
    print(f"{args.kills} kills, {chaos.differences} differences")
    return 1 if chaos.differences else 0


if __name__ == "__main__":
    sys.exit(main())
