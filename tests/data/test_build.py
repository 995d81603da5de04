"""Sources to splits: exact counts, no leaks, one result whatever the order, the machine or the workers."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import leaks
import pytest

from peftlib import data
from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError, DataError, StudyError
from peftlib.data import build, sampling, store, tokenize
from peftlib.data.outcomes import Tally, in_proportion
from peftlib.data.sampling import Stream
from peftlib.data.sources import parse_sources
from peftlib.models import chat_template as chat
from peftlib.notebook.dataset import mask_text

WORDS = [f"w{i}" for i in range(2000)]


def text(rng, low=5, high=40):
    return " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))


def alpaca_rows(rng, n):
    return [{"instruction": text(rng), "input": rng.choice(["", text(rng)]), "output": text(rng)} for _ in range(n)]


def chat_rows(rng, n):
    rows = []
    for i in range(n):
        turns = [text(rng) for _ in range(2 * rng.randrange(1, 4))]
        messages = [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(turns)]
        rows.append({"dataset": "made", "id": f"made_{i}", "messages": messages})
    return rows


def write_jsonl(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture
def cfg_of(tiny_model):
    def made(sources, **fields):
        sizes = {"train_rows": 20, "valid_rows": 5, "test_rows": 10, "max_length": 2000, "workers": 1}
        return resolve("demo", sources=sources, **{"model": str(tiny_model), **sizes, **fields})

    return made


@pytest.fixture
def two_files(tmp_path):
    rng = random.Random(0)
    return {
        "alpaca": write_jsonl(tmp_path / "a.jsonl.gz", alpaca_rows(rng, 80)),
        "tulu": write_jsonl(tmp_path / "t.jsonl", chat_rows(rng, 80)),
    }


def sources_text(files):
    return "; ".join(f"{name}={path}" for name, path in files.items())


def quiet(*args):
    pass


def splits_of(folder):
    return {split: data.load_split(folder, split) for split in ("test", "valid", "train")}


def messages_of(folder):
    return {split: rows.column("messages") for split, rows in splits_of(folder).items()}


def identity(row):
    return row["source"], row["id"]


def assert_accounts(manifest):
    for name in manifest["sources"]:
        kept = sum(manifest["counts"][split][name] for split in manifest["counts"])
        rejected = sum(manifest["rejected"][name].values())
        assert manifest["read"][name] == kept + rejected + manifest["unused"][name]
        assert manifest["unused"][name] >= 0


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


def test_more_training_rows_leave_the_test_rows_as_they_are(two_files, cfg_of, tmp_path):
    for n in (5, 30):
        data.build_data(cfg_of(sources_text(two_files), train_rows=n), tmp_path / str(n), quiet)
    few, many = ([row["id"] for row in data.load_split(tmp_path / n, "test")] for n in ("5", "30"))
    assert few == many


def planted_variant(rng, row, kind):
    """A chat row that repeats an Alpaca row's prompt, the words of its whole text, or its prompt in a longer chat."""
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    turns = [question.upper() + "\n", text(rng)]
    if kind == "near":
        turns = [f"{question} besides", row["output"]]
    if kind == "opening":
        turns = [question, *(text(rng) for _ in range(3))]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns)]
    return {"dataset": "planted", "id": "planted", "messages": messages}


def as_messages(row):
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def test_two_hundred_planted_leaks_are_found_and_none_is_left(cfg_of, tmp_path):
    rng = random.Random(3)
    held_out = [{"instruction": text(rng, 30), "input": text(rng, 30), "output": text(rng, 30)} for _ in range(200)]
    kinds = ["prompt", "near", "opening"]
    planted = [planted_variant(rng, row, kinds[i % 3]) for i, row in enumerate(held_out)]
    fresh = chat_rows(rng, 250)
    mixed = [*planted, *fresh]
    rng.shuffle(mixed)
    plain = [row["messages"] for row in mixed]
    asked = [as_messages(row) for row in held_out]
    found = leaks.prompt_leaks(asked, plain) | leaks.near_pairs(asked, plain)
    assert {i for i, _ in found} == set(range(200)) and len(found) == 200  # the plain search finds them all

    tests, rows = write_jsonl(tmp_path / "held.jsonl", held_out), write_jsonl(tmp_path / "mixed.jsonl.gz", mixed)
    cfg = cfg_of(f"alpaca={rows},{tests}", test_rows=200, valid_rows=50, train_rows=200)
    manifest = data.build_data(cfg, tmp_path / "data", quiet)
    assert {split: counts["alpaca"] for split, counts in manifest["counts"].items()} == {
        "test": 200,
        "train": 200,
        "valid": 50,
    }
    assert manifest["rejected"]["alpaca"] == {"near_duplicate_of_test": 67, "prompt_in_test": 133}
    assert leaks.leaks(messages_of(tmp_path / "data")) == {}
    assert_accounts(manifest)


