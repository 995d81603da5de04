import json
import re
import shutil

import fake_study
import pytest

from peftlib import readme
from peftlib.errors import StudyError

TEXT = (readme.CHECKOUT / "README.md").read_text(encoding="utf-8")


def test_readme_says_what_results_hold_and_comes_back_byte_for_byte():
    made = readme.sections()
    assert readme.with_sections(TEXT, made) == TEXT, "run make readme"
    emptied = TEXT
    for name in made:
        emptied = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", r"\1\2", emptied, flags=re.DOTALL)
    assert len(emptied) < len(TEXT) - 1000
    assert readme.with_sections(emptied, made) == TEXT


def test_a_missing_marker_or_file_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"no lines <!-- demo --> and <!-- /demo -->"):
        readme.with_sections("nothing", {"demo": "x"})
    with pytest.raises(StudyError, match=r"summary.json is not there"):
        readme.sections(tmp_path)


def test_a_studys_results_become_the_demo_section(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch)
    results = tmp_path / "results"
    shutil.copytree(readme.RESULTS / "bench", results / "bench")
    readme.take(study, results)
    summary = json.loads((results / "demo" / "summary.json").read_text())
    shown = readme.sections(results)["demo"]
    assert f"{summary['eval_loss']['base']:.3f}" in shown and "qlora" in shown
    assert (results / "demo" / "results.csv").read_bytes() == study.results_path.read_bytes()
    assert (results / "demo" / "scores.png").stat().st_size > 1000
