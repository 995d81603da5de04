"""The bundled sample as data: the three original schemas, enough distinct rows, no filler."""

import hashlib
import json
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "peftlib" / "data" / "sample"
SOURCES = ("alpaca", "tulu", "ultrachat")


def rows_of(source):
    return [json.loads(line) for line in (SAMPLE / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()]


def prompt_of(source, row):
    if source == "alpaca":
        return row["instruction"] + "\n" + row["input"]
    return "\n".join(message["content"] for message in row["messages"][:-1])


@pytest.mark.parametrize("source", SOURCES)
def test_enough_distinct_prompts_for_the_demo_split(source):
    prompts = {" ".join(prompt_of(source, row).lower().split()) for row in rows_of(source)}
    assert len(prompts) == len(rows_of(source)) >= 64 + 8 + 16


def test_alpaca_rows_have_its_fields():
    for row in rows_of("alpaca"):
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] and row["output"]


@pytest.mark.parametrize("source, fields", [("tulu", {"dataset", "id"}), ("ultrachat", {"prompt", "prompt_id"})])
def test_chat_rows_alternate_and_end_with_the_assistant(source, fields):
    for row in rows_of(source):
        assert set(row) == fields | {"messages"}
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"].strip() for message in row["messages"])


def test_tulu_sample_has_system_turns_code_and_reasoning():
    rows = rows_of("tulu")
    assert sum(row["messages"][0]["role"] == "system" for row in rows) >= 10
    assert {"peftlib_code", "peftlib_cot"} <= {row["dataset"] for row in rows}


def test_ultrachat_sample_has_two_to_four_exchanges_and_true_ids():
    for row in rows_of("ultrachat"):
        assert 4 <= len(row["messages"]) <= 8
        assert row["prompt"] == row["messages"][0]["content"]
        assert row["prompt_id"] == hashlib.sha256(row["prompt"].encode()).hexdigest()
