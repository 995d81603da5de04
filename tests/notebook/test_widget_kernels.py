"""Every control of the form, the row browser, the charts, the explorer and the question box, worked by messages.

Once with the installed ipywidgets (8), once with Colab's (7).
"""

import os
import re

import pytest
from front_end import COLAB, INSTALLED, FrontEnd
from tiny import TINY

from peftlib.notebook.widgets import VIEW

PREPARE = """
if "patch" in globals():
    patch.undo()  # of the test before, in the same kernel
import os, warnings
from pathlib import Path
import fake_study, pytest, torch
torch.set_num_threads(1)
from peftlib import Study, build_report, load_split, load_tokenizer
from peftlib.notebook import ask_box, browse, chat_box, explore, gguf_box, hub_box, show_charts, study_form
from peftlib.report import charts as report_charts
os.environ["PEFTLIB_ROOT"] = {root!r}
study = Study.resolve(profile="demo", study="tiny", **{fields!r})
split = load_split(study.data_dir, "train")
patch = pytest.MonkeyPatch()
with patch.context() as only_here:
    only_here.setattr(report_charts, "charts_of", lambda *_: {{}})
    shown = build_report(fake_study.make(Path({folder!r}), patch, methods=("base", "qlora"), n=6))
# What a version does not know of a widget or its layout it takes with a warning, and its front end drops it. Not before: what is imported above may warn too.
warnings.filterwarnings("error", "(?s).*([Uu]nrecognized|deprecated)", DeprecationWarning)
warnings.filterwarnings("ignore", ".*utcnow", DeprecationWarning)  # the kernel's own, from Python 3.12 on
print("prepared")
"""


@pytest.fixture(scope="module", params=[INSTALLED, COLAB])
def kernel(request, kernel_of):
    return kernel_of(request.param)


@pytest.fixture
def page(kernel, make_study, tmp_path):
    """A Page of a kernel in which a study, a report and some rows stand."""
    study = make_study()
    made = Page(kernel[1])
    fields = {**TINY, "model": study.cfg.model}
    ready = PREPARE.format(root=os.environ["PEFTLIB_ROOT"], fields=fields, folder=str(tmp_path / "fake"))
    said = made.ended(ready)
    assert said.endswith("prepared\n"), said
    made.heard.clear()
    return made


class Page(FrontEnd):
    """A front end that holds the widgets of one cell by what stands on them."""

    def show(self, code):
        """Run a cell that shows one widget; the text beside it. Fails unless a front end of Colab knows all of it."""
        cell = self.run(code)
        assert self.end_of(cell) == ""
        opened = [m["content"] for m in self.heard if m["msg_type"] == "comm_open"]
        self.models = {content["comm_id"]: content["data"]["state"] for content in opened}
        self._take_updates()
        assert {state["_model_module"] for state in self.models.values()} <= {
            "@jupyter-widgets/base",
            "@jupyter-widgets/controls",
        }
        [displayed] = [m["content"] for m in self.heard if m["msg_type"] in ("display_data", "execute_result")]
        view = displayed["data"][VIEW]
        assert view == {"version_major": 2, "version_minor": 0, "model_id": view["model_id"]}
        assert self.models[view["model_id"]]["_model_name"] == "VBoxModel"
        return displayed["data"]["text/plain"]

    def control(self, description):
        """comm id of the widget with that text on it."""
        [found] = [comm for comm, state in self.models.items() if state.get("description") == description]
        return found

    def change(self, description, **state):
        """Change a control, and wait until the kernel has done what follows."""
        self.set(self.control(description), **state)
        self.answered()

    def press(self, description):
        """Click a button, and wait until the kernel has done what follows."""
        self.click(self.control(description))
        self.answered()

    def pick(self, description, label):
        """Choose an option of a dropdown, as `change`."""
        options = list(self.models[self.control(description)]["_options_labels"])
        self.change(description, index=options.index(label))

    def answered(self):
        """Take in what the last message made the kernel send; fails if a callback raised or printed."""
        self.heard.clear()
        marker = self.run("None")  # the shell channel is a queue: it ends after the control's message was handled
        self.end_of(marker)
        assert not [m["content"] for m in self.heard if m["msg_type"] in ("error", "stream")]
        self._take_updates()

    def _take_updates(self):
        for content in (message["content"] for message in self.heard if message["msg_type"] == "comm_msg"):
            if content["data"]["method"] == "update":
                self.models[content["comm_id"]] |= content["data"]["state"]

    def html(self):
        """All HTML and labels that the widgets show now, from top to bottom as they were made."""
        names = ("HTMLModel", "LabelModel")
        return "\n".join(state["value"] for state in self.models.values() if state["_model_name"] in names)


