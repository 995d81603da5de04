"""What becomes of a finished study in results/: one made-up study with every oddity, taken once."""

import json
import re
import shutil
from types import SimpleNamespace

import fake_study
import numpy as np
import pytest
import reference_summary
import take_results
import tiny
from plan_tables import one_cards_rows
from result_tables import RESULTS, Results, make_all

from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.study import Study
from peftlib.export.redact import without_folders
from peftlib.methods import default_methods
from peftlib.models.shapes import short_name

METHODS = ("base", "qlora", "galore", "hybrid")
SWEEP = {
    "rows": 1500,
    "steps": 93,
    "seed": 0,
    "tried": [
        {"factor": factor, "galore_learning_rate": factor * 1e-3, "valid_loss": loss, "train_loss": 2.0}
        for factor, loss in ((0.3, 2.5), (1.0, 2.4), (3.0, 2.3))
    ],
    "is_at_edge": True,
}
FAST = [
    {"step": n, "loss": 3.0, "grad_norm": 1.0, "tokens": 100, "seconds": s} for n, s in ((2, 0.1), (3, 0.2), (4, 0.1))
]
CHANGES = {  # of records, by run
    ("galore", 0): {"history": [{"step": 1, "loss": 3.0, "tokens": 100, "seconds": 50.0}, *FAST], "first_step_s": 50.0},
    ("qlora", 0): {
        "history": [{"step": n, "loss": 3.0, "grad_norm": 1.0} for n in range(1, 939)],
        "layers": [{"layer": 0}],
    },
    ("hybrid", 2): {"status": "failed", "error": "OutOfMemoryError: no room for /home/me/x.bin", "evaluation": None},
}


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """The made-up study, its folder under results/, summary.json, and the tables made from it."""
    tmp_path = tmp_path_factory.mktemp("taken")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("peftlib.report.chart._DPI", 30)
        study = _study(tmp_path, monkeypatch)
        results = tmp_path / "results"
        (results / "reference" / "records-fp16").mkdir(parents=True)
        (results / "reference" / "records-fp16" / "old.json").write_text("{}")  # of an earlier taking
        monkeypatch.setattr(reference_summary, "FIRST_LOOK_TOKENS", 2)
        monkeypatch.setattr(reference_summary, "load_tokenizer", lambda model: tiny.tokenizer())
        built = take_results.build_report(study)
        monkeypatch.setattr(take_results, "build_report", lambda study: built)  # once for both
        take_results.take_reference(study, results / "reference")
        take_results.take_demo(study, results / "demo")
    for name in ("bench", "reference-next"):
        shutil.copytree(RESULTS / name, results / name)
    folder = results / "reference"
    found = read_json(folder / "summary.json")
    return SimpleNamespace(study=study, folder=folder, found=found, tables=make_all(Results(results)))


def _study(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=METHODS, seeds=(0, 1, 2), n=60)
    records = study.records()
    for record in records:  # rates are adopted before the first run
        study.record_path(record["method"], record["seed"]).unlink()
    study.adopt("galore", {"galore_learning_rate": 3e-3}, SWEEP)
    for record in records:
        record["skipped_steps"], record["git"] = 0, {"commit": "abc", "is_dirty": False}
        record["config"] |= {"sources": "alpaca=/home/me/rows.jsonl", "model": "/home/me/gemma"}
        if record["method"] != "base":
            record["evaluation"]["general_loss"] += 0.001 * record["seed"]
        if record["method"] == "qlora":
            record["evaluation"]["general_loss_nf4"] = record["evaluation"]["general_loss"] - 0.05
        fake_study.write_record(study, {**record, **CHANGES.get((record["method"], record["seed"]), {})})
    config = read_json(study.config_path)
    config["config"] |= {
        "sources": "alpaca=/home/me/rows.jsonl,/home/me/test.jsonl; tulu=hub",
        "model": "/home/me/gemma",
    }
    write_json(study.config_path, config)
    other = Study(tmp_path / f"{study.folder.name}-fp16", study.cfg)
    write_json(other.manifest_path, read_json(study.manifest_path))
    other.freeze()
    fake_study.write_record(other, {**read_json(study.record_path("galore", 0)), "precision": "fp16"})
    unscored = {
        "evaluation": None,
        "eval_loss": None,
        "evaluation_error": "RuntimeError: cannot read /home/me/weights.bin",
    }
    fake_study.write_record(other, {**read_json(study.record_path("qlora", 0)), "precision": "fp16", **unscored})
    rows = fake_study.made_rows(60)
    side = Study(tmp_path / f"{study.folder.name}-r4", study.cfg.replace(study="side", galore_rank=4))
    write_json(side.manifest_path, read_json(study.manifest_path))
    side.freeze()
    fake_study.write_record(side, {**read_json(study.record_path("galore", 0)), "peak_memory_bytes": 2**31})
    fake_study.write_predictions(side, "galore", 0, rows, fake_study.answers_of(rows, "galore", 1))
    fake_study.write_predictions(other, "galore", 0, rows, fake_study.answers_of(rows, "galore", 0))
    return study


