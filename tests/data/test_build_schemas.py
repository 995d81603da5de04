"""How the rows of sources are read, and sources that cannot be."""

import json
import random
from pathlib import Path

import pytest
from made_rows import TABLE, alpaca_rows, counts_of, quiet, sources_text, write_jsonl

from peftlib import data
from peftlib.core.errors import ConfigError, DataError
from peftlib.data.outcomes import Tally
from peftlib.data.sampling import Stream
from peftlib.data.sources import parse_sources


def test_fields_that_are_not_used_are_listed_and_said_once(cfg_of, tmp_path):
    rows = [{**row, "context": "c", "id": i} for i, row in enumerate(alpaca_rows(random.Random(23), 40))]
    said = []
    cfg = cfg_of(f"mine={write_jsonl(tmp_path / 'a.jsonl', rows)}")
    manifest = data.build_data(cfg, tmp_path / "data", said.append)
    assert manifest["ignored_fields"] == {"mine": {"context": 40}}
    assert said.count("mine: unused fields: 'context'") == 1


def test_a_parquet_file_from_pandas_with_a_time_beyond_pythons_is_used(cfg_of, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = alpaca_rows(random.Random(24), 40)
    columns = {name: [row[name] or None for row in rows] for name in ("instruction", "input", "output")}
    columns |= {"created": pyarrow.array([2**62] * 40, pyarrow.timestamp("us")), "reviewer_notes": ["n"] * 40}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    manifest = data.build_data(cfg_of(f"mine={tmp_path / 'a.parquet'}"), tmp_path / "data", quiet)
    assert counts_of(manifest, "mine") == (20, 5, 10) and manifest["rejected"]["mine"] == {}
    assert manifest["ignored_fields"] == {"mine": {"reviewer_notes": 40}}


def test_a_source_without_any_known_schema_names_fields_and_schemas(cfg_of, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 1}] * 150)
    with pytest.raises(
        DataError, match=r"none of its first 100 rows has a known schema \(fields 'text', 'label'\).*ShareGPT"
    ):
        data.build_data(cfg_of(f"alpaca={path}"), tmp_path / "data", quiet)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "pairs.jsonl",
            json.dumps(PAIR),
            r"fields 'prompt', 'chosen', 'rejected'.*preference pairs.*as for DPO.*chosen answer",
        ),
        (
            "comma.jsonl",
            ",\n".join(map(json.dumps, [PAIR, PAIR, {}])),
            r"2 not_json: not JSON.*without a trailing comma.*row 1: Extra data",
        ),
        ("array.jsonl", json.dumps(TABLE), r"not a list: use one array of objects, in a .json file"),
        ("pretty.jsonl", json.dumps(TABLE, indent=1), r"put an array into a .json file"),
        ("wrapped.json", json.dumps({"data": TABLE}), r"fields 'data'.*save only that list"),
        ("nested.json", json.dumps([TABLE]), r"not a list"),
        ("texts.json", json.dumps(["a", "b"]), r"A row must be an object with named fields"),
        ("semicolons.csv", "instruction;output\na;b\n", r"separated by commas"),
        ("semicolons2.csv", "instruction;output\na, b;c\n", r"separated by commas"),
        ("odd.csv", "Frage,Antwort\na,b\n", r"rename\(columns={'Frage': 'instruction', 'Antwort': 'output'}\)"),
        ("half.json", json.dumps([{"instruction": "a", "reply": "b"}]), r"columns={'reply': 'output'}"),
        ("capitals.csv", "Instruction, output\na,b\n", r"Field names must be lower case, without surrounding spaces"),
        (
            "latin.csv",
            "instruction,output\ncaf\udce9,b\n",
            r"1 not_utf8: bytes that are not UTF-8: save the file as UTF-8.*row 1: line 2",
        ),
    ],
)
def test_files_of_no_known_schema_come_with_advice(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    [source] = parse_sources(f"mine={path}")
    stream = Stream("main", Tally(source, quiet), seed=0, n_held=10)
    with pytest.raises(DataError, match=rf"{name}: none of its first \d+ rows has a known schema .*{message}"):
        list(stream.batches())


def test_what_the_rows_are_read_as_is_said(two_files, cfg_of, tmp_path):
    said = []
    data.build_data(cfg_of(sources_text(two_files)), tmp_path / "data", said.append)
    assert said[0].startswith("alpaca: ") and said[0].endswith(
        "a.jsonl.gz is read as Alpaca (instruction, input, output)"
    )
    assert said[1].startswith("tulu: ") and "t.jsonl is read as Tulu" in said[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "names no source"),
        ("alpaca", "not of the form NAME=WHERE.*as in mine=rows.jsonl"),
        ("alpaca=", "not of the form"),
        ("al paca=sample", "not of the form"),
        ("alpaca=sample; alpaca=hub", "is given twice"),
        ("mine=hub", "mine=hub, but hub has only alpaca, tulu, ultrachat"),
        ("alpaca=a.jsonl,b.jsonl,c.jsonl", "is not FILE or FILE,TESTFILE"),
        ("alpaca=a.jsonl,", "is not FILE or FILE,TESTFILE"),
        ("alpaca=~nobody-here/a.jsonl", "use the full path"),
    ],
)
def test_malformed_sources_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_sources(text)


def test_sources_stand_in_order_of_precedence():
    named = parse_sources("zoo=z.csv; ultrachat=hub; mine=m.json; tulu=t.jsonl; alpaca=sample")
    assert [source.name for source in named] == ["alpaca", "tulu", "ultrachat", "zoo", "mine"]
    assert list(named[2].streams) == ["main", "test"]  # UltraChat has a test split of its own on the hub


def test_a_missing_file_is_found_before_anything_is_loaded(cfg_of, tmp_path, two_files):
    cfg = cfg_of(f"alpaca={two_files['alpaca']}; tulu={tmp_path / 'absent.jsonl'}", model="no/such-model")
    with pytest.raises(DataError, match=r"absent.jsonl does not exist: check the path"):
        data.build_data(cfg, tmp_path / "data", quiet)
    with pytest.raises(DataError, match=rf"check the path \(it starts at {Path.cwd()}\)"):
        data.build_data(cfg_of("mine=absent.jsonl"), tmp_path / "data", quiet)


def test_a_stray_first_row_does_not_decide_the_schema(cfg_of, tmp_path):
    rows = [{"messages": None}, {"conversations": []}, *alpaca_rows(random.Random(16), 40)]
    manifest = data.build_data(cfg_of(f"alpaca={write_jsonl(tmp_path / 'a.jsonl', rows)}"), tmp_path / "data", quiet)
    assert manifest["sources"]["alpaca"]["schema"] == {"main": "alpaca"}
    assert manifest["rejected"]["alpaca"] == {"other_schema": 2}
