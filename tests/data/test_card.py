"""The hub as a source, with its library's streaming replaced; and publishing, with its client replaced."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftlib import data
from peftlib.core.config import resolve
from peftlib.core.errors import DataError, ModelError, StudyError
from peftlib.data import card
from peftlib.data.sources import HUB, parse_sources


def rows(n, start=0):
    return [
        {
            "prompt": f"q{i}",
            "prompt_id": str(i),
            "messages": [
                {"role": "user", "content": f"question {i} of all"},
                {"role": "assistant", "content": f"answer {i} to it"},
            ],
        }
        for i in range(start, start + n)
    ]


@pytest.fixture
def fake_hub(monkeypatch):
    """Calls of datasets.load_dataset; each gives 60 rows, those of a test split being others."""
    import datasets

    calls = []

    def load_dataset(name, **settings):
        calls.append((name, settings))
        return iter(rows(60, start=1000 if settings["split"].startswith("test") else 0))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_sources_are_streamed_at_their_revision_and_ultrachat_has_its_own_test_rows(fake_hub, tmp_path, tiny_model):
    sizes = {"train_rows": 20, "valid_rows": 5, "test_rows": 10, "workers": 1}
    cfg = resolve("demo", model=str(tiny_model), sources="ultrachat=hub", **sizes)
    manifest = data.build_data(cfg, tmp_path / "data", lambda line: None)
    source = HUB["ultrachat"]
    assert {(name, settings["split"]) for name, settings in fake_hub} == {
        (source.id, "train_sft"),
        (source.id, "test_sft"),
    }
    assert all(s["streaming"] is True and s["revision"] == source.revision for _, s in fake_hub)
    told = manifest["sources"]["ultrachat"]
    assert (told["revision"], told["license"], told["test_rows_from"]) == (source.revision, "MIT", "separate rows")
    origins = data.load_split(tmp_path / "data", "test").column("origin")
    assert len(origins) == 10 and all(int(origin) >= 1000 for origin in origins)
    n_calls = len(fake_hub)
    data.build_data(cfg, tmp_path / "data", lambda line: None)
    assert len(fake_hub) == n_calls  # what stands is not fetched again


@pytest.mark.parametrize("name", HUB)
def test_revisions_are_full_commits(name):
    assert len(HUB[name].revision) == 40 and int(HUB[name].revision, 16)
    assert parse_sources(f"{name}=hub")[0].identity() == {"hub": HUB[name].id, "revision": HUB[name].revision}


@pytest.mark.parametrize("after", [0, 7])
def test_a_hub_that_cannot_be_reached_or_breaks_off_names_the_ways_out(monkeypatch, after):
    import datasets

    def load_dataset(name, **settings):
        yield from rows(after)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=rf"tatsu-lab/alpaca.*after row {after} .*check the network.*alpaca=FILE"):
        list(parse_sources("alpaca=hub")[0].rows("main"))


def test_without_a_network_the_real_library_ends_in_a_data_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="could not be read from the hub after row 0"):
        next(parse_sources("tulu=hub")[0].rows("main"))


class Api:
    is_public = False

    def __init__(self, token, made):
        self.token, self.made = token, made

    def create_repo(self, repo_id, **settings):
        self.made.append(("create", repo_id, self.token, settings))
        return f"https://huggingface.co/datasets/{repo_id}"

    def repo_info(self, repo_id, *, repo_type):
        return SimpleNamespace(private=not self.is_public)

    def upload_folder(self, **settings):
        self.made.append(("upload", settings))


def test_push_to_hub_is_one_call(built_data, monkeypatch):
    import huggingface_hub

    made = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: Api(token, made))
    address = data.push_to_hub(built_data, "me/rows", token="hf_x")
    assert address == "https://huggingface.co/datasets/me/rows"
    (_, repo_id, token, settings), (_, uploaded) = made
    assert (repo_id, token, settings) == (
        "me/rows",
        "hf_x",
        {"repo_type": "dataset", "private": True, "exist_ok": True},
    )
    assert uploaded["folder_path"] == built_data and "README.md" in uploaded["allow_patterns"]
    assert not any(
        "rejects" in pattern for pattern in uploaded["allow_patterns"]
    )  # raw rows may hold what was left out


def test_push_to_hub_refuses_a_public_repository_unless_said(built_data, monkeypatch):
    import huggingface_hub

    made = []
    monkeypatch.setattr(Api, "is_public", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: Api(token, made))
    with pytest.raises(ModelError, match="me/rows is public.*private=False"):
        data.push_to_hub(built_data, "me/rows", token="hf_x")
    assert [what for what, *_ in made] == ["create"]
    data.push_to_hub(built_data, "me/rows", token="hf_x", private=False)
    assert made[-1][0] == "upload"


def test_push_to_hub_refuses_an_unfinished_folder_and_a_missing_token(built_data, tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="run 01_data first"):
        data.push_to_hub(tmp_path, "me/rows", token="hf_x")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelError, match="HF_TOKEN"):
        data.push_to_hub(built_data, "me/rows")


def test_card_names_licences_provenance_and_counts(built_data):
    text = (built_data / card.CARD).read_text()
    manifest = json.loads((built_data / "manifest.json").read_text())
    assert text.startswith("---\nlicense: other\n") and manifest["split_hash"] in text
    for name, facts in manifest["sources"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert facts["license"] in line and "| 4 | 1 | 2 |" in line
    assert {source.license for source in HUB.values()} == {"CC BY-NC 4.0", "ODC-BY 1.0", "MIT"}


def test_the_card_and_manifest_hold_no_private_path(tmp_path, tiny_model):
    secret = tmp_path / "private-folder"
    secret.mkdir()
    path = secret / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    sizes = {"train_rows": 20, "valid_rows": 5, "test_rows": 10, "workers": 1}
    cfg = resolve("demo", model=str(tiny_model), sources=f"mine={path}", **sizes)
    data.build_data(cfg, tmp_path / "data", lambda line: None)
    for name in ("manifest.json", "README.md", "rejects.jsonl"):
        assert "private-folder" not in (tmp_path / "data" / name).read_text()


NASTY = 'a|<img src=x onerror=alert(1)> `x` [b](c) **d** "e"\n# f.jsonl'


def without_escapes(text):
    """A Markdown text without what is escaped in it."""
    return re.sub(r"\\.|&\w+;|&#\d+;", "", text)


def test_the_card_shows_file_and_field_names_as_text(tmp_path, tiny_model):
    path = tmp_path / NASTY
    path.write_text("".join(json.dumps({**row, NASTY: "x"}) + "\n" for row in rows(60)))
    sizes = {"train_rows": 20, "valid_rows": 5, "test_rows": 10, "workers": 1}
    cfg = resolve("demo", model=str(tiny_model), sources=f"mine={path}", **sizes)
    data.build_data(cfg, tmp_path / "data", lambda line: None)
    text = (tmp_path / "data" / card.CARD).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| mine |"))
    assert line.count("|") == 8 and "&lt;img src=x" in line and "<br># f.jsonl" in line
    listed = next(line for line in text.splitlines() if line.startswith("- mine: fields that were not used: a"))
    for shown in (line.replace("`" + line.split("`")[-2] + "`", ""), listed):
        assert not re.search(r"[*\[\]`]|<(?!br>)", without_escapes(shown)), shown


def test_a_file_name_that_is_no_utf8_is_shown_by_its_bytes(tmp_path, tiny_model, capsys):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    sizes = {"train_rows": 20, "valid_rows": 5, "test_rows": 10, "workers": 1}
    cfg = resolve("demo", model=str(tiny_model), sources=f"mine={path}", **sizes)
    manifest = data.build_data(cfg, tmp_path / "data")
    assert manifest["sources"]["mine"]["where"] == {"main": "caf\\xe9.jsonl"}
    assert "caf\\xe9.jsonl is read as" in capsys.readouterr().out
