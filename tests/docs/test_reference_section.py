"""README's section on a reference study: from made-up records and predictions of three seeds."""

import json
import re

import fake_study
import pytest
import reference_findings
import reference_results
import reference_t4
import tiny
import update_readme as readme
from reference_numbers import ends
from reference_section import section

from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.gpus import short_name
from peftlib.core.study import Study
from peftlib.export.redact import without_folders
from peftlib.methods import METHODS as ALL

METHODS = ("base", "qlora", "galore", "hybrid")
BENCH = json.loads((readme.RESULTS / "bench" / "methods.json").read_text())


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """taken(**changes of records by run name) -> (folder of the results, study)."""

    def take(lacking="", **changes):
        study = fake_study.make(tmp_path, monkeypatch, methods=METHODS, seeds=(0, 1, 2), n=60)
        records = study.records()
        for record in records:  # rates are adopted before the first run
            study.record_path(record["method"], record["seed"]).unlink()
        study.adopt("galore", {"galore_learning_rate": 3e-3}, _sweep_of(3e-3))
        for record in records:
            name = f"{record['method']}_s{record['seed']}"
            record["skipped_steps"], record["git"] = 0, {"commit": "abc", "is_dirty": False}
            if record["method"] != "base":
                record["evaluation"]["general_loss"] += 0.001 * record["seed"]
                record["evaluation"]["generate_seconds"] = 30.0
            fake_study.write_record(study, {**record, **changes.get(name, {})})
        other = Study(tmp_path / "made-up-fp16", study.cfg)
        write_json(other.manifest_path, read_json(study.manifest_path))
        other.freeze()
        fake_study.write_record(other, {**read_json(study.record_path("galore", 0)), "precision": "fp16"})
        rows = fake_study.made_rows(60)
        fake_study.write_predictions(other, "galore", 0, rows, fake_study.answers_of(rows, "galore", 0))
        folder = tmp_path / "reference"
        reference_results.take(study, folder, sibling=reference_results.sibling_of(study), lacking=lacking)
        return folder, study

    return take


def _sweep_of(best):
    tried = [
        {"factor": f, "galore_learning_rate": best * f / 3, "valid_loss": loss, "train_loss": 2.0}
        for f, loss in ((0.3, 2.5), (1.0, 2.4), (3.0, 2.3))
    ]
    return {"rows": 1500, "steps": 93, "seed": 0, "tried": tried, "is_at_edge": True}


def test_without_results_the_section_is_one_line(tmp_path):
    assert section(tmp_path, BENCH) == "The reference study on larger data is not run yet."
    planned = (
        section(readme.RESULTS / "reference", BENCH) if not (readme.RESULTS / "reference/summary.json").exists() else ""
    )
    assert "\n" not in planned


def test_the_section_says_what_the_results_hold(taken):
    folder, _ = taken(lacking="no GPU time was left")
    text, found = section(folder, BENCH), read_json(folder / "summary.json")
    for method in METHODS[1:]:
        scores = found["methods"][method]["scores"]["rougeL"]
        mean = sum(scores["seeds"]) / 3
        assert scores["value"] == pytest.approx(mean) and f"| {method} | 3 | {mean:.3f} ± " in text
        low, high = (found["methods"][method]["over_base"]["rougeL"][end] for end in ("low", "high"))
        assert f"{low:+.3f} to {high:+.3f}" in text
    assert "| hybrid − galore |" in text and "factor 3, at the edge (0.3: 2.500, 1: 2.400, 3: 2.300)" in text
    assert (
        "One seed of each, trained in fp16 / in bf16" in text
        and "galore in fp16 instead of bf16 (seed 0) costs no quality that shows" in text
    )
    assert "| lora | 0, 1, 2 | not run | no GPU time was left |" in text
    assert "predicted hours a seed on a T4" in text and "does not fit" not in text.split("| hybrid |")[-1][:80]
    for picture in found["figures"]:
        assert f"![{picture['alt']}](results/reference/figures/{picture['file']})" in text
        assert (folder / "figures" / picture["file"]).stat().st_size > 1000
    assert section(folder, BENCH) == text


def test_a_failed_run_is_an_empty_cell_with_its_reason(taken):
    folder, _ = taken(
        galore_s2={
            "status": "failed",
            "error": "OutOfMemoryError: no room for /home/me/x/y.bin, see https://a.b/c/d",
            "evaluation": None,
        }
    )
    assert "| galore | 2 | failed | OutOfMemoryError: no room for y.bin, see https://a.b/c/d |" in section(
        folder, BENCH
    )
    assert read_json(folder / "summary.json")["methods"]["galore"]["seeds"] == [0, 1]


