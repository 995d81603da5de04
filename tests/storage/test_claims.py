import json
import os
import subprocess
import sys
import threading
import time
from unittest import mock

import fsspec
import pytest

from peftlib.core.errors import LockedError
from peftlib.core.files import read_json, sealed, write_json
from peftlib.storage.claims import Claims
from peftlib.storage.store import Remote

_WORKER = """
import sys, time
from peftlib.storage.claims import Claims
with Claims(sys.argv[1]).take("qlora-s0"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["folder", "memory"])
def claims_of(request, tmp_path):
    """claims_of(name) -> the Claims of a machine on one store that it shares with the others."""
    if request.param == "folder":
        remote = Remote(tmp_path / "store", "study")
    else:
        remote = Remote(f"memory://{tmp_path.name}", "study", fs=fsspec.filesystem("memory"))

    def claims_of(name, **settings):
        (tmp_path / name / "study").mkdir(parents=True, exist_ok=True)
        pace = {"heartbeat_s": 0.05, "stale_s": 0.5, "settle_s": 0.0, **settings}
        return Claims(tmp_path / name / "study", remote=remote, log=[].append, **pace)

    return claims_of


def elsewhere(claims, run, **changes):
    """Make the claim that stands there another machine's."""
    found = read_json_text(claims, run) | {"host": "node7", "token": "another", **changes}
    path = claims.path(run)
    claims.remote.fs.pipe_file(path, sealed(found))


def read_json_text(claims, run):
    found = json.loads(claims.read(run))
    return {name: value for name, value in found.items() if name not in ("seal", "schema_version")}


def test_a_claim_is_one_workers_and_is_given_back(claims_of):
    first, second = claims_of("first"), claims_of("second")
    with first.take("qlora-s0") as claim, first.take("galore-s0"):
        claim.require()
        assert (
            set(second.owners()) == {"galore-s0", "qlora-s0"}
            and f"process {os.getpid()}" in second.owners()["qlora-s0"]
        )
        with pytest.raises(
            LockedError, match=r"qlora-s0 of study 'study' is in use by .*working on qlora-s0.*again in \d+ s"
        ):
            second.take("qlora-s0").__enter__()
    assert second.owners() == {}
    with second.take("qlora-s0"):
        pass


def test_of_many_that_want_a_claim_one_gets_it(claims_of):
    got, refused, start = [], [], threading.Barrier(8)

    def want(number):
        start.wait()
        try:
            with claims_of(f"machine-{number}").take("qlora-s0"):
                got.append(number)
                time.sleep(1.0)
        except LockedError:
            refused.append(number)

    threads = [threading.Thread(target=want, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7


@pytest.mark.parametrize("skew_s", [-7200.0, 0.0, 7200.0])
def test_a_claim_is_stale_once_its_heartbeat_was_not_seen_to_change_whatever_the_clocks_say(
    claims_of, monkeypatch, skew_s
):
    real, later_s = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + later_s[0])
    first, second = claims_of("first", heartbeat_s=60.0), claims_of("second")
    with first.take("qlora-s0") as claim:
        elsewhere(first, "qlora-s0", heartbeat=time.time() + skew_s)
        with pytest.raises(LockedError, match="node7"):
            second.take("qlora-s0").__enter__()
        for beat in range(12):  # it lives
            elsewhere(first, "qlora-s0", heartbeat=time.time() + skew_s + beat)
            assert "node7" in second.owners()["qlora-s0"]
            later_s[0] += 0.06
        later_s[0] += 0.6  # it does not
        again = claims_of("second")  # another command on that machine
        assert again.owners() == {}
        with again.take("qlora-s0") as taken:
            taken.require()
            claim._look()
            with pytest.raises(LockedError, match="has taken over qlora-s0"):
                claim.require()


def test_a_worker_whose_claim_was_taken_over_learns_it_and_leaves_the_new_one(claims_of):
    first = claims_of("first")
    with first.take("qlora-s0") as claim:
        elsewhere(first, "qlora-s0")
        end = time.monotonic() + 5
        while claim._taker is None and time.monotonic() < end:
            time.sleep(0.02)
        with pytest.raises(LockedError, match="node7.*has taken over qlora-s0"):
            claim.require()
    assert read_json_text(first, "qlora-s0")["token"] == "another"


def test_a_killed_workers_claim_on_this_machine_is_free_at_once(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", _WORKER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {child.pid}"):
        Claims(tmp_path).take("qlora-s0").__enter__()
    child.kill()
    child.wait()
    assert Claims(tmp_path).owners() == {}
    with Claims(tmp_path).take("qlora-s0"):
        assert read_json(tmp_path / "claims" / "qlora-s0.json")["pid"] == os.getpid()


def test_a_damaged_claim_holds_for_a_while_and_is_then_taken(claims_of):
    claims = claims_of("first")
    with claims.take("other"):  # makes the folder
        claims.remote.fs.pipe_file(claims.path("qlora-s0"), b"{")
    with pytest.raises(LockedError, match="damaged"):
        claims.take("qlora-s0").__enter__()
    time.sleep(0.6)
    with claims.take("qlora-s0"):
        pass


def test_a_store_that_is_away_takes_no_claim_and_ends_no_work(claims_of):
    claims = claims_of("first")
    away = mock.patch.object(type(claims.remote.fs), "cat_file", side_effect=RuntimeError("no route to host"))
    with away, pytest.raises(OSError, match="no route to host"):
        claims.take("qlora-s0").__enter__()
    with claims.take("qlora-s0") as claim:
        with away:
            time.sleep(0.3)
            claim.require()
            assert claims.owners() == {}
        time.sleep(0.2)
        claim.require()


def test_an_odd_memory_of_claims_counts_as_none(tmp_path):
    claims = Claims(tmp_path)
    write_json(claims._memory, {"seen": 3})
    assert claims.seen_for("qlora-s0", "x") == 0.0 and claims.seen_for("qlora-s0", "x") >= 0.0
