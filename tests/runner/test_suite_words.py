"""The words of `peftlib study`: settings, lists of commands, and machines that cannot do a run."""

import re
import shlex

import pytest

from peftlib import cli
from peftlib.cli import main
from peftlib.core.errors import ConfigError
from peftlib.core.study import Study
from peftlib.models.shapes import find_card, shape_of
from peftlib.runner import suite
from peftlib.storage.claims import Claims
from peftlib.storage.lock import StudyLock
from peftlib.train import estimate


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
        ("--seeds 0,x", "--seeds '0,x': give numbers"),
        ("--seeds 1,1", "each number once"),
        ("--factors 1,inf", "--factors '1,inf': give each number once, finite and not negative"),
        ("--factors nan", "--factors 'nan': give each number once"),
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
    assert last == f"left: {one_run} of training on a t4, one run at a time, plus the time to answer the test rows"
    assert not (study.folder / "records").exists()


def test_a_dry_run_before_the_data_exist_says_what_it_assumes(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    words = f"study run --study new --profile demo -p model={tiny_model} --dry-run --only galore -p train_rows=9"
    assert main(words.split()) == 0
    first, _, *rows, last = capsys.readouterr().out.splitlines()
    assert first.startswith("no data yet: assuming 27 training rows of ")
    assert any(row.startswith("galore-s2 ") and row.endswith("waits") for row in rows) and last.startswith("left: ")
    assert not (tmp_path / "runs").exists()


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
    assert log.read_text() == before + "qlora-s0 is already done\n"


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


def test_a_store_that_does_not_say_who_works_is_named_beside_the_list(study_words, capsys, monkeypatch):
    def unreachable(*args, **how):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.ls", unreachable)
    assert cli.main(["study", "list", *study_words]) == 0
    said = capsys.readouterr()
    assert "cannot read who works on tiny" in said.err and "sweep-qlora" in said.out


def test_the_name_of_a_run_sets_its_seed(listed, capsys):
    words = shlex.split(listed("--pending")[1])[1:]
    assert cli.main([*words, "-p", "seed=3"]) == 2
    assert "-p seed: the runs of a study have their seeds in their names" in capsys.readouterr().err


def test_a_run_whose_sweep_is_not_done_waits(listed, capsys):
    words = shlex.split(listed("--pending")[0])[1:]
    assert cli.main(["qlora-s0" if word == "sweep-qlora" else word for word in words]) == 75
    assert "qlora-s0 waits for sweep-qlora" in capsys.readouterr().out
    assert Study.existing("tiny").records() == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--code": "0.1.0+cafecafe"}, r"has peftlib \S+, but the command needs 0\.1\.0\+cafecafe: install the same"),
        ({"--data": "0123456789ab"}, r"has rows with hash \S+ in .*tiny, but the command needs 0123456789ab"),
        (
            {"device=cpu": "device=auto"},
            "has no GPU that torch can use: check nvidia-smi there, or train on CPUs with -p",
        ),
        ({"PEFTLIB_ROOT": "elsewhere"}, "has no study 'tiny' in .*elsewhere: set PEFTLIB_ROOT to the folder that all"),
        ({"PEFTLIB_ROOT": "file"}, "cannot write to the store: .*file/tiny"),
        ({"PEFTLIB_MIRROR": "file/remote"}, "cannot write to the store: .*file"),
    ],
)
def test_a_machine_that_cannot_do_a_run_says_why(listed, capsys, monkeypatch, tmp_path, changes, message):
    words = shlex.split(listed("--pending")[1])[1:]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        "peftlib.storage.mirror.time.sleep", lambda seconds: None
    )  # before a last upload is tried again
    for name, value in changes.items():
        if name.startswith("PEFTLIB"):
            monkeypatch.setenv(name, str(tmp_path / value))
        elif name.startswith("--"):
            words[words.index(name) + 1] = value
        else:
            words[words.index(name)] = value
    assert cli.main(words) == 69
    assert re.search(rf"^NodeError: \S+ {message}", capsys.readouterr().out, re.MULTILINE)


def test_the_earlier_name_of_the_command_says_so(settings_of, capsys):
    settings_of("--study x")
    assert capsys.readouterr().err == ""
    cli.call(["reference", "--study", "x"])
    assert capsys.readouterr().err == "`peftlib reference` is now called `peftlib study run`\n"
