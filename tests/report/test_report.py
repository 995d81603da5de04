"""A report says what the records and predictions say, refuses what does not belong together, and is reproducible."""

import json
import re

import fake_study
import pandas as pd
import pytest
from fake_study import rows_of

from peftlib.core.files import read_json
from peftlib.core.markdown import escape
from peftlib.evaluation import comparison, hf_metrics, metrics, stats
from peftlib.report import build as report
from peftlib.report import findings
from peftlib.report.tables import COLUMNS

# As the contract lists them.
CONTRACT = [
    "method",
    "seed",
    "status",
    "n_test",
    "bleu4",
    "rougeL",
    "train_loss",
    "eval_loss",
    "trainable_params",
    "steps",
    "train_tokens",
    "learning_rate",
    "learning_rate_2",
    "precision",
    "device",
    "peak_memory_gib",
    "peak_reserved_gib",
    "tokens_per_second",
    "train_seconds",
    "split_hash",
]


@pytest.fixture(scope="module")
def monkeymodule():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def built(tmp_path_factory, monkeymodule):
    """(study, Report) of base, qlora, galore and hybrid; read only."""
    monkeymodule.setattr("peftlib.report.chart._DPI", 30)  # drawing takes most of the time
    study = fake_study.make(tmp_path_factory.mktemp("built"), monkeymodule)
    return study, report.build_report(study)


def test_results_csv_has_the_contracts_columns_and_one_row_a_run(built):
    study, _ = built
    header = study.results_path.read_text(encoding="utf-8").splitlines()[0]
    assert header.split(",") == list(COLUMNS) == CONTRACT
    assert [(row["method"], row["seed"]) for row in rows_of(study)] == [
        (method, "0") for method in ("base", "qlora", "galore", "hybrid")
    ]


def test_results_csv_holds_what_the_records_hold_and_leaves_unknowns_empty(built):
    study, _ = built
    base, qlora = rows_of(study)[:2]
    record = read_json(study.record_path("qlora", 0))
    assert float(qlora["train_loss"]) == pytest.approx(record["train_loss"], rel=1e-9)
    assert float(qlora["peak_memory_gib"]) == pytest.approx(record["peak_memory_bytes"] / 2**30, rel=1e-9)
    assert (qlora["steps"], qlora["trainable_params"], qlora["n_test"]) == ("24", "3796992", "48")
    assert qlora["device"] == "CPU (test, 2 cores)" and qlora["split_hash"] == fake_study.SPLIT
    assert qlora["peak_reserved_gib"] == qlora["learning_rate_2"] == ""
    unknown = [
        "train_loss",
        "trainable_params",
        "steps",
        "train_tokens",
        "learning_rate",
        "peak_memory_gib",
        "train_seconds",
    ]
    assert [base[name] for name in unknown] == [""] * len(unknown)


def test_scores_equal_sacrebleu_on_the_files_themselves(built):
    import sacrebleu

    study, _ = built
    references = {row["id"]: row["messages"][-1]["content"] for row in fake_study.made_rows(48)}
    for row in rows_of(study):
        lines = study.predictions_path(row["method"], 0).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        expected = sacrebleu.corpus_bleu([f["answer"] for f in found], [[references[f["id"]] for f in found]])
        assert float(row["bleu4"]) == pytest.approx(expected.score / 100, abs=1e-9)


def test_results_of_the_report_equal_the_file(built):
    study, shown = built
    read = pd.read_csv(study.results_path)
    assert list(shown.results.columns) == list(read.columns)
    pd.testing.assert_frame_equal(
        shown.results.astype({"seed": "float64", "n_test": "float64", "steps": "float64", "train_tokens": "float64"})[
            ["seed", "n_test", "bleu4", "rougeL", "steps", "train_tokens", "learning_rate"]
        ],
        read.astype({"seed": "float64", "n_test": "float64"})[
            ["seed", "n_test", "bleu4", "rougeL", "steps", "train_tokens", "learning_rate"]
        ],
        rtol=1e-9,
    )


