"""No row or prompt of a split is in another one."""

import random

import leaks
from made_rows import alpaca_rows, assert_accounts, chat_rows, messages_of, quiet, sources_text, text, write_jsonl

from peftlib import data


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
