"""A study shared out among workers that die: a Ray cluster of three nodes, and two workers without one."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from tiny import TINY

from peftlib.core.errors import ConfigError
from peftlib.core.files import read_json
from peftlib.core.paths import PACKAGE
from peftlib.core.study import Study
from peftlib.runner.suite import run
from peftlib.runner.suite_jobs import Settings
from peftlib.runner.suite_work import main
from peftlib.storage.claims import Claims

pytestmark = pytest.mark.slow
RUNS = {"max_steps": 60, "save_steps": 10, "epochs": 30, "eval_steps": 30}
SEEDS = tuple(range(8))  # with base and two sweeps 19 runs


@pytest.fixture
def settings(tiny_model, make_study):
    """settings(name, **changes): a study whose runs take some seconds, so that they can be killed."""

    def made(name, **changes):
        make_study(study=name, **RUNS)
        given = {"profile": "demo", "study": name, **TINY, "model": str(tiny_model), **RUNS}
        chosen = {"methods": ("base", "qlora", "galore"), "seeds": (0, 1), "factors": (1.0, 3.0), "rows": 8}
        return Settings(given, **{**chosen, **changes})

    return made


@pytest.fixture
def whole(settings, finished_before, tmp_path_factory):
    """The study that one process does, run after run; made once for all tests."""
    asked = settings("whole", seeds=SEEDS)
    study = Study.resolve(**asked.given)
    if "whole" in finished_before:
        shutil.copytree(finished_before["whole"], study.folder, dirs_exist_ok=True)
        return study
    run_time = {name: value for name, value in asked.given.items() if name in study.cfg.fields_of("run")}
    own = Settings(run_time, asked.methods, asked.seeds, asked.factors, asked.rows)
    for job in asked.jobs(study)[0]:
        assert main(own, job.name) == 0
    finished_before["whole"] = shutil.copytree(study.folder, tmp_path_factory.mktemp("finished") / "whole")
    return study


def require_equal(study, whole, asked):
    """All runs that were asked for have the records, losses and answers of the study of one process."""
    runs = {(job.method, job.seed) for job in asked.jobs(study)[0] if not job.is_sweep}
    assert {(r["method"], r["seed"]) for r in study.records()} == runs
    assert study.adopted_rates() == whole.adopted_rates()
    for method, seed in runs:
        record, other = (read_json(found.record_path(method, seed)) for found in (whole, study))
        for name in ("status", "eval_loss", "steps", "learning_rate", "valid_history", "weights_sha256"):
            assert record.get(name) == other.get(name), (method, seed, name)
        assert [e["loss"] for e in record["history"]] == [e["loss"] for e in other["history"]]
        answers = [found.predictions_path(method, seed).read_bytes() for found in (whole, study)]
        assert answers[0] == answers[1]


def starts_of(study):
    """{run: how often it was started}, of the runs' own logs."""
    logs = {path.stem: path.read_text(encoding="utf-8") for path in (study.folder / "logs").glob("*.log")}
    return {name: len(re.findall(rf"^{name} starts on ", text, re.MULTILINE)) for name, text in logs.items()}


def runs_of(pid, study):
    """[run, ...] that a process or one below it has claimed: it may also wait for one that another has."""
    owners = Claims(study.folder, log=print).owners()
    with contextlib.suppress(psutil.NoSuchProcess):  # a command has just ended
        below = {process.pid for process in psutil.Process(pid).children(recursive=True)}
        return [name for name, who in owners.items() if below & {int(n) for n in re.findall(r"process (\d+)", who)}]
    return []


