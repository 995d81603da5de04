"""What a server refuses or breaks is retried, counted and named, and no verdict is lost."""

import fake_judge
import pytest
from fake_judge import call, lines_of, quick, shorter

from peftlib.core.errors import JudgeError
from peftlib.evaluation.judging import judge
from peftlib.evaluation.judging.backends import KEY_VARIABLE


@pytest.fixture
def study(tmp_path, monkeypatch):
    return fake_judge.made_study(tmp_path, monkeypatch)


def test_planted_faults_are_retried_counted_and_lose_nothing(study, capsys, monkeypatch):
    faults = [429, "timeout", 500, "reset", "malformed", "empty", 503, None, "malformed", 429, "cut"]
    server = fake_judge.Server(shorter, faults=faults)
    waits = quick(monkeypatch)
    with fake_judge.serving(server) as url:
        assert call(study, url, "--timeout", "0.3", "--parallel", "2") == 0
    printed = capsys.readouterr().out
    for said in ("2 status 429", "1 timeout", "1 status 500", "1 connection", "1 status 503", "1 unreadable answer"):
        assert said in printed
    assert "asked 22: 0 malformed, 0 refused" in printed and len(waits) == 7
    found = lines_of(study)
    assert len(found) == 24 and {line["verdict"] for line in found} == {"b", "tie"}
    assert sum(line["tries"] - 1 for line in found if line["tries"]) == 3


def test_an_endpoint_that_is_down_is_named_and_what_was_said_is_kept(study, monkeypatch):
    waits = quick(monkeypatch)
    port = fake_judge.free_port()
    with pytest.raises(JudgeError, match=r"m at http://127\.0\.0\.1:\d+/v1 does not answer: connection after 3 tries"):
        call(study, f"http://127.0.0.1:{port}/v1", "--retries", "2", "--parallel", "1")
    assert len(waits) == 2 and waits[0] >= 1 and waits[1] >= 2
    assert [line["verdict"] for line in lines_of(study)] == ["tie", "tie"]  # of equal answers
    server = fake_judge.Server(shorter, faults=[None] * 7 + [500] * 9)
    with fake_judge.serving(server, port) as url:
        with pytest.raises(
            JudgeError, match="status 500 after 3 tries.*planted 500.*9 verdicts are kept in base-vs-qlora"
        ):
            call(study, url, "--retries", "2", "--parallel", "1")
        before = lines_of(study)
        server.faults.clear()
        call(study, url)
    assert lines_of(study)[: len(before)] == before and len(lines_of(study)) == 24
    assert len(server.requests) == 22 + 3


@pytest.mark.parametrize(
    "status, message",
    [
        (401, rf"unauthorised \(status 401\): the key in {KEY_VARIABLE} was refused"),
        (403, r"unauthorised \(status 403\)"),
        (404, r"was not found \(status 404: .*planted 404.*check --model"),
        ("page", r"answers, but not like an OpenAI-compatible API"),
        (400, r"refused 3 requests in a row \(.*planted 400"),
    ],
)
def test_a_server_that_refuses_is_named(study, status, message):
    server = fake_judge.Server(shorter, faults=[status] * 9)
    with fake_judge.serving(server) as url, pytest.raises(JudgeError, match=message):
        call(study, url, "--parallel", "1")
    assert len(server.requests) == (3 if status == 400 else 1)


def test_a_missing_key_is_named_as_such(study, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE)
    server = fake_judge.Server(shorter, faults=[401])
    with fake_judge.serving(server) as url, pytest.raises(JudgeError, match=f"{KEY_VARIABLE} is not set"):
        call(study, url, "--parallel", "1")


def test_one_request_that_is_refused_is_asked_again_by_the_next_run(study, capsys):
    server = fake_judge.Server(shorter, faults=[None, 400])
    with fake_judge.serving(server) as url:
        call(study, url, "--parallel", "1")
        assert "1 refused by the server" in capsys.readouterr().out and len(lines_of(study)) == 23
        call(study, url)
    assert len(lines_of(study)) == 24


class Picky(fake_judge.Server):
    """Refuses what holds its param."""

    def next_fault(self, body, headers):
        super().next_fault(body, headers)
        return 400 if self.param in body else None


def test_parameters_that_a_server_does_not_take_are_given_otherwise(study):
    server = Picky(shorter, param="max_tokens")
    with fake_judge.serving(server) as url:
        call(study, url, "--parallel", "4", "--retries", "0")
        first, last = server.requests[0][0], server.requests[-1][0]
        assert "max_tokens" in first and "max_tokens" not in last
        assert last["max_completion_tokens"] == judge.REPLY_TOKENS
        server.param = "temperature"
        call(study, url, "--model", "other", "--parallel", "1")
    assert "temperature" not in server.requests[-1][0]