def test_the_tables_show_what_the_study_holds(taken):
    for method in ("qlora", "galore"):
        scores = taken.found["methods"][method]["scores"]["rougeL"]
        mean = sum(scores["seeds"]) / 3
        assert scores["value"] == pytest.approx(mean) and f"| {method} | 3 | {mean:.3f} ± " in taken.tables["scores"]
        low, high = (taken.found["methods"][method]["over_base"]["rougeL"][end] for end in ("low", "high"))
        assert f"{low:+.3f} to {high:+.3f}" in taken.tables["scores"]
    assert "| hybrid − galore |" in taken.tables["pairs"]
    assert "factor 3, at the edge (0.3: 2.500, 1: 2.400, 3: 2.300)" in taken.tables["cost"]
    assert "hours expected on a T4" in taken.tables["t4"] and "does not fit" not in taken.tables["t4"]
    for source, part in taken.found["sources"].items():
        cells = " | ".join(f"{part['scores'][method]['rougeL']:.3f}" for method in METHODS)
        assert f"| {source} ({part['rows']} rows) | {cells} |" in taken.tables["sources"]
    assert sum(part["rows"] for part in taken.found["sources"].values()) == taken.found["n_test"]
    for picture in taken.found["figures"]:
        assert (taken.folder / "figures" / picture["file"]).stat().st_size > 1000 and picture["alt"]


def test_a_demo_becomes_its_table(taken):
    demo = taken.folder.parent / "demo"
    losses = json.loads((demo / "summary.json").read_text())["eval_loss"]
    assert f"| test loss, nats per token | {losses['base']:.3f} | {losses['qlora']:.3f} |" in taken.tables["demo"]
    assert (demo / "results.csv").read_bytes() == taken.study.results_path.read_bytes()
    assert (demo / "scores.png").stat().st_size > 1000


def test_a_failed_run_is_left_out_of_the_seeds(taken):
    assert taken.found["methods"]["hybrid"]["seeds"] == [0, 1] and "| hybrid | 2 | " in taken.tables["scores"]


def test_what_is_taken_is_small_and_names_no_private_place(taken):
    kept = read_json(taken.folder / "records" / "qlora-s0.json")
    assert len(kept["history"]) == 60 and (kept["history"][0]["step"], kept["history"][-1]["step"]) == (1, 938)
    assert "layers" not in kept and kept["config"]["sources"] == "alpaca=rows.jsonl"
    assert kept["config"]["model"] == "gemma"
    sources = read_json(taken.folder / "config.json")["config"]["sources"]
    assert sources == "alpaca=rows.jsonl,test.jsonl; tulu=hub"
    texts = [path.read_text() for path in taken.folder.rglob("*.json")]
    texts.append((taken.folder / "results.csv").read_text())
    assert not [text for text in texts if "/home/me" in text or str(taken.study.folder) in text]
    answer = json.loads(taken.study.predictions_path("qlora", 0).read_text().splitlines()[0])["answer"]
    assert not any(answer in text for text in texts)
    assert sum(path.stat().st_size for path in taken.folder.rglob("*") if path.is_file()) < 1_000_000
    assert not (taken.folder / "records-fp16" / "old.json").exists()


