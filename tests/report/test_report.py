"""A report says what the records and predictions say, refuses what does not belong together, and is reproducible."""

import csv
import html.parser
import json
import re
import statistics

import fake_study
import pandas as pd
import pytest

from peftlib.core.errors import StudyError
from peftlib.core.files import read_json
from peftlib.core.markdown import escape, table
from peftlib.evaluation import comparison, hf_metrics, metrics, stats
from peftlib.report import build as report
from peftlib.report import charts, findings
from peftlib.report.compare import compare_studies
from peftlib.report.render import render
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


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of base and qlora on six rows, to be spoilt. No figures: they are tested on `built`."""
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    return fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), n=6)


def rows_of(study):
    with open(study.results_path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
        "Caution, 48 test rows"
    )
    value = shown.results.set_index("method")["rougeL"]
    assert f"galore has the highest ROUGE-L ({value['galore']:.3f})" in said
    assert f"ROUGE-L (base {value['base']:.3f})" in said and "with qlora, galore and hybrid" in said
    assert "the gain is more than knowing when to stop" in said
    assert "qlora needs the least memory: 1.12 GiB, hybrid 1.77, galore 2.24;" in said
    assert "base 100%, qlora 0%" in said


@pytest.mark.parametrize(
    "low, high, cut_share, said",
    [
        (0.01, 0.03, 0.1, "so the gain is more than knowing when to stop"),
        (-0.01, 0.03, 0.1, "inside the noise, so the gain may be no more than knowing when to stop"),
        (-0.03, -0.01, 0.49, "so the cut base is the better one"),
        (0.01, 0.03, 0.96, "higher; 96% of its own answers met the token limit uncut"),
        (-0.01, 0.03, 0.5, "inside the noise; 50% of its own answers met the token limit uncut"),
        (-0.03, -0.01, 1.0, "lower; 100% of its own answers met the token limit uncut"),
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
    assert "Not matched between runs" in small.report_path.read_text(encoding="utf-8")


def test_different_seed_sets_are_named(small):
    fake_study.write_record(small, fake_study.record_of("galore", seed=1, evaluation=None))
    assert "seeds: 0 (qlora); 1 (galore)" in report.build_report(small).notes


def test_the_original_studys_figures_stand_beside_ours_as_quoted(built):
    study, shown = built
    text = study.report_path.read_text(encoding="utf-8")
    assert "## Beside the original study" in text
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


# What does not belong together is refused, and nothing is written


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
        (twin, r"qlora-copy\.json is a copy of another record: both are qlora \(seed 0\)"),
        (damaged_record, r"qlora-s0\.json is damaged"),
        (row_missing, r"qlora-s0\.jsonl: 5 answers, not one to each of the 6 test rows.*'alpaca-0'"),
        (damaged_line, r"qlora-s0\.jsonl: line 6 is damaged"),
        (line_twice, r"qlora-s0\.jsonl: 7 answers, not one to each of the 6 test rows"),
        (spoilt(split_hash="0ther"), r"qlora-s0\.jsonl: line 3 has split_hash 0ther.*5f1e0c0ffee0"),
        (spoilt(id="elsewhere-1"), r"qlora-s0\.jsonl: 6 answers, not one to each.*'alpaca-3'"),
        (spoilt(prompt_sha256="00"), r"qlora-s0\.jsonl: 6 answers, not one to each.* and prompts.*'alpaca-3'"),
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


# Texts of a model are shown, never obeyed

NASTY = "a | b `code` <script>alert(1)</script> *x* _y_ [l](u) $1$ ~~z~~ \\| &amp;\r\n    # indent\n| --- |\u2028end"


def test_answers_with_markup_stay_in_their_cell(small):
    rows = fake_study.made_rows(6)
    fake_study.write_predictions(small, "qlora", 0, rows, [NASTY] * 6)
    report.build_report(small)
    text = small.report_path.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.startswith("| qlora |") and "code" in line]
    assert len(lines) == 6 and len(text.splitlines()) == len(text.split("\n")) - 1
    for line in lines:
        assert line.count("|") == 3
        assert "<script" not in line and r"\`code\`" in line
        assert "<br>&nbsp;&nbsp;&nbsp;&nbsp;# indent<br>&#124; --- &#124;" in line
    page = (small.folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page


def test_escaped_markdown_shows_any_text_as_it_is():
    markdown_it = pytest.importorskip("markdown_it")  # comes with what the project installs
    shown = markdown_it.MarkdownIt("commonmark").enable("table").render(table([("a",), (NASTY,)]))
    cells = []

    class Cells(html.parser.HTMLParser):
        def handle_data(self, text):
            cells.append(text)

        def handle_starttag(self, tag, attributes):
            assert tag in ("table", "thead", "tbody", "tr", "th", "td", "br"), tag
            cells.append("\n" if tag == "br" else "")

    Cells().feed(shown.replace("<br>", "<br/>") if "<br>" in shown else shown.replace("&lt;br&gt;", "<br/>"))
    text = "".join(cells).replace("\xa0", " ")
    assert NASTY.replace("\r\n", "\n").replace("\u2028", "\ufffd") in text
    assert escape("max_length of __init__") == r"max_length of \_\_init\_\_"


BLOCKS = """{% import macros as doc %}{{ doc.heading("H", 2) }}{% call doc.paragraph() %}p |
q{% endcall %}{% call doc.list() %}{% call doc.item() %}one{% endcall %}{% endcall %}
{% call doc.table(["a", "b"]) %}{{ doc.row("<", "2") }}{% endcall %}"""


def test_both_formats_write_every_block_and_escape_it(tmp_path):
    (tmp_path / "blocks").write_text(BLOCKS)
    made = {name: render("blocks", tmp_path, macros=f"{name}.jinja") for name in ("markdown", "page")}
    assert made["markdown"] == "## H\n\np &#124; q\n\n- one\n\n| a | b |\n|---|---:|\n| &lt; | 2 |\n"
    for part in (
        "<h2>H</h2>",
        "<p>p | q</p>",
        "<li>one</li>",
        '<table class="text1">',
        "<tr><td>&lt;</td><td>2</td></tr>",
    ):
        assert part in made["page"]


# Two studies


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Folders of two studies of base and qlora on the same rows, with other answers."""
    first = fake_study.make(tmp_path / "a", monkeypatch, methods=("base", "qlora"), n=120)
    second = fake_study.make(tmp_path / "b", monkeypatch, methods=("base", "qlora"), n=120)
    rows = fake_study.made_rows(120)
    fake_study.write_predictions(second, "qlora", 0, rows, fake_study.answers_of(rows, "galore", 0))
    return first, second