@contextlib.contextmanager
def held_still(pid):
    """Within it a process and all below it are stopped."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for signalled in (psutil.Process.suspend, psutil.Process.resume):
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, or was killed
                signalled(process)
        if signalled is psutil.Process.suspend:
            yield


def kill_tree(pid):
    """SIGKILL to a process, then to all below it, as when a machine goes."""
    below = psutil.Process(pid).children(recursive=True)
    for process in (psutil.Process(pid), *below):
        process.kill()


@pytest.fixture
def nodes(tmp_path, make_study, monkeypatch):
    """(cluster, {name: node}) of a Ray cluster of three nodes with a CPU each; the last has other code than we."""
    pytest.importorskip("ray", reason="pip install 'peftlib[cluster]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.chdir(tmp_path)  # where python -m finds no peftlib
    other = shutil.copytree(PACKAGE, tmp_path / "other" / "peftlib", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "cli.py").open("a") as out:
        out.write("\n# another version\n")
    code = {"first": PACKAGE.parent, "second": PACKAGE.parent, "other": other.parent}
    cluster = Cluster()
    made = {
        name: cluster.add_node(num_cpus=1, include_dashboard=False, env_vars={"PYTHONPATH": str(path)})
        for name, path in code.items()
    }
    yield cluster, made
    cluster.shutdown()


def test_a_ray_node_dies_another_has_other_code_and_the_study_is_as_of_one_process(settings, whole, nodes):
    cluster, made = nodes
    with pytest.raises(ConfigError, match="no GPU in the Ray cluster: start nodes that have one, or set -p device=cpu"):
        given = {**settings("here").given, "device": "auto"}
        run(Settings(given, address=cluster.address), log=str)
    lines, killed = [], []
    raylet = made["second"].all_processes["raylet"][0].process.pid

    def kill_in_training():
        """Once a run has trained for a while on the second node, that node goes with all that it runs."""
        for process in [] if killed else psutil.Process(raylet).children(recursive=True):
            words = []
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
            name = next((word for word in words if word.endswith(("-s0", "-s1"))), "")
            if any(re.match(rf"{name} \| step [2-4]\d/60", line) for line in lines if name):
                killed.append(name)
                kill_tree(raylet)
                cluster.remove_node(made["second"], allow_graceful=False)
                return

    asked = settings("cluster", address=cluster.address)
    assert run(asked, log=lines.append, why_stop=kill_in_training) == 0, lines[-20:]
    told = "\n".join(lines)
    assert re.search(
        r"has peftlib \S+, but the command needs \S+: install the same on all machines; no more runs are sent", told
    )
    study = Study.resolve(study="cluster", profile="demo")
    require_equal(study, whole, asked)
    [name] = killed
    assert starts_of(study)[name] == 2 and re.search(rf"{name} \| .* resumes at step \d+0 of 60", told), told
    assert all(times == 1 for other, times in starts_of(study).items() if other != name)


LOOP = """
while sleep 0.5; do
    peftlib study list "$@" --pending > "$RUNS" || exit 1
    head -n 1 "$RUNS" | sh
done
"""


def test_two_workers_without_ray_and_one_is_killed(settings, whole, tmp_path):
    asked = settings("shared", seeds=SEEDS)
    study = Study.resolve(**asked.given)
    words = ["--methods", "base,qlora,galore", "--seeds", ",".join(map(str, SEEDS))]
    words += ["--factors", "1,3", "--sweep-rows", "8"]
    words += ["--study", "shared", "--profile", "demo"]
    for name, value in asked.given.items():
        words += ["-p", f"{name}={value}"] if name not in ("study", "profile") else []
    programs, runs = tmp_path / "bin", tmp_path / "runs.txt"
    programs.mkdir()
    (programs / "peftlib").write_text(f'#!/bin/sh\nexec {sys.executable} -m peftlib "$@"\n')
    (programs / "peftlib").chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "RUNS": str(runs)}
    env["PATH"] = f"{programs}:{env['PATH']}"
    loop = subprocess.Popen(["sh", "-c", LOOP, "sh", *words], env=env)
    other = subprocess.Popen(["peftlib", "study", "run", *words], env=env, stdout=subprocess.PIPE, text=True)
    try:
        killed, end = "", time.monotonic() + 400
        while not killed:
            assert time.monotonic() < end and loop.poll() is None and other.poll() is None
            for name in runs_of(loop.pid, study):
                log = study.folder / "logs" / f"{name}.log"
                if log.exists() and re.search(r"^step [2-4]\d/60", log.read_text(), re.MULTILINE):
                    with held_still(loop.pid):  # it may be about to end
                        record = study.record_path(*name.rsplit("-s", 1))  # there is none before the first checkpoint
                        is_over = record.exists() and read_json(record)["evaluation"]
                        if not is_over and name in runs_of(loop.pid, study):
                            killed = name
                            kill_tree(loop.pid)
                            break
            time.sleep(0.02)
        told = other.communicate(timeout=400)[0]
        assert other.returncode == 0, told
    finally:
        for process in (loop, other):
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()
    require_equal(study, whole, asked)
    starts = starts_of(study)
    assert starts.pop(killed) == 2 and set(starts.values()) == {1}, told
