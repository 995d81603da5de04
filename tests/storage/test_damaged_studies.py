"""Damaged studies: each file, harmed in each way, read by each command, ends in a named error or in the same result."""

import os
import shutil
import socket
import time

import damage
import finished_study
import pytest

from peftlib.core.errors import LockedError, SchemaError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import Map, Maybe, fault, parse
from peftlib.core.record import read as read_record
from peftlib.evaluation.predictions import Predictions
from peftlib.runner.notebook_io import load as load_notebook
from peftlib.storage.lock import StudyLock
from peftlib.storage.mirror import Mirror
from peftlib.storage.store import Remote

SAMPLE = 30  # cases that every test run tries, at even distances


class Matrix:
    """A finished study and what each command makes of it."""

    def __init__(self, pristine, expected, monkeypatch, tmp_path):
        self.pristine, self.expected = pristine, expected
        self._monkeypatch, self._tmp_path = monkeypatch, tmp_path

    def cases(self):
        return damage.cases_of(self.pristine / finished_study.NAME)

    def wrong(self, cases):
        """What is wrong with the cases that do not end as they should, in words."""
        found = []
        for at, case in enumerate(cases):
            root = self._tmp_path / f"case-{at}"
            root.mkdir()
            self._monkeypatch.setenv("PEFTLIB_ROOT", str(root / "runs"))
            found.append(damage.verdict(case, self.pristine, root, self.expected))
            shutil.rmtree(root)
        return [said for said in found if said]


@pytest.fixture
def matrix(built_study, monkeypatch, tmp_path):
    return Matrix(*built_study, monkeypatch, tmp_path)


def test_a_sample_of_all_damages_ends_in_named_errors_or_the_same_results(matrix):
    cases = matrix.cases()
    assert matrix.wrong(cases[:: len(cases) // SAMPLE]) == []


@pytest.mark.slow
def test_every_damage_ends_in_a_named_error_or_the_same_result(matrix):
    """Every fourth one; with PEFTLIB_DAMAGES=all, as `make faults` has it, each of them."""
    cases = matrix.cases()
    assert len(cases) > 2000
    assert matrix.wrong(cases if os.environ.get("PEFTLIB_DAMAGES") == "all" else cases[::4]) == []


def test_the_matrix_sees_a_raw_error(matrix, monkeypatch):
    case = next(c for c in matrix.cases() if c[:2] == ("records/hybrid-s0.json", "learning_rate_2 retyped, unsealed"))
    monkeypatch.setattr("peftlib.core.record.require_shape", lambda value, *_: value)
    assert "RAW" in matrix.wrong([case])[0]


def test_json_has_no_words_for_infinity_and_half_a_character():
    for text in ("NaN", "[Infinity]", "1e999", '{"a": "\\ud800"}', "[" * 100_000):
        with pytest.raises(ValueError):
            parse(text)
    assert parse('{"a": "\\ud83d\\ude00", "b": 1e3}') == {"a": "\U0001f600", "b": 1000.0}


def test_a_missing_key_names_the_file():
    with pytest.raises(StudyError, match=r"records/x\.json lacks 'steps': delete it and run"):
        parse('{"a": {"b": 1}}', "records/x.json")["a"]["steps"]


def test_a_shape_tells_the_first_value_that_does_not_fit():
    shape = {"n": int, "x?": Maybe(float), "rows": [{"id": str}], "by": Map(int), "status": ("ok", "failed")}
    sound = {"n": 1, "x": None, "rows": [{"id": "a"}], "by": {"a": 1}, "status": "ok", "more": [1]}
    assert fault(sound, shape) is None and fault({**sound, "x": 3}, shape) is None
    for changes, said in (
        ({"n": True}, "n is true, not a whole number"),
        ({"n": 1.5}, "n is 1.5, not a whole number"),
        ({"x": "1"}, 'x is "1", not a number'),
        ({"rows": [{"id": "a"}, {}]}, "rows.1 lacks 'id'"),
        ({"by": {"a": "1"}}, 'by.a is "1", not a whole number'),
        ({"status": "done"}, 'status is "done", not one of ok, failed'),
    ):
        assert fault({**sound, **changes}, shape) == said


def test_a_changed_value_shows_and_a_purpose_can_be_told(tmp_path):
    path = tmp_path / "found.json"
    write_json(path, {"rate": 2e-4, "by_seed": {1: 0.5}})
    assert read_json(path) == {"schema_version": 1, "rate": 2e-4, "by_seed": {"1": 0.5}}
    path.write_text(path.read_text().replace("0.0002", "0.0003"))
    with pytest.raises(StudyError, match=r"found\.json is damaged \(its SHA-256 differs\).*remove its line 'seal'"):
        read_json(path)
    lines = [line for line in path.read_text().splitlines() if '"seal"' not in line]
    path.write_text("\n".join(lines).replace("},\n}", "}\n}"))
    assert read_json(path)["rate"] == 3e-4


@pytest.mark.parametrize("field, value", [("steps", "x"), ("eval_loss", "2.4"), ("history", {}), ("status", 3)])
def test_a_record_with_odd_values_is_refused_by_field(tmp_path, field, value):
    path = tmp_path / "hybrid-s0.json"
    write_json(path, {"method": "hybrid", "seed": 0, field: value})
    with pytest.raises(StudyError, match=rf"hybrid-s0\.json is damaged \({field} is .*delete it and run the notebook"):
        read_record(path)


def test_a_record_with_nan_is_refused(tmp_path):
    path = tmp_path / "hybrid-s0.json"
    path.write_text('{"schema_version": 1, "method": "hybrid", "seed": 0, "eval_loss": NaN}')
    with pytest.raises(StudyError, match=r"hybrid-s0\.json is damaged \(NaN is not a number\)"):
        read_record(path)


def test_a_file_of_another_version_is_no_damage(tmp_path):
    (tmp_path / "x.json").write_text('{"schema_version": 99}')
    with pytest.raises(SchemaError, match=r"x\.json has schema_version 99"):
        read_json(tmp_path / "x.json")


def test_what_damage_left_of_answers_is_answered_again(tmp_path):
    line = '{"id": "%s", "source": "s", "prompt_sha256": "p", "answer": "a", "n_tokens": 1, "finish_reason": "stop", '
    line += '"split_hash": "h"}'
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join([line % "one", '{"id": ["odd"], "split_hash": "h"}', "null", line % "two"]))  # no end
    assert list(Predictions(path, "h").rows) == ["one", "two"]
    assert path.read_text() == f"{line % 'one'}\n{line % 'two'}\n"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"cells": 3}', '{"cells": [{"cell_type": 1}], "metadata": {}}']
)
def test_a_damaged_notebook_is_refused_by_name(tmp_path, content):
    (tmp_path / "01_data.ipynb").write_text(content)
    with pytest.raises(StudyError, match=r"01_data\.ipynb.*restore the original file"):
        load_notebook(tmp_path / "01_data.ipynb")