def test_fp16_stands_beside_bf16_and_a_run_that_was_not_scored_is_an_empty_cell_with_its_reason(taken):
    assert re.search(r"^\| galore \| 0\.\d+ / 0\.\d+ \| [+-]", taken.tables["precision"], re.MULTILINE)
    both = taken.found["precision"]["qlora"]
    assert both["difference"] is None and both["fp16"]["rougeL"] is None and both["fp16"]["valid_loss"] == 2.6
    assert both["unscored_because"] == "RuntimeError: cannot read weights.bin"
    assert "| qlora |  / 0." in taken.tables["precision"]


def test_a_study_with_another_setting_stands_beside_it(taken):
    side = taken.found["sides"]["r4"]
    assert side["changes"] == [f"galore_rank: {taken.study.cfg.galore_rank} -> 4"] and [*side["methods"]] == ["galore"]
    gap = side["methods"]["galore"]["difference"]["rougeL"]
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert side["methods"]["galore"]["side"]["peak_memory_gib"] == 2.0
    assert (taken.folder / "records-r4" / "galore-s0.json").exists()


def test_answers_are_cut_at_the_first_looks_limit(taken):
    look = taken.found["first_look"]
    assert look["max_new_tokens"] == 2 and set(look["scores"]) == set(METHODS)
    for method in METHODS[1:]:
        assert 0 < look["scores"][method]["rougeL"] < taken.found["methods"][method]["scores"]["rougeL"]["value"]
    assert "| BLEU-4 / ROUGE-L | here | cut at 2 tokens | first look |" in taken.tables["others"]
    bleu, rouge = (look["scores"]["qlora"][metric] for metric in ("bleu4", "rougeL"))
    assert f" | {bleu:.3f} / {rouge:.3f} | 0.122 / 0.400 |" in taken.tables["others"]


def test_what_rounding_to_4_bits_costs_is_told_apart_from_forgetting(taken):
    known = taken.found["methods"]
    by_rounding = known["qlora"]["general_loss"][0] - known["base"]["general_loss"][0] - 0.05
    [line] = [line for line in taken.tables["general"].splitlines() if line.startswith("| qlora |")]
    assert line.endswith(f"| {by_rounding:+.3f} |")


def test_speed_is_the_median_over_steps_and_compiling_stands_apart(taken):
    known = taken.found["methods"]["galore"]
    assert known["median_tokens_per_second"][0] == pytest.approx(750.0) and known["first_step_seconds"][0] == 50.0


def test_a_study_without_a_finished_run_is_not_taken(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base",))
    with pytest.raises(StudyError, match="no finished run"):
        take_results.take_reference(study, tmp_path / "reference")


def test_speeds_of_a_t4_are_predicted_from_one_card():
    rows = Results().methods
    fast = {**rows[0], "method": "qlora", "precision": "fp16", "cap_gib": 14.5, "device": "NVIDIA H200", "tok_s": 1e6}
    usable = one_cards_rows([*rows, fast])
    assert len({row["device"] for row in usable}) == 1 and {row["method"] for row in usable} >= set(default_methods())
    assert one_cards_rows([]) == []


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("CPU (Xeon, 2 cores)", "CPU"),
    ],
)
def test_cards_have_short_names(device, name):
    assert short_name(device) == name


@pytest.mark.parametrize(
    "text, kept",
    [
        ("no room for /home/me/x/y.bin", "no room for y.bin"),
        ("file:///home/me/y.bin", "y.bin"),
        ("/content/drive/My Drive/me/y.bin is full", "y.bin is full"),
        ("see https://a.b/c/d", "see https://a.b/c/d"),
        (None, None),
    ],
)
def test_messages_lose_their_folders(text, kept):
    assert without_folders(text) == kept


def test_a_difference_of_one_number_a_seed_has_students_t():
    found = reference_summary.seeds_difference([1.0, 2.0, 3.0], [0.0])
    half = 4.3027 / 3**0.5  # t of 2 degrees of freedom, standard deviation 1
    assert found.value == 2.0
    assert found.low == pytest.approx(2.0 - half, abs=0.12) and found.high == pytest.approx(2.0 + half, abs=0.12)
    rng = np.random.default_rng(9)
    equal = sum(
        reference_summary.seeds_difference(list(rng.normal(size=3)), list(rng.normal(size=3)), resamples=2000).is_noise
        for _ in range(400)
    )
    assert equal / 400 >= 0.94
    with pytest.raises(ValueError, match="1 and 1 seeds"):
        reference_summary.seeds_difference([1.0], [2.0])