def test_every_choice_of_the_form_is_answered(page):
    page.show("study_form(study)")
    page.pick("GPU", "l4")
    assert "on a l4" in page.html()
    for name, value in (
        ("train_rows", 5),
        ("max_length", 512),
        ("epochs", 2),
        ("batch_size", 4),
        ("lora_rank", 2),
        ("galore_rank", 4),
    ):
        page.change(name, value=value)
        assert f"{name} = {value}" in page.html()
    for name, label, line in (
        ("moment_bits", "8", "moment_bits = 8"),
        ("galore_weights", "bf16", "galore_weights = &#x27;bf16&#x27;"),
    ):
        page.pick(name, label)
        assert line in page.html()
    page.change("model", value="somewhere/else")
    assert "costs unknown" in page.html()
    page.change("lora_rank", value=0)
    assert "Not possible:" in page.html()


def test_rows_are_browsed_by_source_and_number(page):
    page.show("browse(split, load_tokenizer(study.cfg.model))")
    first = page.html()
    page.change("row", value=1)
    second = page.html()
    page.pick("source", "tulu")
    assert len({first, second, page.html()}) == 3 and "tulu" in page.html()


def test_every_choice_of_the_charts_draws(page):
    assert page.show("show_charts(shown)") == "charts (run the cell to see them)"
    pictures = {page.html()}
    for control, label in (("show", "BLEU-4"), ("of", "tulu"), ("theme", "dark")):
        page.pick(control, label)
        pictures.add(page.html())
    assert len(pictures) == 4 and 'download="results.csv"' in page.html()
    assert re.search(
        r'<img alt="[^"]*test rows of tulu[^"]* qlora BLEU-4 [^"]*" src="data:image/png;base64,', page.html()
    )
    page.pick("show", "test loss")
    assert page.models[page.control("of")]["disabled"]


def test_every_control_of_the_explorer_is_heeded(page):
    assert page.show("explore(shown)") == "6 test rows to explore (run the cell to see them)"
    assert "of 6" in page.html() and page.models[page.control("Previous")]["disabled"]
    page.press("Next")
    page.press("Next")
    page.press("Previous")
    assert page.models[page.control("row")]["value"] == 2 and "tulu-1" in page.html()
    page.change("row", value=6)
    assert "ultrachat-5" in page.html() and page.models[page.control("Next")]["disabled"]
    page.pick("source", "alpaca")
    assert "of 2" in page.html() and "alpaca-0" in page.html()
    page.pick("sort by", "largest gain")
    for control, label in (("score", "BLEU-4 of the row"), ("of", "base"), ("over", "qlora")):
        page.pick(control, label)
    assert "change from qlora" in page.html()
    page.change("qlora", value=False)
    assert "<h4>qlora</h4>" not in page.html()
    page.change("mark words", value=False)
    assert "<mark>" not in page.html().split('class="pl-cards"')[1].split("In brackets")[0]
    page.press("Make CSV")
    assert 'download="answers.download.csv"' in page.html()
    page.change("text", value="no row has this")
    assert "No row contains this text" in page.html()


def test_the_question_box_asks_what_is_typed_of_what_is_ticked(page):
    assert page.show("ask_box(study)") == "a box to ask all models (run the cell to see it)"
    page.change("question", value=" ")
    page.press("Ask all models")
    assert "Type a question first." in page.html()
    page.change("question", value="What is <b>this</b>?")
    page.change("at most", value=3)
    page.press("Ask all models")
    assert "<h4>base</h4>" in page.html() and "Greedy decoding" in page.html()
    assert "3 tokens in" in page.html() or ", finished" in page.html()
    assert not page.models[page.control("Ask all models")]["disabled"]
    page.change("base", value=False)
    page.press("Ask all models")
    assert "Tick a model first." in page.html()


def test_the_chat_box_answers_and_starts_over(page):
    assert page.show('chat_box(study, "qlora")') == "a box to chat with the model (run the cell to see it)"
    page.press("Send")
    assert "Type something first." in page.html()
    page.change("you", value="Hello <b>there</b>")
    page.press("Send")
    assert "Hello &lt;b&gt;there" in page.html() and "<h4>base</h4>" in page.html()
    page.press("Start over")
    assert "<h4>" not in page.html()


def test_the_boxes_that_hand_a_run_on_say_what_it_lacks(page):
    page.show('hub_box(study, "qlora")')
    page.change("repository", value="me/my-model")
    page.pick("form", "merged")
    page.press("Preview")
    assert "can be exported once its training has finished" in page.html()
    assert page.models[page.control("Push to the hub")]["disabled"]
    page.heard.clear()
    page.show('gguf_box(study, "qlora")')
    page.pick("type", "f16")
    page.press("Make GGUF for Ollama")
    assert "no record of qlora" in page.html()