@pytest.mark.parametrize(
    "changes", [{"serials": 3}, {"copied": {"data": 1}}, {"origin": None}, {"serials": {"a": "b"}}]
)
def test_a_mirrors_odd_memory_counts_as_none(tmp_path, changes):
    remote = Remote(tmp_path / "remote")
    Mirror(tmp_path, remote)._has_copied("data", 4, [["data/x", 1, 2]])
    assert Mirror(tmp_path, remote).serials == {"data": 4}
    write_json(tmp_path / ".mirror.json", {**read_json(tmp_path / ".mirror.json"), **changes})
    again = Mirror(tmp_path, remote)
    assert (again.serials, again.copied) == ({}, {}) and isinstance(again.origin, str)


@pytest.mark.parametrize(
    "content", ['{"pid": "x", "heartbeat": [1]}', '{"heartbeat": 1e999}', "[1]", "{", '{"since": -1}']
)
def test_an_odd_lock_is_taken_over(tmp_path, content):
    path = tmp_path / "lock.json"
    path.write_text(content)
    long_ago = time.time() - 60
    os.utime(path, (long_ago, long_ago))
    with StudyLock(tmp_path, "a test"):
        assert str(socket.gethostname()) in path.read_text()


def test_a_folder_in_a_locks_place_is_named(tmp_path):
    (tmp_path / "lock.json").mkdir()
    long_ago = time.time() - 60
    os.utime(tmp_path / "lock.json", (long_ago, long_ago))
    with (
        pytest.raises(LockedError, match=r"lock\.json cannot be read as a lock.*move it away"),
        StudyLock(tmp_path, "a test"),
    ):
        pass
