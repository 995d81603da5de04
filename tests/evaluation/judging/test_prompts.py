"""Sets of prompts are read from a folder or the hub, answered turn by turn, judged whole, and kept."""

import json

import fake_judge
import pytest
from fake_judge import judged

from peftlib.core import record as records
from peftlib.core.errors import ConfigError, DataError, StudyError
from peftlib.evaluation.judging import prompts
from peftlib.report import build as report
from peftlib.report import charts

QUIET = {"log": lambda line: None}


@pytest.fixture
def folder(tmp_path):
    """Files in the two sets' own forms, with as many questions of our own."""
    made = tmp_path / "sets"
    (made / "mt_bench").mkdir(parents=True)
    rows = [{"question_id": 81 + i, "category": "writing", "turns": [f"Say {i}.", "Once more."]} for i in range(80)]
    (made / "mt_bench" / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"instruction": f"Name {i}.", "output": "x", "generator": "y", "dataset": "koala"} for i in range(805)]
    (made / "alpaca_eval.json").write_text(json.dumps(rows))
    return made


@pytest.fixture
def study(finished, monkeypatch):
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    return finished("galore", is_scored=True)


def call(study, url, *more):
    words = ["--study", "x", "--methods", "base", "galore", "--endpoint", url, "--model", "m", *map(str, more)]
    return judged(study, words)


def test_two_turns_are_asked_one_by_one_and_judged_as_a_whole(study, folder, capsys):
    server = fake_judge.Server(lambda body: "VERDICT: 1")
    with fake_judge.serving(server) as url:
        call(study, url, "--prompts", "mt_bench", "--data", folder, "--rows", 3, "--dry-run")
        said = capsys.readouterr().out
        assert "base has to answer 3 of 3 prompts first" in said
        assert "calls and cost below exclude 3 rows that are not answered yet" in said
        assert not (study.folder / "prompts").exists()
        call(study, url, "--prompts", "mt_bench", "--data", folder, "--rows", 3)
        asked = len(server.requests)
        call(study, url, "--prompts", "mt_bench", "--rows", 3)  # the study keeps the questions
        assert len(server.requests) == asked <= 6
        call(study, url, "--prompts", "mt_bench", "--rows", 4)
        assert asked < len(server.requests) <= 8
    text = server.requests[0][0]["messages"][0]["content"]
    assert "user: Once more." in text and "(to turn 1)" in text and "(to turn 2)" in text
    second = (study.folder / "prompts" / "mt_bench" / "galore-s0-2.jsonl").read_text().splitlines()
    assert len(second) == 4 and not (study.folder / "judge" / "base-vs-galore.jsonl").exists()

    (found,) = report.build_report(study).judged
    assert found.prompts == "mt_bench" and found.n_rows == 4
    assert "galore-s0 against base-s0 on mt_bench" in study.report_path.read_text(encoding="utf-8")
    assert "judge_win_rate" not in study.results_path.read_text()  # of the test rows alone


