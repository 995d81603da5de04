"""Training speed of one run on 1, 2 and 4 GPUs of one host, on the exact Gemma-3-1B shape with random weights.

    python tests/bench/scale.py OUT.json [--cards 1,2,4] [--methods qlora,galore,hybrid] [--shard]

For each number of cards a torchrun. weak: 16 rows of 1,024 random tokens a card; strong: 16 rows in all. tok_s is over
all cards, the median over steps after the second; ratio: to the same workload on one card. exchanged_mib: what each
process hands to the group in a step without a refresh. Without a GPU, or with SCALE_TINY=1, a tiny shape on CPUs
(gloo) in 4 short rows, which tries the script and says nothing about speed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_settings
import bench_steps

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 32,
}
STEPS = 12
BEST = {"qlora": (8, True), "galore": (4, False), "hybrid": (8, True)}  # micro-batch, cheap activations recomputed


def is_tiny():
    import torch

    return os.environ.get("SCALE_TINY") == "1" or not torch.cuda.is_available()


def prepare():
    """Shrink the shape where there is no GPU; returns (rows, tokens of each, fields of the config)."""
    if not is_tiny():
        return bench_settings.SEQUENCES, bench_settings.TOKENS, {}
    bench_settings.SHAPE_1B = TINY
    bench_settings.FOLDER = Path(os.environ.get("BENCH_DIR", tempfile.gettempdir())) / "gemma3_tiny_shape"
    return 4, 64, {"galore_rank": 8, "lora_rank": 4, "device": "cpu"}


def measure(method, scaling, *, shard):
    """One process's part of a row; the row in the main process."""
    import numpy as np
    import torch

    from peftlib.train.batching import Rows
    from peftlib.train.parallel.exchange import divide
    from peftlib.train.parallel.processes import join

    n_rows, length, fields = prepare()
    members = join("cpu" if is_tiny() else "cuda")
    n_rows *= members.world if scaling == "weak" else 1
    size, is_cheap = BEST[method]
    setting = {
        **bench_settings.DEFAULTS,
        "method": method,
        "micro_batch": min(size, -(-n_rows // members.world)),
        "is_cheap": is_cheap and not is_tiny(),
        "cap_gib": 0.0 if is_tiny() else 14.5,
        "precision": "fp32" if is_tiny() else "bf16",
        "fields": {**fields, "shard_optimizer": shard},
    }
    with members.main_first():
        stepper, model, is_flat = bench_steps.build(setting, processes=members)
    vocabulary = model.config.vocab_size
    rows = Rows(bench_steps.random_rows([length] * n_rows, vocabulary), is_flat=is_flat)
    part = divide(range(n_rows), rows.lengths, members.world)[members.rank]
    batches = list(rows.batches(part, setting["micro_batch"] * length, stepper.device))
    seconds = []
    for step in range(STEPS):
        bench_steps.wait(stepper.device)
        started = time.perf_counter()
        done = stepper.update(stepper.gradients(batches, int(rows.scored.sum()), seed=step))
        bench_steps.wait(stepper.device)
        seconds.append(time.perf_counter() - started)
    middle = float(np.median(seconds[2:]))
    peak = torch.tensor([torch.cuda.max_memory_allocated() / 2**30 if stepper.device == "cuda" else 0.0])
    peaks = peak.to(stepper.device).repeat(members.world)
    mine = torch.zeros_like(peaks)
    mine[members.rank] = peaks[members.rank]
    members.sum_(mine)
    if not members.is_main:
        return None
    return {
        "bench": "scale",
        "name": f"{method}_{scaling}_{members.world}{'_sharded' if shard else ''}",
        "workload": "uniform",
        "scaling": scaling,
        "method": method,
        "gpus": members.world,
        "shard_optimizer": shard,
        "rows": n_rows,
        "seq": length,
        "tok_s": n_rows * length / middle,
        "step_s": middle,
        "first_step_s": seconds[0],
        "loss": done.loss,
        "exchanged_mib": stepper.exchange.bytes_a_step / 2**20,
        "peak_gib": float(mine.max()),
        "cap_gib": setting["cap_gib"],
        "micro_batch": setting["micro_batch"],
        "recompute": setting["checkpointing"],
        "precision": setting["precision"],
        "device": torch.cuda.get_device_name() if stepper.device == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv):
    if argv[0] == "--one":
        row = measure(argv[1], argv[2], shard=argv[3] == "True")
        if row:
            print("RESULT " + json.dumps(row), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cards", default="1,2,4", help="with commas between; 1 first, which ratios are to")
    parser.add_argument("--methods", default="qlora,galore,hybrid")
    parser.add_argument("--scalings", default="weak,strong")
    parser.add_argument("--shard", action="store_true", help="divide GaLore's moments among the cards")
    args = parser.parse_args(argv)
    prepare()
    bench_settings.make_model()
    rows = []
    for method in args.methods.split(","):
        for cards in map(int, args.cards.split(",")):
            for scaling in args.scalings.split(","):
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cards}"]
                command += [__file__, "--one", method, scaling, str(args.shard)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not found:
                    print(f"{method} {scaling} on {cards}: {(done.stdout + done.stderr)[-2000:]}", flush=True)
                    continue
                row = json.loads(found[0][7:])
                alone = [r for r in rows if (r["method"], r["scaling"], r["gpus"]) == (method, scaling, 1)]
                row["ratio"] = row["tok_s"] / alone[0]["tok_s"] if alone else 1.0 if cards == 1 else None
                rows.append(row)
                args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                print(
                    f"{row['name']:<24}{row['tok_s']:>10,.0f} tok/s  x {row['ratio'] or float('nan'):.2f}  "
                    f"exchanged {row['exchanged_mib']:.2f} MiB a step  peak {row['peak_gib']:.2f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1:])
