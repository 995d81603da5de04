"""Sources that hold fewer rows than are asked for."""

import random

import leaks
import pytest
from made_rows import alpaca_rows, assert_accounts, chat_rows, counts_of, messages_of, quiet, sources_text, write_jsonl

from peftlib import data
from peftlib.core.errors import DataError
from peftlib.data.outcomes import in_proportion


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
    assert "alpaca has only 12 usable rows: dividing them in the requested proportions" in said
    assert "alpaca has fewer rows than requested: test 3 of 20, train 8 of 50, valid 1 of 2" in said
    assert manifest["rejected"]["alpaca"] == {"duplicate": 3} and manifest["unused"]["alpaca"] == 0
    assert_accounts(manifest)
    assert leaks.leaks(messages_of(tmp_path / "data")) == {}
    assert "alpaca has fewer rows than requested" in (tmp_path / "data" / "README.md").read_text()
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
        DataError, match=r"for every split: only 2 can be used, which leaves none for valid. .*valid_rows = 0"
    ):
        data.build_data(cfg_of(f"alpaca={path}", allow_short=True), tmp_path / "data", quiet)
    manifest = data.build_data(cfg_of(f"alpaca={path}", allow_short=True, valid_rows=0), tmp_path / "data", quiet)
    assert counts_of(manifest, "alpaca") == (1, 0, 1)


def test_a_source_of_which_no_row_can_be_used_is_an_error_that_shows_one(two_files, cfg_of, tmp_path):
    rows = [{"instruction": "a", "output": "b", "system": 3}, {"instruction": "a", "output": "b", "system": {}}]
    path = write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"no usable rows. mine has 2 rows, rejected: not_text 2; not_text: a number.*, "
        r"first in row 1 of .*b.jsonl, system: .*Use other data, or remove the source",
    ):
        cfg = cfg_of(sources_text({**two_files, "mine": path}), allow_short=True)
        data.build_data(cfg, tmp_path / "data", quiet)
