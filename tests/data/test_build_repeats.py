"""The same bytes from any number of workers, process and start; data that stand are kept."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_rows import alpaca_rows, chat_rows, quiet, sources_text, splits_of, write_jsonl

from peftlib import data
from peftlib.core.errors import DataError, DiskError
from peftlib.data import build, store, tokenize
from peftlib.data.outcomes import Tally
from peftlib.data.sampling import Stream
from peftlib.data.sources import parse_sources


def identity(row):
    return row["source"], row["id"]


def test_order_on_disk_and_other_sources_change_nothing(two_files, cfg_of, tmp_path):
    first = data.build_data(cfg_of(sources_text(two_files)), tmp_path / "one", quiet)
    for path in list(two_files.values()):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in raw.decode().splitlines()]
        random.Random(9).shuffle(rows)
        write_jsonl(path, rows)
    third = write_jsonl(tmp_path / "other.jsonl", chat_rows(random.Random(5), 60))
    shuffled = data.build_data(cfg_of(sources_text(dict(reversed(two_files.items())))), tmp_path / "two", quiet)
    assert shuffled["split_hash"] == first["split_hash"]
    more = data.build_data(cfg_of(sources_text({"zoo": third, **two_files})), tmp_path / "three", quiet)
    assert list(more["sources"]) == ["alpaca", "tulu", "zoo"]
    for split, rows in splits_of(tmp_path / "three").items():
        old = [identity(row) for row in data.load_split(tmp_path / "one", split)]
        assert [identity(row) for row in rows if row["source"] != "zoo"] == old


def test_another_seed_draws_other_rows(two_files, cfg_of, tmp_path):
    made = [
        data.build_data(cfg_of(sources_text(two_files), split_seed=seed), tmp_path / str(seed), quiet)
        for seed in (0, 1)
    ]
    assert made[0]["split_hash"] != made[1]["split_hash"]
    rows = [{row["id"] for row in data.load_split(tmp_path / str(seed), "train")} for seed in (0, 1)]
    assert rows[0] != rows[1]


@pytest.mark.parametrize("capacity", [1, 7, 10_000])
def test_candidates_do_not_depend_on_how_many_are_held(tmp_path, capacity):
    rng = random.Random(12)
    rows = [*alpaca_rows(rng, 60), *({"instruction": 1, "output": "x"} for _ in range(5))]
    rows += rows[:20]
    rng.shuffle(rows)
    [source] = parse_sources(f"alpaca={write_jsonl(tmp_path / 'a.jsonl', rows)}")
    tally = Tally(source, quiet)
    stream = Stream("main", tally, seed=0, n_held=capacity)
    made = list(stream.batches())
    flat = [c for batch in made for c in batch]
    assert max(map(len, made)) <= capacity
    assert [c.key for c in flat] == sorted({c.key for c in flat})
    assert len(flat) == 60 and sum(c.copies for c in flat) + sum(tally.rejected.values()) == tally.read == len(rows)


def test_of_a_long_source_only_its_first_rows_are_read(cfg_of, two_files, tmp_path):
    cfg = cfg_of(sources_text(two_files), max_read_rows=50)
    manifest = data.build_data(cfg, tmp_path / "data", quiet)
    assert manifest["read"] == {"alpaca": 50, "tulu": 50} and manifest["inputs"]["max_read_rows"] == 50
    assert manifest["sources"]["alpaca"]["where"]["main"] == "a.jsonl.gz, its first 50 rows"
    whole = data.build_data(cfg_of(sources_text(two_files)), tmp_path / "data", quiet)
    assert whole["read"] == {"alpaca": 80, "tulu": 80}, "other rows: built again"
    assert "max_read_rows" not in whole["inputs"], "as in data that were made before there was such a setting"


def test_held_candidates_and_workers_do_not_change_the_split(two_files, cfg_of, tmp_path, monkeypatch):
    cfg = cfg_of(sources_text(two_files))
    whole = data.build_data(cfg, tmp_path / "whole", quiet)
    monkeypatch.setattr(build, "Stream", lambda *args, **sizes: Stream(*args, **{**sizes, "n_held": 3}))
    small = data.build_data(cfg, tmp_path / "small", quiet)
    for key in ("split_hash", "rejected", "read", "unused", "files"):
        assert small[key] == whole[key]


def test_workers_change_no_byte(two_files, cfg_of, tmp_path, monkeypatch):
    cfg = cfg_of(sources_text(two_files))
    monkeypatch.setattr(tokenize, "_ROWS_WORTH_A_WORKER", 20)
    made = [data.build_data(dataclasses.replace(cfg, workers=n), tmp_path / str(n) / "data", quiet) for n in (1, 3)]
    assert made[0] == made[1]  # the Parquet files' own hashes included


def test_a_worker_that_is_killed_ends_the_build_with_the_way_out(two_files, cfg_of, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_ROWS_WORTH_A_WORKER", 1)
    monkeypatch.setattr(tokenize, "_encode_batch", _killed)
    with pytest.raises(DataError, match="tokenizing processes was killed, perhaps out of memory: set workers = 1"):
        data.build_data(dataclasses.replace(cfg_of(sources_text(two_files)), workers=2), tmp_path / "data", quiet)


def _killed(pairs, **settings):
    assert multiprocessing.parent_process() is not None
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_with_another_hash_seed_makes_the_same_bytes(two_files, cfg_of, tmp_path):
    cfg = cfg_of(sources_text(two_files))
    code = (
        "import json, sys; from pathlib import Path; from peftlib import data; from peftlib.core.config import Config\n"
        "data.build_data(Config(**json.loads(sys.argv[1])), Path(sys.argv[2]))"
    )
    fields = json.dumps(cfg.fields_of("run", "data", "math"))
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    where = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(build.__file__).parents[2])}
    command = [sys.executable, "-c", code, fields, str(tmp_path / "other" / "data")]
    done = subprocess.run(command, check=False, env=where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    data.build_data(cfg, tmp_path / "here" / "data", quiet)
    made = [(tmp_path / place / "data" / "manifest.json").read_bytes() for place in ("other", "here")]
    assert made[0] == made[1]


def test_data_that_stand_are_kept_and_made_again_where_anything_changed(two_files, cfg_of, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    cfg = cfg_of(sources_text(two_files))
    first = data.build_data(cfg, folder, quiet)
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(build, "choose", None)  # building again would call it
        again = data.build_data(cfg, folder, said.append)
    assert again == first
    assert said == [f"data already built from the same inputs: split {first['split_hash']}"]
    for name, content in {
        "train.parquet": b"damaged",
        "rejects.jsonl": b"{}\n",
        "manifest.json": b"{cut",
    }.items():
        (folder / name).write_bytes(content)
        assert data.build_data(cfg, folder, quiet) == first
        assert (folder / name).read_bytes() != content
    assert data.build_data(cfg_of(sources_text(two_files), split_seed=1), folder, quiet) != first
    with open(two_files["tulu"], "a") as out:
        out.write(json.dumps(chat_rows(random.Random(14), 1)[0]) + "\n")
    assert data.build_data(cfg, folder, quiet)["sources"] != first["sources"]


def test_a_cut_build_leaves_no_manifest(two_files, cfg_of, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    data.build_data(cfg_of(sources_text(two_files)), folder, quiet)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_card", full_disk)
    with pytest.raises(DiskError, match="No space left.*free some space there.*set PEFTLIB_ROOT"):
        data.build_data(cfg_of(sources_text(two_files), split_seed=1), folder, quiet)
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob(".*writing"))


def test_a_source_that_is_gone_does_not_hide_the_data_that_were_made_of_it(two_files, cfg_of, tmp_path):
    cfg = cfg_of(sources_text(two_files))
    data.build_data(cfg, tmp_path / "data", quiet)
    next(iter(two_files.values())).unlink()
    with pytest.raises(DataError, match="does not exist: check the path.* What was built before is in .*data, and"):
        data.build_data(cfg, tmp_path / "data", quiet)
    with pytest.raises(DataError, match="as the source$"):
        data.build_data(cfg, tmp_path / "none", quiet)
