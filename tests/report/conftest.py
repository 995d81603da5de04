"""A small study whose report is built."""

import fake_study
import pytest


@pytest.fixture
def small(tmp_path, monkeypatch, no_charts):
    """A study of base and qlora on six rows, to be spoilt. No figures: they are tested on `built`."""
    return fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=6)
