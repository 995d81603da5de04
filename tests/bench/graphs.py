"""Losses of a method's first steps on one GPU, with and without CUDA graphs, in several passes of real lengths.

    BENCH_LENGTHS=FILE python tests/bench/graphs.py OUT.json [--method galore] [--micro-batch 1] [--precision bf16]

On the exact Gemma-3-1B shape with random weights: eight steps of 16 random rows, the same two in turn, so that the loss
falls by what the updates do. FILE: as for the rows of real lengths in methods.py. Graphs refresh GaLore's bases in fewer
steps, so `gathered` runs without graphs but with their refreshes: graphs should come near to that.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_settings
from bench_settings import DEFAULTS
from bench_steps import build, random_rows

STEPS, ROWS = 8, 16
WAYS = ("graphs", "gathered", "none")


def losses_of(args, way):
    """A row: the losses of the first steps, in this process."""
    import torch

    from peftlib.core.record import device_name
    from peftlib.train.batching import Rows

    lengths = json.loads(Path(os.environ["BENCH_LENGTHS"]).read_text())["lengths"]
    fields = {"galore_rank": args.rank} if args.rank else {}
    how = {"method": args.method, "micro_batch": args.micro_batch, "precision": args.precision, "fields": fields}
    torch.manual_seed(0)
    stepper, model, is_flat = build({**DEFAULTS, **how, "compile": "off", "graphs": way == "graphs"})
    if way == "gathered":
        stepper.optimizer.gather_refreshes()
    rows = Rows(random_rows(lengths[: 2 * ROWS], model.config.vocab_size, prompt_share=0.3), is_flat=is_flat)
    losses, passes = [], 0
    for step in range(STEPS):
        numbers = range(step % 2 * ROWS, step % 2 * ROWS + ROWS)
        batches = list(rows.batches(numbers, args.micro_batch * DEFAULTS["seq"], stepper.device))
        loss = stepper.gradients(batches, int(rows.scored[list(numbers)].sum()), seed=step)
        stepper.update(loss)
        losses.append(float(loss))
        passes = max(passes, len(batches))
    return {**how, "way": way, "passes": passes, "losses": losses, "device": device_name(stepper.device)}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="galore")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of 1,024 tokens that a pass has room for")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rank", type=int, help="of GaLore's bases")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print("RESULT " + json.dumps({**losses_of(args, args.one), "date": time.strftime("%Y-%m-%d")}), flush=True)
        return
    bench_settings.make_model()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, *argv, "--one", way], stdout=subprocess.PIPE, text=True, check=True
        )
        rows += [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        print(f"{way:<10}" + " ".join(f"{loss:.4f}" for loss in rows[-1]["losses"]), flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1:])
