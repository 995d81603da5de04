import json
import os
import subprocess
import sys
from pathlib import Path

import fake_notebooks
import pytest
from jupyter_client.manager import start_new_kernel

from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError, Stopped, StudyError
from peftlib.core.files import readable_path
from peftlib.core.study import Study
from peftlib.notebook import require_finished
from peftlib.notebook import session as notebook
from peftlib.train.loop import run_training

CHECKOUT = Path(notebook.__file__).resolve().parents[2]
SETUP = 'from peftlib.notebook.session import finish, headless, setup\n\nstudy = setup("NAME")'


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "studies"))
    study = Study.open(resolve("demo", study="s"))
    study.folder.mkdir(parents=True)
    return study


def papermill(source, target, *parameters):
    """The finished process of plain papermill, outputs of the cells on stderr."""
    return subprocess.run(
        [sys.executable, "-m", "papermill", "--log-output", str(source), str(target), *parameters],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        check=False,
    )


def test_later_parameters_win_and_other_cells_do_not_count():
    cells = [
        "",
        '# Parameters\nprofile = "auto"  # @param ["auto", "demo"]\nlora_rank = None\nseed: int = 1'.replace(
            ": int", ""
        ),
        'lora_rank = 99\nmodel = "elsewhere"',
        "# Parameters\nlora_rank = 8\ngalore_scale = -0.5",
    ]
    assert notebook.executed_parameters(cells) == {
        "profile": "auto",
        "lora_rank": 8,
        "seed": 1,
        "galore_scale": -0.5,
    }


OWN = '# Parameters\n# @markdown auto looks at the hardware\nprofile = "auto"  # @param ["auto", "demo"]\n'
INJECTED = "# Parameters\nprofile = 'demo'\n"


@pytest.mark.parametrize(
    "cells, expected",
    [
        # A notebook of ours: lines deleted or edited, run again.
        ([OWN + "seed = 3\nlora_rank = 8", OWN + "seed = 4"], {"profile": "auto", "seed": 4}),
        # An executed copy: its own cell, then papermill's, each may be edited and run again.
        ([OWN + "seed = 3", INJECTED + "lora_rank = 8"], {"profile": "demo", "seed": 3, "lora_rank": 8}),
        ([OWN + "seed = 3", INJECTED + "lora_rank = 8", INJECTED], {"profile": "demo", "seed": 3}),
        ([OWN + "seed = 3", INJECTED + "lora_rank = 8", OWN], {"profile": "auto", "lora_rank": 8}),
        ([OWN, INJECTED + "lora_rank = 8", OWN + "lora_rank = 4"], {"profile": "auto", "lora_rank": 4}),
        ([OWN + "seed = 3", INJECTED + "lora_rank = 8", OWN, INJECTED], {"profile": "demo"}),
        # Written by hand, without the marks of a form.
        ([INJECTED + "lora_rank = 8", INJECTED + "seed = 1"], {"profile": "demo", "seed": 1}),
    ],
)
def test_lines_that_were_deleted_do_not_live_on(cells, expected):
    assert notebook.executed_parameters(cells) == expected


