import json
import re
import shutil

import fake_study
import pytest
import update_readme as readme

from peftlib.core.errors import StudyError

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


def test_speeds_of_real_lengths_and_precisions_are_told_with_their_ratios(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(readme.RESULTS, results)
    rows = [
        {"name": "galore", "method": "galore", "device": "NVIDIA H100", "date": "d", "precision": "bf16", "cap_gib": 0.0,
         "micro_batch": 4, "tok_s": 1600.0, "peak_gib": 1.0, "first_step_s": 1.0, "seq": 100, "checkpoint_gib": 3.0,
         "save_stall_s": 2.0, "save_written_s": 9.0, "save_step_s": 1.5,
         "mixed_found": {"random_4": {"useful_tok_s": 100.0}, "packed_4": {"useful_tok_s": 250.0},
                         "random_8": {"useful_tok_s": 400.0}}}
    ]  # fmt: skip
    (results / "bench" / "methods.json").write_text(json.dumps(rows))
    found = json.loads((results / "bench" / "fp16.json").read_text())
    for run in found["runs"]:
        run["last_losses"] = 2.02 if run["precision"] == "fp16" else 2.0
    (results / "bench" / "fp16.json").write_text(json.dumps(found))
    made = readme.sections(results)
    assert "| ratio | 2.50 |  |" in made["methods"]
    assert "holds training up for 2.0 s" in made["methods"] and "1.50 s instead of 1.00 s" in made["methods"]
    assert made["fp16"].count("+1.00%") == 9
