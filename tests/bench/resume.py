"""How soon a killed run goes on, and how long saving holds it up: the demo's model and rows, on this machine.

    python tests/bench/resume.py OUT.json [--methods qlora,galore,hybrid]

Each method's notebook runs headless with copies to a folder, is killed with its kernel once a checkpoint stands, and
started again by the same command; the seconds count from there to the end of the next step, imports included. Then it
runs on to its end. stall_share is the time that training waited for saving, of all the time of the resumed session's
steps and saves. Needs the packaged model (make demo).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {"qlora": "02", "galore": "03", "hybrid": "05"}
STEP = re.compile(r"step (\d+)/\d+  loss")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default=",".join(NOTEBOOKS))
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        Session(where, "01").to_the_end()
        for method in args.methods.split(","):
            rows.append(_measured(where, method))
            print(json.dumps(rows[-1]), flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _measured(where, method):
    first = Session(where, NOTEBOOKS[method])
    checkpoints = where / "runs" / "bench" / "checkpoints" / f"{method}-s0"
    while not any(checkpoints.glob("step-*")):
        first.read_line()
    size = sum(path.stat().st_size for path in next(checkpoints.glob("step-*")).iterdir())
    first.kill()
    again = Session(where, NOTEBOOKS[method])
    seconds, steps = again.until_next_step()
    again.to_the_end()
    record = json.loads((where / "runs" / "bench" / "records" / f"{method}-s0.json").read_text())
    trained = sum(entry["seconds"] for entry in record["history"][steps - 1 :])
    return {
        "method": method,
        "device": record["device"],
        "resume_s": seconds,
        "first_step_again": steps,
        "steps": record["steps"],
        "saves": record["saves"],
        "save_stall_s": record["save_stall_seconds"],
        "stall_share": record["save_stall_seconds"] / (record["save_stall_seconds"] + trained),
        "checkpoint_gib": size / 2**30,
    }


class Session:
    """One headless run of a notebook, its lines read as they come."""

    def __init__(self, where, notebook):
        settings = {"save_steps": 2, "logging_steps": 1, "test_rows": 1, "max_new_tokens": 8}
        fields = [text for name, value in settings.items() for text in ("-p", name, str(value))]
        command = [sys.executable, "-m", "peftlib", "run", "--profile", "demo", "--study", "bench", *fields]
        environment = {**os.environ, "PEFTLIB_ROOT": str(where / "runs"), "PEFTLIB_MIRROR": str(where / "remote")}
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--", notebook], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )

    def read_line(self):
        """The next line; SystemExit where the run has ended."""
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the run ended before it could be measured")
        return line

    def until_next_step(self):
        """(seconds since the start, number of the step) when the first step of this session is done."""
        while True:
            found = STEP.search(self.read_line())
            if found:
                return time.monotonic() - self.started, int(found[1])

    def to_the_end(self):
        self._process.stdout.read()
        if self._process.wait():
            sys.exit(f"exit code {self._process.returncode}")

    def kill(self):
        """SIGKILL to the runner, its papermill and its kernel."""
        for member in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            member.kill()
        self._process.wait()
        self._process.stdout.close()


if __name__ == "__main__":
    main(sys.argv[1:])
