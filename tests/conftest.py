import contextlib
import gc
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import TINY

from peftlib.core import config, hub_token, paths
from peftlib.core.study import Study
from peftlib.storage import mirror
from peftlib.storage import remotes as storage

# Tiny tensors: a second thread only waits, and two processes that do so on two cores take forty times as long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the kernels and commands that tests start
# No test copies a study to a place of its user's own, nor do the kernels and commands that tests start.
os.environ["PEFTLIB_MIRROR"] = "off"


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_look_through():
    """What stands before a module's first test is left out of garbage collection, which evaluations and sweeps ask
    for: of all that libraries and tests have loaded, it takes half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_drive(monkeypatch, tmp_path):
    """A Drive that is mounted where the tests run, as on Colab, is not theirs."""
    monkeypatch.setattr(storage, "DRIVE", tmp_path / "no-drive")


@pytest.fixture(autouse=True)
def no_mirror_left(monkeypatch):
    """A mirror ends with the test that has started it: each later command would wait for its last uploads."""
    started = {}
    monkeypatch.setattr(mirror, "_RUNNING", started)
    yield
    for left in started.values():
        left._is_over.set()


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    """Nothing of this machine's gives a token: no variable, .env file, login or secret."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "login"))
    monkeypatch.setattr(hub_token, "checkout", lambda: paths.checkout(tmp_path / "checkout" / "peftlib"))
    monkeypatch.setattr(hub_token, "_given", set())
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random Gemma 3 with its tokenizer."""
    return tiny.model_folder(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def built_data(tiny_model, tmp_path_factory):
    """The data folder of a tiny study, built once."""
    from peftlib import data

    folder = tmp_path_factory.mktemp("built") / "data"
    data.build_data(config.resolve("demo", model=str(tiny_model), **TINY), folder)
    return folder


@pytest.fixture
def make_study(tiny_model, built_data, tmp_path, monkeypatch):
    """make_study(**fields) -> a Study below tmp_path whose data stand and whose config is frozen."""
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    # Measuring this machine's speed takes longer than many a tiny run.
    monkeypatch.setattr("peftlib.train.estimate.matmul_ceiling", lambda *args, **settings: 1e12)

    def make(**fields):
        cfg = config.resolve("demo", **{"model": str(tiny_model), "study": "tiny", **TINY, **fields})
        study = Study.open(cfg)
        if not study.data_dir.exists():
            shutil.copytree(built_data, study.data_dir)
        study.freeze()
        return study

    return make


@pytest.fixture
def no_charts(monkeypatch):
    """Reports without figures: drawing them takes longer than all the rest."""
    monkeypatch.setattr("peftlib.report.charts.charts_of", lambda *_: {})


@pytest.fixture
def in_this_process(monkeypatch):
    """`peftlib study run` does the runs' commands in this process, without pauses."""
    from here import Here

    from peftlib.runner import suite

    monkeypatch.setattr(suite, "Local", Here)
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))


@pytest.fixture(scope="session")
def finished_before():
    """{what `finished` was asked for: a copy of that study's folder}, for tests that ask for the same again."""
    return {}


@pytest.fixture
def finished(make_study, finished_before, tmp_path_factory):
    """finished(method, **fields) -> a Study in which that method is trained; is_scored=True scores it and base."""
    from peftlib.evaluation.evaluate import evaluate
    from peftlib.train.loop import TrainingRun

    def make(method, is_scored=False, **fields):
        study = make_study(lora_learning_rate=1e-2, galore_learning_rate=1e-2, **fields)
        asked = (method, is_scored, *sorted(fields.items()))
        is_first = not study.records()
        if is_first and asked in finished_before:
            shutil.copytree(finished_before[asked], study.folder, dirs_exist_ok=True)
            return study
        TrainingRun(study, method, log=lambda line: None).train()
        for name in ("base", method) if is_scored else ():
            evaluate(study, name, log=lambda line: None)
        if is_first and not {"model", "sources"} & fields.keys():  # those name folders of one test
            finished_before[asked] = shutil.copytree(study.folder, tmp_path_factory.mktemp("finished") / "study")
        return study

    return make


@pytest.fixture(scope="session")
def kernel_of():
    """kernel_of(name) -> (KernelManager, client) of one kernel a version, which all tests share; see
    front_end.started."""
    from front_end import started

    with contextlib.ExitStack() as stack:
        made = {}

        def get(name):
            if name not in made:
                made[name] = stack.enter_context(started(name))
            return made[name]

        yield get


@pytest.fixture(scope="session")
def built_study(tiny_model, built_data, tmp_path_factory):
    """(folder of finished studies, {command: what it makes of them}); nobody writes there."""
    import finished_study

    root = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTLIB_MIRROR", "off")
        patch.setenv("PEFTLIB_ROOT", str(root / "runs"))
        finished_study.build(root, tiny_model, built_data, TINY)
        expected = {}
        for command in finished_study.COMMANDS:
            place = tmp_path_factory.mktemp("undamaged")
            shutil.copytree(root / "runs", place / "runs")
            patch.setenv("PEFTLIB_ROOT", str(place / "runs"))
            kind, expected[command] = finished_study.attempt(command, place)
            assert kind == "ok", (command, expected[command])
    return root / "runs", expected


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A lab.Lab, one for all browser tests; skips them where there is no Chromium, driver, JupyterLab or Selenium."""
    from lab_server import LabServer, missing

    if missing():
        pytest.skip(missing())
    from lab import Lab, headless_chromium

    named = os.environ.get("PEFTLIB_SCREENSHOTS")
    shots = Path(named).resolve() if named else tmp_path_factory.mktemp("screenshots")
    with LabServer(tmp_path_factory.mktemp("lab") / "server") as server, headless_chromium() as driver:
        yield Lab(server, driver, shots)