def test_studies_are_compared_row_by_row(two):
    printed = compare_studies([study.folder for study in two])
    assert "| a/made-up | qlora | 1 | 0." in printed
    assert re.search(r"\| qlora: b/made-up - a/made-up \| ROUGE-L \| higher \| \+0\.\d+ \| \+", printed)
    assert re.search(r"\| base: b/made-up - a/made-up \| ROUGE-L \| inside the noise \| \+0\.0000 \| ", printed)
    assert "From a/made-up to b/made-up: none" in printed


def test_studies_that_cannot_be_compared_are_refused(two, tmp_path):
    first, second = two
    with pytest.raises(StudyError, match="two or more different"):
        compare_studies([str(first.folder)] * 2)
    with pytest.raises(StudyError, match=r"nowhere is not a study: there is no config\.json"):
        compare_studies([str(first.folder), str(tmp_path / "nowhere")])
    for method in ("base", "qlora"):
        second.predictions_path(method, 0).unlink()
    with pytest.raises(StudyError, match="no scores in b/made-up: run 04_eval"):
        compare_studies([str(first.folder), str(second.folder)])
    fake_study.write_json(second.manifest_path, {"split_hash": "0ther"})
    for method in ("base", "qlora"):
        fake_study.write_record(second, fake_study.record_of(method, split_hash="0ther"))
    with pytest.raises(StudyError, match="a/made-up has 5f1e0c0ffee0; b/made-up has 0ther"):
        compare_studies([str(first.folder), str(second.folder)])


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
    assert "qlora (seed 0) was not treated as the others: from step 9 on its learning rates were 0.3 times" in text
    assert "qlora (seed 0) went on in fp16 from step 12 on (before: bf16)" in text


def test_a_loss_whose_perplexity_no_number_holds_is_reported(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"))
    fake_study.write_record(study, fake_study.record_of("base", eval_loss=800.0))
    made = report.build_report(study)
    assert any("base 800.000 (perplexity inf)" in line for line in made.findings)
    assert "| inf |" in study.report_path.read_text(encoding="utf-8")
