"""The study that a judge is asked about."""

import fake_study
import pytest
from fake_judge import KEY

from peftlib.evaluation.judging.backends import KEY_VARIABLE
from peftlib.report import charts


@pytest.fixture
def study(request, tmp_path, monkeypatch):
    """Base and qlora on the module's ROWS, else on twelve of which one has equal answers; the key is set."""
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    n = getattr(request.module, "ROWS", None)
    made = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=n or 12)
    if n is None:
        rows = fake_study.made_rows(12)
        answers = fake_study.answers_of(rows, "qlora", 0)
        answers[5] = fake_study.answers_of(rows, "base", 0)[5]
        fake_study.write_predictions(made, "qlora", 0, rows, answers)
    return made