def test_a_prompt_inside_a_longer_training_row_is_a_leak(cfg_of, tmp_path):
    rng = random.Random(4)
    opening, answer = text(rng), text(rng)
    short = [{"instruction": opening, "output": answer}]
    long = chat_rows(rng, 3)
    long[0]["messages"] = [
        {"role": role, "content": words}
        for role, words in [("user", opening), ("assistant", text(rng)), ("user", text(rng)), ("assistant", text(rng))]
    ]
    files = {"alpaca": write_jsonl(tmp_path / "a.jsonl", short), "tulu": write_jsonl(tmp_path / "t.jsonl", long)}
    cfg = cfg_of(sources_text(files), test_rows=1, valid_rows=0, train_rows=2, allow_short=True)
    manifest = data.build_data(cfg, tmp_path / "data", quiet)
    found = manifest["rejected"]["tulu"]
    assert found.get("prompt_in_test") == 1 or manifest["counts"]["test"]["tulu"] == 1
    assert leaks.leaks(messages_of(tmp_path / "data")) == {}


def test_duplicates_are_counted_once_each_and_refilled(cfg_of, tmp_path):
    rows = alpaca_rows(random.Random(6), 40)
    path = write_jsonl(tmp_path / "a.jsonl", rows * 3)
    manifest = data.build_data(
        cfg_of(f"alpaca={path}", train_rows=25, valid_rows=5, test_rows=10), tmp_path / "data", quiet
    )
    assert manifest["rejected"]["alpaca"] == {"duplicate": 80}
    assert_accounts(manifest)


