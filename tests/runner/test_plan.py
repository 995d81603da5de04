"""`plan` says what fits a card, from the planner and from measured speeds, and calls a guess a guess."""

import json
import re
import types

import pytest
import tiny
import torch

from peftlib import cli as command_line
from peftlib import methods
from peftlib.core import config
from peftlib.core.errors import ConfigError, ModelError
from peftlib.models.shapes import CARDS, SHAPES, Shape, card_of_device, find_card, shape_of
from peftlib.runner.suite_plan import plan_lines
from peftlib.train import estimate
from peftlib.train import memory_model as plan


def rows_of(lines):
    """{method: [cell, ...]} of the printed table."""
    return {line.split()[0]: re.split(r"  +", line) for line in lines if line.split()[0] in methods.METHODS}


def test_a_t4_gets_every_method_with_hours_that_are_marked_as_estimates():
    said = list(plan_lines("T4", {}))
    assert said[0].startswith("google/gemma-3-1b-it on a t4: 14.6 GiB, fp16, rows of up to 1024 tokens, 16 per step")
    found = rows_of(said)
    assert list(found) == list(methods.default_methods())
    assert all(cells[1] == "yes" and cells[-1] == "estimate" and " to " in cells[-2] for cells in found.values())
    text = "\n".join(said)
    assert "65 TFLOPS, 320 GB/s" in text and "no data yet" in text and "NVIDIA H200" in text


def test_memory_and_micro_batch_are_the_planners():
    cfg = config.resolve("gpu")
    how = {"precision": "bf16", "device_bytes": int(CARDS["l4"].gib * plan.GIB)}
    found = rows_of(plan_lines("l4", {}))
    for method in methods.default_methods():
        best = plan.best_plan(SHAPES["gemma-3-1b"], method, cfg, **how)
        assert found[method][2:5] == [f"{best.total / plan.GIB:.2f}", str(best.micro_batch), best.checkpointing]


def test_the_card_that_was_measured_gets_the_measured_speed():
    measured = [row for row in estimate.measured_rows() if row["method"] == "qlora" and row["precision"] == "bf16"]
    best = max(row["tok_s"] for row in measured if "H100" in row["device"] and row["micro_batch"] == 8)
    found = rows_of(plan_lines("h100", {"model": "gemma-3-1b", "memory_gib": 14.5}))["qlora"]
    assert found[-1] == "measured speed" and found[5] == f"{float(f'{best:.2g}'):,.0f}"
    assert rows_of(plan_lines("h100", {"model": "packaged"}))["qlora"][-1] == "estimate"  # another model's speed


def test_another_setting_than_measured_is_no_measured_speed():
    found = rows_of(plan_lines("h200", {"memory_gib": 4.0}))["hybrid"]
    assert found[4] == "on" and found[-1] == "estimate"  # it was measured without recomputation


def speed(card, method="qlora", shape="gemma-3-1b", rows=None, micro_batch=16):
    rows = estimate.measured_rows() if rows is None else rows
    return estimate.speed(
        CARDS[card], SHAPES[shape], method, precision="bf16", length=1024, micro_batch=micro_batch, rows=rows
    )


def test_estimates_follow_the_cards_and_the_model():
    slow, fast = speed("l4"), speed("h100")
    assert slow.low < slow.high < fast.high and not slow.is_measured
    assert speed("l4", shape="gemma-3-270m").low > slow.low
    assert speed("l4", micro_batch=2).low == pytest.approx(speed("l4", micro_batch=4).low / 2)
    assert "estimate from galore's" in speed("l4", "galore").basis
    assert "estimate from galore's" in speed("l4", "lora").basis  # lora was not measured in bf16: the fastest's speed


def test_without_any_measurement_the_basis_is_the_published_peak(tmp_path):
    found = speed("l4", rows=[])
    assert found.high / found.low == pytest.approx(4) and "10% to 40% of the card's published 121 TFLOPS" in found.basis
    assert estimate.measured_rows(tmp_path / "none.json") == []
    (tmp_path / "odd.json").write_text(json.dumps([1, {"method": "qlora"}, {"device": "NVIDIA H200"}]))
    assert estimate.measured_rows(tmp_path / "odd.json") == []


