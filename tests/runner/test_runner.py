import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_notebooks
import psutil
import pytest

from peftlib import cli as command_line
from peftlib.core.errors import StudyError
from peftlib.runner import notebook_io as executed
from peftlib.runner import notebooks as runner
from peftlib.runner.execute import Execution

CHECKOUT = Path(runner.__file__).resolve().parents[2]
TOKEN = "hf_planted0token0that0must0not0appear"
BUSY = """\
import os
import sys
import time

import ipywidgets
from tqdm.auto import tqdm

print(f"token {os.environ['HF_TOKEN']}, interpreter {sys.executable}, study in {study.folder}")
for step in range(3):
    print(f"step {step}")
for _ in tqdm(range(3)):
    time.sleep(0.5)
ipywidgets.IntSlider()"""


@pytest.fixture(autouse=True)
def studies(tmp_path, monkeypatch):
    """An output root of its own for each test."""
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "studies"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return tmp_path / "studies"


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return folder


def run(notebooks, *wanted, heartbeat_s=20, **overrides):
    stages = runner.plan(wanted, {"profile": "demo", "study": "s", **overrides}, notebooks)
    return runner.run(stages, heartbeat_s=heartbeat_s)


def command(notebooks, *arguments):
    return [sys.executable, "-m", "peftlib", "run", "--profile", "demo", "--notebooks", str(notebooks), *arguments]


def wait_for(condition, seconds=40):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def kernels_below(pid):
    processes = psutil.Process(pid).children(recursive=True)
    return [p for p in processes if "ipykernel_launcher" in " ".join(p.cmdline())]


def test_a_run_relays_prints_keeps_tidy_copies_and_is_skipped_the_next_time(
    notebooks, studies, tmp_path, monkeypatch, capsys
):
    fake_notebooks.write_good(notebooks, "01_first", BUSY)
    foreign = tmp_path / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "", "language": "python"}))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")  # a user's kernel `python3` would come first

    assert run(notebooks, heartbeat_s=0.4) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "01_first: starting, not finished yet (study s, seed 0)"
    assert [line for line in lines if "| step" in line] == [f"01_first 5/7 | step {i}" for i in range(3)]
    assert any(line.startswith("01_first 5/7 | ... ") and line.endswith(" s in this cell") for line in lines)
    assert any(f"interpreter {sys.executable}" in line for line in lines)
    assert any(line.split()[0] == "together" for line in lines)

    copy = studies / "s" / "notebooks" / "01_first.ipynb"
    text = copy.read_text()
    assert TOKEN not in out + text and "[token]" in text
    for unwanted in ("application/vnd.jupyter.widget", '"widgets":', "0%|", str(studies), ".running"):
        assert unwanted not in text
    assert "0%|" not in out
    assert sorted(p.name for p in copy.parent.iterdir()) == ["01_first.ipynb"]

    assert run(notebooks) == 0
    assert "01_first: already finished, skipped" in capsys.readouterr().out
    assert copy.read_text() == text


def test_after_a_failure_the_same_command_goes_on_and_no_finished_copy_is_lost(notebooks, studies, capsys):
    fake_notebooks.write_good(notebooks, "01_first")
    fake_notebooks.write_good(notebooks, "02_second", 'if True:  # a reason\n    raise ValueError("planted")')
    fake_notebooks.write_good(notebooks, "03_third")
    folder = studies / "s" / "notebooks"

    assert run(notebooks) == 1
    out = capsys.readouterr().out
    assert "FAILED: 02_second, cell 5/7 (if True:  # a reason)\nValueError: planted\n" in out
    assert sorted(p.name for p in folder.iterdir()) == ["01_first.ipynb", "02_second.failed.ipynb"]

    fake_notebooks.write_good(notebooks, "02_second")
    assert run(notebooks) == 0
    out = capsys.readouterr().out
    assert "01_first: already finished, skipped" in out and "02_second: starting, not finished yet" in out
    assert sorted(p.name for p in folder.iterdir()) == ["01_first.ipynb", "02_second.ipynb", "03_third.ipynb"]

    finished = (folder / "03_third.ipynb").read_text()
    fake_notebooks.write_good(
        notebooks, "03_third", 'from peftlib.core.errors import DataError\nraise DataError("no rows")'
    )
    assert run(notebooks) == 1
    out = capsys.readouterr().out
    assert "03_third: starting, its cells have changed" in out and "DataError: no rows" in out
    assert (folder / "03_third.ipynb").read_text() == finished
    failed = executed.load(folder / "03_third.failed.ipynb")
    assert failed["cells"][4]["outputs"][0]["traceback"] == ["DataError: no rows"]  # and nothing of a library