def test_the_same_inputs_give_the_same_bytes(built, tmp_path, monkeypatch):
    first, _ = built
    second = fake_study.make(tmp_path, monkeypatch)
    report.build_report(second)
    names = ["results.csv", "report.md", "report.html"]
    names += [f"figures/{path.name}" for path in sorted(first.figures_dir.iterdir())]
    assert len(names) > 10
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


def test_report_holds_the_fields_table_with_base_cut_at_the_median_reference(built):
    study, shown = built
    text = study.report_path.read_text(encoding="utf-8")
    cut = shown.study.cut_at_words
    assert f"| base, cut at the median reference length ({cut} words) |" in text
    references = [row["messages"][-1]["content"] for row in fake_study.made_rows(48)]
    assert cut == metrics.median_words(references)
    answers = fake_study.answers_of(fake_study.made_rows(48), "base", 0)
    expected = hf_metrics.score([metrics.cut_words(answer, cut) for answer in answers], references)
    assert f"{expected['rougeL']:.4f} (" in text
    assert list(shown.table["technique"])[2:] == ["qlora", "galore", "hybrid"]
    assert "Q4_K_M" in text and "sacrebleu, nrefs:1" in text


def test_findings_are_made_from_the_numbers(built):
    _, shown = built
    said = "\n".join(shown.findings)
    assert shown.findings[: len(shown.summary)] == shown.summary and shown.summary[-1].startswith(
        "Caution: 48 test rows"
    )
    value = shown.results.set_index("method")["rougeL"]
    assert f"galore has the highest ROUGE-L ({value['galore']:.3f})" in said
    assert f"ROUGE-L (base {value['base']:.3f})" in said and "with qlora, galore and hybrid" in said
    assert "the gain is more than knowing when to stop" in said
    assert "qlora uses the least memory: 1.12 GiB, hybrid 1.77, galore 2.24;" in said
    assert "base 100%, qlora 0%" in said


@pytest.mark.parametrize(
    "low, high, cut_share, said",
    [
        (0.01, 0.03, 0.1, "so the gain is more than knowing when to stop"),
        (-0.01, 0.03, 0.1, "inside the noise, so the gain may be no more than knowing when to stop"),
        (-0.03, -0.01, 0.49, "so the cut base is better"),
        (0.01, 0.03, 0.96, "higher; 96% of its own answers reached the token limit uncut"),
        (-0.01, 0.03, 0.5, "inside the noise; 50% of its own answers reached the token limit uncut"),
        (-0.03, -0.01, 1.0, "lower; 100% of its own answers reached the token limit uncut"),
    ],
)
def test_a_method_that_never_stops_is_not_said_to_know_when(low, high, cut_share, said):
    assert findings.worth(stats.Interval((low + high) / 2, low, high), cut_share).startswith(said)


def test_a_winner_that_the_untrained_model_beats_is_not_left_so(built):
    _, shown = built
    assert "the untrained model has a higher" not in shown.summary[0]
    boot = stats.bootstrap(shown.study.systems())
    pairs = comparison.pairs_of(shown.study.systems(), boot)
    boot.value["base"]["rougeL"] = 0.99
    told = findings.summary(shown.study, boot, pairs, [], shown.numbers)[0]
    assert "galore has the highest ROUGE-L" in told and told.endswith(
        "; the untrained model has a higher ROUGE-L: 0.990."
    )


def test_the_report_opens_with_at_most_five_sentences_that_answer_the_question(built):
    study, shown = built
    title, opening = study.report_path.read_text(encoding="utf-8").split("\n\n")[:2]
    assert title == "# Study made-up" and opening == " ".join(map(escape, shown.summary)) and len(shown.summary) <= 5
    for word in ("highest ROUGE-L", "the noise", "GiB", "tokens/s", "forgetting", "Caution"):
        assert word in opening


