"""Measures speeds, memory and parity for docs/memory.md, by need, on all GPUs of a machine within a time limit.

    python tests/bench/session.py OUT --model FOLDER --data DIR --seconds N [--only NAME,...] [--list]
    python tests/bench/session.py OUT --jobs FILE --slots 3 --seconds N

FOLDER and DIR as in parity.py: the real 270M and the three sources. One process a card with cores of its own, so that
timings do not disturb each other, and a fresh compile cache for each. What is found lies in OUT as soon as it is: a
JSON file for each job, merged by hand into results/bench, and its lines under OUT/logs. A job that cannot end in time
is not started. Exit status 1: a job failed, and 2: the first of its kind failed, so the others were not started.

FILE: other commands, [{"name": ..., "command": "a line for the shell", "seconds": that it may take}, ...], such as
results/reference/sides.json; they run in this folder with this environment and PYTHON, --slots at once on each card.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import bench_settings

HERE = Path(__file__).resolve().parent
METHODS = ("qlora", "galore", "lora", "full")
ROWS = (
    *("qlora_memory", "qlora_memory_16", "galore_3_off", "full_3_cheap", "apollo_3_cheap", "qlora", "galore", "hybrid"),
    *("qlora_real_lengths", "galore_real_lengths", "hybrid_real_lengths", "qlora_lean", "galore_lean", "hybrid_lean"),
)
GIVEN = "given"  # kind of the jobs that a file lists
N_LENGTHS = 768  # 48 steps of 16 rows


@dataclass(frozen=True)
class Job:
    """A command whose result is one file; `kind`: jobs that fail for the same reasons. seconds: that it may take."""

    name: str
    kind: str
    command: list
    seconds: int = 240


def jobs(args):
    """All jobs, the most needed first, or those of --jobs."""
    found = given(args.jobs) if args.jobs else all_jobs(args)
    if args.only:
        unknown = {*args.only.split(",")} - {job.name for job in found}
        if unknown:
            raise SystemExit(f"no jobs named {', '.join(sorted(unknown))}")
    return [job for job in found if not args.only or job.name in args.only.split(",")]


def given(path):
    """The jobs of a file."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Job(row["name"], GIVEN, ["bash", "-c", row["command"]], row["seconds"]) for row in rows]


def all_jobs(args):
    """What docs/memory.md needs."""

    def bench(script, *words):
        return [sys.executable, str(HERE / script), *map(str, words)]

    def parity(method, who):
        name = f"parity_{method}_{who}"
        where = ("--model", args.model, "--data", args.data, "--work", args.out / "work" / name)
        command = bench("parity.py", args.out / f"{name}.json", *where, "--only", method, "--who", who)
        return Job(name, "parity", command, 300)

    found = [parity(method, "compiled") for method in METHODS]
    found += [Job("graphs", "graphs", bench("graphs.py", args.out / "graphs.json"))]
    found += [Job(name, "methods", bench("methods.py", args.out / f"{name}.json", "--only", name)) for name in ROWS]
    found += [parity(method, who) for method in METHODS for who in ("stock", "ours")]
    kills = ("--model", bench_settings.FOLDER, "--data", args.data)
    found += [Job("kills", "kills", bench("kills.py", args.out / "kills.json", *kills, "--methods", "galore"))]
    return found


def prepared(args, chosen):
    """The environment of our jobs, after making what several of them read."""
    os.environ["PEERS_TOKENIZER"] = str(args.model)
    bench_settings.make_model()  # now, because several processes at once would each make it
    built = build(args)
    for job in chosen:
        if job.kind == "parity":
            shutil.copytree(built, args.out / "work" / job.name / "runs" / "parity" / "data", dirs_exist_ok=True)
    return {**os.environ, "BENCH_LENGTHS": str(args.out / "lengths.json")}