def test_our_own_cells_and_papermills_are_told_apart():
    from papermill.translators import PythonTranslator

    written = PythonTranslator.codify({"profile": "demo", "study": "@param", "lora_rank": 8})
    assert notebook.literals(written) == {"profile": "demo", "study": "@param", "lora_rank": 8}
    assert not notebook.is_own_parameters(written)
    for path in (CHECKOUT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        [own] = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
        assert notebook.is_own_parameters("".join(own["source"])), path


@pytest.mark.parametrize("line", ["lora_rank = 4 * 2", "import os", "lora_rank =", "cfg.lora_rank = 8", "print(1)"])
def test_anything_but_literals_is_refused(line):
    with pytest.raises(ConfigError, match="only NAME = VALUE lines with literal values"):
        notebook.executed_parameters([f"# Parameters\n{line}"])


def test_without_a_parameters_cell_the_way_out_is_named():
    with pytest.raises(ConfigError, match="first run the cell that begins with '# Parameters'"):
        notebook.executed_parameters(["", "x = 1"])


def test_setup_outside_a_notebook_is_refused():
    with pytest.raises(ConfigError, match="setup\\(\\) works only in notebooks"):
        notebook.setup("01_data")


def test_finish_lists_what_was_written_and_ends_with_the_line_that_the_runner_reads(study, capsys):
    (study.folder / "records").mkdir()
    record = study.record_path("qlora", 0)
    record.write_text("x" * 2048)
    (study.folder / "results.csv").write_text("x" * 5)
    notebook.finish(study, "02_qlora", wrote=[record, study.folder / "records", study.results_path])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1:4] == [
        "  records/qlora-s0.json  2.0 KiB",
        "  records                2.0 KiB",
        "  results.csv            5 B",
    ]
    state = notebook.state_hash("02_qlora", study.cfg)
    assert lines[4:] == ["next: 03_galore", f"peftlib: 02_qlora finished, study s, state {state}"]
    wrote = ["records/qlora-s0.json", "records", "results.csv"]
    assert notebook.last_words("before\n" + out) == ("finished", state, wrote)


def test_the_last_notebook_of_quick_names_the_full_study_and_what_it_takes(study, capsys):
    for profile, n_lines in (("quick", 1), ("demo", 0)):
        notebook.finish(Study(study.folder, resolve(profile)), "05_hybrid", wrote=[])
        told = capsys.readouterr().out
        assert told.count('the full study: profile = "t4" in the settings cells; profile t4 trains') == n_lines
        assert notebook.last_words(told)[0] == "finished"


def test_finish_refuses_a_path_that_is_not_there_unless_the_work_was_stopped(study, capsys):
    with pytest.raises(StudyError, match="02_qlora should have written results.csv, which is missing"):
        notebook.finish(study, "02_qlora", wrote=[study.results_path])
    assert notebook.last_words(capsys.readouterr().out) is None
    notebook.finish(study, "02_qlora", wrote=[study.results_path], status="stopped")
    assert notebook.last_words(capsys.readouterr().out)[0] == "stopped"


def test_state_covers_what_changes_results_and_nothing_else(study):
    cfg = study.cfg
    state = notebook.state_hash("02_qlora", cfg)
    assert state == notebook.state_hash("02_qlora", cfg.replace(micro_batch_size=1, max_seconds=5, study="other"))
    others = [cfg.replace(seed=1), cfg.replace(lora_rank=8), cfg.replace(test_rows=1)]
    assert state not in [notebook.state_hash("02_qlora", other) for other in others]
    assert state != notebook.state_hash("03_galore", cfg)


def test_compact_names_every_field_and_what_differs_from_the_profile():
    text = notebook.compact(resolve("t4", study="other", lora_rank=8))
    fields = vars(resolve("t4"))
    assert all(f"{name}=" in text for name in fields)
    assert text.splitlines()[-1] == "changed    lora_rank: 16 -> 8"
    assert max(map(len, text.splitlines())) <= 110
    many = resolve("demo", study="other", model="/somewhere/deep/down/a-model", lora_rank=8, train_rows=4, test_rows=3)
    changed = notebook.compact(many.replace(max_length=300, workers=1)).split("changed")[1]
    assert max(map(len, changed.splitlines())) <= 110 and "train_rows: 24 -> 4" in " ".join(changed.split())


def test_paths_are_shown_below_the_working_folder_or_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert readable_path(tmp_path / "runs" / "demo") == "runs/demo"
    assert readable_path(CHECKOUT / "runs" / "demo") == "runs/demo"
    assert readable_path("/home/someone/runs") == "~/runs"
    assert readable_path("/elsewhere") == "/elsewhere"