def test_finished_means_same_settings_cells_and_files_and_nothing_read_made_later(notebooks, studies):
    fake_notebooks.write_good(notebooks, "01_first")
    fake_notebooks.write_good(notebooks, "02_second")
    first, second = plan = runner.plan([], {"profile": "demo", "study": "s"}, notebooks)
    for minute, stage in enumerate(plan):
        _plant_copy(stage, f"2026-01-01T00:0{minute}:00")
        assert runner.unfinished_reason(stage) is None

    other = runner.plan(["02"], {"profile": "demo", "study": "s", "lora_rank": 8}, notebooks)[0]
    assert runner.unfinished_reason(other) == "its settings have changed"
    seeded = runner.plan(["02"], {"profile": "demo", "study": "s", "seed": 1}, notebooks)[0]
    assert runner.unfinished_reason(seeded) == "not finished yet"
    assert seeded.copy.name == "02_second-s1.ipynb"
    (studies / "s" / "01_first.txt").unlink()
    assert runner.unfinished_reason(first) == "01_first.txt is missing"
    _plant_copy(first, "2026-01-01T00:05:00")
    assert runner.unfinished_reason(second) == "01_first was run after it"
    fake_notebooks.write_good(notebooks, "01_first", "print(1)")
    assert runner.unfinished_reason(first) == "its cells have changed"


def _plant_copy(stage, end_time):
    """What a finished run of a stage leaves behind."""
    words = f"wrote in .:\n  {stage.name}.txt  9 B\npeftlib: {stage.name} finished, study s, state {stage.state}\n"
    notebook = executed.load(stage.source)
    notebook["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": [words]}]
    notebook["metadata"]["papermill"] = {"end_time": end_time}
    executed.save(stage.copy, notebook)
    (stage.study.folder / f"{stage.name}.txt").write_text("")


def test_a_killed_kernel_is_said_in_plain_words(notebooks, studies, capsys):
    fake_notebooks.write(notebooks, "01_first", fake_notebooks.OPEN, "import os\n\nos.kill(os.getpid(), 9)", "FINISH")
    assert run(notebooks) == 1
    out = capsys.readouterr().out
    assert "FAILED: 01_first, cell 5/6 (import os)\nthe kernel died without an error: it probably ran out of" in out
    assert (studies / "s" / "notebooks" / "01_first.failed.ipynb").exists()


def test_a_notebook_without_its_last_line_is_not_finished(notebooks, studies, capsys):
    fake_notebooks.write(notebooks, "01_first", fake_notebooks.OPEN, fake_notebooks.WRITE)
    assert run(notebooks) == 1
    assert "FAILED: 01_first, all cells ran, but the last one did not print" in capsys.readouterr().out
    assert not (studies / "s" / "notebooks" / "01_first.ipynb").exists()


def test_a_time_limit_stops_the_run_and_the_next_one_goes_on(notebooks, studies, capsys):
    stop = 'finish(study, "NAME", wrote=[study.folder / "later"], status="stopped")'
    fake_notebooks.write(notebooks, "01_first", fake_notebooks.OPEN, stop)
    fake_notebooks.write_good(notebooks, "02_second")
    assert run(notebooks) == 3
    assert "01_first stopped at its time limit, the same command resumes from there" in capsys.readouterr().out
    assert [p.name for p in (studies / "s" / "notebooks").iterdir()] == ["01_first.stopped.ipynb"]
    assert runner.unfinished_reason(runner.plan(["1"], {"profile": "demo", "study": "s"}, notebooks)[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_kernel_save(number, notebooks, studies):
    work = """\
import time

try:
    print("working", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    (study.folder / "saved").write_text("")"""
    later = '(study.folder / "later").write_text("")'
    is_raised = number == signal.SIGINT  # training code may also return as if nothing had been
    fake_notebooks.write_good(notebooks, "01_first", work + "\n    raise" * is_raised, "time.sleep(20)", later)
    log = studies.parent / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command(notebooks, "--study", "s"), stdout=out, stderr=subprocess.STDOUT)
    wait_for(lambda: "working" in log.read_text())
    kernel = kernels_below(process.pid)[0]
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number, log.read_text()
    assert f"01_first was interrupted by {number.name}, the same command resumes it" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert (studies / "s" / "saved").exists() and not (studies / "s" / "later").exists()
    assert executed.load(studies / "s" / "notebooks" / "01_first.stopped.ipynb")
    wait_for(lambda: not kernel.is_running())


def test_a_killed_runner_takes_its_kernel_with_it(notebooks, studies):
    fake_notebooks.write_good(notebooks, "01_first", "import time\n\nprint('working')\ntime.sleep(60)")
    log = studies.parent / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command(notebooks, "--study", "s"), stdout=out, stderr=subprocess.STDOUT)
    wait_for(lambda: "working" in log.read_text())
    kernel = kernels_below(process.pid)[0]
    process.kill()
    process.wait()
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, seconds=10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["06"], "notebook '06' is unknown: use 01_first, or their numbers"),
        (["-p", "lora_rnk", "8"], "'lora_rnk' is not a setting: did you mean lora_rank"),
        (["-p", "seed", "three"], "seed='three' is not a whole number"),
        (["-p", "lora_rank", "0"], "lora_rank=0 is out of range: use 1 or more"),
        (["--profile", "t5"], "profile='t5' is unknown: use auto, demo, quick, t4, gpu"),
        (["--notebooks", "nowhere"], "no notebooks in nowhere"),
    ],
)
def test_wrong_commands_are_refused_in_one_line_before_anything_runs(arguments, message, notebooks, studies, capsys):
    fake_notebooks.write_good(notebooks, "01_first")
    line = ["run", "--profile", "demo", "--notebooks", str(notebooks), *arguments]
    assert command_line.main(line) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert captured.out == "" and not studies.exists()


