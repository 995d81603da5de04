"""`chat` talks to a trained model over several turns, from a pipe too, and ends when told."""

import io
import subprocess
import sys

import pytest
import tiny
import torch

from peftlib import __main__ as command_line
from peftlib import data, talk
from peftlib.chat import encode_prompt
from peftlib.models import load_base
from peftlib.trained import save_trained, stop_at

TURNS = ["Hello there", "And then?", "Is that all?"]


@pytest.fixture
def trained(make_study, tiny_model):
    """A study whose galore weights are those of another tiny model."""
    study = make_study()
    tokenizer = data.open_tokenizer(str(tiny_model))
    facts = {"model": str(tiny_model), "four_bit": [], "precision": "fp32"}
    save_trained(tiny.model(seed=3), tokenizer, study.weights_dir("galore", 0), facts)
    return study


def conversation(tiny_model, **given):
    model = stop_at(load_base(str(tiny_model), precision="fp32", device="cpu")).eval()
    return talk.Conversation(model, data.open_tokenizer(str(tiny_model)), **{"max_new_tokens": 8, **given})


def test_each_turn_is_answered_with_all_before_it_in_mind(tiny_model, capsys):
    made = conversation(tiny_model)
    for text in TURNS:
        answer = made.say(text)
        prompt = torch.tensor([encode_prompt(made._tokenizer, made.messages[:-1])])
        plain = made._model.generate(input_ids=prompt, max_new_tokens=8)[0, prompt.shape[1] :]
        assert answer == made._tokenizer.decode(plain, skip_special_tokens=True).strip()
        assert answer in capsys.readouterr().out  # shown while it was made
    assert [m["role"] for m in made.messages] == ["user", "assistant"] * 3
    made.start_over()
    assert made.messages == []


def test_the_oldest_exchanges_leave_a_full_conversation(tiny_model):
    made = conversation(tiny_model, limit=90)
    for text in TURNS * 3:
        made.say(text)
        assert len(encode_prompt(made._tokenizer, made.messages[:-1])) + 8 <= 90
    assert made.messages[0]["role"] == "user" and 2 <= len(made.messages) < 18
    made.say("word " * 300)  # longer than the limit by itself
    assert len(made.messages) == 2


def test_a_piped_conversation_runs_to_its_end(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/new\nAgain\n/quit\nnever asked\n"))
    assert command_line.main(["chat", "--study", "tiny", "--method", "galore", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    first, second = printed.splitlines()[:2]
    assert "galore-s0 has no record with digests" in first and second.startswith("galore of study tiny (seed 0).")
    assert "> Hello" in printed and "(a new conversation)" in printed and "> Again" in printed
    assert "never asked" not in printed


@pytest.mark.slow
def test_the_command_talks_headless(trained):
    done = subprocess.run(
        [sys.executable, "-m", "peftlib", "chat", "--study", "tiny", "--method", "base", "--max-new-tokens", "4"],
        input="Hello\nHow are you?\n",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "> Hello" in done.stdout and "> How are you?" in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--study", "tiny", "--method", "qlora"], "no trained model in"),
        (["--study", "tiny", "--method", "magic"], "method='magic' is unknown"),
        (["--study", "other", "--method", "base"], "there is no study 'other'"),
        (["--study", "tiny", "--method", "galore", "--max-new-tokens", "0"], "max_new_tokens=0 is out of range"),
    ],
)
def test_what_cannot_be_talked_to_is_named(trained, words, message, capsys):
    assert command_line.main(["chat", *words]) == command_line.ERROR_CODE
    assert message in capsys.readouterr().err
