"""A judge's server that is slow or endless, and a judge that is interrupted: every call ends in time, and what came is kept."""

import gzip
import json
import os
import signal
import threading
import time
from email.utils import formatdate

import fake_judge
import pytest
from fake_judge import call, lines_of

from peftlib.core.errors import ConfigError, JudgeError, LockedError, Stopped
from peftlib.evaluation.judging import verdicts as judge_verdicts
from peftlib.evaluation.judging.backends import Endpoint

ASKED = [{"role": "user", "content": "Which?"}]
MIB = 1 << 20


@pytest.fixture
def study(tmp_path, monkeypatch):
    return fake_judge.made_study(tmp_path, monkeypatch, rows=6)


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
        with pytest.raises(
            JudgeError, match=r"does not answer: timeout after 1 try \(no complete answer within 0.4 s\)"
        ):
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

    with (
        fake_judge.serving_raw(flood) as url,
        pytest.raises(JudgeError, match="more than 1 MiB|status 500 after 1 try"),
    ):
        Endpoint(url, "m", timeout_s=20, retries=0).ask(ASKED, max_tokens=4)
    time.sleep(0.05)
    assert sum(sent) < 20 * MIB  # what the system's buffers hold


def test_an_answer_that_unpacks_to_much_is_not_unpacked():
    packed = gzip.compress(b" " * 50 * MIB + b"{}")

    def bomb(connection):
        fake_judge.received(connection)
        connection.sendall(fake_judge.http_answer(packed, more="Content-Encoding: gzip\r\n"))

    with fake_judge.serving_raw(bomb) as url, pytest.raises(JudgeError, match="unreadable answer after 1 try"):
        Endpoint(url, "m", retries=0).ask(ASKED, max_tokens=4)


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
        pytest.raises(JudgeError, match=r"429 after 1 try \(quota\).*in 86,400 s: run"),
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
    with pytest.raises(JudgeError, match="retries were stopped"):
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
    # typer's own refusals do not repeat the number
    with pytest.raises(ConfigError, match=" ".join(words) if words[0] == "--timeout" else words[0]):
        call(study, "http://127.0.0.1:1/v1", *words)
