"""Benchmarks go on where they were cut, and refuse answers and scores of other rows or weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_rows import ARC, written

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from peftlib.core import record as records
from peftlib.core.errors import DataError, ModelError, StudyError
from peftlib.evaluation.benchmarks import harness
from peftlib.evaluation.benchmarks.run import bench

QUIET = {"log": lambda line: None}


def files_of(study, name="base-s0"):
    folder = study.folder / "benchmarks" / name
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if "responses" not in path.name}


def untimed(record):
    return {task: {**found, "seconds": 0} for task, found in record["benchmarks"].items()}


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_cut_run_goes_on_and_gives_the_very_same_rows(make_study, files, monkeypatch, is_torn):
    monkeypatch.setattr(harness, "_MANY", 6)
    whole = make_study(study="whole")
    expected = bench(whole, "base", "arc_easy,boolq", data=files, **QUIET)

    study, add, added = make_study(study="cut"), harness.Responses.add, []

    def add_and_end(responses, found, **facts):
        add(responses, found, **facts)
        added.append(found)
        if len(added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(harness.Responses, "add", add_and_end)
    with pytest.raises(KeyboardInterrupt):
        bench(study, "base", "arc_easy,boolq", data=files, **QUIET)
    kept = study.folder / "benchmarks" / "base-s0" / "arc_easy.responses.jsonl"
    assert len(kept.read_text().splitlines()) == 12 and len(list(kept.parent.iterdir())) == 1
    if is_torn:
        kept.write_bytes(kept.read_bytes()[:-20])
    again = bench(study, "base", "arc_easy,boolq", data=files, **QUIET)
    assert files_of(study) == files_of(whole) and untimed(again) == untimed(expected)
    assert sum(map(len, added[2:])) == 20 + 10 - (6 if is_torn else 12)


@pytest.mark.slow
def test_a_killed_process_goes_on(make_study, files, monkeypatch):
    whole, study = make_study(study="whole"), make_study(study="cut")
    monkeypatch.setattr(harness, "_MANY", 2)
    expected = bench(whole, "base", "arc_easy,boolq", data=files, **QUIET)
    kept = study.folder / "benchmarks" / "base-s0" / "arc_easy.responses.jsonl"
    code = (
        "import time; from peftlib.evaluation.benchmarks import harness; harness._MANY = 2; add = harness.Responses.add\n"
        "harness.Responses.add = lambda *a, **k: (add(*a, **k), time.sleep(0.3))\n"
        "import sys; from peftlib.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["bench", "base", "--study", "cut", "--tasks", "arc_easy,boolq", "--data", str(files)]
    env = {**os.environ, "PYTHONPATH": str(Path(harness.__file__).parents[3])}
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=env)
    while not kept.exists() or len(kept.read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not study.benchmark_path("base", 0, "arc_easy").exists()
    again = bench(study, "base", "arc_easy,boolq", data=files, **QUIET)
    assert files_of(study) == files_of(whole) and untimed(again) == untimed(expected)


def test_what_was_scored_is_not_scored_again_and_more_rows_join_it(make_study, files, monkeypatch):
    study, lines = make_study(), []
    two = bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)["benchmarks"]["arc_easy"]
    rows = study.benchmark_path("base", 0, "arc_easy").read_text()
    assert two["n"] == 2 and len(rows.splitlines()) == 2 and two["seconds"] > 0
    bench(study, "base", "arc_easy", data=files, limit=1, log=lines.append)
    assert lines[-1] == "base: arc_easy is already scored on 2 rows, nothing to do"
    monkeypatch.setattr(harness, "_LOG_SECONDS", 0)
    all_rows = bench(study, "base", "arc_easy", data=files, log=lines.append)["benchmarks"]["arc_easy"]
    assert all_rows["n"] == 5 and study.benchmark_path("base", 0, "arc_easy").read_text().startswith(rows)
    assert any(line.endswith("20/20 requests  ETA 0:00") for line in lines)
    assert records.load(study, "base", 0)["benchmarks"]["arc_easy"] == all_rows


def test_memory_that_runs_out_halves_the_batch(make_study, files, monkeypatch):
    plain, sizes, lines = HFLM._model_call, [], []

    def full(lm, inps, **how):
        sizes.append(len(inps))
        if len(inps) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(lm, inps, **how)

    expected = bench(make_study(study="whole"), "base", "arc_easy", data=files, **QUIET)
    monkeypatch.setattr(HFLM, "_model_call", full)
    room = 2
    found = bench(make_study(study="small"), "base", "arc_easy,boolq", data=files, log=lines.append)
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2  # the next task begins with what memory holds
    assert "base: arc_easy: out of memory: continuing with 2 rows at a time" in lines
    assert found["benchmarks"]["arc_easy"]["score"] == expected["benchmarks"]["arc_easy"]["score"]
    room = 0
    with pytest.raises(ModelError, match="not even one row fits the memory"):
        bench(make_study(study="none"), "base", "arc_easy", data=files, **QUIET)


def test_an_answer_that_breaks_the_parser_is_shown_and_nothing_is_overwritten(make_study, files, monkeypatch):
    study = make_study()
    bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)
    before = files_of(study), study.record_path("base", 0).read_bytes()

    def broken(task, doc, results):
        raise IndexError("no number")

    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.process_results", broken)
    with pytest.raises(DataError, match=r"arc_easy: IndexError\('no number'\) while scoring the answer \[\(-"):
        bench(study, "base", "arc_easy", data=files, **QUIET)
    assert (files_of(study), study.record_path("base", 0).read_bytes()) == before


def test_scores_of_other_rows_or_weights_are_refused(make_study, files, tmp_path):
    study = make_study()
    bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)
    other = written(tmp_path / "other", "arc_easy.jsonl", ARC[0][::-1])
    with pytest.raises(StudyError, match="scores for other rows"):
        bench(study, "base", "arc_easy", data=other, **QUIET)
    path = study.benchmark_path("base", 0, "arc_easy")
    with pytest.raises(StudyError, match="answers from other weights"):
        harness.Responses(path.with_name("arc_easy.responses.jsonl"), "model:0123")
    kept = path.read_bytes()
    path.unlink()  # its answers are still there
    bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)
    assert path.read_bytes() == kept
    path.write_text(path.read_text().replace('"value": ', '"value":  '))
    with pytest.raises(StudyError, match="is not what scoring wrote"):
        bench(study, "base", "arc_easy", data=files, **QUIET)
