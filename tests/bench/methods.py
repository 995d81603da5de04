"""Training speed and memory of the methods on one GPU, on the exact Gemma-3-1B shape with random weights.

    python tests/bench/methods.py OUT.json [--only NAME,...] [--settings FILE] [--warm]   # a process each
    python tests/bench/methods.py --one '{"method": ...}'      # one setting, here and now

Each step is 16,384 random tokens, all scored, as sequences of 1,024 unless `seq` says otherwise, through peftlib's own
Stepper. tok_s is the median over steps after the second. A micro-batch of 0 is the planner's choice for the cap. A cap
imitates a T4's memory on a larger card; its speed is not a T4's. No data, no tokenizer, no network.

--warm first takes one step of each of our settings, several at a time: that fills the compiler's cache and
gives first_step_cold_s (compilers side by side), so that first_step_s is that of a session which has the cache.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench_settings import DEFAULTS, FOLDER, TOKENS, choose_plan, make_model, settings
from bench_steps import measure

PEERS = Path(__file__).with_name("peers.py")


def main(argv):
    if argv[0] == "--one":
        setting = {**DEFAULTS, **json.loads(argv[1])}
        try:
            setting = choose_plan(setting)
            found = measure(setting)
        except RuntimeError as error:  # out of memory is a result too
            found = {"error": str(error).split("\n")[0][:300]}
        print("RESULT " + json.dumps({**setting, **found}), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="names of rows, with commas between")
    parser.add_argument("--settings", type=Path, help="JSON file with a list of rows to run instead of the table's")
    parser.add_argument("--warm", action="store_true", help="fill the compiler's cache first")
    args = parser.parse_args(argv)
    chosen = json.loads(args.settings.read_text()) if args.settings else list(settings())
    if args.only:
        unknown = set(args.only.split(",")) - {setting["name"] for setting in chosen}
        if unknown:
            parser.error(f"no rows named {', '.join(sorted(unknown))}")
        chosen = [setting for setting in chosen if setting["name"] in args.only.split(",")]
    make_model()
    rows, end = [], time.time() + float(os.environ.get("BENCH_SECONDS", "1e9"))
    cold = _side_by_side(chosen, is_warming=args.warm)
    for setting in chosen:
        if setting.get("is_memory_alone"):
            rows.append(cold[setting["name"]])
        elif time.time() > end:
            print("no time for", setting)
            continue
        else:
            rows.append(_in_own_process(setting))
            if "error" not in cold.get(setting["name"], {"error": "not run"}):
                rows[-1]["first_step_cold_s"] = cold[setting["name"]]["first_step_s"]
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _side_by_side(chosen, *, is_warming):
    """{name: row} of the settings that have no speed, and of one step of each of the others; eight at once."""
    from concurrent.futures import ThreadPoolExecutor

    started, ours = time.time(), [setting for setting in chosen if "peer" not in setting]
    ours = [
        setting if setting.get("is_memory_alone") else {**setting, "only_first_step": True}
        for setting in ours
        if is_warming or setting.get("is_memory_alone")
    ]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(_in_own_process, ours))
    print(f"side by side: {len(rows)} settings in {time.time() - started:.0f} s", flush=True)
    return {row["name"]: row for row in rows}


def _in_own_process(setting):
    started, where = time.time(), dict(os.environ)
    if "peer" in setting:
        sizes = [setting[name] for name in ("micro_batch", "accumulation")]
        sizes += [DEFAULTS["steps"], setting.get("cap_gib", 0.0)]
        command = [sys.executable, str(PEERS), setting["peer"], str(TOKENS), *map(str, sizes)]
        where["PEERS_DIR"] = str(FOLDER)
        where["PYTHONPATH"] = where.get("BENCH_PEER_PATH") or where.get("PYTHONPATH", "")
    else:
        command = [sys.executable, __file__, "--one", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=where)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[0][7:]) if lines else {"error": done.stderr[-600:]}
    row = {**DEFAULTS, **setting, **found, "workload": "uniform", "gpus": 1, "date": time.strftime("%Y-%m-%d")}
    row["recompute"] = row["checkpointing"]
    if "peer" in setting and lines and "error" not in found:
        row.update(first_step_s=row["first"], peak_gib=row["peak_alloc"], reserved_gib=row["peak_res"])
    for line in done.stdout.splitlines():
        if line.startswith("PROFILE"):
            print(line)
    if not setting.get("only_first_step"):
        print(_line(row), f"({time.time() - started:.0f} s)", flush=True)
    return row


def _line(row):
    head = (
        f"{row['name']:<23}{row['precision']:<6}cap {row['cap_gib']:<5}mb {row['micro_batch']:<3}"
        f"ckpt {row['checkpointing']:<8}chunk {row['chunk']:<5}"
    )
    if "error" in row:
        return f"{head}{row['error']}"
    parts = [f"{key[:-4]} {row[key]:.2f}" for key in ("weights_gib", "held_gib", "first_peak_gib") if key in row]
    return (
        f"{head}{row.get('tok_s', 0):>8,.0f} tok/s {row['peak_gib']:6.2f} GiB ({', '.join(parts)}) "
        f"first {row['first_step_s']:.1f} s"
        + "".join(f" {key} {row[key]:.4f}" for key in row if key.startswith(("refresh_", "save_", "checkpoint_")))
        + "".join(f" {way} {got['useful_tok_s']:,.0f}" for way, got in row.get("mixed_found", {}).items())
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1:])