def test_too_few_rows_are_an_error_with_numbers_or_allowed(cfg_of, tmp_path):
    rows = [
        *alpaca_rows(random.Random(7), 30),
        {"instruction": "a", "output": ""},
        {"instruction": None, "output": "b"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"alpaca: 15 of 20 train rows.*32 rows, rejected: .*empty_turn 1.*allow_short"):
        data.build_data(cfg_of(f"alpaca={path}"), tmp_path / "data", quiet)
    assert not (tmp_path / "data").exists()
    manifest = data.build_data(cfg_of(f"alpaca={path}", allow_short=True), tmp_path / "data", quiet)
    assert {split: counts["alpaca"] for split, counts in manifest["counts"].items()} == {
        "test": 9,
        "valid": 4,
        "train": 17,
    }


@pytest.mark.parametrize(
    "n_rows, asked, given",
    [
        (1200, (5000, 200, 2000), (834, 33, 333)),
        (7200, (5000, 200, 2000), (5000, 200, 2000)),
        (10, (5000, 200, 2000), (6, 1, 3)),
        (10, (100, 1, 1), (8, 1, 1)),
        (3, (5000, 200, 2000), (1, 1, 1)),
        (2, (5000, 200, 2000), (1, 0, 1)),
        (1, (5000, 200, 2000), (0, 0, 1)),
        (0, (5000, 200, 2000), (0, 0, 0)),
        (7, (5000, 0, 2000), (5, 0, 2)),
    ],
)
def test_rows_are_shared_out_as_asked(n_rows, asked, given):
    splits = ("train", "valid", "test")
    found = in_proportion(n_rows, dict(zip(splits, asked, strict=True)))
    assert tuple(found[split] for split in splits) == given


def counts_of(manifest, source):
    return tuple(manifest["counts"][split][source] for split in ("train", "valid", "test"))


def test_a_source_that_runs_out_gives_rows_to_all_splits_and_the_others_stay_exact(two_files, cfg_of, tmp_path):
    sizes = {"train_rows": 50, "valid_rows": 2, "test_rows": 20, "allow_short": True}
    short = alpaca_rows(random.Random(7), 12)
    files = {**two_files, "alpaca": write_jsonl(tmp_path / "short.jsonl", [*short, *short[:3]])}
    said = []
    manifest = data.build_data(cfg_of(sources_text(files), **sizes), tmp_path / "data", said.append)
    assert counts_of(manifest, "alpaca") == (8, 1, 3) and counts_of(manifest, "tulu") == (50, 2, 20)
    assert manifest["short"] == {
        "alpaca": {
            "test": {"asked": 20, "given": 3},
            "train": {"asked": 50, "given": 8},
            "valid": {"asked": 2, "given": 1},
        }
    }
    assert "alpaca runs out after 12 rows: they are shared out in the proportions asked" in said
    assert "alpaca has fewer rows than asked: test 3 of 20, train 8 of 50, valid 1 of 2" in said
    assert manifest["rejected"]["alpaca"] == {"duplicate": 3} and manifest["unused"]["alpaca"] == 0
    assert_accounts(manifest)
    assert leaks.leaks(messages_of(tmp_path / "data")) == {}
    assert "alpaca has fewer rows than asked" in (tmp_path / "data" / "README.md").read_text()
    random.Random(1).shuffle(short)
    write_jsonl(tmp_path / "short.jsonl", [*short, *short[:3]])
    again = data.build_data(cfg_of(sources_text(files), **sizes), tmp_path / "again", quiet)
    assert again["split_hash"] == manifest["split_hash"]


def test_allow_short_changes_nothing_where_rows_suffice(two_files, cfg_of, tmp_path):
    made = [
        data.build_data(cfg_of(sources_text(two_files), allow_short=allowed), tmp_path / str(allowed), quiet)
        for allowed in (False, True)
    ]
    assert made[0]["split_hash"] == made[1]["split_hash"] and made[1]["short"] == {}


def test_a_short_file_with_a_test_file_beside_it_is_shared_out_between_train_and_valid(two_files, cfg_of, tmp_path):
    main = write_jsonl(tmp_path / "main.jsonl", chat_rows(random.Random(11), 14))
    cfg = cfg_of(f"tulu={main},{two_files['tulu']}", train_rows=50, valid_rows=10, test_rows=10, allow_short=True)
    assert counts_of(data.build_data(cfg, tmp_path / "data", quiet), "tulu") == (12, 2, 10)


def test_too_few_rows_for_one_in_each_split_are_an_error(cfg_of, tmp_path):
    rows = [*alpaca_rows(random.Random(7), 2), {"instruction": "a", "output": " "}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"for one in each split: 2 can be used, which leaves none for valid. .*valid_rows = 0"
    ):
        data.build_data(cfg_of(f"alpaca={path}", allow_short=True), tmp_path / "data", quiet)
    manifest = data.build_data(cfg_of(f"alpaca={path}", allow_short=True, valid_rows=0), tmp_path / "data", quiet)
    assert counts_of(manifest, "alpaca") == (1, 0, 1)


def test_a_source_of_which_no_row_can_be_used_is_an_error_that_shows_one(two_files, cfg_of, tmp_path):
    rows = [{"instruction": "a", "output": "b", "system": 3}, {"instruction": "a", "output": "b", "system": {}}]
    path = write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"no row can be used. mine has 2 rows, rejected: not_text 2; not_text is a text that is a number.*, "
        r"first in row 1 of .*b.jsonl, system: .*Give other data, or leave the source out",
    ):
        cfg = cfg_of(sources_text({**two_files, "mine": path}), allow_short=True)
        data.build_data(cfg, tmp_path / "data", quiet)


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


def test_one_prompt_with_the_stop_inside_and_outside_its_quotes_is_in_one_split(cfg_of, tmp_path):
    rng = random.Random(22)
    words = [text(rng, 1, 2) for _ in range(30)]
    rows = [{"instruction": f"Define the word '{word}{i}.'", "output": text(rng)} for i, word in enumerate(words)]
    rows += [{"instruction": f"Define the word '{word}{i}'.", "output": text(rng)} for i, word in enumerate(words)]
    cfg = cfg_of(f"alpaca={write_jsonl(tmp_path / 'a.jsonl', rows)}", train_rows=15, valid_rows=5, test_rows=10)
    manifest = data.build_data(cfg, tmp_path / "data", quiet)
    found = messages_of(tmp_path / "data")
    assert leaks.leaks(found) == {}
    assert manifest["rejected"]["alpaca"]["prompt_in_test"] > 0


