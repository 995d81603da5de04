"""Reports of studies with several seeds, and of runs that failed, stopped or were never evaluated or matched."""

import statistics

import fake_study
import numpy as np
from fake_study import rows_of

from peftlib.core import record as records
from peftlib.core.files import read_json
from peftlib.report import build as report
from peftlib.report import charts


def test_evaluations_without_general_text_are_read_and_other_texts_not_compared(small):
    record = fake_study.record_of("base")
    for name in ("general_loss", "general_tokens", "general_text_sha256"):
        del record["evaluation"][name]
    fake_study.write_record(small, record)
    shown = report.build_report(small)
    assert list(shown.table["general text loss (change)"]) == ["n/a", "", "3.060"]
    assert not any("general text" in line for line in shown.findings)
    record = fake_study.record_of("base")
    record["evaluation"]["general_text_sha256"] = "0ther"
    fake_study.write_record(small, record)
    assert list(report.build_report(small).table["general text loss (change)"]) == ["3.000", "", "3.060"]


def test_several_seeds_give_one_table_row_and_their_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), seeds=(0, 1, 2), n=120)
    shown = report.build_report(study)
    assert list(shown.table["technique"]) == [
        "base",
        f"base, cut at the median reference length ({shown.study.cut_at_words} words)",
        "qlora (3 seeds)",
    ]
    assert len(rows_of(study)) == 4
    values = [float(row["rougeL"]) for row in rows_of(study)[1:]]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    text = study.report_path.read_text(encoding="utf-8")
    assert f"{mean:.4f} ({spread:.4f})" in text
    assert "Caution" not in text


def test_test_rows_are_read_from_the_studys_own_files(make_study, monkeypatch):
    from peftlib import data

    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    study = make_study()
    rows = list(data.load_split(study.data_dir, "test"))
    split_hash = study.manifest()["split_hash"]
    fake_study.write_record(study, fake_study.record_of("base", split_hash=split_hash))
    references = [row["messages"][-1]["content"] for row in rows]
    fake_study.write_predictions(study, "base", 0, rows, references, split_hash=split_hash)
    report.build_report(study)
    assert (rows_of(study)[0]["bleu4"], rows_of(study)[0]["n_test"]) == ("1", str(len(rows)))


def test_what_p_leaves_out_is_said_where_seeds_count(small, tmp_path, monkeypatch):
    report.build_report(small)
    assert "too few seeds" not in small.report_path.read_text(encoding="utf-8")
    study = fake_study.make(tmp_path / "b", monkeypatch, methods=("base", "qlora"), seeds=(0, 1))
    report.build_report(study)
    assert "too few seeds" in study.report_path.read_text(encoding="utf-8")


# What is unfinished is shown as such


def test_stopped_and_failed_runs_are_shown_without_scores(small):
    fake_study.write_record(small, fake_study.record_of("galore", status="failed", error="loss is nan", steps=7))
    stopped = fake_study.record_of("hybrid", status="stopped", steps=12, evaluation=None, eval_loss=None)
    fake_study.write_record(small, stopped)
    rows = fake_study.made_rows(6)
    fake_study.write_predictions(small, "galore", 0, rows, fake_study.answers_of(rows, "galore", 0))

    report.build_report(small)

    found = {row["method"]: row for row in rows_of(small)}
    for method in ("galore", "hybrid"):
        assert found[method]["bleu4"] == found[method]["rougeL"] == found[method]["n_test"] == ""
    assert (found["galore"]["status"], found["hybrid"]["status"]) == ("failed", "stopped")
    text = small.report_path.read_text(encoding="utf-8")
    assert "galore (seed 0) failed at step 7 of 24: loss is nan." in text
    assert "hybrid (seed 0) stopped at step 12 of 24." in text


def test_a_run_without_predictions_has_empty_scores(small):
    small.predictions_path("qlora", 0).unlink()
    shown = report.build_report(small)
    assert [row["bleu4"] == "" for row in rows_of(small)] == [False, True]
    assert "No answers yet, so no scores: qlora (seed 0)" in small.report_path.read_text(encoding="utf-8")
    assert len(shown.pairs) == 0 and rows_of(small)[1]["train_loss"] != ""


