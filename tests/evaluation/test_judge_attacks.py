"""A judge's server that is slow, endless, odd or curious: every call ends in time, by name, and keeps the key."""

import gzip
import json
import os
import signal
import threading
import time
from email.utils import formatdate

import fake_judge
import fake_study
import pytest
from fake_judge import judged, lines_of

from peftlib.core.errors import ConfigError, JudgeError, LockedError, Stopped
from peftlib.evaluation.judging import verdicts as judge_verdicts
from peftlib.evaluation.judging.backends import KEY_VARIABLE, Endpoint
from peftlib.report import charts as report_charts

KEY = "sk-planted0key0that0must0not0appear"
ASKED = [{"role": "user", "content": "Which?"}]
MIB = 1 << 20


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(report_charts, "charts_of", lambda *_: {})
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=6)


def call(study, url, *more):
    words = ["--study", "x", "--methods", "base", "qlora", "--endpoint", url, "--model", "m", *more]
    return judged(study, words)


def drip(connection, data, *, every_s=0.05):
    for at in range(len(data)):
        connection.sendall(data[at : at + 1])
        time.sleep(every_s)


def drip_head(connection):
    fake_judge.received(connection)
    drip(connection, fake_judge.http_answer(b"{}", more="X-Long: " + "a" * 500 + "\r\n"))


def drip_body(connection):
    fake_judge.received(connection)
    whole = fake_judge.http_answer(json.dumps(fake_judge.completion("x" * 500)).encode())
    connection.sendall(whole[:-500])
    drip(connection, whole[-500:])


