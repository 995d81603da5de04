"""`peftlib study` on tiny models: sweeps, adoption, runs, failures, cuts, the list of commands."""

import json
import re
import shutil
from dataclasses import replace
from unittest import mock

import pytest
from here import Here

from peftlib.core.errors import ConfigError, LockedError, StudyError
from peftlib.core.files import read_json
from peftlib.core.study import Study
from peftlib.runner import suite, suite_work
from peftlib.runner.console import STOPPED_CODE
from peftlib.runner.execute import environment
from peftlib.runner.executors import workers_of
from peftlib.runner.suite import run
from peftlib.runner.suite_jobs import Settings, job_named
from peftlib.storage.lock import StudyLock

pytestmark = pytest.mark.usefixtures("no_charts")


def test_benchmarks_and_rewinding_that_are_named_are_part_of_a_run(settings, in_this_process, tmp_path):
    row = {"query": "Question: What is 1 + 1?\nAnswer: ", "choices": ["2", "3"], "gold": 0}
    files = tmp_path / "files"
    files.mkdir()
    (files / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    asked = settings(methods=("base", "galore"), seeds=(0,), factors=())
    assert run(asked, log=lambda line: None) == 0
    more = {"benchmarks": "piqa", "benchmark_data": str(files), "rewind": "0.5"}
    wider, lines = replace(asked, given={**asked.given, **more}), []
    study = Study.resolve(study="tiny", profile="demo", **more)
    states = {job.name: job.state() for job in wider.jobs(study)[0]}
    assert states["base-s0"] == ("trained", "piqa")
    assert states["galore-s0"][1].endswith("min, piqa, rewound to 0.5")
    assert run(wider, log=lines.append) == 0
    records = {record["method"]: record for record in study.records()}
    assert all(record["benchmarks"]["piqa"]["n"] == 1 for record in records.values())
    factors = [point["factor"] for point in read_json(study.folder / "rewind" / "galore-s0.json")["points"]]
    assert factors == [0.5]
    assert [job.state()[0] for job in wider.jobs(study)[0]] == ["done", "done"]

    alone = replace(wider, methods=("galore",), names=("galore-s0",))
    assert [job.name for job in alone.jobs(study)[1]] == ["base-s0", "galore-s0"]  # without base nothing can be rewound

    (files / "boolq.jsonl").write_text("{")
    wrong = replace(wider, given={**wider.given, "benchmarks": "piqa,boolq"})
    assert run(wrong, log=lines.append) == 1  # said, and what stands stays
    assert any("evaluation: DataError" in line and "boolq" in line for line in lines)
    assert all(record["benchmarks"].keys() == {"piqa"} for record in study.records())


def test_the_whole_study_by_one_command_and_nothing_twice(settings, in_this_process):
    lines, asked = [], settings()
    assert run(asked, log=lines.append) == 0
    assert lines[-1] == "all runs are done"
    study = Study.resolve(study="tiny", profile="demo")
    records = {f"{r['method']}-s{r['seed']}": r for r in study.records()}
    assert set(records) == {"base-s0", "qlora-s0", "qlora-s1", "galore-s0", "galore-s1"}
    assert all(record["status"] == "ok" and record["evaluation"] for record in records.values())
    assert study.report_path.exists() and len(study.results_path.read_text().splitlines()) == 6
    for method, field in (("qlora", "lora_learning_rate"), ("galore", "galore_learning_rate")):
        best = read_json(study.folder / "sweeps" / f"{method}.json")["best"]
        assert study.adopted_rates()[method]["rates"] == {field: best[field]}
        assert {records[f"{method}-s{seed}"]["learning_rate"] for seed in (0, 1)} == {best[field]}
        assert records[f"{method}-s0"]["side_by_side"] == 1
    assert not [path for path in study.folder.rglob("*lock.json")]
    lines.clear()
    shutil.rmtree(study.folder / "weights")  # as where only records and answers came back from a lent machine
    assert run(asked, log=lines.append) == 0
    assert not any("step 1/" in line or "starts" in line for line in lines)


def test_without_factors_a_study_adopts_what_a_search_finds(settings, in_this_process):
    assert run(settings(methods=("qlora",), seeds=(0,), factors=None), log=str) == 0
    study = Study.resolve(study="tiny", profile="demo")
    found, adopted = read_json(study.folder / "sweeps" / "qlora.json"), study.adopted_rates()["qlora"]
    assert adopted["rates"]["lora_learning_rate"] == found["best"]["lora_learning_rate"]
    assert adopted["from"]["max_trials"] == 9 >= len(found["tried"]) >= 3
    said = study.report_path.read_text().split("Learning rate of qlora: ")[1].split("\n")[0]
    assert said.startswith("lowest loss of " if found["is_at_edge"] else "best of ")


def test_later_rates_are_refused(settings, in_this_process):
    run(settings(methods=("qlora",), seeds=(0,), has_report=False), log=str)
    with pytest.raises(StudyError, match="already has learning rates for qlora"):
        changed = settings(methods=("qlora",), seeds=(0, 1), factors=(0.1,), has_report=False)
        run(changed, log=str)


def test_a_failing_run_is_recorded_and_the_others_go_on(settings, in_this_process, monkeypatch):
    from peftlib.evaluation import evaluate
    from peftlib.train import loop as train

    lines, asked = [], settings(factors=(), has_report=True)
    real, real_evaluate = train.TrainingRun.__init__, evaluate.evaluate

    def broken(self, study, method, **rest):
        if method == "qlora" and study.cfg.seed == 0:
            raise MemoryError("out of memory, planted")
        real(self, study, method, **rest)

    def unanswered(study, method, **rest):
        if method == "galore" and study.cfg.seed == 1:
            raise MemoryError("no room for answers, planted")
        return real_evaluate(study, method, **rest)

    monkeypatch.setattr(train.TrainingRun, "__init__", broken)
    monkeypatch.setattr(evaluate, "evaluate", unanswered)
    assert run(asked, log=lines.append) == 1
    study = Study.resolve(study="tiny", profile="demo")
    found = {f"{r['method']}-s{r['seed']}": r for r in study.records()}
    assert (found["qlora-s0"]["status"], found["qlora-s0"]["error"]) == (
        "failed",
        "MemoryError: out of memory, planted",
    )
    assert found["galore-s1"]["evaluation_error"] == "MemoryError: no room for answers, planted"
    assert found["qlora-s1"]["evaluation"] and found["galore-s0"]["evaluation"] and found["base-s0"]["evaluation"]
    assert "failed: qlora-s0, galore-s1; --again retries them" in lines
    assert "qlora,0,failed" in study.results_path.read_text()  # the report tells it too


def test_failed_runs_are_tried_again_where_asked(settings, in_this_process, monkeypatch):
    from peftlib.train import loop as train

    real = train.TrainingRun.__init__
    is_broken = [True]

    def broken(self, study, method, **rest):
        if is_broken[0]:
            raise MemoryError("planted")
        real(self, study, method, **rest)

    monkeypatch.setattr(train.TrainingRun, "__init__", broken)
    plain = {"methods": ("qlora",), "seeds": (0,), "factors": (), "has_report": False}
    assert run(settings(**plain), log=str) == 1
    is_broken[0] = False
    lines = []
    assert run(settings(**plain), log=lines.append) == 1 and not any("step 1/" in line for line in lines)
    assert run(settings(**plain, is_again=True), log=lines.append) == 0


def test_another_session_in_the_study_is_refused(settings):
    asked = settings()
    elsewhere = StudyLock(Study.resolve(study="tiny", profile="demo").folder, "training elsewhere")
    with elsewhere, pytest.raises(LockedError, match="training elsewhere"):
        run(asked, log=str)


def test_a_cut_command_says_what_is_left(settings, in_this_process):
    lines, asked = [], settings(has_report=False)

    def stop():
        return "time is over" if any(line.startswith("base-s0 ended") for line in lines) else None

    assert run(asked, log=lines.append, why_stop=stop) == STOPPED_CODE
    assert "left: qlora-s0, galore-s0, qlora-s1, galore-s1; the same command resumes them" in lines
    lines.clear()
    assert run(settings(has_report=False, minutes=0.01), log=lines.append) == STOPPED_CODE
    assert not any("starts" in line for line in lines)  # none is begun that could not save in time
    assert run(settings(has_report=False, names=("galore-s1",)), log=lines.append) == 0
    assert lines[-1] == "all chosen runs are done"


@pytest.mark.slow
def test_a_study_cut_in_the_middle_of_a_run_ends_as_one_never_cut(settings):
    # Steps enough that a slow machine too sees the first ones before the last one is done.
    how = {"seeds": (1,), "max_steps": 0, "epochs": 15, "has_report": False}
    with mock.patch.object(suite, "Local", Here):
        assert run(settings("whole", **how), log=str) == 0
    asked, lines, seen = settings("cut", **how), [], set()

    def cut():
        """Once in a sweep, once in each of two runs."""
        for name in ("sweep-galore", "qlora-s1", "galore-s1"):
            if name not in seen and any(re.match(rf"{name} \| step \d/", line) for line in lines):
                seen.add(name)
                return f"cut in {name}"
        return None

    codes = []
    while not codes or codes[-1] == STOPPED_CODE:
        codes.append(run(asked, log=lines.append, why_stop=cut))
    assert codes == [STOPPED_CODE] * 3 + [0], lines[-12:]
    whole, cut_study = (Study.resolve(study=name, profile="demo") for name in ("whole", "cut"))
    for record in whole.records():
        method, seed = record["method"], record["seed"]
        other = read_json(cut_study.record_path(method, seed))
        for name in ("status", "eval_loss", "steps", "learning_rate", "valid_history", "weights_sha256"):
            assert record.get(name) == other.get(name), (method, seed, name)
        assert [e["loss"] for e in record["history"]] == [e["loss"] for e in other["history"]]
        answers = [found.predictions_path(method, seed).read_bytes() for found in (whole, cut_study)]
        assert answers[0] == answers[1]


def test_runs_are_named_and_chosen(make_study):
    study = make_study()
    asked = Settings({}, ("base", "qlora", "galore"), (0, 1), (1.0,), 4)
    names = ["sweep-qlora", "sweep-galore", "base-s0", "qlora-s0", "galore-s0", "qlora-s1", "galore-s1"]
    jobs, chosen = asked.jobs(study)
    assert [job.name for job in jobs] == [job.name for job in chosen] == names
    chosen = replace(asked, names=("qlora", "galore-s1")).jobs(study)[1]
    assert [job.name for job in chosen] == ["sweep-qlora", "sweep-galore", "qlora-s0", "qlora-s1", "galore-s1"]
    with pytest.raises(ConfigError, match="--only galore-s7: no such run, use sweep-qlora"):
        replace(asked, names=("galore-s7",)).jobs(study)
    with pytest.raises(ConfigError, match="method='qlor' is unknown"):
        replace(asked, methods=("qlor",)).jobs(study)
    assert {job.state()[0] for job in jobs} == {"waits"}
    assert [job_named(study, asked, name) for name in names] == jobs
    for name in ("galore", "galore-s", "-s0", "sweep-", "../x-s1"):
        with pytest.raises(ConfigError, match="is not a run|is unknown"):
            job_named(study, asked, name)


def test_a_place_for_each_share_of_each_gpu(make_study, monkeypatch):
    cfg = make_study().cfg
    assert workers_of(cfg, 3) == [environment()]  # device='cpu'
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    found = workers_of(cfg.replace(device="auto"), 2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in found] == ["0", "1", "0", "1"]
    assert {place["OMP_NUM_THREADS"] for place in found} == {"8"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in workers_of(cfg.replace(device="auto"), 1)] == ["5", "GPU-a"]


@pytest.mark.slow
def test_a_refusal_is_named_and_the_other_runs_go_on(settings, in_this_process, monkeypatch):
    real = suite_work.code_id
    asked = iter([real(), "0.1.0+other"])
    monkeypatch.setattr(suite_work, "code_id", lambda: next(asked, real()))
    lines = []
    assert run(settings(factors=(), has_report=False), log=lines.append) == 1
    died = [line for line in lines if " died " in line]
    assert len(died) == 1 and re.search(r"exit code 69: NodeError: \S+ has peftlib", died[0])
    assert sum(line.split()[1:2] == ["done"] for line in lines) == 4
    assert run(settings(factors=(), has_report=False), log=lines.append) == 0
