"""Models between base and tuned: exact at both ends, kept point by point, and drawn as one line a method."""

import json

import fake_study
import pytest
import torch

from peftlib import cli
from peftlib.core import record as records
from peftlib.core.errors import ConfigError, ModelError, StudyError
from peftlib.core.files import write_json
from peftlib.evaluation import evaluate as evaluation
from peftlib.evaluation import results as scored
from peftlib.evaluation.benchmarks import rewind, scores, tasks
from peftlib.evaluation.benchmarks.run import bench
from peftlib.evaluation.predictions import Predictions
from peftlib.notebook.results import ChartPanel
from peftlib.report import build as report
from peftlib.report import charts
from peftlib.report.charts import REWIND

QUIET = {"log": lambda line: None}
MEASURED = ("valid_loss", "test_loss", "general_loss", "rougeL", "bleu4")


def answers(path):
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


def measured(point):
    return {name: point[name] for name in MEASURED}


@pytest.mark.parametrize("method", ["qlora", "galore", "hybrid", pytest.param("dora", marks=pytest.mark.slow)])
def test_the_ends_are_the_tuned_model_and_the_base_to_the_bit(finished, method):
    study = finished(method, is_scored=True, general_tokens=128)
    (half,) = rewind.rewind(study, method, [0, 0.5, 1], **QUIET)  # the ends are what was evaluated
    assert half["factor"] == 0.5 and set(half["valid_loss"]) == {"all", "alpaca", "tulu", "ultrachat"}
    curve = rewind.curves(study, scored.load(study).runs)[method]
    assert [point["factor"] for point in curve] == [0.0, 0.5, 1.0]
    for point, name in ((curve[0], "base"), (curve[2], method)):
        record = records.load(study, name, 0)
        assert (point["test_loss"], point["general_loss"]) == (
            record["eval_loss"],
            record["evaluation"]["general_loss"],
        )
    assert curve[1]["test_loss"] not in (curve[0]["test_loss"], curve[2]["test_loss"])

    how = {"device": "cpu", "dtype": torch.float32, **QUIET}
    tuned, base = (evaluation.load_model(study, name, 0, **how) for name in (method, "base"))
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    prompt = torch.arange(5, 25)[None]
    with torch.no_grad():
        at_base = base(prompt).logits
        with rewind.rewound(tuned, base, 0.0) as model:
            assert torch.equal(model(prompt).logits, at_base)
        with rewind.rewound(tuned, base, 0.5) as model:  # half of each change
            for name, p in model.named_parameters():
                half = (before[name] + dict(base.named_parameters())[name]) / 2
                torch.testing.assert_close(p, half, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p, before[name]) for name, p in tuned.named_parameters())

    # What measures a point gives the evaluation's own numbers at an end.
    kept = Predictions(study.folder / "end.jsonl", "x")
    measured_end = rewind._scores(study, tuned, kept, QUIET["log"])
    assert (measured_end["test_loss"]["all"], measured_end["rougeL"]) == (curve[2]["test_loss"], curve[2]["rougeL"])
    assert answers(kept.path) == answers(study.predictions_path(method, 0))


def test_bf16_ends_are_exact_too_and_an_error_puts_the_weights_back():
    tuned, base = (torch.nn.Linear(64, 64).to(torch.bfloat16) for _ in range(2))
    own = tuned.weight.clone()
    with rewind.rewound(tuned, base, 0.0):
        assert torch.equal(tuned.weight, base.weight)
    with rewind.rewound(tuned, base, 1.0):
        assert torch.equal(tuned.weight, own)
    with pytest.raises(KeyError), rewind.rewound(tuned, base, 0.3):
        raise KeyError
    assert torch.equal(tuned.weight, own)
    with pytest.raises(ModelError, match="another shape: bias differs"):
        rewind.rewound(tuned, torch.nn.Linear(64, 32), 0.5).__enter__()


