import pytest

from peftlib import cli as command_line
from peftlib.core.errors import ConfigError, LockedError, ModelError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.export.export import Preview, export_model
from peftlib.export.targets import target_of


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
    with pytest.raises(ModelError, match=r"also contains mine.txt, which is not from an export"):
        export_model(study, "qlora", to=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "runs"]  # no folder is left beside


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_stands_there_is_never_lost(finished, tmp_path, what):
    study, out = finished("qlora"), tmp_path / "out"
    held = out / "thesis.tex" if what == "folder" else out
    held.parent.mkdir(exist_ok=True)
    held.write_text("a year's work")
    with pytest.raises(ModelError, match="already exists and is not a peftlib export"):
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
    assert told == [f"removed {left}, left by an interrupted export"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "runs"]


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
    assert repr(shown).startswith(f"would be written to {tmp_path / '<out>'}; README.md is a model card of ")
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
    with pytest.raises(ConfigError, match=f"{method} trains full weights and has no adapter: use lora, merged or gguf"):
        export_model(study, method, to=tmp_path / "out")


def test_only_what_a_finished_run_left_is_exported(finished, tmp_path):
    study = finished("qlora")
    for settings, error, told in (
        ({"method": "qlora", "form": "onnx"}, ConfigError, "form='onnx' is unknown: use adapter, lora, merged, gguf"),
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
    with pytest.raises(ModelError, match=r"does not match the run's record: adapter_model.safetensors is damaged"):
        export_model(study, "qlora", to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_exports(finished, tmp_path, capsys):
    finished("galore")
    call = ["export", "--study", "tiny", "--method", "galore", "--to", str(tmp_path / "out")]
    assert command_line.main(call) == 2
    assert "use lora, merged or gguf" in capsys.readouterr().err
    assert command_line.main([*call, "--form", "merged", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert command_line.main([*call, "--form", "merged"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out and (tmp_path / "out" / "model.safetensors").exists()
