"""Tasks are found by name in files or on the hub, and what is wrong with one is named."""

import pytest
import tiny
import torch
from benchmark_rows import ARC, written

pytest.importorskip("lm_eval")


from peftlib.core.errors import ConfigError, DataError, ModelError
from peftlib.evaluation.benchmarks import harness, local
from peftlib.evaluation.benchmarks import tasks as benchmarks
from peftlib.evaluation.benchmarks.run import bench
from peftlib.models.chat_template import set_template


def responding(model, study, path, **changes):
    how = {"batch": 8, "precision": "fp32", "deadline": None, "log": lambda line: None, **changes}
    return harness.KeepingModel(model, set_template(tiny.tokenizer()), harness.Responses(path, "w"), **how)


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
    with pytest.raises(ModelError, match=r"pip install -e '.*\[bench\]'"):
        benchmarks.load("arc_easy")
