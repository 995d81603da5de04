"""Where a training step of the real 270M goes on a CPU without 16-bit products: shares of its time by operator.

python tests/bench/cpu.py MODEL_FOLDER results/bench/cpu.json
"""

import argparse
import json
import os
import time
from pathlib import Path

import bench_settings
import bench_steps
import torch
from torch.profiler import ProfilerActivity, profile

from peftlib.train.batching import Rows
from peftlib.train.estimate import matmul_ceiling

METHODS = ("qlora", "galore")
LENGTHS = (180, 200, 150)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def measure(method):
    """{figure: value} of the second step of a method, float32 as where the CPU has no bfloat16 products."""
    settings = {**bench_settings.DEFAULTS, "method": method, "precision": "fp32", "micro_batch": 3, "compile": "off"}
    stepper, _, is_flat = bench_steps.build({**settings, "seq": max(LENGTHS)})
    rows = Rows(bench_steps.random_rows(list(LENGTHS), 262144), is_flat=is_flat)
    batches, scored = list(rows.batches(range(len(LENGTHS)), sum(LENGTHS), "cpu")), int(rows.scored.sum())
    stepper.update(stepper.gradients(batches, scored, seed=0))
    started = time.perf_counter()
    stepper.update(stepper.gradients(batches, scored, seed=1))
    seconds = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        stepper.update(stepper.gradients(batches, scored, seed=2))
    events = seen.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    products = [event for event in events if event.key in PRODUCTS]
    in_products = sum(event.self_cpu_time_total for event in products)
    speed = sum(event.flops for event in products) / (in_products / 1e6)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:6]
    return {
        "method": method,
        "tokens_per_second": sum(LENGTHS) / seconds,
        "products_share": in_products / total,
        "products_of_ceiling": speed / matmul_ceiling("cpu", torch.float32),
        "largest": {event.key: event.self_cpu_time_total / total for event in largest},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    bench_settings.FOLDER = args.model
    found = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    found["rows"] = []
    for method in METHODS:
        found["rows"].append(measure(method))
        print(json.dumps(found["rows"][-1]), flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