def test_what_is_taken_is_small_and_names_no_private_place(taken):
    folder, study = taken()
    config = read_json(study.config_path)
    config["config"] |= {
        "sources": "alpaca=/home/me/rows.jsonl,/home/me/test.jsonl; tulu=hub",
        "model": "/home/me/gemma",
    }
    write_json(study.config_path, config)
    long = [{"step": n, "loss": 3.0, "grad_norm": 1.0} for n in range(1, 939)]
    record = {**read_json(study.record_path("qlora", 0)), "history": long, "layers": [{"layer": 0}]}
    record["config"] |= {"sources": "alpaca=/home/me/rows.jsonl", "model": "/home/me/gemma"}
    fake_study.write_record(study, record)
    reference_results.take(study, folder)
    kept = read_json(folder / "records" / "qlora-s0.json")
    assert len(kept["history"]) == 60 and (kept["history"][0]["step"], kept["history"][-1]["step"]) == (1, 938)
    assert (
        "layers" not in kept and kept["config"]["sources"] == "alpaca=rows.jsonl" and kept["config"]["model"] == "gemma"
    )
    assert read_json(folder / "config.json")["config"]["sources"] == "alpaca=rows.jsonl,test.jsonl; tulu=hub"
    texts = [path.read_text() for path in folder.rglob("*.json")] + [(folder / "results.csv").read_text()]
    assert not [text for text in texts if "/home/me" in text]
    assert not [text for text in texts if str(study.folder) in text]
    answer = json.loads(study.predictions_path("qlora", 0).read_text().splitlines()[0])["answer"]
    assert not any(answer in text for text in texts)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
    assert not (folder / "records-fp16").exists()  # of an earlier taking


def test_readme_with_a_finished_study_comes_back_byte_for_byte(taken):
    folder, _ = taken()
    made = {"reference": section(folder, BENCH)}
    whole = readme.with_sections("before\n<!-- reference -->\nold\n<!-- /reference -->\nafter\n", made)
    emptied = re.sub(r"(<!-- reference -->\n).*?(<!-- /reference -->)", r"\1\2", whole, flags=re.DOTALL)
    assert len(emptied) < len(whole) - 1000 and readme.with_sections(emptied, made) == whole
    assert whole.startswith("before\n") and whole.endswith("\nafter\n")


def _gap(value, half):
    return {"value": value, "low": value - half, "high": value + half, "is_noise": abs(value) <= half}


def _claims(found):
    return {claim: verdict for claim, verdict, _ in reference_findings.claims(found)}


def test_claims_are_decided_by_the_intervals_alone(taken):
    folder, _ = taken()
    found = read_json(folder / "summary.json")
    names = ("If RAM is low, use QLoRA", "GaLore might learn better", "The hybrid keeps general knowledge")
    assert _claims(found)[names[0]] == "supported"  # least memory, and a gain over base
    found["methods"]["qlora"]["peak_memory_gib"] = [9.0, 9.0, 9.0]
    assert _claims(found)[names[0]] == "not supported"
    found["methods"]["qlora"]["over_base"]["rougeL"] = _gap(0.001, 0.01)
    found["methods"]["qlora"]["peak_memory_gib"] = [0.1, 0.1, 0.1]
    assert _claims(found)[names[0]] == "not decided"
    for values, verdict in (
        ((0.02, 0.02), "supported"),
        ((0.02, 0.0), "not decided"),
        ((-0.02, 0.02), "not supported"),
    ):
        found["pairs"] = [
            {"metric": metric, "method": "galore", "other": "qlora", "difference": v, "low": v - 0.01, "high": v + 0.01}
            for metric, v in zip(("bleu4", "rougeL"), values)
        ]
        assert _claims(found)[names[1]] == verdict
    for values, verdict in (((-0.1, -0.1), "supported"), ((-0.1, 0.0), "not decided"), ((0.1, -0.1), "not supported")):
        found["losses"] = [
            {"what": "general_loss", "method": "hybrid", "other": other, **_gap(v, 0.01)}
            for other, v in zip(("qlora", "galore"), values)
        ]
        assert _claims(found)[names[2]] == verdict
    found["losses"] = [
        {"what": "general_loss", "method": "qlora", "other": "hybrid", **_gap(0.1, 0.01)},
        {"what": "general_loss", "method": "galore", "other": "hybrid", **_gap(0.1, 0.01)},
    ]
    assert _claims(found)[names[2]] == "supported"  # the same, told the other way round


