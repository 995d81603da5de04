"""`peftlib study` on tiny models: sweeps, adoption, runs, failures, cuts, the list of commands."""

import re
import shlex
import shutil
from dataclasses import replace

import pytest
from tiny import TINY

from peftlib import cli
from peftlib.cli import main
from peftlib.core.errors import ConfigError, LockedError, StudyError
from peftlib.core.files import read_json
from peftlib.core.study import Study
from peftlib.models.shapes import find_card, shape_of
from peftlib.runner import suite, suite_work
from peftlib.runner.console import STOPPED_CODE
from peftlib.runner.execute import environment
from peftlib.runner.executors import Ending, workers_of
from peftlib.runner.suite import run
from peftlib.runner.suite_jobs import Settings, job_named
from peftlib.storage.claims import Claims
from peftlib.storage.lock import StudyLock
from peftlib.train import estimate


@pytest.fixture
def settings(tiny_model, make_study):
    """settings(**changes): two methods, two seeds, a sweep of two rates, in a study whose data stand."""

    def made(name="tiny", max_steps=2, epochs=1, **changes):
        fields = {**TINY, "model": str(tiny_model), "max_steps": max_steps, "epochs": epochs}
        make_study(study=name, max_steps=max_steps, epochs=epochs)
        given = {"profile": "demo", "study": name, **fields}
        chosen = {"methods": ("base", "qlora", "galore"), "seeds": (0, 1), "factors": (0.3, 1.0), "rows": 4}
        return Settings(given, **{**chosen, **changes})

    return made


@pytest.fixture
def in_this_process(monkeypatch):
    """The runs' commands done one after another in this process."""

    class Here:
        def __init__(self, workers):
            self._ended = []

        has_room = property(lambda self: not self._ended)

        def start(self, name, words):
            code = cli.call(words)
            log = Study.existing(words[words.index("--study") + 1]).folder / "logs" / f"{name}.log"
            self._ended.append(Ending(name, code, log.read_text().splitlines()[-1], 1.0))

        def ended(self):
            found, self._ended = self._ended, []
            return found

        def avoid(self, node):
            return False

        def stop(self):
            pass

        close = stop

    monkeypatch.setattr(suite, "Local", Here)
    monkeypatch.setattr("peftlib.report.charts.charts_of", lambda *_: {})


def test_the_whole_study_by_one_command_and_nothing_twice(settings, in_this_process):
    lines, asked = [], settings()
    assert run(asked, log=lines.append) == 0
    assert lines[-1] == "all is done"
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
    assert said.startswith("least loss of " if found["is_at_edge"] else "best of ")


def test_later_rates_are_refused(settings, in_this_process):
    run(settings(methods=("qlora",), seeds=(0,), has_report=False), log=str)
    with pytest.raises(StudyError, match="has learning rates of qlora already"):
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
    assert "failed: qlora-s0, galore-s1; --again tries them once more" in lines
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
    assert "left: qlora-s0, galore-s0, qlora-s1, galore-s1; the same command goes on" in lines
    lines.clear()
    assert run(settings(has_report=False, minutes=0.01), log=lines.append) == STOPPED_CODE
    assert not any("starts" in line for line in lines)  # none is begun that could not save in time
    assert run(settings(has_report=False, names=("galore-s1",)), log=lines.append) == 0
    assert lines[-1] == "all that was chosen is done"


@pytest.mark.slow
def test_a_study_cut_in_the_middle_of_a_run_ends_as_one_never_cut(settings):
    # Steps enough that a slow machine too sees the first ones before the last one is done.
    assert run(settings("whole", max_steps=0, epochs=15, has_report=False), log=str) == 0
    asked, lines, seen = settings("cut", max_steps=0, epochs=15, has_report=False), [], set()

    def cut():
        """Once in a sweep, once in each of two runs."""
        for name in ("sweep-galore", "qlora-s0", "galore-s1"):
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
    with pytest.raises(ConfigError, match="--only galore-s7 means no run here: use sweep-qlora"):
        replace(asked, names=("galore-s7",)).jobs(study)
    with pytest.raises(ConfigError, match="method='qlor' is unknown"):
        replace(asked, methods=("qlor",)).jobs(study)
    assert {job.state()[0] for job in jobs} == {"waits"}
    assert [job_named(study, asked, name) for name in names] == jobs
    for name in ("galore", "galore-s", "-s0", "sweep-", "../x-s1"):
        with pytest.raises(ConfigError, match="is no run|is unknown"):
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


@pytest.fixture
def settings_of(monkeypatch):
    """settings_of(words) -> the suite.Settings that a command line leads to."""
    found = []
    monkeypatch.setattr(suite, "run", lambda settings, log: found.append(settings))

    def made(words):
        cli.call(["study", "run", *words.split()])
        return found.pop()

    return made


