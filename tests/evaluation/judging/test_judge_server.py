"""The judge against a real OpenAI-compatible server (`transformers serve`), with faults planted by a proxy before
it."""

import contextlib
import copy
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import fake_judge
import fake_study
import pytest
import tiny
from fake_judge import judged, lines_of

from peftlib.core.errors import JudgeError
from peftlib.evaluation.judging.backends import KEY_VARIABLE, Endpoint
from peftlib.models.chat_template import set_template
from peftlib.report import build as report
from peftlib.report import charts as report_charts

pytestmark = pytest.mark.slow
_START_S = 120  # for a machine that is busy; a free one takes five


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(URL without /v1, name) of a tiny random Gemma 3 behind `transformers serve`."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny.model(max_position_embeddings=8192).save_pretrained(folder)
    set_template(copy.deepcopy(tiny.tokenizer())).save_pretrained(folder)
    port = fake_judge.free_port()
    words = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = folder.parent / "serve.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*map(str, words), "--device", "cpu"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}", str(folder)
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_up(url, process, log):
    for _ in range(2 * _START_S):
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as found:
            if found.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"no answer from {url}: {log.read_text(encoding='utf-8', errors='replace')}")


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(report_charts, "charts_of", lambda *_: {})
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=12)


def call(study, url, model, *more):
    words = [
        "--study",
        "x",
        "--methods",
        "base",
        "qlora",
        "--endpoint",
        url,
        "--model",
        model,
        "--reply-tokens",
        "16",
        *more,
    ]
    return judged(study, words)


def test_a_real_server_that_says_no_verdict_is_counted_as_such(served, study, capsys):
    """What a random model writes is no verdict: the calls work, and nothing is guessed."""
    url, model = served
    assert call(study, f"{url}/v1", model, "--rows", "2") == 0
    assert {line["verdict"] for line in lines_of(study)} == {"malformed"} and len(lines_of(study)) == 4
    assert all(
        line["tries"] == 3 and line["input_tokens"] > 100 and line["output_tokens"] > 0 for line in lines_of(study)
    )
    assert "malformed verdicts: 4" in capsys.readouterr().out
    before = lines_of(study)
    assert call(study, f"{url}/v1", model, "--rows", "2") == 0
    assert lines_of(study) == before


def test_a_real_server_names_a_model_it_does_not_serve(served, study):
    url, _ = served
    with pytest.raises(JudgeError, match="refused 3 requests in a row .*other-model|was not found"):
        call(study, f"{url}/v1", "other-model", "--parallel", "1")


def test_planted_faults_before_a_real_server_lose_nothing(served, study, monkeypatch, capsys):
    """Timeouts, 429, 500, resets and malformed verdicts between the judge and the server; then a cut, then the rest."""
    url, model = served
    faults = [429, None, "timeout", 500, None, "reset", "malformed", None, 503, "empty", None, "malformed"]
    proxy = fake_judge.Server(lambda body: "They differ.\nVERDICT: 2", upstream=url, faults=faults, hang_s=25.0)
    _quick(monkeypatch)
    port = fake_judge.free_port()
    with fake_judge.serving(proxy, port) as front:
        call(study, front, model, "--rows", "6", "--timeout", "20", "--parallel", "2")
        printed = capsys.readouterr().out
        for said in ("1 status 429", "1 timeout", "1 status 500", "1 connection", "1 status 503"):
            assert said in printed
        assert "asked 12: 0 malformed, 0 refused" in printed
        some = lines_of(study)
        assert len(some) == 12 and proxy.passed_on == len(proxy.requests) - 5 >= 12 + 3
        proxy.faults = [None, None, *[500] * 9]
        with pytest.raises(JudgeError, match="14 verdicts are kept"):
            call(study, front, model, "--retries", "2", "--parallel", "1")
        proxy.faults = []
        asked = len(proxy.requests)
        call(study, front, model)
        assert len(proxy.requests) - asked == 24 - 14
    found = lines_of(study)
    assert found[:12] == some and len({line["key"] for line in found}) == len(found) == 24
    (judged,) = report.build_report(study).judged
    assert (judged.n_rows, judged.n_malformed, judged.position_bias) == (12, 0, 1.0)


def test_a_server_that_went_away_is_named(served, study, monkeypatch):
    _, model = served
    _quick(monkeypatch)
    with pytest.raises(JudgeError, match="does not answer: connection"):
        call(study, f"http://127.0.0.1:{fake_judge.free_port()}/v1", model, "--retries", "1")
    assert not (study.folder / "judge").exists()


def _quick(monkeypatch):
    real = Endpoint.__init__
    monkeypatch.setattr(Endpoint, "__init__", lambda self, *a, **given: real(self, *a, **given, sleep=lambda _: None))
