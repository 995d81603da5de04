"""What does not belong together is refused, and nothing is written."""

import json

import fake_study
import pytest

from peftlib.core.errors import StudyError
from peftlib.report import build as report


def spoil_line(path, **changes):
    lines = path.read_text(encoding="utf-8").splitlines()
    row = {**json.loads(lines[2]), **changes}
    lines[2] = json.dumps({name: value for name, value in row.items() if value is not None})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def other_split(study):
    fake_study.write_record(study, fake_study.record_of("qlora", split_hash="0ther"))


def missing_field(study):
    record = fake_study.record_of("qlora")
    del record["train_tokens"]
    fake_study.write_record(study, record)


def twin(study):
    path = study.record_path("qlora", 0)
    path.with_name("qlora-copy.json").write_bytes(path.read_bytes())


def damaged_record(study):
    study.record_path("qlora", 0).write_text("{", encoding="utf-8")


def row_missing(study):
    path = study.predictions_path("qlora", 0)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")


def damaged_line(study):
    path = study.predictions_path("qlora", 0)
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")


def line_twice(study):
    path = study.predictions_path("qlora", 0)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]), encoding="utf-8")


def spoilt(**changes):
    return lambda study: spoil_line(study.predictions_path("qlora", 0), **changes)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (other_split, r"split_hash differs.*manifest\.json has 5f1e0c0ffee0.*qlora-s0\.json has 0ther"),
        (missing_field, r"qlora-s0\.json lacks train_tokens"),
        (twin, r"qlora-copy\.json duplicates another record: both are qlora \(seed 0\)"),
        (damaged_record, r"qlora-s0\.json is damaged"),
        (row_missing, r"qlora-s0\.jsonl: 5 answers do not match the 6 test rows.*'alpaca-0'"),
        (damaged_line, r"qlora-s0\.jsonl: line 6 is damaged"),
        (line_twice, r"qlora-s0\.jsonl: 7 answers do not match the 6 test rows"),
        (spoilt(split_hash="0ther"), r"qlora-s0\.jsonl: line 3 has split_hash 0ther.*5f1e0c0ffee0"),
        (spoilt(id="elsewhere-1"), r"qlora-s0\.jsonl: 6 answers do not match.*'alpaca-3'"),
        (spoilt(prompt_sha256="00"), r"qlora-s0\.jsonl: 6 answers do not match.* and prompts.*'alpaca-3'"),
        (spoilt(answer=None), r"qlora-s0\.jsonl: line 3 is damaged \(it lacks 'answer'"),
        (spoilt(answer=7), r"qlora-s0\.jsonl: line 3 is damaged \(answer is 7, not text"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_nothing_is_overwritten(small, spoil, message):
    kept = (small.results_path, small.report_path)
    for path in kept:
        path.write_text("older", encoding="utf-8")
    spoil(small)
    with pytest.raises(StudyError, match=message):
        report.build_report(small)
    assert [path.read_text(encoding="utf-8") for path in kept] == ["older", "older"]
    assert not small.figures_dir.exists()


def test_a_study_without_records_or_data_says_what_to_run(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=())
    with pytest.raises(StudyError, match="run 04_eval"):
        report.build_report(study)
    study.manifest_path.unlink()
    with pytest.raises(StudyError, match="run 01_data first"):
        report.build_report(study)
