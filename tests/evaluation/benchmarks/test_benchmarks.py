"""Benchmarks give the harness's own numbers."""

from pathlib import Path

import pytest
import tiny
from benchmark_rows import POET, SHIP, TABLE, written

pytest.importorskip("lm_eval")

from lm_eval import evaluator, tasks
from lm_eval.models.huggingface import HFLM

from peftlib.core import record as records
from peftlib.core.errors import ConfigError, DataError
from peftlib.core.paths import pip_line
from peftlib.evaluation.benchmarks import tasks as benchmarks
from peftlib.evaluation.benchmarks.run import bench, bench_study
from peftlib.models.chat_template import set_template
from peftlib.runner import console

QUIET = {"log": lambda line: None}
FAST = ("arc_easy", "boolq", "winogrande")


def the_harness_itself(name, rows, monkeypatch):
    """What the harness gives for a task of its own with its own model class; only the download is replaced."""
    from datasets import Dataset, DatasetDict

    splits = DatasetDict(dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows)))
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.api.task.datasets.load_dataset", lambda **_: splits)
        folder = Path(tasks.__file__).parent / benchmarks._KNOWN[name][2]
        manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
        lm = HFLM(pretrained=tiny.model(), tokenizer=set_template(tiny.tokenizer()), batch_size=8, max_length=2048)
        chat = name == "gsm8k"
        return evaluator.simple_evaluate(
            lm, tasks=[name], task_manager=manager, bootstrap_iters=0, apply_chat_template=chat, batch_size=8
        )["results"][name]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TABLE])
def test_local_files_give_the_numbers_of_the_harness_on_the_rows_of_the_hub(
    name, make_study, tmp_path, monkeypatch, subtests
):
    file, rendered, of_the_hub = TABLE[name]
    theirs = the_harness_itself(name, of_the_hub, monkeypatch)
    for kind, rows in (("renderings", rendered), ("the hub's fields", of_the_hub)):
        with subtests.test(kind):
            study = make_study(study=kind[:3])
            record = bench(study, "base", name, data=written(tmp_path / kind, file, rows), **QUIET)
            found = record["benchmarks"][name]
            assert found["score"] == theirs[f"{found['metric']},{found['filter']}"] and found["n"] == len(rows)


def test_pages_of_wikitext_are_the_harness_s(make_study, tmp_path, monkeypatch):
    theirs = the_harness_itself("wikitext", [{"page": SHIP}, {"page": POET}], monkeypatch)
    folder = written(tmp_path / "eval", "wikitext2_raw_test.txt", f" \n{SHIP}{POET}")
    found = bench(make_study(), "base", "wikitext", data=folder, **QUIET)["benchmarks"]["wikitext"]
    assert found["score"] == pytest.approx(theirs["word_perplexity,none"], rel=1e-9) and found["n"] == 2
    assert found["chance"] is None and found["is_perplexity"]


def test_answers_are_generated_and_parsed_as_by_the_harness(make_study, tmp_path, monkeypatch):
    rows = [{"question": f"What is {n} and {n}?", "answer": f"{n}\n#### {2 * n}"} for n in range(6)]
    theirs = the_harness_itself("gsm8k", rows, monkeypatch)
    written(tmp_path / "eval" / "gsm8k", "train.jsonl", rows)
    folder = written(tmp_path / "eval" / "gsm8k", "test.jsonl", rows).parent
    study = make_study()
    found = bench(study, "base", "gsm8k", data=folder, **QUIET)["benchmarks"]["gsm8k"]
    assert found["score"] == theirs["exact_match,flexible-extract"] and found["is_chat"] and found["shots"] == 5
    assert found["chance"] == 0.0


def test_guessing_counts_the_choices_and_the_most_frequent_of_fixed_answers(files):
    four = benchmarks.load("arc_easy", files)
    assert four.chance(list(four.task.eval_docs)) == 0.25
    two = benchmarks.load("boolq", files)
    docs = list(two.task.eval_docs)
    assert two.chance(docs) == 0.6 and two.chance([docs[0], docs[1]]) == 0.5  # three of five are no
    assert four.labels(list(four.task.eval_docs)) is None and sorted(two.labels(docs)) == ["no"] * 3 + ["yes"] * 2


def test_a_trained_method_and_a_model_made_elsewhere_are_scored_too(finished, files, tmp_path, capsys):
    study = finished("qlora")
    command = ["bench", "base", "qlora", "--study", "tiny", "--tasks", "boolq", "--data", str(files), "--limit", "3"]
    from peftlib.cli import main

    assert main(command) == 0
    assert "qlora: boolq acc " in capsys.readouterr().out
    bare = tiny.model_folder(tmp_path / "theirs", seed=5)  # its tokenizer has no chat template: it gets Gemma's
    found = bench(study, None, "boolq", path=bare, data=files, **QUIET)
    assert found["method"] == "theirs" and found["benchmarks"]["boolq"]["n"] == 5
    assert main(["bench", "--study", "tiny"]) == console.ERROR_CODE


def test_the_setting_of_a_study_says_what_its_notebook_scores(make_study, files, monkeypatch):
    lines = []
    how = {"log": lines.append}
    assert not bench_study(make_study(), ["base"], **how) and lines == [
        f"no benchmarks: to score some, run {pip_line('bench')} and set benchmarks = 'retention'"
    ]
    asked = {"benchmarks": "arc_easy", "benchmark_data": str(files), "benchmark_limit": 2}
    study = make_study(**asked)
    assert bench_study(study, ["base"], **how)
    assert records.load(study, "base", 0)["benchmarks"]["arc_easy"]["n"] == 2
    # what was not asked for does not end a notebook
    monkeypatch.setattr("peftlib.evaluation.benchmarks.run.resolve_device", lambda device: "cuda")
    missing = str(files / "none")
    with pytest.raises(ConfigError, match="no such folder"):
        bench_study(make_study(**{**asked, "benchmark_data": missing}), ["base"], **how)
    (files / "arc_easy.jsonl").unlink()
    with pytest.raises(DataError, match="needs one arc_easy.jsonl"):
        bench_study(make_study(**{**asked, "benchmark_limit": 3}), ["base"], **how)
    assert not bench_study(make_study(**{**asked, "benchmarks": "auto"}), ["base"], **how)
    assert lines[-1].startswith("no benchmarks: arc_easy needs one arc_easy.jsonl")
