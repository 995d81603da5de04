"""Data at study size: seconds, rows a second, peak memory at 1x and 10x, exact counts, leaks, and equal splits.

python tests/bench/data.py [--data DIR] [--skip-10x]     (make bench-data)

DIR holds alpaca.jsonl.gz, tulu_v2.jsonl.gz and ultrachat_200k.jsonl.gz in the sources' own schemas. Each build is a
process of its own; its peak is the largest sum of the proportional set sizes of it and its workers, looked at twice
a second. Ends with 1 where a bar is missed.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import leaks

FILES = {"alpaca": "alpaca.jsonl.gz", "tulu": "tulu_v2.jsonl.gz", "ultrachat": "ultrachat_200k.jsonl.gz"}
TRAIN, VALID, TEST = 5000, 200, 2000
MOST_SECONDS, MOST_CACHED_SECONDS = 60.0, 5.0
MOST_GROWTH = 1.15  # of the peak from 1x to 10x; a tenth is what the peak itself varies by from run to run
PLANTED = 200
_WATCH_SECONDS = 0.5  # looking costs the watched process time


class Build:
    """One run of `python -m peftlib data` in its own process. peak_bytes: of the whole process tree."""

    def __init__(self, root, study, files, *, hash_seed="0", workers=0):
        sources = [part for name, path in files.items() for part in ("--source", f"{name}={path}")]
        sizes = ["--train", str(TRAIN), "--valid", str(VALID), "--test", str(TEST), "-p", "workers", str(workers)]
        command = [
            sys.executable,
            "-m",
            "peftlib",
            "data",
            "--study",
            study,
            *sources,
            *sizes,
            "-p",
            "model",
            "packaged",
        ]
        where = {**os.environ, "PEFTLIB_ROOT": str(root), "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=REPOSITORY, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.peak_bytes = _watched(process)
        self.seconds = time.monotonic() - started
        output = process.stdout.read().decode()
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{output}")
        self.folder = Path(root) / study / "data"
        self.manifest = json.loads((self.folder / "manifest.json").read_text())

    @property
    def rows(self):
        return sum(n for counts in self.manifest["counts"].values() for n in counts.values())

    def line(self, name):
        read = sum(self.manifest["read"].values())
        return (
            f"{name:<22}{self.seconds:7.1f} s {self.rows / self.seconds:8,.0f} rows kept/s {read / self.seconds:8,.0f} "
            f"rows read/s {self.peak_bytes / 2**20:8,.0f} MiB peak   split {self.manifest['split_hash']}"
        )


def _watched(process):
    peak, parent = 0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        for one in [parent, *_children(parent)]:
            try:
                total += one.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue  # it ended in between
        peak = max(peak, total)
        time.sleep(_WATCH_SECONDS)
    return peak


def _children(parent):
    try:
        return parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def messages_of(folder):
    from peftlib.data import load_split

    return {split: load_split(folder, split).column("messages") for split in ("test", "valid", "train")}


def rows_in(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_rows(path, rows):
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
    return path


def ten_times(files, folder):
    """The files and nine more of each with every text's words shuffled, so that no copy resembles another."""
    made = {}
    for name, path in files.items():
        rng = random.Random(name)
        copies = (row if copy == 0 else shuffled(row, rng) for copy in range(10) for row in rows_in(path))
        made[name] = write_rows(folder / f"{name}.jsonl.gz", copies)
    return made


def shuffled(value, rng):
    if isinstance(value, dict):
        return {key: item if key == "role" else shuffled(item, rng) for key, item in value.items()}
    if isinstance(value, list):
        return [shuffled(item, rng) for item in value]
    words = value.split(" ")
    rng.shuffle(words)
    return " ".join(words)


def planted(files, test_messages, folder):
    """The files, with variants of PLANTED test rows among Tulu's: half repeat the prompt, half nearly the whole
    text."""
    rng = random.Random(0)
    long = [m for m in test_messages if len(" ".join(turn["content"] for turn in m).split()) > 60]
    chosen = rng.sample(long, PLANTED)
    variants = []
    for i, messages in enumerate(chosen):
        last = messages[-1]["content"] + " Indeed." if i % 2 else "Something else entirely."
        variants.append([*messages[:-1], {"role": "assistant", "content": last}])
    found = leaks.prompt_leaks(chosen, variants) | leaks.near_pairs(chosen, variants)
    n_found = len({j for _, j in found})
    rows = [*rows_in(files["tulu"]), *({"dataset": "planted", "id": "planted", "messages": m} for m in variants)]
    rng.shuffle(rows)
    return n_found, {**files, "tulu": write_rows(folder / "planted.jsonl.gz", rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--skip-10x", action="store_true")
    args = parser.parse_args()
    files = {name: args.data / file for name, file in FILES.items()}
    absent = [str(path) for path in files.values() if not path.exists()]
    if absent:
        sys.exit(f"{', '.join(absent)}: not there; give the folder that holds them as --data DIR")
    from peftlib.models.packaged import packaged_model

    packaged_model()  # converted once on a machine, and no part of what is measured
    root = Path(tempfile.mkdtemp(prefix="peftlib-bench-"))
    try:
        checks = measured(files, root, args.skip_10x)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name, is_met in checks.items():
        print(f"{'ok    ' if is_met else 'MISSED'} {name}", flush=True)
    return 0 if all(checks.values()) else 1


def measured(files, root, skips_10x):
    """{claim: whether it holds}; prints a line a build."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    first = _said(Build(root, "first", files), "1x")
    again = _said(Build(root, "first", files), "1x, again (cached)")
    other = _said(Build(root, "other", files, hash_seed="77", workers=1), "1x, one worker")
    messages = messages_of(first.folder)
    found = leaks.leaks(messages)
    n_found, with_planted = planted(files, messages["test"], root)
    third = _said(Build(root, "planted", with_planted), f"1x, {PLANTED} planted")
    left = leaks.leaks(messages_of(third.folder))
    wanted = {"test": TEST, "train": TRAIN, "valid": VALID}
    checks = {
        f"{first.seconds:.1f} s <= {MOST_SECONDS:.0f} s at study size": first.seconds <= MOST_SECONDS,
        f"{again.seconds:.1f} s <= {MOST_CACHED_SECONDS:.0f} s from the cache": again.seconds <= MOST_CACHED_SECONDS,
        f"{first.rows:,} rows, {wanted} a source": _counts(first) == wanted and _counts(third) == wanted,
        "one split hash whatever hash seed and workers": first.manifest["files"] == other.manifest["files"],
        f"exhaustive check: {sum(found.values())} leaks": not found,
        f"exhaustive check finds {n_found} of {PLANTED} planted": n_found == PLANTED,
        f"and {sum(left.values())} leaks are left of them": not left,
    }
    if not skips_10x:
        (root / "ten").mkdir()
        ten = _said(Build(root, "ten-times", ten_times(files, root / "ten")), "10x")
        growth = ten.peak_bytes / first.peak_bytes
        checks[f"peak at 10x is {growth:.2f} of that at 1x, <= {MOST_GROWTH}"] = growth <= MOST_GROWTH
        checks[f"10x: {sum(ten.manifest['read'].values()):,} rows read, exact counts"] = _counts(ten) == wanted
    return checks


def _said(build, name):
    print(build.line(name), flush=True)
    return build


def _counts(build):
    """{split: rows a source}, None where sources differ."""
    numbers = {split: set(counts.values()) for split, counts in build.manifest["counts"].items()}
    return {split: found.pop() if len(found) == 1 else None for split, found in numbers.items()}


if __name__ == "__main__":
    sys.exit(main())
