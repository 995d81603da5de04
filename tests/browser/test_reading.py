"""Each notebook as a reader opens and runs it in JupyterLab, in order, in one tiny study."""

import pytest
from tiny import TINY

from peftlib.notebook import session as notebook
from peftlib.runner import notebook_io as executed

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def fields(tiny_model):
    """Parameters of the one study."""
    return {"profile": "demo", "study": "read", "model": str(tiny_model), **TINY}


def require_good_end(lab, opened, name):
    """The last line was printed, nothing looks broken, and the file as the reader saves it holds no widgets."""
    last = opened.code_cells[-1].text.strip().splitlines()
    assert last[-1].startswith(f"peftlib: {name} finished, study read, state "), opened.problems()
    assert opened.problems() == []
    assert lab.script_errors() == []
    opened.save()
    saved = executed.load(opened.path)
    assert executed.failure(saved) is None and executed.ending(saved)[0] == notebook.FINISHED
    assert "widgets" not in saved["metadata"]
    assert opened.path.stat().st_size <= 500_000


def test_01_refuses_a_typed_mistake_in_words_and_runs_cell_by_cell(lab, fields):
    with lab.opened(lab.server.put("01_data", fields=fields)) as opened:
        parameters, setup = opened.cell("# Parameters"), opened.cell("setup(")
        parameters.type_at_end("lora_rank = 0")
        parameters.run()
        setup.run()
        assert setup.text == "ConfigError: lora_rank=0 is out of range: use 1 or more (rank of each adapter)"
        assert setup.problems() == [f"an error: {setup.text}"]
        parameters.type_at_end(f"lora_rank = {TINY['lora_rank']}")
        for cell in opened.code_cells:
            cell.run()
        require_good_end(lab, opened, "01_data")
        opened.picture_in_both_themes("01_data")


def test_01s_row_browser_shows_the_row_that_is_picked(lab, fields):
    with lab.opened(lab.server.put("01_data", fields=fields)) as opened:
        browser = opened.cell("browse(")
        opened.run_above(browser, seconds=120)
        browser.run()
        browser.wait_for("scored by the loss")
        assert browser.options("source") == ["alpaca", "tulu", "ultrachat"]
        first = browser.text
        browser.choose("source", "tulu")
        second = browser.wait_for_change(first)
        assert "alpaca-" in first and "tulu-" not in first and "tulu-" in second
        browser.enter("row", 2)
        assert "tulu-" in browser.wait_for_change(second)
        browser.enter("row", 99)  # there are four
        browser.lab.wait(lambda: browser.value("row") == "3", "the last row instead of one that is not there")


@pytest.mark.parametrize("name", [name for name in notebook.NOTEBOOKS if name != "01_data"])
def test_the_others_run_from_top_to_bottom(name, lab, fields):
    assert (lab.server.runs / "read" / "data").exists(), "01_data did not come to its end"
    with lab.opened(lab.server.put(name, fields=fields)) as opened:
        opened.run_all(seconds=240)
        require_good_end(lab, opened, name)
        opened.picture_in_both_themes(name)