def test_arguments_become_settings(settings_of):
    words = "--study x --methods base,qlora galore --seeds 0,3 --factors none -p max_steps 5 --source alpaca=a.jsonl"
    found = settings_of(words)
    assert found.given == {"profile": "gpu", "study": "x", "sources": "alpaca=a.jsonl", "max_steps": 5}
    assert (found.methods, found.seeds, found.factors) == (("base", "qlora", "galore"), (0, 3), ())
    for words, message in (
        ("--seeds 0,x", "--seeds '0,x': use numbers"),
        ("--seeds 1,1", "each number once"),
        ("--at-once 0", "Invalid value for '--at-once'"),
        ("--methods qlor,galore", "--methods qlor: use base, qlora, galore"),
        ("--methods ,", "use base, qlora"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            settings_of(words)


def test_a_dry_run_tells_what_is_left_and_changes_nothing(make_study, capsys):
    study = make_study()
    words = "study run --study tiny --profile demo --dry-run --seeds 0,1 --factors 1,3 --sweep-rows 6 --only galore-s0"
    assert main(words.split()) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    told = {row.split()[0]: re.split("  +", row)[1:] for row in rows[1:]}
    name, card = find_card("t4")
    costs = estimate.forecast(study.cfg, name, card, shape=shape_of(study.cfg.model), manifest=study.manifest()).costs
    [hours] = [cost.hours for cost in costs if cost.method == "galore"]
    one_run = estimate.duration(*(3600 * end for end in hours))
    assert told["galore-s0"] == told["galore-s1"] == told["sweep-galore"] == [one_run, "waits"]  # 6 of 12 rows, twice
    assert told["base-s0"] == ["none", "waits"]
    assert last == f"left: {one_run} of training on a t4, one run at a time; answering the test rows comes on top"
    assert not (study.folder / "records").exists()


@pytest.fixture
def study_words(settings):
    """The words that say which runs of the study there are, for `study list` and `study run`."""
    given = settings().given
    words = [
        "--study",
        "tiny",
        "--profile",
        "demo",
        "--methods",
        "base,qlora",
        "--seeds",
        "0",
        "--factors",
        "0.3,1",
        "--sweep-rows",
        "4",
    ]
    for name, value in given.items():
        words += ["-p", f"{name}={value}"] if name not in ("study", "profile") else []
    return words


@pytest.fixture
def listed(study_words, capsys):
    """listed(*options) -> what `peftlib study list` prints of it, in lines."""

    def made(*options):
        capsys.readouterr()
        assert cli.main(["study", "list", *study_words, *options]) == 0
        return capsys.readouterr().out.splitlines()

    return made


def test_the_list_of_commands_leads_to_the_whole_study_and_each_command_can_be_given_twice(listed, capsys):
    done = []
    while commands := listed("--pending"):
        for command in commands:
            program, *words = shlex.split(command)
            assert program == "peftlib" and cli.main(words) == 0
            done.append(words[2])
    assert done == ["sweep-qlora", "base-s0", "qlora-s0"]  # the run once its sweep is done
    assert [line.split()[:2] for line in listed()[1:]] == [[name, "done"] for name in done]
    log = Study.existing("tiny").folder / "logs" / "qlora-s0.log"
    before = log.read_text()
    assert re.search(r"^qlora-s0 starts on .*^step 2/2 .*^qlora: BLEU-4", before, re.MULTILINE | re.DOTALL)
    assert cli.main(words) == 0
    assert log.read_text() == before + "qlora-s0 is done\n"


def test_what_another_worker_holds_is_neither_listed_nor_done(listed, capsys):
    commands = listed("--pending")
    claims = Claims(Study.existing("tiny").folder)
    with claims.take("base-s0"):
        assert listed("--pending") == commands[:1]
        assert re.match(r"base-s0 +held +by .*, process \d+ \(working on base-s0", listed()[2])
        assert cli.main(shlex.split(commands[1])[1:]) == 75
        assert "LockedError: base-s0 of study 'tiny' is in use by" in capsys.readouterr().out
    with StudyLock(Study.existing("tiny").folder, "a notebook"):
        assert cli.main(shlex.split(commands[1])[1:]) == 75
    assert cli.main(shlex.split(commands[1])[1:]) == 0


def test_a_run_whose_sweep_is_not_done_waits(listed, capsys):
    words = shlex.split(listed("--pending")[0])[1:]
    assert cli.main(["qlora-s0" if word == "sweep-qlora" else word for word in words]) == 75
    assert "qlora-s0 waits for sweep-qlora" in capsys.readouterr().out
    assert Study.existing("tiny").records() == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--code": "0.1.0+cafecafe"}, r"has peftlib \S+, the command is of 0\.1\.0\+cafecafe: install the same"),
        ({"--data": "0123456789ab"}, r"has rows of the hash \S+ in .*tiny, the command asks for 0123456789ab"),
        ({"device=cpu": "device=auto"}, "has no GPU that torch can use: see nvidia-smi there, or train on CPUs by -p"),
        ({"PEFTLIB_ROOT": "elsewhere"}, "has no study 'tiny' in .*elsewhere: set PEFTLIB_ROOT to the folder that all"),
        ({"PEFTLIB_ROOT": "file"}, "cannot write to the store: .*file/tiny"),
        ({"PEFTLIB_MIRROR": "file/remote"}, "cannot write to the store: .*file"),
    ],
)
def test_a_machine_that_cannot_do_a_run_says_why(listed, capsys, monkeypatch, tmp_path, changes, message):
    words = shlex.split(listed("--pending")[1])[1:]
    (tmp_path / "file").write_text("")
    for name, value in changes.items():
        if name.startswith("PEFTLIB"):
            monkeypatch.setenv(name, str(tmp_path / value))
        elif name.startswith("--"):
            words[words.index(name) + 1] = value
        else:
            words[words.index(name)] = value
    assert cli.main(words) == 69
    assert re.search(rf"^NodeError: \S+ {message}", capsys.readouterr().out, re.MULTILINE)


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


def test_the_earlier_name_of_the_command_says_so(settings_of, capsys):
    settings_of("--study x")
    assert capsys.readouterr().err == ""
    cli.call(["reference", "--study", "x"])
    assert capsys.readouterr().err == "`peftlib reference` is now called `peftlib study run`\n"
