"""Answers of any shape: read without guessing, or a named error."""

import json

import fake_judge
import pytest
from fake_judge import call, lines_of

from peftlib.core.errors import JudgeError
from peftlib.evaluation.judging.backends import Endpoint

ASKED = [{"role": "user", "content": "Which?"}]


@pytest.fixture
def study(tmp_path, monkeypatch):
    return fake_judge.made_study(tmp_path, monkeypatch, rows=6)


def choices(message):
    return {"choices": [{"index": 0, "message": message}]}


def told(text, usage=None):
    return {**choices({"content": text}), "usage": usage}


@pytest.mark.parametrize(
    "made, text",
    [
        ({"choices": None}, ""),
        ({"choices": []}, ""),
        ({"choices": {}}, ""),
        ({"choices": "VERDICT: 1"}, ""),
        ({"choices": [None]}, ""),
        ({"choices": ["VERDICT: 1"]}, ""),
        ({"choices": [{"message": None}]}, ""),
        ({"choices": [{"message": "VERDICT: 1"}]}, ""),
        ({"choices": [{"text": "VERDICT: 1"}]}, ""),
        (choices({}), ""),
        (choices({"content": None}), ""),
        (choices({"content": 7}), ""),
        (choices({"content": {"text": "VERDICT: 1"}}), ""),
        (choices({"content": [{"type": "text", "text": "It is.\n"}, {"type": "text", "text": "VERDICT: 1"}]}),
         "It is.\nVERDICT: 1"),
        (choices({"content": ["VERDICT", ": 2", None, 3, {"type": "image_url"}, {"text": 5}]}), "VERDICT: 2"),
        (choices({"content": None, "refusal": "VERDICT: 1"}), "VERDICT: 1\n(the model refused to answer)"),
        (choices({"content": None, "refusal": 3}), ""),
        (choices({"content": None, "tool_calls": [{"function": {"name": "VERDICT: 1"}}]}), ""),
        (choices({"content": "half \ud800 of one"}), "half ? of one"),
        (told("ok", "many"), "ok"),
        (told("ok", []), "ok"),
        (told("ok", {"prompt_tokens": "9", "completion_tokens": None}), "ok"),
        (told("ok", {"prompt_tokens": float("nan"), "completion_tokens": float("inf")}), "ok"),
        (told("ok", {"prompt_tokens": -1, "completion_tokens": 2.5}), "ok"),
        (told("ok", {"prompt_tokens": True, "completion_tokens": 10**300}), "ok"),
    ],
)  # fmt: skip
def test_a_completion_of_another_shape_is_read_without_guessing(made, text):
    def answer(connection):
        fake_judge.received(connection)
        connection.sendall(fake_judge.http_answer(json.dumps(made).encode()))

    with fake_judge.serving_raw(answer) as url:
        reply = Endpoint(url, "m", retries=0).ask(ASKED, max_tokens=4)
    assert (reply.text, reply.input_tokens, reply.output_tokens, reply.is_refused) == (text, None, None, False)


NO_API = "answers, but not like an OpenAI-compatible API"


@pytest.mark.parametrize(
    "answer, message",
    [
        (fake_judge.http_answer(b""), "unreadable answer after 1 try"),
        (fake_judge.http_answer(b'{"choi'), "unreadable answer after 1 try"),
        (fake_judge.http_answer(b"\xff\xfe\x00"), "unreadable answer after 1 try"),
        (fake_judge.http_answer(b"[" * 100_000), "unreadable answer after 1 try"),
        (fake_judge.http_answer(b"<html>Sign in</html>"), NO_API),
        (fake_judge.http_answer(b"hello", kind="text/plain"), NO_API),
        (fake_judge.http_answer(b"data: {}", kind="text/event-stream"), NO_API),
        (fake_judge.http_answer(b"[]"), NO_API),
        (fake_judge.http_answer(b"null"), NO_API),
        (fake_judge.http_answer(b'"VERDICT: 1"'), NO_API),
        (fake_judge.http_answer(b'{"object": "list", "data": []}'), NO_API),
        (fake_judge.http_answer(b'{"error": {"message": "upstream is\\u001b[31m down"}}'),
         r"error in an answer after 1 try \(upstream is\\x1b\[31m down\)"),
        (fake_judge.http_answer(b"<html>Bad gateway</html>", status="502 Oh", kind="text/html"),
         r"status 502 after 1 try \(an HTML page\)"),
        (fake_judge.http_answer(b'{"error": "plain words"}', status="500 Oh"), r"500 after 1 try \(plain words\)"),
        (fake_judge.http_answer(b'{"detail": [{"loc": 1}]}', status="503 Oh"), r"503 after 1 try \(\[{\"loc\": 1}\]\)"),
        (fake_judge.http_answer(b"\x9b31m\xff", status="500 Oh"), r"500 after 1 try \(\ufffd31m\ufffd\)"),
        (fake_judge.http_answer(b"", status="204 No Content"), "unreadable answer after 1 try"),
        (fake_judge.http_answer(b"pay", status="402 Pay"), r"answers with status 402 \(pay\), which a retry"),
        (fake_judge.http_answer(b"", status="405 No"), r"was not found \(status 405: no message\)"),
        (fake_judge.http_answer(b"", status="700 What"), "answers with status 700"),
        (b"HTTP/1.1 abc\r\n\r\n", "connection after 1 try"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "connection after 1 try"),
        (b"\x00" * 300, "connection after 1 try"),
        (b"HTTP/1.1 200 OK\r\nA" + b"a" * 200_000, "connection after 1 try"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "connection after 1 try"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", "connection after 1 try"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}", "connection after 1 try"),
        (b"", "connection after 1 try"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_a_named_error(answer, message):
    def say(connection):
        fake_judge.received(connection)
        connection.sendall(answer)

    with fake_judge.serving_raw(say) as url, pytest.raises(JudgeError, match=message) as error:
        Endpoint(url, "m", retries=0).ask(ASKED, max_tokens=4)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_tokens_that_the_judge_does_not_count_are_unknown(study, capsys):
    made = fake_judge.completion("VERDICT: TIE")
    answers = iter([{**made, "usage": None}] + [made] * 20)
    with fake_judge.serving_raw(lambda c: c.sendall(
        fake_judge.http_answer(json.dumps(next(answers)).encode()) if fake_judge.received(c) else b""
    )) as url:  # fmt: skip
        assert call(study, url, "--parallel", "1", "--price-in", "2") == 0
    printed = capsys.readouterr().out
    assert (
        "1,100 tokens sent, 110 received as the judge counts them, cost 0.0022; the judge gave no count for 1 of "
        in printed
    )
    (unknown,) = [line for line in lines_of(study) if line["input_tokens"] is None]
    assert unknown["output_tokens"] is None and unknown["verdict"] == "tie"
