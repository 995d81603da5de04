"""What no session may lose, in short forms of `make chaos` and `make faults`, and through the notebooks themselves."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import TINY

CHECKOUT = Path(__file__).resolve().parents[2]
TOKEN = "hf_planted0token0that0must0not0appear"
NOT_EQUAL = ("train_seconds", "tokens_per_second", "peak_memory_gib", "peak_reserved_gib")

pytestmark = pytest.mark.slow


def run_tool(name, *arguments):
    command = [sys.executable, CHECKOUT / "tests" / "stress" / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr


def test_killed_runs_end_bit_equal():
    assert run_tool("chaos.py", "--kills", "12", "--seed", "1") == "12 kills, 0 differences"


def test_every_fault_leaves_the_newest_whole_checkpoint():
    assert run_tool("faults.py", "--short").endswith(" cases, 0 crashes, 0 lost good checkpoints")


@pytest.fixture(scope="module")
def studies(tiny_model, tmp_path_factory):
    """Two studies of the same command: one never stopped, one killed in 02, and in 04 with its disk."""
    fields = {**TINY, "model": tiny_model, "test_rows": 6, "eval_batch_size": 1, "epochs": 4, "save_steps": 1}
    command = [sys.executable, "-m", "peftlib", "run", "--profile", "demo", "--study", "tiny"]
    command += [f for name, value in fields.items() for f in ("-p", name, str(value))]

    def environment(root):
        where = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PEFTLIB_ROOT": str(root / "runs"), "HF_TOKEN": TOKEN}
        return where | {"PEFTLIB_MIRROR": str(root / "remote"), "HF_HUB_OFFLINE": "1"}

    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(whole), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    study = killed / "runs" / "tiny"
    kill_when(command, environment(killed), lambda: any((study / "checkpoints" / "qlora-s0").glob("step-*")))
    kill_when(command, environment(killed), lambda: 1 <= lines_of(study / "predictions" / "galore-s0.jsonl") < 18)
    shutil.rmtree(study)  # the machine went with the session; what is left is the copy
    done = subprocess.run(command, capture_output=True, text=True, env=environment(killed), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return whole, killed, done.stdout


def kill_when(command, environment, is_time):
    """Start the command and kill it with its kernel once `is_time` says so, before it ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while not is_time():
        assert process.poll() is None, "it came to its end before it could be killed"
        time.sleep(0.002)
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        member.kill()
    process.wait()


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_study_has_the_results_of_one_never_stopped(studies):
    def kept(root):
        with open(root / "runs" / "tiny" / "results.csv", encoding="utf-8", newline="") as opened:
            return [{name: v for name, v in row.items() if name not in NOT_EQUAL} for row in csv.DictReader(opened)]

    whole, killed, said = studies
    assert "restored study from" in said and "01_data: already finished, skipped" in said
    assert kept(whole) == kept(killed) and len(kept(whole)) == 4


def test_its_predictions_are_equal_byte_for_byte(studies):
    whole, killed, _ = studies
    files = sorted((whole / "runs" / "tiny" / "predictions").iterdir())
    assert [path.name for path in files] == [f"{m}-s0.jsonl" for m in ("base", "galore", "hybrid", "qlora")]
    for path in files:
        assert path.read_bytes() == (killed / "runs" / "tiny" / "predictions" / path.name).read_bytes()


def test_the_token_is_nowhere_in_the_study_or_its_copy(studies):
    *roots, said = studies
    for root in roots:
        for path in root.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in said
