"""How far the losses of a run that is killed and resumed lie from those of an uninterrupted one, on a GPU.

    PEFTLIB_ROOT=FOLDER python tests/bench/kills.py OUT.json --model FOLDER --data DIR [--methods qlora,...]

Each method trains `steps` steps twice: to the end, and killed (SIGKILL) after step `kill` and started again. It runs as
users call it, on real rows within 14.5 GiB, saving as often as asked. DIR holds the three sources as parity.py has it.
On one CPU the losses are equal to the last bit, which tests/train shows.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "bench")]
CAP_GIB, SAVE_STEPS = 14.5, 6
STEP = re.compile(r"^step (\d+)/")


def train(args, method, name):
    """Train a study of this name, or go on with it, in this process."""
    from parity import FILES

    from peftlib import Study, TrainingRun, build_data, resolve
    from peftlib.core.config import from_text

    fields = {"train_rows": 400, "valid_rows": 20, "test_rows": 1, "allow_short": True, "max_length": 512}
    fields |= {"max_steps": args.steps, "eval_steps": args.steps, "save_steps": SAVE_STEPS, "max_save_overhead": 0.0}
    fields |= {"logging_steps": 1, "memory_gib": CAP_GIB, "galore_update_interval": 10}
    fields |= {name: from_text(name, text) for name, text in (pair.split("=", 1) for pair in args.set)}
    sources = "; ".join(f"{source}={args.data / file}" for source, file in FILES.items())
    study = Study.open(resolve("gpu", study=name, model=str(args.model), sources=sources, **fields))
    build_data(study.cfg, study.data_dir)
    study.freeze()
    print("RECORD " + json.dumps(TrainingRun(study, method).train()), flush=True)


def in_own_process(argv, method, name, kill=0):
    """The record of a run in a process of its own, or None where it was killed after step `kill`."""
    command = [sys.executable, __file__, *argv, "--one", method, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as p:
        for line in p.stdout:
            if line.startswith("RECORD "):
                return json.loads(line[7:])
            print(f"{name}: {line}", end="", flush=True)
            found = STEP.match(line)
            if kill and found and int(found[1]) >= kill:
                p.kill()
                return None
    raise SystemExit(f"{name} ended with {p.returncode}")


def measured(argv, args, method):
    stamp = f"kills-{method}-{int(time.time())}"
    whole = in_own_process(argv, method, f"{stamp}-whole")
    if in_own_process(argv, method, f"{stamp}-cut", args.kill) is not None:
        raise SystemExit(f"{method} was over before it could be killed: lower --kill")
    cut = in_own_process(argv, method, f"{stamp}-cut")
    losses = [[entry["loss"] for entry in record["history"]] for record in (whole, cut)]
    return {
        "name": f"resume_{method}",
        "method": method,
        "killed_after_step": args.kill,
        "save_steps": SAVE_STEPS,
        "steps": len(losses[1]),
        "largest_relative_loss_difference": max(abs(one - two) / one for one, two in zip(*losses, strict=True)),
        "placement": cut["placement"],
        "losses": losses,
        "peak_gib": [record["peak_memory_bytes"] / 2**30 for record in (whole, cut)],  # uninterrupted, resumed
        "device": cut["device"],
        "cap_gib": CAP_GIB,
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, type=Path, help="folder with a Gemma 3 and its tokenizer")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--methods", default="qlora,galore,hybrid,full")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--kill", type=int, default=14, help="the step after which the process is killed")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the study")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        train(args, *args.one)
        return
    rows = []
    for method in args.methods.split(","):
        rows.append(measured(argv, args, method))
        print(f"{method}: {rows[-1]['largest_relative_loss_difference']:.1e}", flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
