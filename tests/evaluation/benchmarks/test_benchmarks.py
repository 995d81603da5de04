"""Benchmarks give the harness's own numbers, go on where they were cut, and refuse what would make them wrong."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

pytest.importorskip("lm_eval")

from lm_eval import evaluator, tasks
from lm_eval.models.huggingface import HFLM

from peftlib.core import record as records
from peftlib.core.errors import ConfigError, DataError, ModelError, StudyError
from peftlib.evaluation.benchmarks import harness, local
from peftlib.evaluation.benchmarks import tasks as benchmarks
from peftlib.evaluation.benchmarks.run import bench, bench_study
from peftlib.models.chat_template import set_template
from peftlib.runner import console

QUIET = {"log": lambda line: None}
TEXTS = ["What is ice?", "Who swims best?", "Which is of the sea", "Where is the sun at noon?", "Why do cats sleep?"]
CHOICES = [["frozen water", "a metal", "the answer", "wood"], ["a fish", "a model of it", "an anvil", "the user"]] * 3
# {task: (rows as llm-foundry renders them, the same rows in the fields that the harness gets from the hub)}
ARC = (
    [{"query": f"Question: {q}", "choices": c, "gold": i % 4} for i, (q, c) in enumerate(zip(TEXTS, CHOICES))],
    [
        {"question": q, "choices": {"text": c, "label": ["A", "B", "C", "D"]}, "answerKey": "ABCDABCD"[i]}
        for i, (q, c) in enumerate(zip(TEXTS, CHOICES))
    ],
)
PIQA = (
    [{"query": f"Question: {q}\n", "choices": c[:2], "gold": i % 2} for i, (q, c) in enumerate(zip(TEXTS, CHOICES))],
    [{"goal": q, "sol1": c[0], "sol2": c[1], "label": i % 2} for i, (q, c) in enumerate(zip(TEXTS, CHOICES))],
)
BOOLQ = (
    [
        {"query": f"Passage: {q} It is.\nQuestion: is it so?", "choices": ["no", "yes"], "gold": i % 2}
        for i, q in enumerate(TEXTS)
    ],
    [{"passage": f"{q} It is.", "question": "is it so", "label": i % 2, "idx": i} for i, q in enumerate(TEXTS)],
)
WINOGRANDE = (
    [
        {"context_options": ["Mary saw Maria so Mary", "Mary saw Maria so Maria"], "continuation": "hid.", "gold": 1},
        {
            "context_options": ["The cup fell as the cup", "The cup fell as the shelf"],
            "continuation": "'s leg broke.",
            "gold": 0,
        },
    ],
    [
        {"sentence": "Mary saw Maria so _ hid.", "option1": "Mary", "option2": "Maria", "answer": "2"},
        {"sentence": "The cup fell as the _'s leg broke.", "option1": "cup", "option2": "shelf", "answer": "1"},
    ],
)
LAMBADA = (
    [
        {"context": "He gave her the ring,\nand she took the", "continuation": "ring"},
        {"context": "So is it", "continuation": "of"},
    ],
    [{"text": "He gave her the ring,\nand she took the ring"}, {"text": "So is it of"}],
)
SHIP = " = A ship = \n \n The ship sank in 1 @,@ 900 . \n = = Crew = = \n \n It had none . \n \n"
POET = " = Du Fu = \n \n A poet . \n"
TABLE = {
    "arc_easy": ("arc_easy.jsonl", *ARC),
    "piqa": ("piqa.jsonl.gz", *PIQA),
    "boolq": ("boolq.jsonl", *BOOLQ),
    "winogrande": ("winogrande.jsonl", *WINOGRANDE),
    "lambada_openai": ("lambada_openai.jsonl", *LAMBADA),
}


def written(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


FAST = ("arc_easy", "boolq", "winogrande")


@pytest.fixture
def files(tmp_path):
    """Two tasks as llm-foundry renders them."""
    folder = written(tmp_path / "eval", "arc_easy.jsonl", ARC[0])
    return written(folder, "boolq.jsonl", BOOLQ[0])


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


def files_of(study, name="base-s0"):
    folder = study.folder / "benchmarks" / name
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if "responses" not in path.name}


def untimed(record):
    return {task: {**found, "seconds": 0} for task, found in record["benchmarks"].items()}


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_cut_run_goes_on_and_gives_the_very_same_rows(make_study, files, monkeypatch, is_torn):
    monkeypatch.setattr(harness, "_MANY", 6)
    whole = make_study(study="whole")
    expected = bench(whole, "base", "arc_easy,boolq", data=files, **QUIET)

    study, add, added = make_study(study="cut"), harness.Responses.add, []

    def add_and_end(responses, found, **facts):
        add(responses, found, **facts)
        added.append(found)
        if len(added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(harness.Responses, "add", add_and_end)
    with pytest.raises(KeyboardInterrupt):
        bench(study, "base", "arc_easy,boolq", data=files, **QUIET)
    kept = study.folder / "benchmarks" / "base-s0" / "arc_easy.responses.jsonl"
    assert len(kept.read_text().splitlines()) == 12 and len(list(kept.parent.iterdir())) == 1
    if is_torn:
        kept.write_bytes(kept.read_bytes()[:-20])
    again = bench(study, "base", "arc_easy,boolq", data=files, **QUIET)
    assert files_of(study) == files_of(whole) and untimed(again) == untimed(expected)
    assert sum(map(len, added[2:])) == 20 + 10 - (6 if is_torn else 12)


@pytest.mark.slow
def test_a_killed_process_goes_on(make_study, files, monkeypatch):
    whole, study = make_study(study="whole"), make_study(study="cut")
    monkeypatch.setattr(harness, "_MANY", 2)
    expected = bench(whole, "base", "arc_easy,boolq", data=files, **QUIET)
    kept = study.folder / "benchmarks" / "base-s0" / "arc_easy.responses.jsonl"
    code = (
        "import time; from peftlib.evaluation.benchmarks import harness; harness._MANY = 2; add = harness.Responses.add\n"
        "harness.Responses.add = lambda *a, **k: (add(*a, **k), time.sleep(0.3))\n"
        "import sys; from peftlib.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["bench", "base", "--study", "cut", "--tasks", "arc_easy,boolq", "--data", str(files)]
    env = {**os.environ, "PYTHONPATH": str(Path(harness.__file__).parents[3])}
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=env)
    while not kept.exists() or len(kept.read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not study.benchmark_path("base", 0, "arc_easy").exists()
    again = bench(study, "base", "arc_easy,boolq", data=files, **QUIET)
    assert files_of(study) == files_of(whole) and untimed(again) == untimed(expected)


def test_what_was_scored_is_not_scored_again_and_more_rows_join_it(make_study, files, monkeypatch):
    study, lines = make_study(), []
    two = bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)["benchmarks"]["arc_easy"]
    rows = study.benchmark_path("base", 0, "arc_easy").read_text()
    assert two["n"] == 2 and len(rows.splitlines()) == 2 and two["seconds"] > 0
    bench(study, "base", "arc_easy", data=files, limit=1, log=lines.append)
    assert lines[-1] == "base: arc_easy was scored on 2 rows before, nothing to do"
    monkeypatch.setattr(harness, "_LOG_SECONDS", 0)
    all_rows = bench(study, "base", "arc_easy", data=files, log=lines.append)["benchmarks"]["arc_easy"]
    assert all_rows["n"] == 5 and study.benchmark_path("base", 0, "arc_easy").read_text().startswith(rows)
    assert any(line.endswith("20/20 requests  ETA 0:00") for line in lines)
    assert records.load(study, "base", 0)["benchmarks"]["arc_easy"] == all_rows


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
        "no benchmarks: set benchmarks='retention' and install peftlib[bench] to score some"
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


def responding(model, study, path, **changes):
    how = {"batch": 8, "precision": "fp32", "deadline": None, "log": lambda line: None, **changes}
    return harness.KeepingModel(model, set_template(tiny.tokenizer()), harness.Responses(path, "w"), **how)


def test_memory_that_runs_out_halves_the_batch(make_study, files, monkeypatch):
    plain, sizes, lines = HFLM._model_call, [], []

    def full(lm, inps, **how):
        sizes.append(len(inps))
        if len(inps) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(lm, inps, **how)

    expected = bench(make_study(study="whole"), "base", "arc_easy", data=files, **QUIET)
    monkeypatch.setattr(HFLM, "_model_call", full)
    room = 2
    found = bench(make_study(study="small"), "base", "arc_easy,boolq", data=files, log=lines.append)
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2  # the next task begins with what memory holds
    assert "base: arc_easy: out of memory: 2 rows at a time from here on" in lines
    assert found["benchmarks"]["arc_easy"]["score"] == expected["benchmarks"]["arc_easy"]["score"]
    room = 0
    with pytest.raises(ModelError, match="memory does not hold one row at a time"):
        bench(make_study(study="none"), "base", "arc_easy", data=files, **QUIET)


def test_tasks_are_named(files, tmp_path, make_study):
    assert benchmarks.chosen("skill, arc_easy,skill") == ["ifeval", "gsm8k", "arc_easy"]
    with pytest.raises(ConfigError, match="name some"):
        benchmarks.chosen(" ,")
    with pytest.raises(ConfigError, match="cannot be read from files"):
        local.overrides("hellaswag", files)
    with pytest.raises(ConfigError, match="there is no such folder"):
        bench(make_study(), "base", "arc_easy", data=tmp_path / "none")


def test_a_name_is_answered_with_near_ones(monkeypatch):
    monkeypatch.setattr(benchmarks, "_manager", lambda _, plain=benchmarks._manager: plain("arc"))
    with pytest.raises(ConfigError, match="no task is called 'arc_esy': did you mean arc_easy"):
        benchmarks.load("arc_esy")
    with pytest.raises(ConfigError, match="ai2_arc is a group"):
        benchmarks.load("ai2_arc")
    with pytest.raises(ConfigError, match="no task is called 'q': sets: retention, skill"):
        benchmarks.load("q")


@pytest.mark.slow
def test_all_tasks_of_the_harness_are_known_by_their_names():
    with pytest.raises(ConfigError, match="no task is called 'arc_esy': did you mean arc_easy"):
        benchmarks.load("arc_esy")
    with pytest.raises(ConfigError, match="mmlu is a group"):
        benchmarks.load("mmlu")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("piqa.jsonl", [], "arc_easy needs one arc_easy.jsonl .*there is none"),
        ("more/arc_easy.jsonl", ARC[0], "there is 2 of them"),
        ("arc_easy.jsonl", "", "holds no rows"),
        (
            "arc_easy.jsonl",
            [{"query": "What?", "choices": ["a"], "gold": 0}],
            "line 1: .*does not begin with 'Question: '",
        ),
        ("arc_easy.jsonl", [ARC[0][0], {"query": "Question: What?", "gold": 0}], "line 2: .*it lacks 'choices'"),
        ("arc_easy.jsonl", "{", "line 1: no row"),
    ],
)
def test_files_that_are_missing_or_of_other_rows_are_named(tmp_path, files, name, rows, message):
    if name == "piqa.jsonl":
        files = tmp_path / "other"
    path = files / name
    written(path.parent, path.name, rows)
    with pytest.raises(DataError, match=message):
        benchmarks.load("arc_easy", files)


def test_an_answer_that_a_rendering_repeats_stands_once():
    row = local._arc({"query": "Question: Q", "choices": ["up", "down", "up", "same"], "gold": 3})
    assert row == {
        "question": "Q",
        "choices": {"text": ["up", "down", "same"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }


def test_renderings_that_cannot_be_taken_apart_are_refused():
    gap = {"context_options": ["a_b c", "a_b d"], "continuation": "e", "gold": 0}
    with pytest.raises(ValueError, match="before the gap"):
        local._winogrande(gap)
    with pytest.raises(ValueError, match="no passage"):
        local._boolq({"query": "Passage: it is.", "choices": ["no", "yes"], "gold": 0})


def test_the_hub_out_of_reach_is_named(monkeypatch):
    def refuse(**_):
        raise ConnectionError("offline")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"arc_easy cannot be had from the hub \(offline\): .*--data DIR"):
        benchmarks.load("arc_easy")


def test_a_metric_that_the_harness_has_renamed_is_named(files, monkeypatch):
    monkeypatch.setitem(benchmarks._KNOWN, "arc_easy", ("accuracy", "none", "arc"))
    with pytest.raises(DataError, match="arc_easy of lm-eval .* has no metric 'accuracy' .*it has acc, acc_norm"):
        benchmarks.load("arc_easy", files)


def test_orders_of_ifeval_are_checked_by_the_harness_s_own_program(tmp_path, monkeypatch):
    orders = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}),
    ]
    rows = [
        {"key": i, "prompt": "Say it.", "instruction_id_list": [name], "kwargs": [words]}
        for i, (name, words) in enumerate(orders)
    ]
    folder = written(tmp_path / "ifeval", "input_data.jsonl", rows).parent
    with monkeypatch.context() as patch:
        patch.setattr("nltk.data.find", lambda name: name)  # these orders need no sentences
        found = benchmarks.load("ifeval", folder)
    docs = list(found.task.eval_docs)
    for answer, obeyed in (("four words, one comma", [0, 1]), ("two words", [1, 0])):
        samples = [found.task.process_results(doc, [answer]) for doc in docs]
        assert [found.row(sample)[0] for sample in samples] == obeyed
    assert found.is_generated and found.chance(docs) is None

    def nothing(name):
        raise LookupError(name)

    monkeypatch.setattr("nltk.data.find", nothing)
    with pytest.raises(ModelError, match="python -m nltk.downloader punkt_tab"):
        benchmarks.load("ifeval", folder)


def test_a_task_that_runs_what_the_model_writes_is_refused(files, monkeypatch):
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.UNSAFE_CODE", True, raising=False)
    with pytest.raises(ConfigError, match="arc_easy runs code that the model writes"):
        benchmarks.load("arc_easy", files)


def test_the_metric_of_any_other_task_is_its_first_mean(files):
    task = benchmarks.load("arc_easy", files).task
    assert benchmarks._metric_of("mine", task, None) == ("acc", "none", False)


def test_an_answer_that_breaks_the_parser_is_shown_and_nothing_is_overwritten(make_study, files, monkeypatch):
    study = make_study()
    bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)
    before = files_of(study), study.record_path("base", 0).read_bytes()

    def broken(task, doc, results):
        raise IndexError("no number")

    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.process_results", broken)
    with pytest.raises(DataError, match=r"arc_easy: IndexError\('no number'\) when scoring the answer \[\(-"):
        bench(study, "base", "arc_easy", data=files, **QUIET)
    assert (files_of(study), study.record_path("base", 0).read_bytes()) == before


def test_scores_of_other_rows_or_weights_are_refused(make_study, files, tmp_path):
    study = make_study()
    bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)
    other = written(tmp_path / "other", "arc_easy.jsonl", ARC[0][::-1])
    with pytest.raises(StudyError, match="scores of other rows"):
        bench(study, "base", "arc_easy", data=other, **QUIET)
    path = study.benchmark_path("base", 0, "arc_easy")
    with pytest.raises(StudyError, match="answers of other weights"):
        harness.Responses(path.with_name("arc_easy.responses.jsonl"), "model:0123")
    kept = path.read_bytes()
    path.unlink()  # its answers are still there
    bench(study, "base", "arc_easy", data=files, limit=2, **QUIET)
    assert path.read_bytes() == kept
    path.write_text(path.read_text().replace('"value": ', '"value":  '))
    with pytest.raises(StudyError, match="is not what scoring wrote"):
        bench(study, "base", "arc_easy", data=files, **QUIET)


def test_weights_that_give_no_numbers_are_refused(make_study, tmp_path, files):
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    lm = responding(model, make_study(), tmp_path / "r.jsonl", deadline=type("Never", (), {"passed": lambda _: None})())
    with pytest.raises(ModelError, match="log-likelihood nan"):
        harness.score(lm, benchmarks.load("arc_easy", files), limit=1)
    assert not (tmp_path / "r.jsonl").exists()


def test_the_harness_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise benchmarks.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(benchmarks.importlib.metadata, "version", missing)
    with pytest.raises(ModelError, match=r"pip install 'peftlib\[bench\]'"):
        benchmarks.load("arc_easy")