def test_notebooks_are_found_by_number_and_name_and_run_in_their_order(notebooks):
    for name in ("01_first", "02_second", "03_third"):
        fake_notebooks.write_good(notebooks, name)
    plan = runner.plan(["third", "2"], {"profile": "demo"}, notebooks)
    assert [stage.name for stage in plan] == ["02_second", "03_third"]


def test_the_notebooks_own_parameters_count_unless_overridden(notebooks):
    fake_notebooks.write(notebooks, "01_first", parameters='# Parameters\nprofile = "t4"\nlora_rank = 4\nseed = 3')
    cfg = runner.plan([], {"seed": 0}, notebooks)[0].study.cfg
    assert (cfg.profile, cfg.study, cfg.lora_rank, cfg.seed) == ("t4", "t4", 4, 0)


def test_a_study_made_with_other_settings_is_refused_with_the_fields(notebooks, capsys):
    fake_notebooks.write_good(notebooks, "01_first")
    runner.plan([], {"profile": "demo", "study": "s"}, notebooks)[0].study.freeze()
    line = ["run", "--profile", "demo", "--study", "s", "--notebooks", str(notebooks), "-p", "max_length", "99"]
    assert command_line.main(line) == 2
    assert "study 's' was made with another config: max_length: 256 -> 99" in capsys.readouterr().err


def test_a_report_of_a_study_that_is_not_there_is_refused(capsys):
    assert command_line.main(["report", "--study", "nothing"]) == 2
    assert "there is no study 'nothing'" in capsys.readouterr().err


def test_it_runs_with_the_network_cut_off(notebooks, studies):
    unshare, ip = shutil.which("unshare"), shutil.which("ip")
    cut_off = [unshare, "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not (unshare and ip) or subprocess.run([*cut_off, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no test make a network namespace (unshare -rn)")
    offline = (
        "import socket\n\ntry:\n    socket.create_connection(('1.1.1.1', 53), timeout=2)\nexcept OSError as error:\n"
    )
    fake_notebooks.write_good(notebooks, "01_first", offline + "    print('offline:', error)")
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([*cut_off, *command(notebooks)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| offline: " in done.stdout and "peftlib: 01_first finished" in done.stdout


def test_a_second_runner_in_one_study_is_refused_by_name(notebooks, studies, capsys):
    from peftlib.storage.lock import StudyLock

    fake_notebooks.write_good(notebooks, "01_data")
    stages = runner.plan([], {"profile": "demo"}, notebooks)
    with StudyLock(stages[0].study.folder, "python -m peftlib run", name="runner-lock.json"):
        assert command_line.main(["run", "--profile", "demo", "--notebooks", str(notebooks)]) == 2
    assert "is in use by" in capsys.readouterr().err
    assert not stages[0].running.exists()


def test_overwritten_text_is_left_out_of_a_copy_and_long_lines_take_no_time(tmp_path):
    page = "x" * 300_000  # every place tried: minutes
    texts = {"1 %\r50 %\rdone\n": "done\n", "a\r\nb\rc": "a\r\nc", page: page}
    outputs = [{"output_type": "stream", "name": "stdout", "text": text} for text in texts]
    copy = {"cells": [{"cell_type": "code", "source": "", "metadata": {}, "outputs": outputs}], "metadata": {}}
    started = time.monotonic()
    executed.tidy(copy, tmp_path)
    assert [output["text"] for output in copy["cells"][0]["outputs"]] == list(texts.values())
    assert time.monotonic() - started < 5


def test_a_cell_without_outputs_has_not_ended_and_one_without_source_is_named(notebooks, tmp_path):
    path = tmp_path / "copy.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": "1"}], "metadata": {}}))
    copy = executed.load(path)
    assert executed.ending(copy) is None
    executed.tidy(copy, tmp_path)
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": []}], "metadata": {}}))
    with pytest.raises(StudyError, match=r"copy\.ipynb is not a notebook \(a cell has no source\)"):
        executed.load(path)


def test_a_signal_that_comes_as_the_kernel_ends_breaks_nothing(notebooks, monkeypatch, capsys):
    fake_notebooks.write_good(notebooks, "01_first")
    [stage] = runner.plan([], {"profile": "demo", "study": "s"}, notebooks)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(gone.pid)
    gone.wait()
    execution = Execution(stage, [], heartbeat_s=20)
    monkeypatch.setattr(execution, "_kernel_process", lambda: process)
    execution._on_signal(signal.SIGINT)
    assert execution.signal == signal.SIGINT and "SIGINT" in capsys.readouterr().out