def test_hours_come_from_the_studys_own_rows(make_study):
    study = make_study()
    manifest = study.manifest()
    low, high, basis = estimate.study_tokens(study.cfg, manifest)
    total = sum(found["total"] for found in manifest["tokens"]["train"].values())
    assert low == high == pytest.approx(total) and "from the study's data" in basis
    assert estimate.study_tokens(study.cfg.replace(epochs=3), manifest)[0] == pytest.approx(3 * total)
    steps = study.cfg.replace(max_steps=1)
    n_rows = sum(manifest["counts"]["train"].values())
    assert estimate.study_tokens(steps, manifest)[0] == pytest.approx(total / n_rows * steps.batch_size)
    said = "\n".join(plan_lines("t4", {}, study))
    assert f"{n_rows} training rows of" in said


def test_the_command_prints_the_table_for_a_study_and_settings(make_study, capsys):
    make_study()
    assert command_line.main(["plan", "--gpu", "t4", "--study", "tiny", "-p", "max_length", "900"]) == 0
    printed = capsys.readouterr().out
    assert "rows of up to 900 tokens" in printed and "qlora" in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpu", "b9"], "'b9' is unknown: use t4, v100, l4"),
        (["--gpu", "t4", "-p", "memory_gib", "0.5"], r"no method can train google/gemma-3-1b-it on a t4 with 0\.5 GiB: the smallest"),
        (["--gpu", "t4", "-p", "max_lenght", "9"], "did you mean max_length"),
        (["--gpu", "t4", "--study", "nowhere"], "there is no study 'nowhere'"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_named(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path))
    assert command_line.main(["plan", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_shapes_are_found_offline_from_ids_and_folders(tiny_model, tmp_path):
    assert shape_of("packaged") == shape_of("google/gemma-3-270m-it") == SHAPES["gemma-3-270m"]
    assert shape_of("Gemma-3-1B-pt") == SHAPES["gemma-3-1b"]
    assert shape_of(str(tiny_model)) == Shape.of(tiny.config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no Gemma-like config"):
        shape_of(str(tmp_path / "empty"))


def test_cards_are_found_by_their_usual_names():
    for name, key in (
        ("A100-80GB", "a100-80"),
        ("A100 80GB", "a100-80"),
        ("a100-80", "a100-80"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("tesla t4", "t4"),
    ):
        assert find_card(name)[0] == key
    with pytest.raises(
        ConfigError, match="'rtx3060' is unknown: use t4, .* its memory, such as --gpu rtx4090 -p memory"
    ):
        find_card("rtx3060")
    for device, key in (
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
    ):
        assert card_of_device(device) is CARDS[key]
    assert card_of_device("NVIDIA H200") is CARDS["h200"] and card_of_device("Tesla T4") is CARDS["t4"]
    assert card_of_device("NVIDIA H100 80GB HBM3") is CARDS["h100"]
    assert card_of_device("NVIDIA A100-SXM4-40GB") is CARDS["a100"] and card_of_device("CPU (x, 2 cores)") is None
    with pytest.raises(ConfigError):
        find_card("cpu")


def test_hours_are_priced_where_the_price_is_known():
    def said(gpu):
        return [line for line in plan_lines(gpu, {}) if line.startswith("cost at")]

    [line] = said("t4")
    assert "$0.54 per hour (Google Cloud" in line and re.search(r"qlora \$\d\.\d\d to \$\d\.\d\d, ", line)
    assert said("h100") == [] and CARDS["t4"].cost((1, 2)) == "$0.54 to $1.08"
    assert CARDS["t4"].cost((1e-9, 1e-9)) == "$0.01"


def test_rows_of_other_lengths_and_ranks_are_no_speeds_to_plan_by(tmp_path):
    row = {"method": "qlora", "precision": "fp16", "tok_s": 9e9, "device": "NVIDIA H100", "micro_batch": 8}
    rows = [{**row, "seq": seq, "fields": fields} for seq in (256, 1024) for fields in ({}, {"lora_rank": 8})]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert estimate.measured_rows(tmp_path / "rows.json") == [{**row, "seq": 1024, "fields": {}}]


def test_a_card_of_unknown_speed_is_not_planned_as_a_t4(monkeypatch):
    seen = types.SimpleNamespace(name="NVIDIA GeForce RTX 4070", total_memory=12 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: seen)
    with pytest.raises(ConfigError, match=r"RTX 4070 \(12.0 GiB\) are known: use --gpu; .* -p memory_gib=11"):
        list(plan_lines(None, {}))


def test_a_study_is_planned_for_the_card_not_as_the_machine_that_built_its_data(make_study):
    study = make_study(micro_batch_size=4)
    lines = "\n".join(plan_lines("t4", {}, study))
    assert "micro_batch_size=4" not in lines and lines != "\n".join(plan_lines("t4", {"micro_batch_size": 4}, study))
