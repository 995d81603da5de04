"""The key and the texts go to the judge alone: https or this machine, no redirect, no proxy, nothing on disk."""

import json

import fake_judge
import pytest
from fake_judge import KEY, call, lines_of, shorter

from peftlib.core.errors import JudgeError
from peftlib.evaluation.judging.backends import KEY_VARIABLE, Endpoint
from peftlib.report import build as report

ASKED = [{"role": "user", "content": "Which?"}]


@pytest.fixture
def study(tmp_path, monkeypatch):
    return fake_judge.made_study(tmp_path, monkeypatch, rows=6)


def test_the_key_is_sent_and_stands_nowhere_else(study, capsys):
    server = fake_judge.Server(shorter, faults=[400])
    server.param = KEY  # a server that repeats the key in what it says
    with fake_judge.serving(server) as url:
        call(study, url)
    assert all(headers["authorization"] == f"Bearer {KEY}" for _, headers in server.requests)
    report.build_report(study)
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    assert all(KEY.encode() not in path.read_bytes() for path in study.folder.rglob("*") if path.is_file())


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
    assert "(key)" in told[0] and "redirects to https://elsewhere/(key) (status 307)" in told[3]


def test_a_redirect_carries_neither_key_nor_texts():
    server = fake_judge.Server(lambda body: "VERDICT: 1")
    with fake_judge.serving(server) as there:

        def say(connection):
            fake_judge.received(connection)
            connection.sendall(
                fake_judge.http_answer(b"", status="307 Go", more=f"Location: {there}/chat/completions\r\n")
            )

        with fake_judge.serving_raw(say) as url, pytest.raises(JudgeError, match="redirects to http://127"):
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
        with pytest.raises(JudgeError, match="contains the key") as error:
            Endpoint(url, model)
        assert KEY not in str(error.value)


def test_a_placeholder_for_a_key_does_not_spoil_verdicts(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "1")
    with fake_judge.serving(fake_judge.Server(lambda body: "VERDICT: 1")) as url:
        assert Endpoint(url, "m").ask(ASKED, max_tokens=4).text == "VERDICT: 1"


@pytest.mark.parametrize("url", ["http://example.com/v1", "http://10.0.0.3:8000/v1", "http://0.0.0.0:8000/v1",
                                 "http://localhost.evil.com/v1", "http://127.0.0.1.evil.com/v1", "HTTP://[::2]/v1"])  # fmt: skip
def test_what_is_not_on_this_machine_needs_https(url):
    with pytest.raises(JudgeError, match=r"(?i)http.*unencrypted: use https://.*ssh -L") as error:
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


@pytest.mark.parametrize("url", ["http://user:pass@host/v1", "https://host/v1?api-key=abc", "ftp://host", "host:80"])
def test_an_endpoint_that_is_no_plain_url_is_refused(study, url):
    with pytest.raises(JudgeError) as error:
        call(study, url)
    assert "pass" not in str(error.value) and "abc" not in str(error.value)


def test_this_machine_is_reached_without_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{fake_judge.free_port()}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{fake_judge.free_port()}")
    with fake_judge.serving(fake_judge.Server(lambda body: "VERDICT: 1")) as url:
        assert Endpoint(url, "m", retries=0).ask(ASKED, max_tokens=4).text == "VERDICT: 1"
