"""Two studies are compared row by row, or refused."""

import re

import fake_study
import pytest

from peftlib.core.errors import StudyError
from peftlib.report.compare import compare_studies


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Folders of two studies of base and qlora on the same rows, with other answers."""
    first = fake_study.make(tmp_path / "a", monkeypatch, methods=("base", "qlora"), n=120)
    second = fake_study.make(tmp_path / "b", monkeypatch, methods=("base", "qlora"), n=120)
    rows = fake_study.made_rows(120)
    fake_study.write_predictions(second, "qlora", 0, rows, fake_study.answers_of(rows, "galore", 0))
    return first, second


def test_studies_are_compared_row_by_row(two):
    printed = compare_studies([study.folder for study in two])
    assert "| a/made-up | qlora | 1 | 0." in printed
    assert re.search(r"\| qlora: b/made-up - a/made-up \| ROUGE-L \| higher \| \+0\.\d+ \| \+", printed)
    assert re.search(r"\| base: b/made-up - a/made-up \| ROUGE-L \| inside the noise \| \+0\.0000 \| ", printed)
    assert "From a/made-up to b/made-up: none" in printed


def test_studies_that_cannot_be_compared_are_refused(two, tmp_path):
    first, second = two
    with pytest.raises(StudyError, match="two or more different"):
        compare_studies([str(first.folder)] * 2)
    with pytest.raises(StudyError, match=r"nowhere is not a study: there is no config\.json"):
        compare_studies([str(first.folder), str(tmp_path / "nowhere")])
    for method in ("base", "qlora"):
        second.predictions_path(method, 0).unlink()
    with pytest.raises(StudyError, match="no scores in b/made-up: run 04_eval"):
        compare_studies([str(first.folder), str(second.folder)])
    fake_study.write_json(second.manifest_path, {"split_hash": "0ther"})
    for method in ("base", "qlora"):
        fake_study.write_record(second, fake_study.record_of(method, split_hash="0ther"))
    with pytest.raises(StudyError, match="a/made-up has 5f1e0c0ffee0; b/made-up has 0ther"):
        compare_studies([str(first.folder), str(second.folder)])