def test_a_study_without_a_finished_run_is_not_taken(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base",))
    with pytest.raises(StudyError, match="no finished run"):
        reference_results.take(study, tmp_path / "reference")


def test_a_run_in_fp16_that_was_not_scored_is_an_empty_cell_with_its_reason(taken, tmp_path):
    folder, study = taken()
    sibling = reference_results.sibling_of(study)
    record = {**read_json(sibling.record_path("galore", 0)), "evaluation": None, "eval_loss": None}
    record["evaluation_error"] = "RuntimeError: cannot read /home/me/weights.bin"
    fake_study.write_record(sibling, record)
    reference_results.take(study, folder, sibling=sibling, lacking="no GPU was left")
    text, both = section(folder, BENCH), read_json(folder / "summary.json")["precision"]["galore"]
    assert both["difference"] is None and both["fp16"]["rougeL"] is None and both["fp16"]["valid_loss"] == 2.6
    assert "(galore: RuntimeError: cannot read weights.bin; no GPU was left)" in text
    assert "galore in fp16 instead of bf16 (seed 0) was trained, not scored: validation loss +0.0000" in text


def test_answers_are_cut_at_the_first_looks_limit(taken, monkeypatch, tmp_path):
    folder, study = taken()
    assert read_json(folder / "summary.json")["first_look"] is None  # a limit of 48 is below it
    monkeypatch.setattr(reference_results, "FIRST_LOOK_TOKENS", 2)
    monkeypatch.setattr(reference_results.data, "load_tokenizer", lambda model: tiny.tokenizer())
    reference_results.take(study, folder)
    found = read_json(folder / "summary.json")
    look = found["first_look"]
    assert look["max_new_tokens"] == 2 and set(look["scores"]) == set(METHODS)
    for method in METHODS[1:]:
        assert 0 < look["scores"][method]["rougeL"] < found["methods"][method]["scores"]["rougeL"]["value"]
    text = section(folder, BENCH)
    assert "| BLEU-4 / ROUGE-L | here | cut at 2 tokens | first look |" in text
    bleu, rouge = (look["scores"]["qlora"][metric] for metric in ("bleu4", "rougeL"))
    assert f" | {bleu:.3f} / {rouge:.3f} | 0.122 / 0.400 |" in text


def test_what_rounding_to_4_bits_costs_is_told_apart_from_forgetting(taken):
    folder, study = taken()
    for record in study.records():
        if record["method"] == "qlora":
            record["evaluation"]["general_loss_nf4"] = record["evaluation"]["general_loss"] - 0.05
            fake_study.write_record(study, record)
    reference_results.take(study, folder)
    found = read_json(folder / "summary.json")
    rise = found["methods"]["qlora"]["general_loss"][0] - found["methods"]["base"]["general_loss"][0] - 0.05
    told = next(line for line in reference_findings.findings(found) if "without any training" in line)
    assert f"qlora {rise:+.3f} of " in told and "changes it by +0.051 for qlora more" in told
    why = {claim: why for claim, _, why in reference_findings.claims(found)}["The hybrid keeps general knowledge"]
    assert f"by 4 bits alone, untrained: qlora {rise:+.3f}" in why


def test_a_best_rate_at_the_edge_of_the_sweep_is_a_finding(taken):
    folder, _ = taken()
    found = read_json(folder / "summary.json")
    told = [line for line in reference_findings.findings(found) if "best of the sweep" in line]
    assert len(told) == 1 and "the largest tried for galore," in told[0]
    found["methods"]["galore"]["sweep"]["from"]["is_at_edge"] = False
    assert not [line for line in reference_findings.findings(found) if "best of the sweep" in line]
    assert not [line for line in reference_findings.findings(found) if "scaled together" in line]
    found["methods"]["galore"]["sweep"]["rates"]["another"] = 1.0
    assert any("two rates of galore were scaled together" in line for line in reference_findings.findings(found))


@pytest.mark.parametrize(
    "low, high, said",
    [(-0.0196, -0.0001, "-0.0196 to -0.0001"), (-0.0123, 0.0, "-0.012 to +0.000"), (0.01, 0.02, "+0.010 to +0.020")],
)
def test_an_interval_shows_on_which_side_of_0_its_ends_lie(low, high, said):
    assert ends({"value": (low + high) / 2, "low": low, "high": high}) == said


def test_speed_is_the_median_over_steps_and_compiling_stands_apart(taken):
    history = [{"step": 1, "loss": 3.0, "tokens": 100, "seconds": 50.0}]
    history += [{"step": n, "loss": 3.0, "tokens": 100, "seconds": s} for n, s in ((2, 0.1), (3, 0.2), (4, 0.1))]
    folder, _ = taken(galore_s0={"history": history, "first_step_s": 50.0})
    known = read_json(folder / "summary.json")["methods"]["galore"]
    assert known["median_tokens_per_second"][0] == pytest.approx(750.0) and known["first_step_seconds"][0] == 50.0


def test_answers_of_a_resumed_session_are_timed_by_all_of_their_tokens(taken):
    folder, study = taken()
    record = read_json(study.record_path("galore", 0))
    tokens = sum(json.loads(line)["n_tokens"] for line in study.predictions_path("galore", 0).read_text().splitlines())
    record["evaluation"] |= {"generate_seconds": 3.0, "generated_tokens": tokens / 4}
    fake_study.write_record(study, record)
    reference_results.take(study, folder)
    assert read_json(folder / "summary.json")["methods"]["galore"]["generate_seconds"][0] == pytest.approx(12.0)


def test_scores_by_source_are_shown_where_there_are_several(taken):
    folder, _ = taken()
    found = read_json(folder / "summary.json")
    assert sum(part["rows"] for part in found["sources"].values()) == found["n_test"]
    text = section(folder, BENCH)
    for source, part in found["sources"].items():
        cells = " | ".join(f"{part['scores'][method]['rougeL']:.3f}" for method in METHODS)
        assert f"| {source} ({part['rows']} rows) | {cells} |" in text


def test_speeds_of_a_t4_are_predicted_from_one_card():
    fast = {**BENCH[0], "method": "qlora", "precision": "fp16", "cap_gib": 14.5, "device": "NVIDIA H200", "tok_s": 1e6}
    usable = reference_t4._of_one_card([*BENCH, fast])
    assert len({row["device"] for row in usable}) == 1 and {row["method"] for row in usable} == set(ALL)
    assert reference_t4._of_one_card([]) == []


def test_a_seed_that_was_not_scored_leaves_the_findings_standing(taken):
    folder, study = taken(qlora_s2={"evaluation": None, "eval_loss": None})
    for seed in (0, 1):
        record = read_json(study.record_path("qlora", seed))
        record["evaluation"]["general_loss_nf4"] = record["evaluation"]["general_loss"]
        fake_study.write_record(study, record)
    reference_results.take(study, folder)
    found = read_json(folder / "summary.json")
    assert found["methods"]["qlora"]["general_loss"][2] is None and found["methods"]["qlora"]["general_loss_nf4"]
    assert not any("without any training" in line for line in reference_findings.findings(found))
    assert "| qlora | 2 | trained |" in section(folder, BENCH)


def test_a_run_in_bf16_that_was_not_scored_is_told_too(taken):
    folder, study = taken(galore_s0={"evaluation": None, "eval_loss": None, "evaluation_error": "OSError: full"})
    sibling, scored = reference_results.sibling_of(study), read_json(study.record_path("galore", 1))
    fake_study.write_record(sibling, {**scored, "seed": 0, "precision": "fp16"})
    reference_results.take(study, folder, sibling=sibling, lacking="no GPU was left")
    text = section(folder, BENCH)
    assert "Empty cells are runs that were trained and not evaluated (galore: OSError: full)." in text


def test_a_model_that_stops_by_itself_is_not_said_to_run_on(taken):
    folder, _ = taken()
    found = read_json(folder / "summary.json")
    found["first_look"] = {"max_new_tokens": 96, "scores": {}}
    for share, is_said in ((0.01, False), (0.995, True)):
        found["methods"]["base"]["truncated_share"] = share
        write_json(folder / "summary.json", found)
        assert ("seldom stops by itself (99.5%" in section(folder, BENCH)) == is_said


def test_without_speeds_nothing_is_said_of_where_they_come_from(taken):
    folder, _ = taken()
    assert "How predicted" in section(folder, BENCH) and "How predicted" not in section(folder, [])


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
