"""A PEFT config as a method: its name, the study's copy of it, other machines, and what is refused before anything."""

import json
import re
import shutil

import finished_study
import pytest

from peftlib import methods
from peftlib.core import record as records
from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.files import read_json
from peftlib.evaluation.evaluate import evaluate
from peftlib.export.export import export_model
from peftlib.methods import peft_file
from peftlib.report.build import build_report
from peftlib.report.palette import LIGHT, marker_of
from peftlib.train.loop import TrainingRun
from peftlib.train.sweep import sweep

FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my q-v.json"
    path.write_text(json.dumps(FIELDS))
    return path


def silent(line):
    pass


def test_a_name_is_safe_in_files_and_follows_the_content(file, tmp_path):
    name = methods.find(f"peft:{file}").name
    assert re.fullmatch(r"peft-my_q_v-[0-9a-f]{8}", name)
    file.write_text(json.dumps(dict(reversed(FIELDS.items())), indent=4))
    assert methods.find(f"peft:{file}").name == name, "the same content in another order"
    file.write_text(json.dumps({**FIELDS, "r": 3}))
    assert methods.find(f"peft:{file}").name != name, "a changed file is another method"
    file.write_text(json.dumps(FIELDS))
    four = methods.find(f"peft4:{file}")
    assert four.name == name.replace("peft-", "peft4-") and len(four.four_bit) == 7
    saved = tmp_path / "my-adapter" / "adapter_config.json"
    saved.parent.mkdir()
    shutil.copy(file, saved)
    assert methods.find(f"peft:{saved}").name == name.replace("my_q_v", "my_adapter")


def test_a_study_does_without_the_file_here_and_on_another_machine(make_study, file, tmp_path, monkeypatch, no_charts):
    study = make_study(max_steps=3, activation_checkpointing="on")
    name = methods.find(f"peft:{file}").name
    run = TrainingRun(study, f"peft:{file}", log=silent)
    one = run._step

    def stop():
        one()
        run._why_stop = lambda: "asked to"

    run._step = stop
    assert run.train()["status"] == "stopped"
    file.unlink()
    monkeypatch.setattr(peft_file, "_known", {})
    shutil.copytree(study.folder.parent, tmp_path / "elsewhere")
    shutil.rmtree(study.folder.parent)
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "elsewhere"))
    study = make_study(max_steps=3, activation_checkpointing="on")
    record = TrainingRun(study, name, log=silent).train()
    assert (record["status"], record["steps"], record["peft_config"]) == ("ok", 3, FIELDS)
    evaluate(study, "base", log=silent)
    evaluate(study, name, log=silent)
    monkeypatch.setattr(peft_file, "_known", {})
    build_report(study)
    assert name in study.report_path.read_text(encoding="utf-8")
    assert LIGHT.color_of(name) != LIGHT.other and marker_of(name) != "*"
    made = export_model(study, name, to=tmp_path / "out", log=silent)
    assert "PEFT's LORA with the config my_q_v" in made.card
    assert records.load(study, name, 0)["method"] == name
    finished_study.call("plan", "--study", "tiny", "--gpu", "t4", "--methods", name)


def test_a_sweep_takes_one(make_study, file):
    study = make_study()
    found = sweep(study, f"peft:{file}", factors=(1.0,), rows=2, log=silent)
    assert found["method"].startswith("peft-my_q_v-")
    assert (study.folder / "sweeps" / f"{found['method']}.json").is_file()


def test_the_copy_in_a_study_is_checked(make_study, file, monkeypatch):
    study = make_study()
    name = methods.keep(f"peft:{file}", study.folder)
    path = study.folder / "methods" / f"{name}.json"
    assert read_json(path)["peft_config"] == FIELDS
    monkeypatch.setattr(peft_file, "_known", {})
    assert methods.find(name).peft_config == FIELDS
    monkeypatch.setattr(peft_file, "_known", {})
    shutil.move(path, path.with_name(f"{name[:-8]}00000000.json"))
    with pytest.raises(StudyError, match="is damaged: its name is"):
        methods.find(f"{name[:-8]}00000000")
    monkeypatch.setattr(peft_file, "_known", {})
    with pytest.raises(ConfigError, match=f"method='{name}' is unknown: use qlora, .*or peft:FILE.json"):
        methods.find(name)


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "there is no file .*: use PEFT's adapter_config.json"),
        ("{", "is not JSON"),
        (json.dumps({**FIELDS, "peft_type": "PROMPT_TUNING"}), "trains a prompt"),
        (json.dumps({**FIELDS, "target_modules": ["q_porj"]}), "'q_porj', which is not a layer: use q_proj"),
        (
            json.dumps({**FIELDS, "base_model_name_or_path": "google/gemma-3-4b-it"}),
            "='google/gemma-3-4b-it', but the study's",
        ),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_written(make_study, file, content, told):
    study = make_study()
    before = sorted(study.folder.rglob("*"))
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=told):
        TrainingRun(study, f"peft:{file}", log=silent)
    assert sorted(study.folder.rglob("*")) == before
