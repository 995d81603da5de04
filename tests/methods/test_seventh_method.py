"""A method is added in one file: registered here, it goes through all that the six go through."""

import dataclasses

import finished_study
import pytest
import torch

from peftlib import methods
from peftlib.core.errors import ConfigError
from peftlib.export.export import export_model
from peftlib.methods import MethodSpec, qlora
from peftlib.methods.spec import LORA_SETTINGS
from peftlib.models.inspect import ATTENTION
from peftlib.models.saved import load_trained
from peftlib.report.build import build_report
from peftlib.report.palette import DARK, LIGHT, marker_of
from peftlib.train.loop import TrainingRun

NAME = "attention_lora"
SPEC = MethodSpec(
    name=NAME,
    label="attention LoRA",
    description="LoRA (arXiv:2106.09685) on the four attention projections alone, the rest frozen in 16 bits",
    colors=("#7f3c8d", "#c994d8"),
    marker="h",
    trains={"adapters": ATTENTION},
    rates=("lora_learning_rate",),
    settings=LORA_SETTINGS,
    prepare=lambda model, cfg: qlora.with_adapters(model, cfg, ATTENTION),
    build_optimizer=qlora.build_optimizer,
)


@pytest.fixture
def seventh():
    before = list(methods.METHODS)
    yield methods.register(SPEC)
    methods.unregister(NAME)
    assert list(methods.METHODS) == before


@pytest.fixture
def study(seventh, finished):
    return finished(NAME, is_scored=True, max_steps=3)


def test_a_registered_method_trains_is_scored_reported_and_exported(study, tmp_path, capsys):
    [record] = [record for record in study.records() if record["method"] == NAME]
    assert (record["status"], record["steps"]) == ("ok", 3)
    assert record[
        "trainable_params"
    ] == 4 * sum(  # rank 4, on two layers of width 64 with 4 query and 2 key heads of 16
        2 * (rows + columns) for rows, columns in ((64, 64), (32, 64), (32, 64), (64, 64))
    )
    assert set(record["evaluation"]) >= {"eval_loss", "n_test"}
    assert load_trained(study.weights_dir(NAME, 0))(input_ids=torch.tensor([[2, 30, 31]])).logits.shape == (1, 3, 512)

    found = build_report(study)
    assert list(found.results["method"]) == ["base", NAME], "the base first, then in the order of registration"
    assert (study.folder / "report.md").read_text(encoding="utf-8").count(NAME) > 3

    made = export_model(study, NAME, to=tmp_path / "out", form="adapter")
    assert SPEC.description in made.card and "2106.09685" in made.card
    assert "lora_rank" in made.card and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_command_line_knows_it(study, tmp_path):
    assert NAME in finished_study.call("plan", "--gpu", "t4")
    finished_study.call(
        "export", "--study", study.cfg.study, "--method", NAME, "--form", "merged", "--to", tmp_path / "out"
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
    swept = finished_study.call("sweep", "--study", study.cfg.study, "--method", NAME, "--factor", "1", "--rows", "2")
    assert NAME in swept
    asked = finished_study.call(
        "reference", "--study", study.cfg.study, "--profile", "demo", "--dry-run", "--factors", "1", "--sweep-rows", "2"
    )
    assert f"sweep-{NAME}" in asked
    methods.unregister(NAME)
    try:
        with pytest.raises(ConfigError, match=f"method='{NAME}' is unknown"):
            TrainingRun(study, NAME)
    finally:
        methods.register(SPEC)


def test_it_has_its_own_colour_marker_and_place(seventh):
    assert [theme.color_of(NAME) for theme in (LIGHT, DARK)] == list(SPEC.colors)
    assert marker_of(NAME) == "h"
    assert methods.study_order("apollo") < methods.study_order(NAME) < methods.study_order("not there")


def test_a_name_is_taken_once(seventh):
    for name in (NAME, "base", "qlora"):
        with pytest.raises(ConfigError, match="already exists"):
            methods.register(dataclasses.replace(SPEC, name=name))
