import ast
import json
import re
from pathlib import Path

import pytest
import torch
from card_code import logits, run_code_of
from fake_hub import FakeHub
from huggingface_hub import ModelCard

from peftlib import cli as command_line
from peftlib.core.errors import ConfigError, LockedError, ModelError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.paths import TORCHAO_MIN
from peftlib.core.study import Study
from peftlib.evaluation import results as scored
from peftlib.evaluation.evaluate import evaluate
from peftlib.export import model_card
from peftlib.export.export import Preview, export_model
from peftlib.export.targets import target_of
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


def test_an_export_is_replaced_whole_by_one_of_the_same_run_alone(finished, tmp_path):
    study, out = finished("qlora"), tmp_path / "out"
    out.mkdir()  # empty: free
    first = export_model(study, "qlora", to=out)
    (out / "README.md").write_text("edited")
    assert export_model(study, "qlora", to=out).files.keys() == first.files.keys()
    assert (out / "README.md").read_text() == first.card
    with pytest.raises(ModelError, match=r"another export \(qlora, seed 0, adapter, run .*choose another place"):
        export_model(study, "qlora", to=out, form="merged")
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ModelError, match=r"also holds mine.txt, which no export wrote"):
        export_model(study, "qlora", to=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "runs"]  # no folder is left beside


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_stands_there_is_never_lost(finished, tmp_path, what):
    study, out = finished("qlora"), tmp_path / "out"
    held = out / "thesis.tex" if what == "folder" else out
    held.parent.mkdir(exist_ok=True)
    held.write_text("a year's work")
    with pytest.raises(ModelError, match="is there already and is no export of ours"):
        export_model(study, "qlora", to=out)
    assert held.read_text() == "a year's work"


def test_an_export_that_fails_leaves_the_earlier_one(finished, tmp_path, monkeypatch):
    study = finished("qlora")
    first = export_model(study, "qlora", to=tmp_path / "out")

    def fail(*args, **named):
        raise OSError("no space left")

    monkeypatch.setattr("peftlib.export.model_card.model_card", fail)
    with pytest.raises(OSError, match="no space"):
        export_model(study, "qlora", to=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == first.card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "runs"]


def test_two_exports_to_one_place_are_refused_by_name_and_leftovers_are_told(finished, tmp_path):
    study, told = finished("qlora"), []
    other = target_of(tmp_path / "out")
    with other.workspace("exporting something else", log=told.append):
        with pytest.raises(LockedError, match="the export to .*out is in use by .*exporting something else"):
            export_model(study, "qlora", to=tmp_path / "out")
        export_model(study, "qlora", to=tmp_path / "out", dry_run=True)
        (left,) = tmp_path.glob(".exporting-*")
    (left / "new").mkdir(parents=True)
    export_model(study, "qlora", to=tmp_path / "out", log=told.append)
    assert told == [f"removed {left}, which an interrupted export had left"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "runs"]


def test_the_hub_gets_one_commit_in_a_private_repository(finished, tiny_model, tmp_path, monkeypatch):
    study, hub = finished("qlora"), FakeHub(tmp_path / "hub")
    made = export_model(study, "qlora", to="hf://me/my-model", api=hub)
    assert made.address == "https://huggingface.co/me/my-model" and hub.is_private
    assert hub.commits == ["qlora (seed 0) of study tiny"]
    assert made.files.keys() == set(hub._list_repo_files("me/my-model", repo_type="model"))
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: asked.append(name) or str(hub.folder))
    names, _ = run_code_of(hub.folder, made.card, base=tiny_model)
    torch.testing.assert_close(
        logits(names["model"]), logits(load_trained(study.weights_dir("qlora", 0))), atol=1e-4, rtol=0
    )
    assert asked == ["me/my-model"]


def test_a_repository_is_replaced_by_the_same_run_alone(finished, tmp_path):
    study, hub = finished("qlora"), FakeHub(tmp_path / "hub")
    export_model(study, "qlora", to="hf://me/m", api=hub, private=False)
    assert hub.is_private is False
    (hub.folder / "old.bin").write_text("of an earlier export")
    with pytest.raises(ModelError, match="hf://me/m is public.*make it private.*--public"):
        export_model(study, "qlora", to="hf://me/m", api=hub)
    assert len(hub.commits) == 1
    export_model(study, "qlora", to="hf://me/m", api=hub, private=False)
    assert len(hub.commits) == 2 and not (hub.folder / "old.bin").exists()
    with pytest.raises(ModelError, match=r"hf://me/m holds another export \(qlora, seed 0, adapter"):
        export_model(study, "qlora", to="hf://me/m", form="merged", api=hub, private=False)
    foreign = FakeHub(tmp_path / "foreign")
    foreign.folder.mkdir()
    (foreign.folder / "model.bin").write_text("somebody's")
    with pytest.raises(ModelError, match="is there already and is no export of ours"):
        export_model(study, "qlora", to="hf://me/m", api=foreign)
    assert foreign.commits == [] and (foreign.folder / "model.bin").exists()


