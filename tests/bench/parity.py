"""The same trainings by peftlib and by stock libraries: losses on the same validation rows, speed, memory.

    python tests/bench/parity.py OUT.json --model FOLDER --data DIR [--only qlora,...] [--who ours,compiled,stock]

Both sides start from the same weights and see the same rows in the same order, 16 a step. `ours` is a TrainingRun as
users call it, under a cap of 14.5 GiB; so is `compiled`, with compile=on. `stock` is what transformers with eager
attention, PEFT, bitsandbytes and galore_torch do in a plain loop: right-padded micro-batches of 8 rows under autocast,
float32 trained weights, the optimizer, rates, schedule and clipping of our config. `sdpa` is the same with sdpa
attention; it ends at the first loss or gradient that is not finite, whose step it reports. One plain function takes all
validation losses. DIR holds the three sources as ../shared/data or its real/ do. Each training has a process of its
own; rows of other names in OUT stay. galore_torch clips by the norm of whole gradients, ours by that of the projected
ones.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "bench")]
FILES = {"alpaca": "alpaca.jsonl.gz", "tulu": "tulu_v2.jsonl.gz", "ultrachat": "ultrachat_200k.jsonl.gz"}
METHODS, SIDES = ("qlora", "lora", "galore", "full"), ("ours", "compiled", "stock", "sdpa")
RATES = {"lora_learning_rate": 6e-4, "galore_learning_rate": 1e-3, "full_learning_rate": 6e-5}
OURS = SIDES[:2]
CAP_GIB, VALID_ROWS, VALID_TOKENS = 14.5, 600, 2048
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "galore-torch")


def study_of(args):
    """The study whose rows and settings both sides take."""
    from peftlib import Study, resolve
    from peftlib.core.config import from_text

    sources = "; ".join(f"{name}={args.data / file}" for name, file in FILES.items())
    rows = {"train_rows": 2000, "valid_rows": 250, "test_rows": 1, "allow_short": True}
    fields = {**rows, **RATES, "max_steps": args.steps, "memory_gib": CAP_GIB, "eval_steps": args.steps}
    fields |= {name: from_text(name, text) for name, text in (pair.split("=", 1) for pair in args.set)}
    return Study.open(resolve("gpu", study="parity", model=str(args.model), sources=sources, **fields))


def compiled(study, args):
    """The same study with compile=on, in a folder of its own because its runs have the same names."""
    os.environ["PEFTLIB_ROOT"] = str(args.work / "compiled")
    args.set.append("compile=on")
    other = study_of(args)
    shutil.copytree(study.data_dir, other.data_dir, dirs_exist_ok=True)
    other.freeze()
    return other


def started(study, method, initial):
    """A TrainingRun before its first step, whose adapters are kept in the file `initial`."""
    from safetensors.torch import save_file

    from peftlib import TrainingRun
    from peftlib.models.inspect import trainable

    run = TrainingRun(study, method)
    adapters = {name: p.detach().cpu().clone() for name, p in trainable(run.model).items() if "lora_" in name}
    save_file(adapters, initial)
    return run


class KernelShare:
    """Callback of a TrainingRun that profiles a few steps in its middle. share: time of their kernels / their time."""

    is_dropped, STEPS = False, 4

    def __init__(self, steps, device):
        self.share, self._step, self._device = None, 0, device
        self._first = steps // 2

    def wants_numbers(self):
        return False

    def show(self, snapshot):
        pass

    def stop_asked(self):
        from parity_stock import wait
        from torch.profiler import ProfilerActivity, profile

        self._step += 1
        if self._device == "cuda" and self._step == self._first:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            wait(self._device)
            self._profile.start()
            self._started = time.perf_counter()
        elif self._device == "cuda" and self._step == self._first + self.STEPS:
            wait(self._device)
            wall = time.perf_counter() - self._started
            self._profile.stop()
            kernels = sum(event.self_device_time_total for event in self._profile.key_averages()) / 1e6
            self.share = kernels / wall
        return False


def train_ours(study, method, initial):
    """(what was found, the trained model as a plain one)."""
    import torch
    from parity_stock import speed_of

    from peftlib import load_trained

    run = started(study, method, initial)
    kernels = KernelShare(study.cfg.max_steps, run.device)
    record = run.train([kernels])
    placement = record["placement"]
    found = {
        **speed_of([(entry["tokens"], entry["seconds"]) for entry in record["history"]]),
        "losses": [entry["loss"] for entry in record["history"]],
        "kernel_share": kernels.share,
        "first_step_s": record["first_step_s"],
        "peak_gib": record["peak_memory_bytes"] / 2**30,
        "cap_gib": study.cfg.memory_gib,
        "micro_batch": placement["micro_batch_size"],
        "recompute": placement["activation_checkpointing"],
        "precision": record["precision"],
        "placement": placement,
    }
    device, where = run.device, run.weights_dir
    del run
    return found, load_trained(where, device=device, dtype=torch.float32)


def valid_loss(model, rows, device):
    """Nats per scored token, with eager attention in float32 and sums in float64. Padding stands right of all rows and
    attention is causal, so no mask is needed."""
    import torch
    from parity_stock import padded

    model.set_attn_implementation("eager")
    model.eval()
    total, count = 0.0, 0
    rows = sorted(rows, key=lambda row: row["n_tokens"])
    while rows:
        n = max(1, VALID_TOKENS // rows[-1]["n_tokens"])
        rows, part = rows[:-n], padded(rows[-n:], device)
        with torch.no_grad():
            logits = model(input_ids=part["input_ids"], use_cache=False).logits[:, :-1]
            targets = part["labels"][:, 1:]
            kept = targets != -100
            losses = torch.nn.functional.cross_entropy(logits[kept].float(), targets[kept], reduction="none")
        total, count = total + float(losses.double().sum()), count + int(kept.sum())
    return total / count


def one(args):
    """Train and score one method on one side, here; prints the row."""
    import torch
    from parity_stock import train_stock

    from peftlib import load_split, methods
    from peftlib.core import record
    from peftlib.core.env import resolve_device

    method, who = args.one.split(":")
    study, initial = study_of(args), args.work / f"initial-{method}.safetensors"
    if who == "start":
        started(study, method, initial)
        return
    if who == "compiled":
        study = compiled(study, args)
    if who in OURS:
        found, model = train_ours(study, method, initial)
    else:
        found, model = train_stock(study, method, initial, "eager" if who == "stock" else "sdpa")
    device = resolve_device(study.cfg.device)
    valid = load_split(study.data_dir, "valid")
    valid = [valid[i * len(valid) // VALID_ROWS] for i in range(VALID_ROWS)] if len(valid) > VALID_ROWS else list(valid)
    loss = valid_loss(model, valid, device) if model is not None else None
    rate = getattr(study.cfg, methods.find(method).rates[0])
    row = {"name": f"{method}_{who}", "workload": "parity", "method": method, "who": who, "valid_loss": loss, **found}
    row |= {"valid_rows": len(valid), "steps": study.cfg.max_steps, "learning_rate": rate}
    row |= {"split_hash": study.manifest()["split_hash"], "gpus": int(device == "cuda")}
    row |= {"device": record.device_name(device), "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
    print("\nRESULT " + json.dumps({**row, "versions": versions()}), flush=True)  # a bar may have left a line open


def versions():
    """{package: version} of those that are installed."""
    known = {
        found.metadata["Name"].lower().replace("_", "-"): found.version for found in importlib.metadata.distributions()
    }
    return {name: known[name] for name in PACKAGES if name in known}


def in_own_process(args, what):
    """Run this script again for one METHOD:SIDE, its lines passed on; returns its row."""
    command = [sys.executable, __file__, args.out, "--model", args.model, "--data", args.data, "--work", args.work]
    command += ["--steps", args.steps, "--one", what, *(word for pair in args.set for word in ("--set", pair))]
    row, last = None, ""
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        for line in child.stdout:
            if line.startswith("RESULT "):
                row = json.loads(line[7:])
            else:
                print(f"  {what}  {line}", end="", flush=True)
                last = line.strip() or last
    method, who = what.split(":")
    return row or {"name": f"{method}_{who}", "workload": "parity", "method": method, "who": who, "error": last[:300]}


def with_differences(rows):
    """Each row of ours beside the stock one of its method: by how much its validation loss is above, as a share."""
    stock = {row["method"]: row.get("valid_loss") for row in rows if row["who"] == "stock"}
    for row in rows:
        base = stock.get(row["method"])
        if row["who"] in OURS and row.get("valid_loss") and base:
            row["loss_over_stock"] = row["valid_loss"] / base - 1
    return rows


def line_of(row):
    if "error" in row:
        return f"{row['name']:<18}{row['error']}"
    loss = f"not finite at step {row['nan_step']}" if "nan_step" in row else f"{row['valid_loss']:.4f}"
    beside = f" ({row['loss_over_stock']:+.2%} of stock)" if "loss_over_stock" in row else ""
    speed = f"{row['tok_s'] or 0:>10,.0f} tok/s {row['peak_gib']:7.2f} GiB  first step {row['first_step_s'] or 0:.1f} s"
    return f"{row['name']:<18}{speed}  validation loss {loss}{beside}"


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, type=Path, help="folder with a Gemma 3 and its tokenizer")
    parser.add_argument("--data", required=True, type=Path, help=f"folder with {', '.join(FILES.values())}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas between")
    parser.add_argument("--who", default="ours,stock", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the study")
    parser.add_argument("--work", type=Path, help="folder of the study; a finished training there is not repeated")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    chosen, sides = args.only.split(","), args.who.split(",")
    if wrong := ({*chosen} - {*METHODS}) | ({*sides} - {*SIDES}):
        parser.error(f"{', '.join(sorted(wrong))}: --only takes {', '.join(METHODS)}, --who takes {', '.join(SIDES)}")
    args.work = (args.work or Path(tempfile.mkdtemp(prefix="peftlib-parity-"))).absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"PEFTLIB_ROOT": str(args.work / "runs"), "PEFTLIB_MIRROR": "off", "HF_HUB_OFFLINE": "1"}
    if args.one:
        one(args)
        return
    from peftlib import build_data

    study = study_of(args)
    build_data(study.cfg, study.data_dir)
    study.freeze()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    for method in chosen:
        for who in sides:
            if who not in OURS and not (args.work / f"initial-{method}.safetensors").exists():
                in_own_process(args, f"{method}:start")
            row = in_own_process(args, f"{method}:{who}")
            rows = with_differences([*(kept for kept in rows if kept["name"] != row["name"]), row])
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(line_of(row), flush=True)
    print("\n" + "\n".join(map(line_of, rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