def test_answers_that_were_cut_go_on_and_are_equal(study, folder, monkeypatch):
    rows = prompts.rows_of(study, "mt_bench", folder)[:6]
    whole = prompts.answers(study, "galore", 0, "mt_bench", rows, **QUIET)
    files = {path: path.read_bytes() for path in (study.folder / "prompts" / "mt_bench").glob("galore*")}
    assert len(whole) == 6 and len(files) == 2
    for path in files:
        path.unlink()
    real, said = prompts.Predictions.add, []

    def killed(self, row, answer):
        said.append(row["id"])
        if len(said) == 8:
            raise KeyboardInterrupt
        real(self, row, answer)

    with monkeypatch.context() as patch:
        patch.setattr(prompts.Predictions, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            prompts.answers(study, "galore", 0, "mt_bench", rows, **QUIET)
    assert len(prompts.answers(study, "galore", 0, "mt_bench", rows, is_asked=False, **QUIET)) == 1
    assert prompts.answers(study, "galore", 0, "mt_bench", rows, **QUIET) == whole
    assert {path: path.read_bytes() for path in files} == files


def test_verdicts_on_answers_of_earlier_weights_are_left_out_of_the_report(study, folder):
    with fake_judge.serving(fake_judge.Server(lambda body: "VERDICT: 1")) as url:
        call(study, url, "--prompts", "mt_bench", "--data", folder, "--rows", 2)
        record = records.load(study, "galore", 0)
        records.save(study, {**record, "weights_sha256": {"model.safetensors": "0" * 64}})  # trained anew
        made = report.build_report(study)
        assert made.judged == [] and made.n_other_verdicts == 4
        with pytest.raises(StudyError, match=r"answers of galore-s0 from before it was retrained: move galore-s0-\*"):
            call(study, url, "--prompts", "mt_bench", "--rows", 2)


def test_a_single_turn_is_its_answer(study, folder):
    rows = prompts.rows_of(study, "alpaca_eval", folder)
    assert len(rows) == 805 and rows[0]["source"] == "koala" and len({row["id"] for row in rows}) == 805
    (text,) = prompts.answers(study, "base", 0, "alpaca_eval", rows[:1], **QUIET).values()
    assert "(to turn" not in text


def test_bad_sets_are_named_and_nothing_is_kept(study, folder, monkeypatch):
    with pytest.raises(ConfigError, match="prompts 'mtbench' is unknown: use mt_bench or alpaca_eval"):
        prompts.rows_of(study, "mtbench", folder)
    with pytest.raises(ConfigError, match="--data needs a prompt set"):
        call(study, "http://127.0.0.1:1/v1", "--data", folder)
    with pytest.raises(DataError, match=r"question\.jsonl does not exist"):
        prompts.rows_of(study, "mt_bench", folder / "nowhere")
    path = folder / "mt_bench" / "question.jsonl"
    whole = path.read_text()
    for text, said in (
        (whole.rpartition("{")[0], "holds 79 questions, mt_bench has 80"),
        (whole.replace('"turns": ["Say 3.", "Once more."]', '"turns": "Say 3."'), "row 4 has neither"),
        (whole.replace('"Say 3."', "3"), "row 4 has neither"),
        (whole + "no json\n", "row 81 has neither"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            prompts.rows_of(study, "mt_bench", folder)
    path.write_text(whole)
    assert not (study.folder / "prompts").exists()
    prompts.rows_of(study, "mt_bench", folder)
    path.write_text(whole.replace("Say 3.", "Say three."))
    with pytest.raises(StudyError, match=r"questions\.json holds different questions from"):
        prompts.rows_of(study, "mt_bench", folder)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _no_hub)
    with pytest.raises(
        DataError, match="alpaca_eval could not be downloaded from tatsu-lab/alpaca_eval .no network.: use --data"
    ):
        prompts.rows_of(study, "alpaca_eval")
    with pytest.raises(StudyError, match="no record of qlora"):
        prompts.answers(study, "qlora", 0, "mt_bench", prompts.rows_of(study, "mt_bench"), **QUIET)


def _no_hub(*args, **how):
    raise OSError("no network")


def test_the_hub_is_asked_where_no_folder_is_named(study, folder, monkeypatch):
    asked = []

    def fetched(repository, path, *, repo_type):
        asked.append((repository, path, repo_type))
        return str(folder / "alpaca_eval.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    assert len(prompts.rows_of(study, "alpaca_eval")) == 805
    assert asked == [("tatsu-lab/alpaca_eval", "alpaca_eval.json", "dataset")]


def test_a_report_asks_no_hub_for_questions_that_are_gone(study, folder, monkeypatch):
    with fake_judge.serving(fake_judge.Server(lambda body: "VERDICT: 1")) as url:
        call(study, url, "--prompts", "alpaca_eval", "--data", folder, "--rows", 2)
    prompts.path_of(study, "alpaca_eval").unlink()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _no_hub)
    with pytest.raises(StudyError, match="is missing: run `judge --prompts alpaca_eval` again"):
        report.build_report(study)