def build(args):
    """Folder of the rows that parity.py trains on, built once; also writes the lengths for steps of real rows."""
    from parity import study_of

    from peftlib import build_data, load_split

    os.environ |= {"PEFTLIB_ROOT": str(args.out / "work" / "built"), "PEFTLIB_MIRROR": "off", "HF_HUB_OFFLINE": "1"}
    study = study_of(argparse.Namespace(model=args.model, data=args.data, steps=300, set=[]))
    build_data(study.cfg, study.data_dir)
    tokens = [row["n_tokens"] for row in load_split(study.data_dir, "train")]  # source by source
    found = tokens[:: max(1, len(tokens) // N_LENGTHS)][:N_LENGTHS]
    (args.out / "lengths.json").write_text(json.dumps({"lengths": found}), encoding="utf-8")
    return study.data_dir


def run_all(waiting, places, out, end, *, env):
    """Run the jobs, one at a time on each place; returns {name: exit status or what happened instead}.

    places: [(GPU, cores), ...]. end: on time.monotonic's clock. A kind whose first job failed is not tried again.
    """
    todo, results, failed, passed, lock = queue.SimpleQueue(), {}, set(), set(), threading.Lock()
    for job in waiting:
        todo.put(job)

    def work(gpu, cores):
        while True:
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            if time.monotonic() + job.seconds > end:
                results[job.name] = "no time left"
            elif job.kind in failed - passed - {GIVEN}:
                results[job.name] = "others of its kind failed"
            else:
                results[job.name] = status = _run(job, gpu, cores, out, env)
                with lock:
                    (failed if status else passed).add(job.kind)
            print(f"{job.name:<28}{results[job.name]}", flush=True)

    threads = [threading.Thread(target=work, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _run(job, gpu, cores, out, env):
    """The exit status of a job; 'out of time' if it was killed."""
    with tempfile.TemporaryDirectory(prefix="peftlib-bench-") as cache:
        where = {**env, "CUDA_VISIBLE_DEVICES": str(gpu), "PYTHON": sys.executable}
        if job.kind != GIVEN:
            where |= {"PEFTLIB_ROOT": f"{cache}/runs", "PEFTLIB_CACHE": cache}
            where |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        with open(out / "logs" / f"{job.name}.log", "w", encoding="utf-8") as log:
            os.sched_setaffinity(0, cores)  # of this thread, and so of the process that it starts
            with subprocess.Popen(
                job.command, stdout=log, stderr=subprocess.STDOUT, env=where, start_new_session=True
            ) as child:
                try:
                    return child.wait(job.seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)  # with all that it started
                    return "out of time"


def places(slots=1):
    """[(GPU, its share of this process's cores), ...], `slots` of each."""
    import torch

    cores, gpus = sorted(os.sched_getaffinity(0)), max(1, torch.cuda.device_count())
    return [(gpu, {*cores[gpu::gpus]} or {*cores}) for gpu in range(gpus)] * slots


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=lambda text: Path(text).absolute())
    parser.add_argument("--model", type=lambda text: Path(text).absolute())
    parser.add_argument("--data", type=lambda text: Path(text).absolute())
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--jobs", type=Path, metavar="FILE", help="run these commands instead")
    parser.add_argument("--slots", type=int, default=1, help="jobs at once on each card")
    parser.add_argument("--only", help="names of jobs, with commas between")
    parser.add_argument("--list", action="store_true", help="only print the jobs")
    args = parser.parse_args(argv)
    if not args.jobs and not (args.model and args.data):
        parser.error("--model and --data, or --jobs FILE")
    chosen, end = jobs(args), time.monotonic() + args.seconds
    if args.list:
        print("\n".join(job.name for job in chosen))
        return 0
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    env = dict(os.environ) if args.jobs else prepared(args, chosen)
    results = run_all(chosen, places(args.slots), args.out, end, env=env)
    (args.out / "jobs.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 2 if "others of its kind failed" in results.values() else int(any(v for v in results.values() if v != 0))


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    sys.exit(main(sys.argv[1:]))
