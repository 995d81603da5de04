"""The model card: what it tells, what it does not invent, and that its code loads the model."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from card_code import logits, run_code_of
from huggingface_hub import ModelCard

from peftlib.core.files import read_json, write_json
from peftlib.core.paths import TORCHAO_MIN
from peftlib.core.study import Study
from peftlib.evaluation import results as scored
from peftlib.evaluation.evaluate import evaluate
from peftlib.export import model_card
from peftlib.export.export import export_model
from peftlib.models.packaged import PROVENANCE
from peftlib.models.saved import load_trained


@pytest.mark.parametrize("method", ["qlora", "lora", "hybrid"])
def test_the_adapters_card_loads_the_model_that_was_scored(finished, tiny_model, tmp_path, method):
    study = finished(method)
    made = export_model(study, method, to=tmp_path / "out", form="adapter")
    names, printed = run_code_of(tmp_path / "out", made.card, base=tiny_model)
    ours = load_trained(study.weights_dir(method, 0))
    torch.testing.assert_close(logits(names["model"]), logits(ours), atol=1e-4, rtol=0)
    assert names["made"].shape[1] > names["inputs"]["input_ids"].shape[1] and printed.endswith("\n")
    assert names["stops"].eos_token_id == [1, 106]
    assert f'pip install -U "torchao>={TORCHAO_MIN}"' in made.card, "else the code fails on Colab as it comes"


def test_the_hybrids_adapter_without_its_attention_is_another_model(finished, tiny_model, tmp_path):
    study = finished("hybrid")
    card = export_model(study, "hybrid", to=tmp_path / "out", form="adapter").card
    start, end = card.index("# Weights beside the adapter"), card.index("model.eval()")
    names, _ = run_code_of(tmp_path / "out", card[:start] + card[end:], base=tiny_model)
    ours = load_trained(study.weights_dir("hybrid", 0))
    assert (logits(names["model"]) - logits(ours)).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["hybrid", "galore"])
def test_the_merged_models_card_loads_it(finished, tmp_path, method):
    study = finished(method)
    made = export_model(study, method, to=tmp_path / "out", form="merged")
    names, _ = run_code_of(tmp_path / "out", made.card)
    ours = load_trained(study.weights_dir(method, 0))
    assert names["model"].dtype == torch.bfloat16 and names["model"].generation_config.eos_token_id == [1, 106]
    torch.testing.assert_close(logits(names["model"].float()), logits(ours), atol=0.03, rtol=0)


def test_the_header_says_what_the_hub_asks_for(finished, tmp_path):
    study = finished("qlora", is_scored=True)
    data = ModelCard(export_model(study, "qlora", to=tmp_path / "out").card).data
    assert (data.license, data.license_link) == ("gemma", "https://ai.google.dev/gemma/terms")
    assert (data.library_name, data.pipeline_tag, data.language) == ("peft", "text-generation", "en")
    assert {"gemma3", "qlora"} <= set(data.tags)
    assert data.base_model is None  # a folder, which the hub does not know
    found = {result.metric_type: result for result in data.eval_results}
    run = next(run for run in scored.load(study).runs if run.record["method"] == "qlora")
    assert found["bleu"].metric_value == pytest.approx(run.rows.scores()["bleu4"], abs=1e-4)
    assert found["rouge"].metric_value == pytest.approx(run.rows.scores()["rougeL"], abs=1e-4)
    assert found["loss"].metric_value == pytest.approx(run.eval_loss, abs=1e-4)
    assert "95 % interval" in found["rouge"].metric_name and found["bleu"].dataset_args["n_test"] == 6


@pytest.mark.parametrize(("form", "relation"), [("adapter", "adapter"), ("merged", "finetune"), ("gguf", "finetune")])
def test_a_base_from_the_hub_is_named_with_its_relation(finished, form, relation):
    study = finished("qlora")
    record = read_json(study.record_path("qlora", 0))
    there = Study(study.folder, study.cfg.replace(model="google/gemma-3-1b-it"))
    text = str(model_card.model_card(there, record, form, model_card.scores_of(study, "qlora", 0), quant="q8_0"))
    data = ModelCard(text).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("google/gemma-3-1b-it", relation)
    assert ('base = "google/gemma-3-1b-it"' in text) == (form == "adapter")


def test_the_card_tells_scores_against_base_with_intervals_and_rows(finished, tmp_path):
    study = finished("qlora", is_scored=True)
    card = export_model(study, "qlora", to=tmp_path / "out").card
    scores = model_card.scores_of(study, "qlora", 0)
    for metric, name in (("bleu4", "BLEU-4"), ("rougeL", "ROUGE-L")):
        line = next(line for line in card.splitlines() if line.startswith(f"| {name}"))
        for method in ("base", "qlora"):
            found = scores.boot.interval(method, metric)
            assert f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})" in line
        assert f"{scores.boot.difference('qlora', 'base', metric).value:+.3f}" in line
    assert "6 test rows that training never saw" in card and "Caution: 6 test rows" in card


def test_scores_that_are_not_known_are_not_invented(finished, tmp_path):
    study = finished("qlora")
    evaluate(study, "base", log=lambda line: None)
    card = export_model(study, "qlora", to=tmp_path / "out").card
    assert "Not scored: this run has not answered the test rows yet." in card
    assert "model-index" not in card and "| BLEU-4" not in card


def test_without_base_no_gain_is_told(finished, tmp_path):
    study = finished("qlora", is_scored=True)
    study.record_path("base", 0).unlink()
    card = export_model(study, "qlora", to=tmp_path / "out").card
    assert "The untrained model was not scored" in card
    assert next(line for line in card.splitlines() if line.startswith("| BLEU-4")).endswith("| n/a |")


def test_how_it_was_trained_is_the_records(finished, tmp_path):
    study = finished("qlora")
    record, card = read_json(study.record_path("qlora", 0)), export_model(study, "qlora", to=tmp_path / "out").card
    for shown in (
        f"| steps | {record['steps']} of {record['planned_steps']} |",
        f"| tokens read | {record['train_tokens']:,} |",
        f"| weights that trained | {record['trainable_params']:,} of {record['total_params']:,} |",
        "| learning rates (peak) | lora 0.01 |",
        f"| hardware | {record['device']} |",
        f"| seconds | {record['train_seconds']:,.0f} of training",
        f"| peak memory | {record['peak_memory_bytes'] / 2**30:.2f} GiB |",
        "lora_rank 4",
        "batch_size 2",
    ):
        assert shown in card
    assert "galore_rank" not in card


def rewrite_manifest(study, **sources):
    """Make a study's data come from elsewhere. sources: {name: (licence, hub id or None)}."""
    manifest = read_json(study.manifest_path)
    for name, (licence, hub_id) in sources.items():
        manifest["sources"][name]["license"] = licence
        manifest["inputs"]["sources"][name] = {"hub": hub_id, "revision": "0" * 40} if hub_id else {"sha256": {}}
    write_json(study.manifest_path, manifest)