def test_killed_in_a_point_and_run_again_it_makes_the_same_points(finished, monkeypatch):
    study = finished("galore", is_scored=True, general_tokens=128)
    whole = rewind.rewind(study, "galore", [0.25, 0.75], **QUIET)
    files = {path: path.read_bytes() for path in sorted((study.folder / "rewind").rglob("*.jsonl"))}
    for path in [*files, *(study.folder / "rewind").glob("*.json")]:
        path.unlink()

    real, asked = rewind.Predictions.add, []

    def killed(self, row, answer):
        asked.append(row["id"])
        if len(asked) == 6 + 3:  # 0.25, and half of 0.75
            raise KeyboardInterrupt
        real(self, row, answer)

    with monkeypatch.context() as patch:
        patch.setattr(rewind.Predictions, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            rewind.rewind(study, "galore", [0.25, 0.75], **QUIET)
    kept = json.loads(rewind.path_of(study, "galore", 0).read_text())["points"]
    assert [point["factor"] for point in kept] == [0.25]
    again = rewind.rewind(study, "galore", [0.75, 0.25], **QUIET)
    assert [measured(point) for point in again] == [measured(point) for point in whole]
    assert again[0]["seconds"] == kept[0]["seconds"]  # not measured again
    assert {path: path.read_bytes() for path in files} == files

    monkeypatch.setattr(rewind, "load_model", lambda *args, **how: pytest.fail("everything is known"))
    assert rewind.rewind(study, "galore", [0.25], **QUIET) == again


def test_what_cannot_be_rewound_is_named_before_anything_is_loaded(finished, monkeypatch):
    study = finished("galore")
    monkeypatch.setattr("peftlib.cli.open_study", lambda name: study)
    monkeypatch.setattr(evaluation, "load_model", lambda *args, **how: pytest.fail("nothing is loaded"))
    for words, said in (
        (["base", "--rewind", "0.5"], "--rewind .0.5,. of base: use factors from 0 to 1 of a trained method"),
        (["galore", "--rewind", "0.5,2"], "--rewind='0.5,2': use different numbers from 0 to 1"),
        (["galore", "--rewind", "half"], "--rewind='half': use different numbers"),
        (["galore", "--rewind", "nan"], "--rewind='nan': use different numbers"),
        (["--path", "x", "--rewind", "0.5"], "--rewind needs a METHOD of the study"),
        (["galore", "--tasks", "piqa"], "--tasks piqa needs --rewind"),
    ):
        with pytest.raises(ConfigError, match=said):
            cli.call(["evaluate", *words, "--study", "x"])
    with pytest.raises(StudyError, match="galore .seed 0. is not evaluated"):
        rewind.rewind(study, "galore", [0.5], **QUIET)


def test_points_of_other_weights_are_refused_and_left_out_of_the_report(finished, monkeypatch):
    monkeypatch.setattr("peftlib.report.chart._DPI", 30)
    study = finished("galore", is_scored=True, general_tokens=128)
    rewind.rewind(study, "galore", [0.5], **QUIET)
    record = records.load(study, "galore", 0)
    made = report.build_report(study)
    assert REWIND in ChartPanel(made).kind.options
    assert [point["factor"] for point in made.numbers.rewound["galore"]] == [0.0, 0.5, 1.0]
    assert "rewind" in made.figures and "galore" in made.alt["rewind"]
    text = study.report_path.read_text(encoding="utf-8")
    assert "## Between base and tuned" in text and "| galore | 0.5 |" in text

    write_json(study.record_path("galore", 0), {**record, "weights_sha256": {"model.safetensors": "0" * 64}})
    before = rewind.path_of(study, "galore", 0).read_bytes()
    with pytest.raises(StudyError, match=r"galore-s0\.json holds points of another run \(weights: "):
        rewind.rewind(study, "galore", [0.75], **QUIET)
    assert rewind.path_of(study, "galore", 0).read_bytes() == before
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    assert report.build_report(study).numbers.rewound == {}

    # As if killed within a point: the answers are there, and were made with other settings.
    rewind.path_of(study, "galore", 0).unlink()
    changed = {**record, "evaluation": {**record["evaluation"], "max_new_tokens": 5}}
    write_json(study.record_path("galore", 0), changed)
    with pytest.raises(StudyError, match=r"0\.5\.jsonl has split_hash"):
        rewind.rewind(study, "galore", [0.5], **QUIET)

    for points in ('[{"factor": "x"}]', "7"):
        rewind.path_of(study, "galore", 0).write_text(f'{{"schema_version": 1, "of": {{}}, "points": {points}}}')
        with pytest.raises(StudyError, match=r"galore-s0\.json is damaged .*points"):
            report.build_report(study)


def test_the_command_scores_after_the_evaluation(finished, files, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    study = finished("qlora", is_scored=True)
    monkeypatch.setattr("peftlib.cli.open_study", lambda name: study)
    words = ["--rewind", "0.5", "--tasks", "arc_easy", "--data", str(files)]
    assert cli.call(["evaluate", "qlora", *words, "--study", "x"]) == 0
    said = capsys.readouterr().out
    assert "base: arc_easy acc" in said and "qlora: arc_easy acc" in said and "qlora at 0.5: test loss" in said
    assert len(answers(study.folder / "rewind" / "qlora-s0" / "0.5.jsonl")) == 6
    points = json.loads(rewind.path_of(study, "qlora", 0).read_text())["points"]
    assert [point["benchmarks"]["arc_easy"]["n"] for point in points] == [5]


def test_a_curve_is_the_mean_over_seeds_at_their_common_factors(tmp_path, monkeypatch):
    study = fake_study.make(tmp_path, monkeypatch, methods=("base", "qlora"), seeds=(0, 1))
    runs = scored.load(study).runs

    def point(factor, loss):
        losses = {"valid_loss": {"all": 9.0}, "test_loss": {"all": loss}, "general_loss": loss + 1}
        return {"factor": factor, **losses, "rougeL": 0.5, "bleu4": 0.1, "seconds": 1.0}

    for run, points in zip(runs[1:], ([point(0.25, 3.5), point(0.5, 3.0)], [point(0.5, 2.0)])):
        path = rewind.path_of(study, run.record["method"], run.record["seed"])
        write_json(path, {"of": rewind._identity(study, run.record), "points": points})
    curve = rewind.curves(study, runs)["qlora"]
    tuned = sum(run.record["eval_loss"] for run in runs[1:]) / 2
    assert [at["factor"] for at in curve] == [0.0, 0.5, 1.0]
    assert [at["test_loss"] for at in curve] == [runs[0].record["eval_loss"], 2.5, pytest.approx(tuned)]
    assert (curve[1]["general_loss"], curve[1]["retention"]) == (3.5, None)
    assert "qlora" in charts.figures.rewind_curves({"qlora": curve}).alt


def test_without_a_loss_on_general_text_there_is_no_line():
    same = {"general_loss": None, "rougeL": 0.1, "retention": None}
    points = [{"factor": at, "test_loss": 3 - at, **same} for at in (0.0, 1.0)]
    assert charts.figures.rewind_curves({"qlora": points}).is_empty and charts.figures.rewind_curves({}).is_empty


def test_points_are_scored_on_the_retention_tasks_too(finished, files, monkeypatch):
    pytest.importorskip("lm_eval")
    study = finished("galore", is_scored=True, general_tokens=128)
    (plain,) = rewind.rewind(study, "galore", [0.5], **QUIET)
    assert plain["benchmarks"] == {}
    study = type(study)(study.folder, study.cfg.replace(benchmarks="arc_easy,boolq,gsm8k", benchmark_data=str(files)))
    monkeypatch.setattr(rewind, "ROWS", 4)
    (point,) = rewind.rewind(study, "galore", [0.5], **QUIET)
    assert measured(point) == measured(plain)
    assert {task: of["n"] for task, of in point["benchmarks"].items()} == {
        "arc_easy": 4,
        "boolq": 4,
    }  # gsm8k is a skill

    # The ends are the scores of peftlib bench on the same rows, and a model of the end's weights has them.
    runs = scored.load(study).runs
    assert [at["retention"] for at in rewind.curves(study, runs)["galore"]] == [None] * 3  # not there yet
    tuned = evaluation.load_model(study, "galore", 0, device="cpu", dtype=torch.float32, **QUIET)
    for name in ("base", "galore"):
        bench(study, name, "arc_easy,boolq", data=files, **QUIET)
    end = rewind._end(study, scored.load(study).runs[1], 1.0, {"arc_easy": 4, "boolq": 4})["benchmarks"]
    for task in ("arc_easy", "boolq"):
        made = rewind._benchmark(study, {}, tuned, study.folder / "1.0.jsonl", tasks.load(task, files), QUIET["log"])
        assert made == end[task]

    # A curve's mean is over the tasks on which base is not at its floor, as that of scores.lost.
    monkeypatch.setattr(scores.TaskScores, "is_at_floor", lambda self, method: self.task == "boolq")
    kept = rewind.curves(study, scored.load(study).runs)["galore"]
    assert kept[1]["retention"] == point["benchmarks"]["arc_easy"]["score"]
    assert kept[2]["retention"] == end["arc_easy"]["score"]

    # What was scored is not scored again, and a task more adds to what is there.
    monkeypatch.setattr(rewind, "load_model", lambda *args, **how: pytest.fail("everything is known"))
    assert rewind.rewind(study, "galore", [0.5], **QUIET) == [point]
    record = records.load(study, "galore", 0)
    assert rewind.missing(study, record, [0, 0.5, 0.75, 1]) == [0.75]
    other = type(study)(study.folder, study.cfg.replace(benchmarks="piqa"))
    assert rewind.missing(other, record, [0.5]) == [0.5]


def test_retention_is_the_mean_over_the_tasks_that_base_knows():
    def point(*scores):
        tasks = {task: {"score": score, "n": 400} for task, score in zip(("piqa", "arc_easy", "boolq"), scores)}
        return {"test_loss": {"all": 2.0}, "general_loss": 3.0, "rougeL": 0.1, "benchmarks": tasks}

    base, tuned, kept = point(0.7, 0.5, 0.62), point(0.6, 0.45, 0.7), {"piqa": 400, "arc_easy": 400}
    assert rewind._mean(1.0, [{1.0: tuned}], kept)["retention"] == pytest.approx(0.525)
    lacks = {**tuned, "benchmarks": {}}
    assert rewind._mean(1.0, [{1.0: tuned}, {1.0: lacks}], kept)["retention"] is None
    assert rewind._mean(1.0, [{1.0: tuned}], {})["retention"] is None
    assert rewind._mean(1.0, [{1.0: tuned}], {"piqa": 500, "arc_easy": 400})["retention"] is None  # of other rows
    curve = [rewind._mean(at, [{at: of}], kept) for at, of in ((0.0, base), (1.0, tuned))]
    drawn = charts.figures.rewind_curves({"qlora": curve})
    assert (
        "accuracy on retention tasks" in drawn.alt and "qlora 2.000 and 0.600 at 0, 2.000 and 0.525 at 1" in drawn.alt
    )
