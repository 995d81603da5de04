"""The remote on a real S3 server on loopback, with faults in its answers."""

import subprocess
import sys
import time

import pytest
from kept_study import newest, save

from peftlib.core.errors import ConfigError, LockedError
from peftlib.storage import mirror
from peftlib.storage.claims import Claims
from peftlib.storage.mirror import Mirror
from peftlib.storage.store import Remote

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow


class Faults:
    """WSGI middleware: the next answers to a method on a path that holds `part` go wrong as `kind` says."""

    def __init__(self, app):
        self.app, self.part, self.method, self.kind, self.times, self.hit = app, None, None, None, 0, 0
        self.hidden = None  # what listings leave out

    def plant(self, kind, method, part, times=1):
        self.kind, self.method, self.part, self.times, self.hit = kind, method, part, times, 0

    def __call__(self, environ, start_response):
        is_meant = self.times and environ["REQUEST_METHOD"] == self.method and self.part in environ["PATH_INFO"]
        if is_meant:
            self.times -= 1
            self.hit += 1
            if self.kind == "500":
                start_response("500 Internal Server Error", [("Content-Type", "text/plain"), ("Content-Length", "0")])
                return [b""]
            if self.kind == "hangs":
                time.sleep(3)
        answered = {}

        def remember(status, headers, *rest):
            answered.update(status=status, headers=headers)

        body = b"".join(self.app(environ, remember))
        if is_meant and self.kind == "truncated":
            body = body[: len(body) // 2]
        if is_meant and self.kind == "flipped":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.hidden and environ["REQUEST_METHOD"] == "GET" and "list-type" in environ.get("QUERY_STRING", ""):
            head, *rest = body.split(b"<Contents>")
            tail = rest[-1].partition(b"</Contents>")[2] if rest else b""
            kept = [part.partition(b"</Contents>")[0] for part in rest if self.hidden not in part]
            body = head + b"".join(b"<Contents>" + part + b"</Contents>" for part in kept) + tail
        if environ["REQUEST_METHOD"] == "HEAD":  # its length is that of the file
            start_response(answered["status"], answered["headers"])
            return [body]
        headers = [pair for pair in answered["headers"] if pair[0].lower() != "content-length"]
        start_response(answered["status"], [*headers, ("Content-Length", str(len(body)))])
        return [body]


@pytest.fixture(scope="module")
def server():
    """(Faults, address) of an S3 server."""
    started = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    faults = Faults(started._server.app)
    started._server.app = faults
    host, port = started.get_host_and_port()
    yield faults, f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def s3(server, request, monkeypatch):
    """s3() -> a Remote of a machine of its own on one private bucket. s3.faults, s3.bucket."""
    faults, address = server
    faults.times, faults.hidden = 0, None
    bucket = f"b{abs(hash(request.node.name)) % 10**9}"
    for name, value in {"KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{name}" if "KEY_ID" not in name else "AWS_ACCESS_KEY_ID", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()

    def make():
        config = {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 1}}
        fs = s3fs.S3FileSystem(endpoint_url=address, config_kwargs=config, skip_instance_cache=True)
        fs.retries = 2
        return Remote(f"s3://{bucket}", "study", fs=fs)

    make.faults, make.bucket = faults, bucket
    make().fs.mkdir(bucket)
    return make


def test_a_bucket_serves_as_a_folder_does_and_nothing_is_left_in_pieces(study, s3, tmp_path):
    lines = []
    ours = Mirror(study, s3(), log=lines.append, every_s=0.01)
    assert ours.flush(60) and ours.state() == f"the whole study is on s3://{s3.bucket}", lines
    for step in range(4, 8):
        save(study, step)
        ours.copy_once(is_last=True)
    stored = ours.remote.fs.find(s3.bucket)
    assert sum("checkpoint" in path for path in stored) == 4 and not any("probe" in path for path in stored)
    again = Mirror(tmp_path / "elsewhere", s3(), log=lines.append)
    again.restore(["galore-s0"])
    assert newest(again.folder) is None and (again.folder / "weights" / "galore-s0").exists()
    again.restore(["qlora-s0"])
    assert newest(again.folder) == 7 and (again.folder / "records" / "base-s0.json").exists()
    assert again.flush(60), again.state()


@pytest.mark.parametrize("kind", ["500", "hangs", "truncated", "flipped"])
@pytest.mark.parametrize("method, part", [("GET", ".tar"), ("GET", ".json"), ("PUT", ".tar"), ("PUT", ".json")])
def test_a_fault_is_got_over_or_said_and_never_believed(study, s3, tmp_path, kind, method, part):
    if method == "PUT" and kind in ("truncated", "flipped"):
        pytest.skip("an answer to PUT has no content")
    lines = []
    ours = Mirror(study, s3(), log=lines.append, every_s=0.01)
    assert ours.flush(60), lines
    save(study, 4)
    s3.faults.plant(kind, method, f"checkpoint-qlora-s0.1{part}", times=2)
    ours.copy_once(is_last=True)
    again = Mirror(tmp_path / "elsewhere", s3(), log=lines.append)
    again.restore()
    assert newest(again.folder) in (3, 4), lines
    s3.faults.times = 0
    assert s3.faults.hit
    assert ours.flush(60), ours.state()
    last = Mirror(tmp_path / "last", s3(), log=lines.append)
    last.restore()
    assert newest(last.folder) == 4


def test_a_store_that_is_down_is_said_and_caught_up_with(study, s3):
    lines = []
    ours = Mirror(study, s3(), log=lines.append, every_s=0.01)
    s3.faults.plant("500", "PUT", "", times=10**6)
    ours.copy_once(is_last=True)
    assert lines and all("Work continues" in line and "credentials" in line for line in lines)
    s3.faults.times = 0
    assert ours.flush(60)


def test_what_a_listing_shows_late_is_not_written_over(study, s3, tmp_path):
    ours = Mirror(study, s3(), log=[].append)
    assert ours.flush(60)
    save(study, 4)
    s3.faults.hidden = b"checkpoint-qlora-s0"
    ours.copy_once(is_last=True)
    save(study, 5)
    ours.copy_once(is_last=True)  # takes the older slot, though neither is listed
    late = Mirror(tmp_path / "late", s3(), log=[].append)
    late.restore()
    assert newest(late.folder) is None
    s3.faults.hidden = None
    facts = {facts["serial"]: name for name, facts in s3().listing().items() if "checkpoint" in name}
    assert sorted(facts) == [2, 3]
    again = Mirror(tmp_path / "elsewhere", s3(), log=[].append)
    again.restore()
    assert newest(again.folder) == 5


def test_a_bucket_that_everybody_can_read_is_refused_unless_said(study, s3, monkeypatch):
    remote = s3()
    assert remote.refusal() is None
    policy = (
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*", "Action": "s3:*", '
        f'"Resource": "arn:aws:s3:::{s3.bucket}/*"}}]}}'
    )
    remote.fs.call_s3("put_bucket_policy", Bucket=s3.bucket, Policy=policy)
    monkeypatch.setattr(mirror, "remote_of", lambda name: s3())
    with pytest.raises(ConfigError, match=rf"s3://{s3.bucket} is public.*PEFTLIB_MIRROR_PUBLIC=1"):
        mirror.restore(study)
    lines = []
    assert not Mirror(study, s3(), log=lines.append, every_s=0.01).flush(60) and "is public" in lines[0]
    monkeypatch.setenv("PEFTLIB_MIRROR_PUBLIC", "1")
    assert mirror.restore(study).flush(60)


_WORKER = """
import sys, time
from pathlib import Path
from peftlib.core.errors import LockedError
from peftlib.storage.claims import Claims
folder, name = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True)
claims, done, told = Claims(folder, heartbeat_s=0.5, stale_s=3, settle_s=0.0), set(), 0
while len(done) < 6 and told < 400:
    for run in [f"qlora-s{seed}" for seed in range(6)]:
        mark = claims.remote.at(f"done/{run}")
        try:
            with claims.take(run) as claim:
                if not claims.remote.fs.exists(mark):
                    time.sleep(0.2)
                    claim.require()
                    claims.remote.fs.pipe_file(mark, name.encode())
                    print(run, flush=True)
                done.add(run)
        except LockedError:
            told += 1
            time.sleep(0.1)
"""


def test_two_workers_share_runs_by_claims_on_a_bucket(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLIB_MIRROR", f"s3://{s3.bucket}")
    argv = [[sys.executable, "-c", _WORKER, tmp_path / name / "study", name] for name in ("one", "two")]
    workers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for words in argv]
    done = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert sorted(done[0] + done[1]) == [f"qlora-s{seed}" for seed in range(6)]
    assert Claims(tmp_path / "one" / "study").owners() == {}


def test_a_claim_that_stands_is_not_written_over(s3, tmp_path):
    first, second = (Claims(tmp_path / name / "study", remote=s3(), settle_s=0.0) for name in ("one", "two"))
    with first.take("qlora-s0"):
        second.read = lambda run: None  # it looked before the other wrote
        with pytest.raises(LockedError, match="in use by"):
            second.take("qlora-s0").__enter__()