def drip_chunks(connection):
    fake_judge.received(connection)
    connection.sendall(b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1\r\n \r\n")
        time.sleep(0.05)


def drip_hints(connection):
    fake_judge.received(connection)
    while True:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        time.sleep(0.05)


def say_nothing(connection):
    time.sleep(5)


@pytest.mark.parametrize(
    "scheme, answer",
    [
        *(("http", answer) for answer in (drip_head, drip_body, drip_chunks, drip_hints, say_nothing)),
        ("https", say_nothing),  # a handshake that never comes
    ],
)
def test_a_call_ends_by_its_time_whatever_drips(scheme, answer):
    with fake_judge.serving_raw(answer) as url:
        endpoint = Endpoint(url.replace("http:", f"{scheme}:"), "m", timeout_s=0.4, retries=0)
        started = time.monotonic()
        with pytest.raises(JudgeError, match=r"cannot be asked: timeout 1 times \(no whole answer within 0.4 s\)"):
            endpoint.ask(ASKED, max_tokens=4)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", ["200 OK", "500 Oh"])
@pytest.mark.parametrize("is_told", [True, False])
def test_an_answer_without_end_is_read_up_to_a_limit(status, is_told):
    sent = []

    def flood(connection):
        fake_judge.received(connection)
        length = f"Content-Length: {400 * MIB}\r\n" if is_told else ""
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{length}\r\n".encode())
        for _ in range(400):
            connection.sendall(b" " * MIB)
            sent.append(MIB)

    with fake_judge.serving_raw(flood) as url, pytest.raises(JudgeError, match="more than 1 MiB|status 500 1 times"):
        Endpoint(url, "m", timeout_s=20, retries=0).ask(ASKED, max_tokens=4)
    time.sleep(0.05)
    assert sum(sent) < 20 * MIB  # what the system's buffers hold


def test_an_answer_that_unpacks_to_much_is_not_unpacked():
    packed = gzip.compress(b" " * 50 * MIB + b"{}")

    def bomb(connection):
        fake_judge.received(connection)
        connection.sendall(fake_judge.http_answer(packed, more="Content-Encoding: gzip\r\n"))

    with fake_judge.serving_raw(bomb) as url, pytest.raises(JudgeError, match="unreadable answer 1 times"):
        Endpoint(url, "m", retries=0).ask(ASKED, max_tokens=4)


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


NO_API = "answers, but not as an OpenAI-compatible API does"


@pytest.mark.parametrize(
    "answer, message",
    [
        (fake_judge.http_answer(b""), "unreadable answer 1 times"),
        (fake_judge.http_answer(b'{"choi'), "unreadable answer 1 times"),
        (fake_judge.http_answer(b"\xff\xfe\x00"), "unreadable answer 1 times"),
        (fake_judge.http_answer(b"[" * 100_000), "unreadable answer 1 times"),
        (fake_judge.http_answer(b"<html>Sign in</html>"), NO_API),
        (fake_judge.http_answer(b"hello", kind="text/plain"), NO_API),
        (fake_judge.http_answer(b"data: {}", kind="text/event-stream"), NO_API),
        (fake_judge.http_answer(b"[]"), NO_API),
        (fake_judge.http_answer(b"null"), NO_API),
        (fake_judge.http_answer(b'"VERDICT: 1"'), NO_API),
        (fake_judge.http_answer(b'{"object": "list", "data": []}'), NO_API),
        (fake_judge.http_answer(b'{"error": {"message": "upstream is\\u001b[31m down"}}'),
         r"error in an answer 1 times \(upstream is\\x1b\[31m down\)"),
        (fake_judge.http_answer(b"<html>Bad gateway</html>", status="502 Oh", kind="text/html"),
         r"status 502 1 times \(a page of HTML\)"),
        (fake_judge.http_answer(b'{"error": "plain words"}', status="500 Oh"), r"500 1 times \(plain words\)"),
        (fake_judge.http_answer(b'{"detail": [{"loc": 1}]}', status="503 Oh"), r"503 1 times \(\[{\"loc\": 1}\]\)"),
        (fake_judge.http_answer(b"\x9b31m\xff", status="500 Oh"), r"500 1 times \(\ufffd31m\ufffd\)"),
        (fake_judge.http_answer(b"", status="204 No Content"), "unreadable answer 1 times"),
        (fake_judge.http_answer(b"pay", status="402 Pay"), r"answers with status 402 \(pay\), which no other try"),
        (fake_judge.http_answer(b"", status="405 No"), r"is not there \(status 405: no words\)"),
        (fake_judge.http_answer(b"", status="700 What"), "answers with status 700"),
        (b"HTTP/1.1 abc\r\n\r\n", "connection 1 times"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "connection 1 times"),
        (b"\x00" * 300, "connection 1 times"),
        (b"HTTP/1.1 200 OK\r\nA" + b"a" * 200_000, "connection 1 times"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "connection 1 times"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", "connection 1 times"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}", "connection 1 times"),
        (b"", "connection 1 times"),
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
        "1,100 tokens sent, 110 received as the judge counts them, cost 0.0022; of 1 calls the judge told no number"
        in printed
    )
    (unknown,) = [line for line in lines_of(study) if line["input_tokens"] is None]
    assert unknown["output_tokens"] is None and unknown["verdict"] == "tie"


def test_the_key_is_kept_nowhere_wherever_the_server_repeats_it(study, capsys):
    """In the verdict's text, in its parts, in an error, a header, a broken head: none is written or printed."""
    quoted = json.dumps(KEY)[1:-1].replace("s", "\\u0073", 1)
    good = json.dumps(fake_judge.completion(f"Your key is {KEY}.\nVERDICT: 1")).encode()
    escaped = good.replace(KEY.encode(), quoted.encode())
    answers = [
        fake_judge.http_answer(good),
        fake_judge.http_answer(escaped),
        *[fake_judge.http_answer(good)] * 10,
        fake_judge.http_answer(f"bad Bearer {KEY}".encode(), status="500 Oh"),
        fake_judge.http_answer(json.dumps({"error": {"message": "x" * 190 + KEY}}).encode(), status="500 Oh"),
        b"HTTP/1.1 200 OK\r\n" + KEY.encode() + b"\r\n\r\n",
        fake_judge.http_answer(b"", status="307 Go", more=f"Location: https://elsewhere/{KEY}\r\n"),
        fake_judge.http_answer(KEY.encode(), status="402 Pay"),
    ]
    left = iter(answers)

    def say(connection):
        assert KEY.encode() in fake_judge.received(connection)
        connection.sendall(next(left))

    told = []
    with fake_judge.serving_raw(say) as url:
        assert call(study, url, "--parallel", "1") == 0
        for _ in answers[12:]:
            with pytest.raises(JudgeError) as error:
                call(study, url, "--parallel", "1", "--model", "other", "--retries", "0")
            told.append(str(error.value))
    captured = capsys.readouterr()
    assert len(lines_of(study)) == 12 and "Your key is (key)." in lines_of(study)[0]["reply"]
    everything = [captured.out, captured.err, *told]
    everything += [path.read_text(encoding="utf-8") for path in study.folder.rglob("*") if path.is_file()]
    assert all(KEY[:12] not in text for text in everything)
    assert "(key)" in told[0] and "sends its callers to https://elsewhere/(key) (status 307)" in told[3]


def test_a_redirect_carries_neither_key_nor_texts():
    server = fake_judge.Server(lambda body: "VERDICT: 1")
    with fake_judge.serving(server) as there:

        def say(connection):
            fake_judge.received(connection)
            connection.sendall(
                fake_judge.http_answer(b"", status="307 Go", more=f"Location: {there}/chat/completions\r\n")
            )

        with fake_judge.serving_raw(say) as url, pytest.raises(JudgeError, match="sends its callers to http://127"):
            Endpoint(url, "m").ask(ASKED, max_tokens=4)
    assert server.requests == []


@pytest.mark.parametrize("key", ["sk-\u00e4\u00f6\u00fc0123", "sk-one\nsk-two", "two words"])
def test_a_key_that_no_header_carries_is_refused_without_showing_it(key, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(JudgeError, match=f"{KEY_VARIABLE} holds characters") as error:
        Endpoint("http://127.0.0.1:1/v1", "m")
    assert key not in str(error.value)


def test_a_key_in_the_url_or_the_models_name_is_refused(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for url, model in ((f"https://host/{KEY}/v1", "m"), ("https://host/v1", KEY)):
        with pytest.raises(JudgeError, match="holds the key") as error:
            Endpoint(url, model)
        assert KEY not in str(error.value)


def test_a_placeholder_for_a_key_does_not_spoil_verdicts(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "1")
    with fake_judge.serving(fake_judge.Server(lambda body: "VERDICT: 1")) as url:
        assert Endpoint(url, "m").ask(ASKED, max_tokens=4).text == "VERDICT: 1"


@pytest.mark.parametrize("url", ["http://example.com/v1", "http://10.0.0.3:8000/v1", "http://0.0.0.0:8000/v1",
                                 "http://localhost.evil.com/v1", "http://127.0.0.1.evil.com/v1", "HTTP://[::2]/v1"])  # fmt: skip
def test_what_is_not_on_this_machine_needs_https(url):
    with pytest.raises(JudgeError, match=r"(?i)http.*in the open: use https://.*ssh -L") as error:
        Endpoint(url, "m")
    assert url in str(error.value)


@pytest.mark.parametrize("url", ["https://example.com/v1", "http://127.0.0.1:8000/v1", "http://127.9.9.9/v1",
                                 "http://[::1]:8000/v1", "http://localhost:8000/v1", "http://LOCALHOST/v1"])  # fmt: skip
def test_https_and_this_machine_are_fine(url):
    assert Endpoint(url, "m").name == f"m at {url}"


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:0x1/v1", "http://127.0.0.1:99999/v1", "https://a b/v1", "https://h\x1b[31m/",
            "https://h\n/v1", "http://127.0.0.1\\@evil.com/v1", "https://", "", "//h/v1", "https://@h/v1"])  # fmt: skip
def test_an_url_that_is_none_is_a_named_error(url):
    with pytest.raises(JudgeError, match="the endpoint"):
        Endpoint(url, "m")


def test_this_machine_is_reached_without_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{fake_judge.free_port()}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{fake_judge.free_port()}")
    with fake_judge.serving(fake_judge.Server(lambda body: "VERDICT: 1")) as url:
        assert Endpoint(url, "m", retries=0).ask(ASKED, max_tokens=4).text == "VERDICT: 1"


@pytest.mark.parametrize(
    "asked, wait_s", [("7", 7), ("130.5", 130.5), ("0", 1), ("-3", 1), ("soon", 1), ("nan", 1), ("inf", 1), ("9" * 400, 1),
                      ("a date in 300 s", 300), ("Mon, 99 Foo 2020", 1)])  # fmt: skip
def test_a_wait_that_the_server_asks_for_is_kept(asked, wait_s):
    if asked == "a date in 300 s":  # made here, for the names of tests have to be the same in every process
        asked = formatdate(time.time() + 300, usegmt=True)
    waits, left = [], iter(["429 Slow", "200 OK"])

    def say(connection):
        fake_judge.received(connection)
        body = json.dumps(fake_judge.completion("VERDICT: 1")).encode()
        connection.sendall(fake_judge.http_answer(body, status=next(left), more=f"Retry-After: {asked}\r\n"))

    with fake_judge.serving_raw(say) as url:
        assert Endpoint(url, "m", sleep=waits.append).ask(ASKED, max_tokens=4).text == "VERDICT: 1"
    assert len(waits) == 1 and wait_s - 100 * (wait_s == 300) <= waits[0] <= wait_s * 1.26


def test_a_wait_beyond_all_patience_ends_at_once():
    waits = []

    def say(connection):
        fake_judge.received(connection)
        connection.sendall(fake_judge.http_answer(b"quota", status="429 Slow", more="Retry-After: 86400\r\n"))

    with (
        fake_judge.serving_raw(say) as url,
        pytest.raises(JudgeError, match=r"429 1 times \(quota\).*in 86,400 s: run"),
    ):
        Endpoint(url, "m", sleep=waits.append).ask(ASKED, max_tokens=4)
    assert waits == []


def test_two_judges_at_once_pay_once(study):
    """The second is refused by name while the first asks; together they ask each question once."""
    asked, go_on = threading.Event(), threading.Event()

    def slow(body):
        asked.set()
        go_on.wait(20)
        return "VERDICT: TIE"

    server = fake_judge.Server(slow)
    with fake_judge.serving(server) as url:
        first = threading.Thread(target=call, args=(study, url))
        first.start()
        assert asked.wait(20)
        call(study, url, "--dry-run")  # looks, and is let in
        with pytest.raises(LockedError, match=r"the judging of base-vs-qlora in study .* is in use by .*judging base"):
            call(study, url)
        go_on.set()
        first.join()
        call(study, url)
    assert len(server.requests) == 12 and len(lines_of(study)) == 12
    assert [path.name for path in study.folder.glob("*lock*")] == []


def test_ctrl_c_keeps_what_is_paid_for(study):
    """The calls under way are waited for and kept; nobody waits for another try."""
    started = threading.Barrier(3)

    def slow(body):
        if len(server.requests) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        started.wait(20)
        time.sleep(0.2)
        return "VERDICT: TIE"

    server = fake_judge.Server(slow)
    with fake_judge.serving(server) as url:
        threading.Thread(target=started.wait, args=(20,), daemon=True).start()
        with pytest.raises(Stopped, match="judging stopped after 2 of 12 calls. 2 verdicts are kept"):
            call(study, url, "--parallel", "2")
    assert len(server.requests) == len(lines_of(study)) == 2


def test_nobody_waits_for_another_try_after_a_stop():
    endpoint = Endpoint(f"http://127.0.0.1:{fake_judge.free_port()}/v1", "m")
    threading.Timer(0.3, endpoint.stop).start()
    started = time.monotonic()
    with pytest.raises(JudgeError, match="no more tries are wanted"):
        endpoint.ask(ASKED, max_tokens=4)
    assert time.monotonic() - started < 0.9


def test_a_full_disk_leaves_no_half_line(study, monkeypatch):
    with fake_judge.serving(fake_judge.Server(lambda body: "VERDICT: TIE")) as url:
        call(study, url, "--rows", "1")
        before = lines_of(study)
        with monkeypatch.context() as patch:

            def half(path, text, **how):
                real(path, text[:50])
                raise OSError(28, "No space left on device")

            real = judge_verdicts.append_text
            patch.setattr(judge_verdicts, "append_text", half)
            with pytest.raises(OSError, match="No space"):
                call(study, url)
        call(study, url)
    assert lines_of(study)[: len(before)] == before and len(lines_of(study)) == 12


@pytest.mark.parametrize("words", [["--timeout", "nan"], ["--timeout", "0"], ["--timeout", "-1"], ["--timeout", "inf"],
                                   ["--retries", "-1"], ["--price-in", "nan"], ["--price-out", "-2"]])  # fmt: skip
def test_odd_numbers_are_refused(study, words):
    with pytest.raises(ConfigError, match=words[0]):
        call(study, "http://127.0.0.1:1/v1", *words)