def test_a_repository_that_turns_public_meanwhile_gets_nothing(finished, tmp_path):
    study, hub = finished("qlora"), FakeHub(tmp_path / "hub")
    hub.is_private = False  # as for a repository that another program makes between the first look and the upload
    with pytest.raises(ModelError, match="hf://me/m is public"):
        export_model(study, "qlora", to="hf://me/m", api=hub)
    assert hub.commits == []


def test_a_repository_that_was_just_made_is_free(finished, tmp_path):
    study, hub = finished("qlora"), FakeHub(tmp_path / "hub")
    hub.folder.mkdir()
    for name in (".gitattributes", "README.md"):
        (hub.folder / name).write_text("")
    export_model(study, "qlora", to="hf://me/m", api=hub)
    assert len(hub.commits) == 1 and (hub.folder / ".gitattributes").exists()


def test_a_hub_that_cannot_be_had_is_explained(finished, tmp_path, monkeypatch):
    study, hub = finished("qlora"), FakeHub(tmp_path / "hub")
    hub.is_down = True
    with pytest.raises(ModelError, match=r"hf://me/m: the network is unreachable\. See whether HF_TOKEN may write"):
        export_model(study, "qlora", to="hf://me/m", api=hub)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelError, match="no Hugging Face token: set the environment variable HF_TOKEN"):
        export_model(study, "qlora", to="hf://me/m")


@pytest.mark.parametrize("to", ["hf://", "hf://me", "hf://me/a/b", "hf://me/a b", "hf://me/--x", "hf://me/x.git"])
def test_a_name_that_no_repository_can_have_is_refused(finished, to):
    study = finished("qlora")
    with pytest.raises(ConfigError, match="use hf://USER/REPO"):
        export_model(study, "qlora", to=to)


def test_a_dry_run_shows_all_and_leaves_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    study = finished("qlora")
    for to in ("hf://me/m", tmp_path / "out"):
        made = export_model(study, "qlora", to=to, dry_run=True)
        assert made.address == str(to) and "adapter_model.safetensors" in made.files and "## Training" in made.card
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_preview_shows_files_and_card_and_keeps_nothing(finished, tmp_path):
    study = finished("qlora")
    shown = Preview(study, "qlora", to=tmp_path / "<out>")
    page = shown._repr_html_()
    assert "adapter_model.safetensors</td><td>" in page and "KiB" in page and "## Training" in page
    assert "<out>" not in page and "## Training" not in repr(shown)
    assert repr(shown).startswith(f"would go to {tmp_path / '<out>'}, README.md a model card of ")
    assert "\n  adapter_model.safetensors  " in repr(shown)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_preview_of_a_run_that_has_not_ended_says_so(finished, tmp_path):
    study = finished("qlora")
    path = study.record_path("qlora", 0)
    for status in ("stopped", "failed"):
        write_json(path, {**read_json(path), "status": status})
        found = Preview(study, "qlora", to=tmp_path / "out")
        assert repr(found) == "qlora (seed 0) can be exported once its training has finished" in found._repr_html_()
    assert repr(Preview(study, "galore", to=tmp_path / "out")).startswith("galore (seed 0) can be exported once")


@pytest.mark.parametrize("method", ["galore", "full", "apollo"])
def test_a_method_without_adapter_names_the_way_out(finished, tmp_path, method):
    study = finished(method)
    with pytest.raises(ConfigError, match=f"{method} trains the model itself and has no adapter: use merged or gguf"):
        export_model(study, method, to=tmp_path / "out")


def test_only_what_a_finished_run_left_is_exported(finished, tmp_path):
    study = finished("qlora")
    for settings, error, told in (
        ({"method": "qlora", "form": "onnx"}, ConfigError, "form='onnx' is unknown: use adapter, merged, gguf"),
        ({"method": "base"}, ConfigError, "method='base' is unknown"),
        ({"method": "hybrid"}, StudyError, r"no record of hybrid \(seed 0\).*train it first"),
        ({"method": "qlora", "seed": 7}, StudyError, r"no record of qlora \(seed 7\)"),
    ):
        with pytest.raises(error, match=told):
            export_model(study, to=tmp_path / "out", **settings)
    weights, path = study.weights_dir("qlora", 0), study.record_path("qlora", 0)
    record = read_json(path)
    write_json(path, {**record, "status": "stopped"})
    with pytest.raises(StudyError, match="is stopped at step"):
        export_model(study, "qlora", to=tmp_path / "out")
    write_json(path, record)
    (weights / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match=r"not what the run's record speaks of: adapter_model.safetensors is damaged"):
        export_model(study, "qlora", to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_exports(finished, tmp_path, capsys):
    finished("galore")
    call = ["export", "--study", "tiny", "--method", "galore", "--to", str(tmp_path / "out")]
    assert command_line.main(call) == 2
    assert "use merged or gguf" in capsys.readouterr().err
    assert command_line.main([*call, "--form", "merged", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert command_line.main([*call, "--form", "merged"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out and (tmp_path / "out" / "model.safetensors").exists()


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