def test_fields_that_are_not_used_are_listed_and_said_once(cfg_of, tmp_path):
    rows = [{**row, "context": "c", "id": i} for i, row in enumerate(alpaca_rows(random.Random(23), 40))]
    said = []
    cfg = cfg_of(f"mine={write_jsonl(tmp_path / 'a.jsonl', rows)}")
    manifest = data.build_data(cfg, tmp_path / "data", said.append)
    assert manifest["ignored_fields"] == {"mine": {"context": 40}}
    assert said.count("mine: fields that are not used: 'context'") == 1


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


def test_conversations_are_cut_after_whole_turns_and_what_cannot_be_is_rejected(cfg_of, tmp_path, tiny_model):
    rng = random.Random(8)
    rows = chat_rows(rng, 60)
    rows[0]["messages"][0]["content"] = "long " * 1_000_000
    rows[1]["messages"][-1]["content"] = "long " * 1_000_000
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
    assert manifest["sources"]["tulu"]["test_rows_from"] == "rows of their own"
    assert set(manifest["sources"]["tulu"]["sha256"]) == {"main", "test"}
    raw = {json.dumps(json.loads(line)["messages"]) for line in own.read_text().splitlines()}
    for split, messages in messages_of(tmp_path / "data").items():
        assert {json.dumps(m) in raw for m in messages} == {split == "test"}
    assert_accounts(manifest)


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
    with pytest.raises(DataError, match="tokenizing processes was killed, perhaps for memory: set workers = 1"):
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
    assert said == [f"data already built: split {first['split_hash']}, from the same inputs"]
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
    with pytest.raises(StudyError, match="No space left.*free some space there, or set PEFTLIB_ROOT"):
        data.build_data(cfg_of(sources_text(two_files), split_seed=1), folder, quiet)
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob(".*writing"))


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


def test_a_source_without_any_known_schema_names_fields_and_schemas(cfg_of, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 1}] * 150)
    with pytest.raises(
        DataError, match=r"none of its first 100 rows is of a known schema \(fields 'text', 'label'\).*ShareGPT"
    ):
        data.build_data(cfg_of(f"alpaca={path}"), tmp_path / "data", quiet)


TABLE = [{"instruction": f"ask {i}", "output": f"say {i}"} for i in range(3)]
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
            r"2 not_json: not JSON.*without a comma behind it.*row 1: Extra data",
        ),
        ("array.jsonl", json.dumps(TABLE), r"not a list: give one array of objects, in a .json file"),
        ("pretty.jsonl", json.dumps(TABLE, indent=1), r"an array goes into a .json file"),
        ("wrapped.json", json.dumps({"data": TABLE}), r"fields 'data'.*give that list alone"),
        ("nested.json", json.dumps([TABLE]), r"not a list"),
        ("texts.json", json.dumps(["a", "b"]), r"A row is an object of named fields"),
        ("semicolons.csv", "instruction;output\na;b\n", r"commas separate the columns"),
        ("capitals.csv", "Instruction, output\na,b\n", r"Names of fields are lower case, without spaces"),
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
    with pytest.raises(DataError, match=rf"{name}: none of its first \d+ rows is of a known schema .*{message}"):
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
        ("alpaca", "not of the form NAME=WHERE"),
        ("alpaca=", "not of the form"),
        ("al paca=sample", "not of the form"),
        ("alpaca=sample; alpaca=hub", "is given twice"),
        ("mine=hub", "mine=hub, but hub has only alpaca, tulu, ultrachat"),
        ("alpaca=a.jsonl,b.jsonl,c.jsonl", "is not FILE or FILE,TESTFILE"),
        ("alpaca=a.jsonl,", "is not FILE or FILE,TESTFILE"),
        ("alpaca=~nobody-here/a.jsonl", "give the whole path"),
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


def test_a_stray_first_row_does_not_decide_the_schema(cfg_of, tmp_path):
    rows = [{"messages": None}, {"conversations": []}, *alpaca_rows(random.Random(16), 40)]
    manifest = data.build_data(cfg_of(f"alpaca={write_jsonl(tmp_path / 'a.jsonl', rows)}"), tmp_path / "data", quiet)
    assert manifest["sources"]["alpaca"]["schema"] == {"main": "alpaca"}
    assert manifest["rejected"]["alpaca"] == {"other_schema": 2}
