"""Settings and files of sources that are built in a test."""

import random

import pytest
from made_rows import alpaca_rows, chat_rows, write_jsonl

from peftlib.core.config import resolve


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
