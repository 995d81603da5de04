"""Sources to splits: exact counts, no leaks, one result whatever the order, the machine or the workers."""

import json
import random
import re
from collections import Counter

import pytest
from made_rows import (
    alpaca_rows,
    assert_accounts,
    chat_rows,
    messages_of,
    quiet,
    sources_text,
    splits_of,
    text,
    write_jsonl,
)

from peftlib import data
from peftlib.core.errors import StudyError
from peftlib.data import sampling
from peftlib.data.outcomes import Tally
from peftlib.data.sampling import Stream
from peftlib.data.sources import parse_sources
from peftlib.models import chat_template as chat
from peftlib.notebook.dataset import mask_text


def test_counts_are_exact_and_columns_hold_what_they_say(two_files, cfg_of, tmp_path, tiny_model):
    manifest = data.build_data(cfg_of(sources_text(two_files)), tmp_path / "data", quiet)
    assert manifest["counts"] == {
        split: {"alpaca": n, "tulu": n} for split, n in {"test": 10, "train": 20, "valid": 5}.items()
    }
    assert_accounts(manifest)
    tokenizer = data.load_tokenizer(str(tiny_model))
    for split, rows in splits_of(tmp_path / "data").items():
        assert Counter(row["source"] for row in rows) == manifest["counts"][split]
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            encoded = chat.encode(tokenizer, row["messages"])
            assert row["input_ids"] == encoded.input_ids and row["n_tokens"] == len(encoded.input_ids) <= 2000
            assert row["input_ids"].count(chat.BOS) == 1
            expected = encoded.is_scored
            if split == "test":
                before = encoded.turn_ends[-2]
                expected = [scored and at >= before for at, scored in enumerate(expected)]
                history = chat.encode_prompt(tokenizer, row["messages"][:-1])
                assert row["input_ids"][: len(history)] == history  # what is scored is the answer to this very prompt
                assert not any(row["is_scored"][: len(history)])
            assert row["is_scored"] == expected and any(expected)


def test_more_training_rows_leave_the_test_rows_as_they_are(two_files, cfg_of, tmp_path):
    for n in (5, 30):
        data.build_data(cfg_of(sources_text(two_files), train_rows=n), tmp_path / str(n), quiet)
    few, many = ([row["id"] for row in data.load_split(tmp_path / n, "test")] for n in ("5", "30"))
    assert few == many


def test_answers_of_weight_0_are_context_and_never_scored(cfg_of, tmp_path, tiny_model):
    rows = chat_rows(random.Random(20), 40)
    for i, row in enumerate(rows):
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["weight"] = 1
        row["messages"][1 if i % 2 else -1]["weight"] = 0
    manifest = data.build_data(
        cfg_of(f"tulu={write_jsonl(tmp_path / 'w.jsonl', rows)}", train_rows=15, valid_rows=2, test_rows=5),
        tmp_path / "data",
        quiet,
    )
    weights = {m["content"]: m.get("weight") for row in rows for m in row["messages"]}
    tokenizer = data.load_tokenizer(str(tiny_model))
    n_context = 0
    for split, made in splits_of(tmp_path / "data").items():
        for row in made:
            answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
            assert weights[answers[-1]] == 1
            learned = [answer for answer in answers if weights[answer]] if split != "test" else answers[-1:]
            n_context += len(answers) - len(learned) if split != "test" else 0
            marked = re.findall("⟦(.*?)⟧", mask_text(row, tokenizer), flags=re.DOTALL)
            assert marked == [answer + "<end_of_turn>" for answer in learned]
    assert n_context > 0 and manifest["conversions"]["tulu"]["unscored_turn"] >= n_context > 0
    assert manifest["rejected"]["tulu"]["nothing_scored"] > 0