def test_plain_papermill_runs_a_notebook_keeps_bars_out_and_never_asks_for_drive(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLIB_DRIVE", "1")
    bars = "from tqdm.auto import tqdm\n\nfor _ in tqdm(range(3)):\n    pass\nprint(headless())"
    # As after the first cell, whose torch imports tqdm.
    setup = f"import tqdm.auto\n{SETUP}"
    source = fake_notebooks.write(tmp_path, "01_data", setup, bars, 'finish(study, "NAME", wrote=[])')
    done = papermill(source, tmp_path / "out.ipynb", "-p", "study", "s", "-p", "lora_rank", "8")
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    shown = ["".join("".join(o.get("text", "?")) for o in cell.get("outputs", [])) for cell in cells]
    lines = shown[3].splitlines()
    assert lines[0] == "01_data, study s, profile demo"
    assert "changed    lora_rank: 16 -> 8" in lines
    assert [line.split()[0] for line in lines[-4:]] == ["device", "precision", "folder", "copies"]
    assert shown[4] == "True\n"
    state = notebook.state_hash("01_data", resolve("demo", lora_rank=8))
    assert shown[5].splitlines()[-1] == f"peftlib: 01_data finished, study s, state {state}"


def test_plain_papermill_with_an_unknown_parameter_fails_with_our_message_alone(study, tmp_path):
    source = fake_notebooks.write(tmp_path, "01_data", SETUP)
    assert papermill(source, tmp_path / "out.ipynb", "-p", "lora_rnk", "8").returncode == 1
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    errors = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
    [shown] = [line for error in errors for line in error["traceback"]]
    assert shown.startswith("ConfigError: 'lora_rnk' is not a setting: did you mean lora_rank")


def test_in_a_live_kernel_an_edited_parameters_cell_wins_and_errors_are_short(study, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        assert _said(client, "from peftlib.notebook.session import setup, headless; print(headless())") == (
            "ok",
            "False\n",
        )
        _said(client, '# Parameters\nprofile = "demo"\nstudy = "s"\nlora_rank = 8')
        status, said = _said(client, 'study = setup("01_data")')
        assert status == "ok" and "lora_rank: 16 -> 8" in said
        _said(client, '# Parameters\nprofile = "demo"\nstudy = "s"\nlora_rank = 4')
        _, said = _said(client, 'study = setup("01_data")')
        assert "lora_rank: 16 -> 4" in said
        _said(client, '# Parameters\nprofile = "demo"\nstudy = "s"')
        _, said = _said(client, 'study = setup("01_data")')
        assert "changed    nothing, same as the profile" in said
        status, said = _said(client, 'study = setup("01_data", drive=True)')
        assert status == "error" and said.endswith("but only Colab can mount it")
        _said(client, "# Parameters\nlora_rank = 0")
        status, said = _said(client, 'study = setup("01_data")')
        assert status == "error"
        assert said == "ConfigError: lora_rank=0 is out of range: use 1 or more (rank of each adapter)"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _said(client, code):
    """(status, what the cell printed or its traceback) of code run as a person's front end would."""
    heard = []

    def hear(message):
        content = message["content"]
        heard.append(content.get("text", "") + "\n".join(content.get("traceback", [])))

    reply = client.execute_interactive(code, allow_stdin=True, timeout=60, output_hook=hear)
    return reply["content"]["status"], "".join(heard)


def test_a_notebooks_state_is_the_first_editions():
    assert notebook.state_hash("02_qlora", resolve("t4")) == "810aefb2f37a"


def test_a_notebook_whose_training_stopped_ends_as_stopped(make_study, monkeypatch):
    study = make_study(max_seconds=1e-6)
    record = run_training(study, "qlora", log=str)
    with pytest.raises(Stopped, match="qlora is saved at step 1 of 6: run this notebook again to resume"):
        require_finished(study, record)
    with pytest.raises(Stopped):
        notebook.make_inputs("04_eval", study, ["qlora"], str)
    assert require_finished(study, {**record, "status": "ok"}) is None
