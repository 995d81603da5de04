"""Exports to a repository of the hub: one commit, private, of the same run alone."""

import pytest
import torch
from card_code import logits, run_code_of
from fake_hub import FakeHub

from peftlib.core.errors import ConfigError, ModelError
from peftlib.export.export import export_model
from peftlib.models.saved import load_trained


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
    with pytest.raises(ModelError, match="already exists and is not a peftlib export"):
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
    with pytest.raises(ModelError, match=r"hf://me/m: the network is unreachable\. Check that HF_TOKEN may write"):
        export_model(study, "qlora", to="hf://me/m", api=hub)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelError, match="no Hugging Face token: set the environment variable HF_TOKEN") as told:
        export_model(study, "qlora", to="hf://me/m")
    assert "gated" not in str(told.value)  # that is for who loads a model


@pytest.mark.parametrize("to", ["hf://", "hf://me", "hf://me/a/b", "hf://me/a b", "hf://me/--x", "hf://me/x.git"])
def test_a_name_that_no_repository_can_have_is_refused(finished, to):
    study = finished("qlora")
    with pytest.raises(ConfigError, match="use hf://USER/REPO"):
        export_model(study, "qlora", to=to)