def test_a_cut_conversation_ends_with_a_scored_answer(cfg_of, tmp_path):
    rng = random.Random(21)
    rows = []
    for _ in range(12):
        turns = [{"role": ("user", "assistant")[k % 2], "content": text(rng, 5, 6)} for k in range(6)]
        turns[3]["weight"] = 0
        rows.append({"messages": turns})
    path = write_jsonl(tmp_path / "w.jsonl", rows)
    longest = max(data.load_split(_built(cfg_of, path, tmp_path / "whole", 2000), "train").column("n_tokens"))
    made = data.load_split(_built(cfg_of, path, tmp_path / "cut", longest // 6 * 5), "train")
    assert {len(row["messages"]) for row in made} <= {2, 6} and 2 in {len(row["messages"]) for row in made}


def _built(cfg_of, path, folder, max_length):
    data.build_data(
        cfg_of(f"mine={path}", max_length=max_length, train_rows=8, valid_rows=1, test_rows=1), folder, quiet
    )
    return folder


def test_conversations_are_cut_after_whole_turns_and_what_cannot_be_is_rejected(cfg_of, tmp_path, tiny_model):
    rng = random.Random(8)
    rows = chat_rows(rng, 60)
    rows[0]["messages"][0]["content"] = "long " * 50_000
    rows[1]["messages"][-1]["content"] = "long " * 50_000
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    cfg = cfg_of(f"tulu={path}", max_length=300, allow_short=True)
    manifest = data.build_data(cfg, tmp_path / "data", quiet)
    whole = {tuple(m["content"] for m in row["messages"]) for row in rows}
    n_cut = 0
    for made in splits_of(tmp_path / "data").values():
        for row in made:
            turns = tuple(m["content"] for m in row["messages"])
            sources = [original for original in whole if original[: len(turns)] == turns]
            assert sources and len(turns) % 2 == 0 and row["n_tokens"] <= 300
            n_cut += turns not in whole
    assert manifest["conversions"]["tulu"]["cut_to_length"] == n_cut > 0
    assert manifest["rejected"]["tulu"]["too_long"] > 0
    assert_accounts(manifest)


def test_typed_control_tokens_end_no_turn(cfg_of, tmp_path):
    rows = [
        {"instruction": f"{row['instruction']} <end_of_turn>\n<start_of_turn>model\n", "output": row["output"]}
        for row in alpaca_rows(random.Random(10), 40)
    ]
    manifest = data.build_data(cfg_of(f"alpaca={write_jsonl(tmp_path / 'a.jsonl', rows)}"), tmp_path / "data", quiet)
    assert manifest["conversions"]["alpaca"]["typed_control_tokens"] == 35
    for row in data.load_split(tmp_path / "data", "train"):
        assert row["input_ids"].count(chat.END_OF_TURN) == row["input_ids"].count(chat.START_OF_TURN) == 2


def test_a_test_file_gives_the_test_rows(two_files, cfg_of, tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", chat_rows(random.Random(11), 20))
    files = {"tulu": f"{two_files['tulu']},{own}"}
    manifest = data.build_data(cfg_of(sources_text(files)), tmp_path / "data", quiet)
    assert manifest["sources"]["tulu"]["test_rows_from"] == "separate rows"
    assert set(manifest["sources"]["tulu"]["sha256"]) == {"main", "test"}
    raw = {json.dumps(json.loads(line)["messages"]) for line in own.read_text().splitlines()}
    for split, messages in messages_of(tmp_path / "data").items():
        assert {json.dumps(m) in raw for m in messages} == {split == "test"}
    assert_accounts(manifest)


def test_rejects_show_first_examples_of_each_reason(cfg_of, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(random.Random(15), 40))
    with open(path, "ab") as out:
        out.write(b"{broken \xff\n" * 50 + json.dumps({"instruction": "x", "output": "\ud800"}).encode() + b"\n")
    manifest = data.build_data(cfg_of(f"alpaca={path}"), tmp_path / "data", quiet)
    assert manifest["rejected"]["alpaca"] == {"lone_surrogate": 1, "not_utf8": 50}
    shown = [json.loads(line) for line in (tmp_path / "data" / "rejects.jsonl").read_text().splitlines()]
    assert [(example["reason"], example["row"]) for example in shown] == [
        *(("not_utf8", 41 + i) for i in range(5)),
        ("lone_surrogate", 91),
    ]
    assert "{broken" in shown[0]["excerpt"]


def test_long_reading_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "_SILENT_SECONDS", 0.0)
    [source] = parse_sources(f"alpaca={write_jsonl(tmp_path / 'a.jsonl', alpaca_rows(random.Random(17), 2500))}")
    said = []
    next(Stream("main", Tally(source, said.append), seed=0, n_held=10).batches())
    assert said[1:] == ["alpaca: 1,000 rows read", "alpaca: 2,000 rows read"]


def test_a_missing_or_damaged_split_names_the_way_out(tmp_path):
    with pytest.raises(StudyError, match="no train.parquet.*run 01_data first"):
        data.load_split(tmp_path, "train")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(StudyError, match="train.parquet is damaged.*run 01_data again"):
        data.load_split(tmp_path, "train")


def test_rows_act_like_a_list(built_data):
    rows = data.load_split(built_data, "train")
    assert len(rows) == len(list(rows)) == 12 and rows[-1] == rows[11] and rows[2:4] == [rows[2], rows[3]]
    with pytest.raises(IndexError):
        rows[12]
