"""The command line: verbs, one way to say each option, the first edition's spellings, one-line errors."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from peftlib import cli
from peftlib.core.errors import ConfigError, Stopped
from peftlib.runner import console, notebooks
from peftlib.storage.mirror import open_study
from peftlib.storage.store import PUBLIC

COMMANDS = sorted(typer.main.get_command(cli.app).commands)


def test_help_lists_every_verb_and_loads_no_torch():
    code = "import sys; from peftlib.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  (\w+)  ", done.stdout.split("Commands:")[1], re.MULTILINE)
    verbs = "run data train evaluate report judge chat export bench plan methods compare site sweep study"
    assert listed == verbs.split()


def test_a_public_copy_is_said_before_the_command(monkeypatch):
    monkeypatch.setenv(PUBLIC, "")
    monkeypatch.setattr("peftlib.runner.suite.listing", lambda settings, is_pending: [os.environ[PUBLIC]])
    for words, said in (([], ""), (["--public"], "1")):
        assert cli.main([*words, "study", "list"]) == 0
        assert os.environ[PUBLIC] == said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_examples_of_its_own(command, capsys):
    assert cli.main([command, "--help"]) == 0
    examples = capsys.readouterr().out.split("Examples:\n")[1].splitlines()
    assert examples and all(line.startswith(f"    peftlib {command} ") for line in examples if line.strip())


def test_the_console_script_is_main():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"peftlib": "peftlib.cli:main"}


@pytest.mark.parametrize(
    "words, now",
    [
        ("run -p lora_rank 8 -- 01", "run -p lora_rank=8 -- 01"),
        ("run -p lora_rank=8 --set seed 1", "run -p lora_rank=8 --set seed=1"),
        ("data -p sources a=hub", "data -p sources=a=hub"),
        ("run 01 -- -p", "run 01 -- -p"),
        ("chat --study x --method galore", "chat --study x galore"),
        ("sweep --method qlora --method full --study x", "sweep qlora full --study x"),
        ("judge --methods base qlora --study x", "judge --methods base qlora --study x"),
        ("reference --methods base qlora --seeds 0", "study run --methods base,qlora --seeds 0"),
    ],
)
def test_command_lines_of_the_first_edition_stay_valid(words, now):
    assert console.in_todays_words(words.split()) == now.split()


def test_settings_are_given_in_either_way(monkeypatch):
    seen = []
    monkeypatch.setattr(notebooks, "plan", lambda wanted, given, folder: seen.append((wanted, given, folder)))
    monkeypatch.setattr(notebooks, "run", lambda stages: 0)
    for words in ("-p lora_rank 8 -p fork= 01 02", "--set lora_rank=8 -p fork= 01 02"):
        assert cli.main(["run", "--study", "s", "--seed", "1", *words.split()]) == 0
    expected = (["01", "02"], {"study": "s", "seed": 1, "lora_rank": 8, "fork": ""}, None)
    assert seen == [expected, expected]


@pytest.mark.parametrize(
    "words, message",
    [
        ("nope", "No such command 'nope'"),
        ("report", "Missing option '--study'"),
        ("run --studdy x", "No such option: --studdy"),
        ("data --study x --train many", "Invalid value for '--train'"),
        ("run -p lora_rank", "-p lora_rank: give a setting as NAME=VALUE"),
        ("run -p lora_rnk=8", "'lora_rnk' is not a setting: did you mean lora_rank"),
        ("evaluate --study x", "give one model: a METHOD, or --path FOLDER"),
        ("evaluate qlora --path y --study x", "give one model: a METHOD, or --path FOLDER"),
        ("judge --study x --methods a b", "give one judge: --endpoint URL --model M, or --local MODEL"),
        ("train qlora --study new", "no data in"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    assert cli.main(words.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}") and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "runs").exists()
    with pytest.raises(Exception, match=re.escape(message)):
        cli.call(words.split())


def test_an_exit_code_comes_through_and_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(notebooks, "plan", lambda *given: [])
    monkeypatch.setattr(notebooks, "run", lambda stages: 3)
    assert cli.main(["run"]) == 3
    monkeypatch.setattr(notebooks, "run", lambda stages: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run"])


def test_a_method_is_trained_resumed_and_scored_by_verbs(make_study, capsys):
    make_study()
    assert cli.main(["train", "qlora", "--study", "tiny", "--profile", "demo", "-p", "max_seconds=0.001"]) == 3
    assert "qlora, seed 0: stopped, " in capsys.readouterr().out
    assert cli.main(["train", "qlora", "--study", "tiny", "--profile", "demo", "-p", "max_seconds=0"]) == 0
    assert "qlora, seed 0: ok, 6 of 6 steps" in capsys.readouterr().out
    assert cli.main(["evaluate", "qlora", "--study", "tiny"]) == 0
    assert re.search(r"^qlora: loss \d+\.\d{4} nats per token on 6 test rows$", capsys.readouterr().out, re.MULTILINE)
    assert open_study("tiny").predictions_path("qlora", 0).exists()
    with pytest.raises(ConfigError, match="method='qlor' is unknown"):
        cli.call(["train", "qlor", "--study", "tiny", "--profile", "demo"])


def test_work_that_was_cut_and_saved_exits_with_3_once_its_copy_is_complete(monkeypatch, capsys):
    def cut(*args):
        raise Stopped("2 of 12 calls are made and kept: run it again to go on")

    monkeypatch.setattr("peftlib.report.site.build.build_site", cut)
    monkeypatch.setattr(console.mirror, "flush_all", lambda: ["everything is copied"])
    assert cli.main(["site", "a", "--to", "b"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "stopped: 2 of 12 calls are made and kept: run it again to go on",
        "everything is copied",
    ]