def test_trained_but_never_evaluated_study_has_a_report(small):
    for method in ("base", "qlora"):
        small.predictions_path(method, 0).unlink()
    shown = report.build_report(small)
    assert shown.samples == [] and len(shown.results) == 2
    assert "n/a" in small.report_path.read_text(encoding="utf-8")


def test_runs_that_were_not_matched_are_named(small):
    record = fake_study.record_of("galore", train_tokens=99, evaluation=None)
    record["config"] = {**record["config"], "batch_size": 4, "galore_rank": 8}
    fake_study.write_record(small, record)
    notes = report.build_report(small).notes
    assert "batch_size: 3 (qlora (seed 0)); 4 (galore (seed 0))" in notes
    assert "train_tokens: 31,234 (qlora (seed 0)); 99 (galore (seed 0))" in notes
    assert not any("galore_rank" in note for note in notes)  # a setting of one method alone
    assert "These settings differ between runs" in small.report_path.read_text(encoding="utf-8")


def test_different_seed_sets_are_named(small):
    fake_study.write_record(small, fake_study.record_of("galore", seed=1, evaluation=None))
    assert "seeds: 0 (qlora); 1 (galore)" in report.build_report(small).notes


def test_the_report_says_that_a_runs_rates_or_precision_were_changed_midway(small):
    record = read_json(small.record_path("qlora", 0))
    changed = [
        {"step": 9, "what": "rate_factor", "from": 1.0, "to": 0.3, "at": "2026-11-26T10:00:00+00:00"},
        {"step": 12, "what": "precision", "from": "bf16", "to": "fp16", "at": "2026-11-26T11:00:00+00:00"},
        {"step": 12, "what": "plan", "from": "a", "to": "b", "at": "2026-11-26T11:00:00+00:00"},
    ]
    fake_study.write_record(small, {**record, "changes": changed})
    report.build_report(small)
    text = small.report_path.read_text(encoding="utf-8")
    assert "qlora (seed 0) was not trained like the others: from step 9 on, its learning rates were 0.3 times" in text
    assert "qlora (seed 0) continued in fp16 from step 12 on (before: bf16)" in text


def test_a_loss_whose_perplexity_no_number_holds_is_reported(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"))
    fake_study.write_record(study, fake_study.record_of("base", eval_loss=800.0))
    made = report.build_report(study)
    assert any("base 800.000 (perplexity inf)" in line for line in made.findings)
    assert "| inf |" in study.report_path.read_text(encoding="utf-8")


def test_a_report_of_many_methods_stays_readable_and_keeps_every_pair(tmp_path, monkeypatch, no_charts):
    more = ("lora", "full", "apollo", "muon")
    for of in (fake_study.SKILL, fake_study.MEMORY, fake_study.GENERAL):
        for at, method in enumerate(more):
            monkeypatch.setitem(of, method, of["galore"] * (1 + at / 100))
    study = fake_study.make(tmp_path, monkeypatch, methods=tuple(fake_study.SKILL), n=12)
    for method in fake_study.SKILL:
        record = records.load(study, method, 0)
        for task in ("arc_easy", "piqa", "boolq"):
            fake_study.write_benchmark(
                study, record, task, np.arange(100) < (40 if method == "muon" else 80), chance=0.3
            )
        records.save(study, record)
    shown = report.build_report(study)
    text = study.report_path.read_text(encoding="utf-8")
    assert "| difference | - base | - base (cut) | - qlora | - galore | - hybrid | - lora |" in text
    assert "| muon, ROUGE-L | +" in text and "\n| muon - qlora |" not in text and "| muon - base | -" in text
    assert "| method | arc_easy | piqa | boolq |" in text and "| task | metric | shots | rows | guessing |\n" in text
    pairs = (study.folder / "pairs.csv").read_text().splitlines()
    n_scores, n_tasks = 2 * (21 + 7 + 7), 3 * (21 + 7)  # among seven, against base and, for scores, against base cut
    assert len(pairs) == 1 + n_scores + n_tasks and ",".join(shown.pairs.columns) == pairs[0]
    assert "with all 7 methods" in shown.summary[1] and " to muon " in shown.summary[2]
