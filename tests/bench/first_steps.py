"""Seconds of each method's first step on a few CPU cores, with an empty compile cache and then with a filled one.

    python tests/bench/first_steps.py OUT.json [--methods qlora,...] [--cores 2] [--at-once N]

On the exact Gemma-3-1B shape with random weights, under a cap of 14.5 GiB, as the planner would run it. Each method has
cores and a cache folder of its own; at once: as many as the machine has cores for, spread over the visible GPUs.
`python tests/bench/methods.py --one` runs the step. Without a GPU nothing is compiled: that only tries the script.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_settings

METHODS = ("qlora", "galore", "hybrid", "lora", "dora", "full", "apollo", "muon")


def measured(method, place, args):
    """Rows of a method's first step with each state of the cache, run on the cores and the GPU of a place."""
    cores, gpu = place
    os.sched_setaffinity(0, cores)  # of this thread; the processes that it starts inherit them
    setting = {"name": f"first_{method}", "method": method, "micro_batch": 0, "cap_gib": 14.5, "only_first_step": True}
    rows = []
    with tempfile.TemporaryDirectory(prefix="peftlib-first-") as cache:
        where = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        where |= {"OMP_NUM_THREADS": str(len(cores)), "CUDA_VISIBLE_DEVICES": str(gpu)}
        for state in ("empty", "filled"):
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("methods.py")), "--one", json.dumps(setting)],
                capture_output=True,
                text=True,
                check=False,
                env=where,
            )
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            row = json.loads(found[0][7:]) if found else {**setting, "error": done.stderr[-300:]}
            rows.append({**row, "cache": state, "cores": len(cores), **args.facts})
            print(f"{method:<8}{state:<8}{row.get('first_step_s', row.get('error'))}", flush=True)
    return rows


def places(args):
    """[(cores, number of the GPU), ...] for the processes that run at once."""
    import torch

    cores, gpus = sorted(os.sched_getaffinity(0)), max(1, torch.cuda.device_count())
    return [(set(cores[i * args.cores : (i + 1) * args.cores]), i % gpus) for i in range(args.at_once)]


def main(argv):
    import torch

    from peftlib.core import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between")
    parser.add_argument("--cores", type=int, default=2, help="of each process")
    parser.add_argument("--at-once", type=int, help="processes; default: one for each method that has cores")
    args = parser.parse_args(argv)
    methods, n_cores = args.methods.split(","), len(os.sched_getaffinity(0))
    if n_cores < args.cores:
        parser.error(f"--cores {args.cores}: this machine has {n_cores}")
    args.at_once = min(args.at_once or len(methods), len(methods), n_cores // args.cores)
    device = record.device_name("cuda" if torch.cuda.is_available() else "cpu")
    args.facts = {"at_once": args.at_once, "device": device, "date": time.strftime("%Y-%m-%d")}
    bench_settings.make_model()
    free, rows = queue.SimpleQueue(), []
    for place in places(args):
        free.put(place)

    def one(method):
        place = free.get()
        try:
            return measured(method, place, args)
        finally:
            free.put(place)

    with ThreadPoolExecutor(args.at_once) as pool:
        for found in pool.map(one, methods):
            rows += found
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1:])
