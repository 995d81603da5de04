"""`chat` talks to a trained model over several turns, from a pipe too, and ends when told."""

import io
import subprocess
import sys
import unicodedata

import pytest
import tiny
import torch

from peftlib import cli as command_line
from peftlib import data
from peftlib.core.files import visible
from peftlib.evaluation import chat as talk
from peftlib.models.chat_template import encode_prompt, stop_at
from peftlib.models.load import load_base
from peftlib.models.saved import save_trained

TURNS = ["Hello there", "And then?", "Is that all?"]


@pytest.fixture
def trained(make_study, tiny_model):
    """A study whose galore weights are those of another tiny model."""
    study = make_study()
    tokenizer = data.load_tokenizer(str(tiny_model))
    facts = {"model": str(tiny_model), "four_bit": [], "precision": "fp32"}
    save_trained(tiny.model(seed=3), tokenizer, study.weights_dir("galore", 0), facts)
    return study


def conversation(tiny_model, **given):
    model = stop_at(load_base(str(tiny_model), precision="fp32", device="cpu")).eval()
    return talk.Conversation(model, data.load_tokenizer(str(tiny_model)), **{"max_new_tokens": 8, **given})


def test_each_turn_is_answered_with_all_before_it_in_mind(tiny_model, capsys):
    made = conversation(tiny_model)
    for text in TURNS:
        answer = made.say(text)
        prompt = torch.tensor([encode_prompt(made._tokenizer, made.messages[:-1])])
        plain = made._model.generate(input_ids=prompt, max_new_tokens=8)[0, prompt.shape[1] :]
        assert answer == made._tokenizer.decode(plain, skip_special_tokens=True).strip()
        assert answer in capsys.readouterr().out  # shown while it was made
    assert [m["role"] for m in made.messages] == ["user", "assistant"] * 3


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


ACTIVE = "a\x1b[31mred\x1b]0;title\x07 \x9b2J\u202egnp\u2066 b\r\x08\x00\x7f \u2028\ud800 c"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07 \x9b2J\u202egnp\u2066 b\x0d\x08\x00\x7f \u2028\ud800 c"


def test_what_a_terminal_would_act_on_is_shown_instead():
    assert visible(ACTIVE) == SHOWN
    plain = "Grüße, 你好\n\tمرحبا 👩‍👩‍👧 ﬁ €\n"
    assert visible(plain) == plain
    every = visible("".join(map(chr, [*range(0x3000), *range(0xD800, 0xE000)])))
    assert "\n" in every and every.encode("utf-8")
    kept = set(every) - set("\n\t")
    assert not {c for c in kept if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert not {
        c
        for c in kept
        if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }


class Escaping:
    """A model that answers each turn with the same ids, through the streamer."""

    def __init__(self, ids):
        self.device, self.ids = "cpu", torch.tensor([ids])

    def generate(self, *, input_ids, streamer, **_):
        streamer.put(input_ids[0])
        for number in self.ids[0]:
            streamer.put(number.reshape(1))
        streamer.end()
        return torch.cat([input_ids, self.ids], dim=1)


def test_an_answer_with_escape_sequences_is_shown_and_not_obeyed(tiny_model, capsys):
    text = "a\x1b[31mred\x1b]0;title\x07\n\tb\x9b2J \u202ec"
    tokenizer = data.load_tokenizer(str(tiny_model))
    model = Escaping(tokenizer(text, add_special_tokens=False).input_ids)
    made = talk.Conversation(model, tokenizer, max_new_tokens=8, limit=500)
    answer = made.say("Hello")
    printed = capsys.readouterr().out
    assert printed == visible(tokenizer.decode(model.ids[0])) + "\n"
    assert "\x1b" not in printed and r"\x1b[31m" in printed and "\n\tb" in printed
    assert "\x1b[31m" in answer  # the model is told what it said


def test_odd_bytes_from_a_pipe_and_an_odd_terminal_do_not_end_it(trained, monkeypatch):
    odd = b"Gr\xfc\xdfe \xff\xfe\x00 \x1b[2J\n\xed\xa0\x80\n" + b"<end_of_turn>\n<start_of_turn>model\n" * 2 + b"\x1c\n"
    odd += "\u202e\ud83d\ude00 \U0010ffff\n".encode("utf-8", "surrogatepass") + b"word " * 5000 + b"\n\r\n/quit \n"
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(odd), encoding="utf-8", errors="strict"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", errors="strict"))
    assert command_line.main(["chat", "--study", "tiny", "--method", "galore", "--max-new-tokens", "5"]) == 0
    sys.stdout.flush()
    printed = out.getvalue()
    assert (
        rb"> Gr\ufffd\ufffde \ufffd\ufffd\x00 \x1b[2J" in printed
        and b"\x1b" not in printed
        and printed.endswith(b"> /quit\n")
    )


def test_half_characters_that_were_typed_do_not_end_it(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("half \udcff of \ud800 one\n"))
    assert command_line.main(["chat", "--study", "tiny", "--method", "base", "--max-new-tokens", "3"]) == 0
    assert "> half ? of ? one" in capsys.readouterr().out


def test_a_closed_input_is_an_empty_one(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert command_line.main(["chat", "--study", "tiny", "--method", "base"]) == 0
    assert capsys.readouterr().out.startswith("base of study tiny")


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
    assert command_line.main(["chat", *words]) == 2
    assert message in capsys.readouterr().err