def test_no_table_of_the_report_runs_out_of_the_page(built):
    study, _ = built
    for line in study.report_path.read_text(encoding="utf-8").splitlines():
        assert not line.startswith("|") or line.count("|") <= 9, line  # eight columns
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<table") == page.count('<div class="wide"><table') > 10 and ".wide { overflow-x: auto; }" in page


def test_what_was_forgotten_stands_in_table_and_findings(built):
    study, shown = built
    cells = dict(zip(shown.table["technique"], shown.table["general text loss (change)"]))
    assert (cells["base"], cells["qlora"], cells["galore"]) == ("3.000", "3.060 (+2.0%)", "3.300 (+10.0%)")
    said = next(line for line in shown.findings if "general text" in line)
    assert (
        "512 tokens" in said and "base 3.000, qlora 3.060 (+2.0%), galore 3.300 (+10.0%), hybrid 2.970 (-1.0%)." in said
    )
    for text in (study.report_path, study.folder / "report.html"):
        assert "World Factbook" in text.read_text(encoding="utf-8")


def test_every_pair_is_compared_and_noise_is_called_noise(built):
    study, shown = built
    pairs = shown.pairs
    assert len(pairs) == 2 * (3 * 2 + 3)  # two scores; three methods against base and cut base, and among themselves
    is_noise = (pairs["low"] <= 0) & (pairs["high"] >= 0)
    assert (pairs["verdict"] == "inside the noise").equals(is_noise)
    assert is_noise.any() and not is_noise.all()
    trained = pairs[(pairs["other"] == "base") & (pairs["metric"] == "rougeL")]
    assert (trained["low"] > 0).all() and (trained["p"] < 0.01).all()
    assert "inside the noise" in study.report_path.read_text(encoding="utf-8")


def test_ten_samples_are_shown_sources_in_turn(built):
    _, shown = built
    assert len(shown.samples) == 10
    assert [sample["source"] for sample in shown.samples[:4]] == ["alpaca", "tulu", "ultrachat", "alpaca"]
    assert list(shown.samples[0])[2:] == ["prompt", "reference", "base", "qlora", "galore", "hybrid"]
    assert shown.samples[2]["prompt"].startswith("user: ")  # earlier turns are part of what was asked


def test_figures_are_written_with_text_for_those_who_cannot_see_them(built):
    study, shown = built
    assert {"loss", "scores", "rougeL_by_source", "rougeL_against_memory", "memory"} <= set(shown.figures)
    for name, path in shown.figures.items():
        assert path.read_bytes().startswith(b"\x89PNG") and path.with_suffix(".svg").exists()
        assert len(shown.alt[name]) > 40 and not re.search(r"[.!?] ", shown.alt[name])  # one sentence
    assert "qlora 1.12 GiB" in shown.alt["memory"]
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(shown.figures)
    assert not re.search(r'(src|href)="(?!data:)', page) and "prefers-color-scheme: dark" in page


def test_the_original_studys_figures_stand_beside_ours_as_quoted(built):
    study, shown = built
    text = study.report_path.read_text(encoding="utf-8")
    assert "## The original study" in text
    assert "| original (quoted) | base | 5 samples | 0.0085 | 0.1355 |" in text
    assert "| original (quoted) | qlora | 5 samples | 0.0227 | 0.1632 |" in text
    ours = shown.scores.set_index("method").loc["qlora"]
    assert f"| this one | qlora | 48 rows | {ours['sample_bleu4']:.4f} | {ours['sample_rougeL']:.4f} |" in text


def test_the_table_has_what_the_field_prints(built):
    _, shown = built
    assert list(shown.table.columns) == [
        "technique",
        "BLEU-4 before",
        "BLEU-4 after (95 %)",
        "ROUGE-L before",
        "ROUGE-L after (95 %)",
        "test loss before",
        "test loss after",
        "general text loss (change)",
        "peak memory GiB",
        "training hours",
    ]
    assert list(shown.table["training hours"]) == ["", "", "0.028", "0.028", "0.028"]
    assert all(len(row) == len(shown.table.columns) for row in shown.table.to_numpy())