def test_the_datas_licences_are_told_and_a_ban_on_commerce_stands_first(finished, tmp_path):
    study = finished("qlora")
    assert "commercial" not in export_model(study, "qlora", to=tmp_path / "sample").card
    own = "as its owner says: not known to peftlib"
    rewrite_manifest(
        study, alpaca=("CC BY-NC 4.0", "tatsu-lab/alpaca"), tulu=("ODC-BY 1.0", "a/tulu"), ultrachat=(own, None)
    )
    card = export_model(study, "qlora", to=tmp_path / "out").card
    data, text = ModelCard(card).data, ModelCard(card).text
    assert data.datasets == ["tatsu-lab/alpaca", "a/tulu"] and "non-commercial" in data.tags and data.language is None
    assert text.index("Not for commercial use") < text.index("## What it is")
    assert "whose licence is CC BY-NC 4.0" in text and "- tulu: ODC-BY 1.0\n" in text
    assert "- ultrachat: the user's own file, licence unknown\n" in text
    assert "Gemma is provided under and subject to the Gemma Terms of Use found at" in text


def test_the_packaged_model_is_not_passed_off_as_the_original(finished):
    study = finished("qlora")
    record = read_json(study.record_path("qlora", 0)) | {"model": "packaged", "model_provenance": PROVENANCE}
    there = Study(study.folder, study.cfg.replace(model="packaged"))
    text = str(model_card.model_card(there, record, "adapter", model_card.scores_of(study, "qlora", 0)))
    assert PROVENANCE in text and "neither trained nor scored on the original release" in text
    assert ModelCard(text).data.base_model == "google/gemma-3-270m"


def test_nothing_private_is_handed_on(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    rows = tmp_path / "private" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}\n")
    study = finished("hybrid", sources=f"alpaca={rows}; tulu=sample; ultrachat=sample")
    for form in ("adapter", "merged"):
        export_model(study, "hybrid", to=tmp_path / form, form=form)
        for path in (tmp_path / form).rglob("*"):
            if path.is_file():
                held = path.read_bytes()
                assert str(tmp_path).encode() not in held and b"hf_secret" not in held, path
                assert str(Path(study.cfg.model).parent).encode() not in held, path
    shown = read_json(tmp_path / "adapter" / "study" / "config.json")["config"]
    assert shown["sources"] == "alpaca=rows.jsonl; tulu=sample; ultrachat=sample"
    assert shown["model"] == Path(study.cfg.model).name
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        Path(study.cfg.model).name
    )


NASTY = 'a|<img src=x onerror=alert(1)> `x` [b](c) **d** "e"\n# f'


def test_names_of_files_and_folders_are_text_in_the_card(finished):
    study = finished("qlora")
    manifest = read_json(study.manifest_path)
    manifest["sources"]["alpaca"]["where"] = {"main": f"{NASTY}.jsonl"}
    write_json(study.manifest_path, manifest)
    record = read_json(study.record_path("qlora", 0)) | {"model": f"/models/{NASTY}", "forked_from": NASTY}
    there = Study(study.folder, study.cfg.replace(model=f"/models/{NASTY}"))
    card = model_card.model_card(there, record, "adapter", model_card.scores_of(study, "qlora", 0))
    assert card.data.model_name == f"{NASTY} fine-tuned with qlora"
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    [base] = [
        node.value.value
        for node in ast.parse(code).body
        if getattr(getattr(node, "targets", [None])[0], "id", "") == "base"
    ]
    assert base == NASTY
    text = card.text.replace(code, "")
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") == 4 and "<img" not in text and "\n# f" not in text
    assert "\\*\\*d\\*\\*" in text and "**d**" not in text
    assert next(line for line in text.splitlines() if line.startswith("| alpaca |")).count("|") == 6
