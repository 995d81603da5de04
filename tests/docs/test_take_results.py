"""What becomes of a finished study in results/: one made-up study with every oddity, taken once."""

import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import fake_study
import numpy as np
import pytest
import reference_summary
import take_results
import tiny
from cells import ends
from plan_tables import one_cards_rows
from result_tables import RESULTS, Results, make_all
from study_tables import sides

from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.study import Study
from peftlib.evaluation.benchmarks import rewind
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
        with pytest.MonkeyPatch.context() as once:  # for both
            once.setattr(take_results, "build_report", lambda study: built)
            take_results.take_reference(study, results / "reference")
            take_results.take_demo(study, results / "demo")
        shutil.copytree(RESULTS / "bench", results / "bench")
        folder = results / "reference"
        found = read_json(folder / "summary.json")
        yield SimpleNamespace(study=study, folder=folder, found=found, tables=make_all(Results(results)))


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
    _benchmarks_and_points(study)
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


def _benchmarks_and_points(study):
    """Scores of base, of one seed of qlora and of three of galore, which forgets; qlora is rewound."""
    rng = np.random.default_rng(0)
    for method, seed, skill in (("base", 0, 0.9), ("qlora", 1, 0.9), *(("galore", s, 0.5) for s in range(3))):
        record = read_json(study.record_path(method, seed))
        write = partial(fake_study.write_benchmark, study, record)
        write("arc_easy", rng.random(200) < skill, chance=0.25)
        write("piqa", np.arange(60) % 2)
        write("wikitext", rng.normal(30, 1, 30), weights=10.0, chance=None, is_perplexity=True)
        write("gsm8k", np.arange(50) < 2, chance=0.1)
        fake_study.write_record(study, {name: of for name, of in record.items() if name != "seal"})
    for method, seed, factors in (("base", 0, (0.0,)), ("qlora", 1, (0.5, 1.0))):
        points = [
            {
                **{"factor": f, "valid_loss": {"all": 2.0}, "test_loss": {"all": 2.5 - 0.2 * f}, "bleu4": 0.1},
                **{"general_loss": 3.0 - 0.2 * f, "rougeL": 0.1 + 0.2 * f, "seconds": 1.0, "benchmarks": {}},
            }
            for f in factors
        ]
        of = rewind._identity(study, read_json(study.record_path(method, seed)))
        write_json(rewind.path_of(study, method, seed), {"of": of, "points": points})


def test_the_tables_show_what_the_study_holds(taken):
    for method in ("qlora", "galore"):
        scores = taken.found["methods"][method]["scores"]["rougeL"]
        mean = sum(scores["seeds"]) / 3
        assert scores["value"] == pytest.approx(mean) and f"| {method} | 3 | {mean:.3f} ± " in taken.tables["scores"]
        low, high = (taken.found["methods"][method]["over_base"]["rougeL"][end] for end in ("low", "high"))
        assert f"{low:+.3f} to {high:+.3f}" in taken.tables["scores"]
    gap = next(
        p for p in taken.found["pairs"] if (p["metric"], p["method"], p["other"]) == ("rougeL", "hybrid", "galore")
    )
    turned = f"{-gap['high']:+.3f} to {-gap['low']:+.3f}"
    assert re.search(rf"^\| galore, ROUGE-L \| .* \|  \| \**{re.escape(turned)}", taken.tables["pairs"], re.MULTILINE)
    assert (taken.folder / "pairs.csv").read_text().count("\nrougeL,") == 3 * 2 + 3
    assert "| 3 tried, at the edge |" in taken.tables["cost"] and "| tokens/s (CPU) |" in taken.tables["cost"]
    assert "hours expected on a T4" in taken.tables["t4"] and "does not fit" not in taken.tables["t4"]
    parts = taken.found["sources"]
    head = " | ".join(f"{source} ({part['rows']} rows)" for source, part in parts.items())
    assert taken.tables["sources"].startswith(f"| ROUGE-L by source | {head} |")
    for method in METHODS:
        cells = " | ".join(f"{part['scores'][method]['rougeL']:.3f}" for part in parts.values())
        assert f"| {method} | {cells} |" in taken.tables["sources"]
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
    lines = taken.tables["sides"].splitlines()[2:]
    assert lines[0].startswith("| galore, as in the study | 0.") and lines[1].startswith(
        "| galore with `galore_rank` = 4 | 0."
    )
    assert f"| {ends(gap)} |" in lines[1].replace("**", "") and lines[1].endswith("| 2.00 |")


