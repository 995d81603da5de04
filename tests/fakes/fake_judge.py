"""HTTP servers on loopback for tests of the judge: a quick OpenAI-like one, and a proxy that plants faults."""

import contextlib
import json
import re
import socket
import socketserver
import struct
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fake_study
import pytest

from peftlib import cli
from peftlib.evaluation.judging.backends import KEY_VARIABLE, Endpoint
from peftlib.report import charts
from peftlib.runner import analysis_cli

KEY = "sk-planted0key0that0must0not0appear"


def completion(text, *, sent=100, received=10):
    """A chat completion as OpenAI-compatible servers answer it."""
    return {
        "id": "made",
        "object": "chat.completion",
        "created": 1,
        "model": "made",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}},
        ],
        "usage": {"prompt_tokens": sent, "completion_tokens": received, "total_tokens": sent + received},
    }


class Server:
    """`requests`: bodies and headers as they came. `faults`: what becomes of the next requests, in order; a status,
    'timeout', 'reset', 'malformed', 'empty', 'cut' (no JSON), 'page' (HTML), or None for none. `verdict`: the text to
    a request's body; with `upstream` the request is passed on first, and verdict(body) replaces the text that came
    back."""

    def __init__(self, verdict, *, upstream=None, faults=(), hang_s=1.0, param=None):
        self.verdict, self.upstream, self.hang_s, self.param = verdict, upstream, hang_s, param
        self.faults, self.requests, self.passed_on = list(faults), [], 0
        self._lock = threading.Lock()

    def next_fault(self, body, headers):
        with self._lock:
            self.requests.append((body, headers))
            return self.faults.pop(0) if self.faults else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        server, body = self.server.owner, json.loads(raw)
        fault = server.next_fault(body, {name.lower(): value for name, value in self.headers.items()})
        if fault == "timeout":
            time.sleep(server.hang_s)
            self.close_connection = True
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": f"planted {fault}", "param": server.param, "code": "planted"}})
            return
        if fault in ("cut", "page"):
            kind = "text/html" if fault == "page" else "application/json"
            self._send_bytes(200, b"<html>Sign in</html>" if fault == "page" else b'{"id": "x", "choi', kind)
            return
        answer = self._passed_on(raw) if server.upstream else completion("")
        if fault == "empty":
            answer = {**answer, "choices": []}
        else:
            text = "Both are fine, I think." if fault == "malformed" else server.verdict(body)
            if text is not None:
                answer["choices"][0]["message"]["content"] = text
        self._send(200, answer)

    def _passed_on(self, raw):
        request = urllib.request.Request(
            self.server.owner.upstream + self.path, data=raw, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as found:
            self.server.owner.passed_on += 1
            return json.load(found)

    def _send(self, status, value):
        self._send_bytes(status, json.dumps(value).encode(), "application/json")

    def _send_bytes(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have given up
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(server, port=0):
    """The base URL of a Server that listens on loopback while the block runs."""
    http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    http.daemon_threads, http.owner = True, server
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()


class _Raw(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):  # the client may have given up
            self.server.answer(self.request)


@contextlib.contextmanager
def serving_raw(answer):
    """The base URL of a server on loopback where answer(socket) says what it likes, once a connection."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Raw) as raw:
        raw.daemon_threads, raw.block_on_close, raw.answer = True, False, answer
        threading.Thread(target=raw.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{raw.server_address[1]}/v1"
        raw.shutdown()


def http_answer(body, *, status="200 OK", kind="application/json", more=""):
    """The bytes of an HTTP answer. body: bytes. more: further header lines, each with its line end."""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + body


def received(connection):
    """A request as it came, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def judged(study, words):
    """The exit code of the judge command on a study. ConfigError and others: as the command raises them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis_cli, "open_study", lambda name: study)
        return cli.call(["judge", *words])


def lines_of(study):
    """[verdict, ...] that a study has of base against qlora."""
    text = (study.folder / "judge" / "base-vs-qlora.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def made_study(tmp_path, monkeypatch, rows=None):
    """Base and qlora on some rows, or on twelve of which one has equal answers; the key is set, no charts are drawn."""
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    made = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=rows or 12)
    if rows is None:
        shown_rows = fake_study.made_rows(12)
        answers = fake_study.answers_of(shown_rows, "qlora", 0)
        answers[5] = fake_study.answers_of(shown_rows, "base", 0)[5]
        fake_study.write_predictions(made, "qlora", 0, shown_rows, answers)
    return made


def call(study, url, *more):
    words = ["--study", "x", "--methods", "qlora", "base", "--endpoint", url, "--model", "m", *more]
    return judged(study, words)


def shown(body):
    """(answer 1, answer 2) of a request to the judge."""
    text = body["messages"][0]["content"]
    return re.findall(r"===== answer \d \(\w+\) =====\n(.*?)\n===== end", text, re.DOTALL)


def shorter(body):
    """A fair judge: the shorter answer, which is qlora's, wins; the equal of both ties."""
    first, second = (len(answer) for answer in shown(body))
    return f"One is shorter.\nVERDICT: {1 if first < second else 2 if second < first else 'TIE'}"


def quick(monkeypatch):
    """Waits between retries are noted, not waited for."""
    waits, real = [], Endpoint.__init__

    def init(self, *args, **given):
        real(self, *args, **given, sleep=waits.append)

    monkeypatch.setattr(Endpoint, "__init__", init)
    return waits