def test_sides_are_taken_again_beside_a_control_and_the_rest_stays(taken, tmp_path):
    target = tmp_path / "reference"
    shutil.copytree(taken.folder, target)
    shutil.rmtree(target / "records-r4")
    (target / "records-old").mkdir()
    whole = {name: of for name, of in taken.found.items() if name != "seal"}
    old = {"changes": ["moment_bits: 32 -> 8"], "methods": taken.found["sides"]["r4"]["methods"]}
    write_json(target / "summary.json", {**whole, "sides": {"old": old, "r4": {}}, "precision": {}})
    take_results.take_sides(taken.study, target)
    found = read_json(target / "summary.json")
    assert found.pop("control")["devices"]
    assert found.pop("sides") == {"old": old, "r4": {**whole["sides"]["r4"], "is_control": True}}
    assert {name: of for name, of in found.items() if name != "seal"} == {
        k: v for k, v in whole.items() if k != "sides"
    }
    folders = {path.name for path in target.glob("records*")}
    assert folders == {"records", "records-control", "records-fp16", "records-old", "records-r4"}
    rows = [*sides(SimpleNamespace(reference=read_json(target / "summary.json")))]
    assert [row[0] for row in rows[1:]] == [
        "galore, as in the study",
        "galore with `moment_bits` = 8",
        "galore, trained again as in the study",
        "galore with `galore_rank` = 4",
    ]
    write_json(target / "summary.json", {**whole, "split_hash": "other"})
    with pytest.raises(StudyError, match="is of split other: build its data"):
        take_results.take_sides(taken.study, target)
    assert folders == {path.name for path in target.glob("records*")}


def test_benchmarks_stand_beside_the_untrained_model_with_their_seeds(taken):
    found = taken.found["benchmarks"]
    assert found["lost_on"] == ["arc_easy"] and set(found["tasks"]) == {"arc_easy", "piqa", "wikitext", "gsm8k"}
    arc = found["tasks"]["arc_easy"]["methods"]
    assert arc["galore"]["seeds"] == [0, 1, 2] and arc["qlora"]["seeds"] == [1] and arc["base"]["over_base"] is None
    gap = arc["galore"]["over_base"]
    assert f"| galore | {arc['galore']['value']:.3f} (**{ends(gap)}**) |" in taken.tables["benchmarks_tasks"]
    lines = taken.tables["benchmarks_study"].splitlines()
    assert lines[0] == "| method | seeds | mean change on 1 tasks | wikitext, perplexity | gsm8k |"
    change = found["lost"]["galore"]
    assert any(line.startswith(f"| galore | 3 | {change['value']:+.3f} (**{ends(change)}**) | ") for line in lines)
    assert any(re.match(r"\| qlora \| 1 \| .*, at floor", line) for line in lines)
    assert "hybrid" not in taken.tables["benchmarks_study"]


def test_rewound_models_are_a_row_a_method_from_base_to_tuned(taken):
    points = taken.found["rewound"]["qlora"]
    assert [point["factor"] for point in points] == [0.0, 0.5, 1.0]
    known = taken.found["methods"]
    ends = ["{:.3f}".format(known[name]["eval_loss"][0]) for name in ("base", "qlora")]
    row = next(line for line in taken.tables["rewound"].splitlines() if line.startswith("| qlora |"))
    assert "|  | 2.400 / 2.900 / 0.200 / – |  |" in row  # what was not scored is an empty cell
    assert row.startswith(f"| qlora | {ends[0]} / ") and f"|  | {ends[1]} / " in row


def test_an_edition_without_benchmarks_rewinding_or_sides_says_so(taken, tmp_path):
    shutil.copytree(taken.folder.parent, tmp_path / "results")
    path = tmp_path / "results" / "reference" / "summary.json"
    left_out = ("benchmarks", "rewound", "sides", "seal")
    write_json(path, {name: of for name, of in read_json(path).items() if name not in left_out})
    tables = make_all(Results(tmp_path / "results"))
    for name in ("benchmarks_study", "benchmarks_tasks", "rewound", "sides"):
        assert tables[name].startswith("| not measured in this edition |")


def test_a_rise_that_only_one_seed_shows_has_no_interval(taken, tmp_path):
    shutil.copytree(taken.folder.parent, tmp_path / "results")
    path = tmp_path / "results" / "reference" / "summary.json"
    found = read_json(path)
    galore = found["methods"]["galore"]
    for name in ("seeds", "eval_loss", "general_loss"):
        galore[name] = galore[name][:1]
    found["losses"] = [gap for gap in found["losses"] if "galore" not in (gap["method"], gap["other"])]
    write_json(path, {name: of for name, of in found.items() if name != "seal"})
    rise = galore["general_loss"][0] - found["methods"]["base"]["general_loss"][0]
    assert f"| galore | {rise:+.3f} (one seed) |" in make_all(Results(tmp_path / "results"))["general"]


def test_answers_are_cut_at_the_first_looks_limit(taken):
    look = taken.found["first_look"]
    assert look["max_new_tokens"] == 2 and set(look["scores"]) == {"base", "qlora", "galore"}
    for method in ("qlora", "galore"):
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
        reference_summary.seeds_difference(list(rng.normal(size=3)), list(rng.normal(size=3))).is_noise
        for _ in range(400)
    )
    assert 0.92 <= equal / 400 <= 0.98
    with pytest.raises(ValueError, match="1 and 1 seeds"):
        reference_summary.seeds_difference([1.0], [2.0])
