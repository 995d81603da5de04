"""What a session of Colab or Kaggle lacks is said before work begins, with the line that mends it."""

import csv
import importlib
import shutil
import subprocess
import sys
import types
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import update_badges as badges

from peftlib.core import config, paths
from peftlib.core.errors import ModelError, StudyError
from peftlib.core.study import Study
from peftlib.models import packaged
from peftlib.notebook import hosted
from peftlib.notebook import session as notebook

CHECKOUT = Path(hosted.__file__).resolve().parents[2]


@pytest.fixture
def at(monkeypatch, tmp_path):
    """at('colab' | 'kaggle' | ''): this machine takes itself for that; studies go to a folder of their own."""
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))

    def enter(host):
        monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
        monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
        if host:
            monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
        if host == "kaggle":
            monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")

    return enter


def packages(**installed):
    """name -> version, as importlib.metadata.version."""

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    return version


def loaded(**versions):
    return {name: types.SimpleNamespace(__version__=version) for name, version in versions.items()}


def test_the_packages_of_this_machine_are_sound():
    hosted.require_sound_packages()


@pytest.mark.parametrize(
    "host, menu", [("colab", "Runtime > Restart session"), ("kaggle", "Run > Restart"), ("", "kernel")]
)
def test_a_login_before_the_install_cell_asks_for_a_restart(at, host, menu):
    at(host)
    version = packages(huggingface_hub="2.4.0", transformers="5.24.0")
    with pytest.raises(
        ModelError, match=r"huggingface_hub 1\.27\.0 was imported before 2\.4\.0.*restart the session"
    ) as told:
        hosted.require_sound_packages(loaded(huggingface_hub="1.27.0"), version)
    assert menu in str(told.value)
    hosted.require_sound_packages(loaded(huggingface_hub="2.4.0"), version)
    hosted.require_sound_packages({}, version)


def test_the_check_comes_before_anything_imports_a_package_that_the_install_changed():
    code = "import sys, peftlib.notebook.session; print(*set(sys.modules) & set(peftlib.notebook.hosted._CHANGED_BY_INSTALL))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_torchao_that_peft_refuses_is_named_with_both_ways_out():
    with pytest.raises(
        ModelError, match=r"torchao 0\.10\.0 .* PEFT needs 0\.16 or newer: .*torchao>=0\.16.*uninstall -y torchao"
    ):
        hosted.require_sound_packages({}, packages(torchao="0.10.0"))
    hosted.require_sound_packages({}, packages(torchao="0.16.0"))
    hosted.require_sound_packages({}, packages())


def test_torchaos_own_warning_is_not_in_the_readers_way(at, monkeypatch, tmp_path):
    package = tmp_path / "torchao"
    package.mkdir()
    (package / "__init__.py").write_text("assert 1 is 1\n")  # a SyntaxWarning under every Python
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        for host, n_seen in (("", 1), ("colab", 0)):
            warnings.simplefilter("always")
            at(host)
            hosted.quiet_torchao()
            seen.clear()
            monkeypatch.setitem(sys.modules, "torchao", None)  # the real one, which PEFT has imported, comes back
            del sys.modules["torchao"]
            shutil.rmtree(package / "__pycache__", ignore_errors=True)
            importlib.import_module("torchao")
            assert len(seen) == n_seen


def test_the_install_line_is_the_one_of_the_install_cell(at):
    line = paths.install_line("colab", "demo")
    assert line == f'%pip install -q --no-compile "peftlib[colab,demo] @ git+{badges.address()}"'
    assert line.replace("colab,demo", "{extras}") in badges.install_cell()


def test_an_installed_copy_knows_its_address(monkeypatch):
    monkeypatch.setattr(paths, "checkout", lambda: None)
    assert paths.address() == badges.address()
    assert paths.pip_line("bench") == f"pip install 'peftlib[bench] @ git+{badges.address()}'"  # PyPI has no peftlib


@pytest.mark.parametrize(
    "host, way", [("colab", "Runtime > Change runtime type > T4 GPU"), ("kaggle", "Settings > Accelerator")]
)
def test_without_a_gpu_a_hosted_session_says_how_to_get_one_and_what_happens_else(at, host, way):
    at(host)
    demo = hosted.without_gpu("cpu", config.resolve("demo"))
    assert way in demo[0] and "small demo" in demo[1] and "24 rows per source" in demo[1]
    assert 'profile = "demo"' in hosted.without_gpu("cpu", config.resolve("t4"))[1]
    assert hosted.without_gpu("cuda", config.resolve("t4")) == []


def test_elsewhere_a_machine_without_a_gpu_is_nothing_to_talk_about(at):
    at("")
    assert hosted.without_gpu("cpu", config.resolve("demo")) == []


def test_a_hosted_session_without_the_packaged_model_is_told_the_line_to_run(at, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "_PACKAGES", ["peftlib-no-such-package"])
    for host in ("colab", "kaggle"):
        at(host)
        with pytest.raises(ModelError, match="in a cell and continue, without a restart") as told:
            packaged.packaged_model()
        assert paths.install_line("demo") in str(told.value)


def open_notebook(monkeypatch, name, **parameters):
    """setup() of a notebook whose parameters cell holds these."""
    cells = ["# Parameters\n" + "\n".join(f"{field} = {value!r}" for field, value in parameters.items())]
    monkeypatch.setattr(notebook, "_ipython", lambda: types.SimpleNamespace(user_ns={"In": cells}))
    return notebook.setup(name, drive=False)


@pytest.mark.parametrize("name", [name for name, needs in notebook.NOTEBOOKS.items() if needs])
def test_a_notebook_without_data_says_so_before_it_opens_a_model_or_asks_for_a_token(at, monkeypatch, name):
    at("colab")
    for asked in (
        "peftlib.models.packaged.packaged_model",
        "peftlib.core.hub_token.hf_token",
        "peftlib.models.load.load_base",
    ):
        monkeypatch.setattr(asked, lambda *_, **__: pytest.fail("asked for before the data"))
    with pytest.raises(StudyError, match="run 01_data first") as told:
        open_notebook(monkeypatch, name, profile="t4", study="mine", model="packaged", max_length=512)
    words = str(told.value)
    assert "gets its own machine" in words and f'setup("{name}", drive=True)' in words.replace("'", '"')
    [line] = [line.split() for line in words.splitlines() if "%run" in line]
    assert line[:8] == ["%run", "-m", "peftlib", "data", "--profile", "t4", "--study", "mine"]
    assert sorted(zip(line[9::3], line[10::3])) == [("max_length", "512"), ("model", "packaged")]


def test_on_kaggle_persistence_and_inputs_are_named_and_elsewhere_the_first_sentence_is_enough(at, monkeypatch):
    at("kaggle")
    with pytest.raises(StudyError, match="Persistence.*Add Input"):
        open_notebook(monkeypatch, "02_qlora", profile="demo", study="mine")
    at("")
    with pytest.raises(StudyError) as told:
        open_notebook(monkeypatch, "02_qlora", profile="demo", study="mine")
    assert len(str(told.value).splitlines()) == 1


def test_the_line_for_missing_data_makes_the_study_that_the_notebook_asks_for(at, monkeypatch, tiny_model, capsys):
    from tiny import TINY

    from peftlib.cli import main

    at("colab")
    given = {"profile": "demo", "study": "mine", "model": str(tiny_model), **TINY}
    with pytest.raises(StudyError) as told:
        open_notebook(monkeypatch, "02_qlora", **given)
    [line] = [line for line in str(told.value).splitlines() if "%run -m peftlib " in line]
    assert main(line.split()[3:]) == 0
    assert open_notebook(monkeypatch, "02_qlora", **given).manifest()["split_hash"]
    assert isinstance(Study.existing("mine"), Study)


@pytest.fixture
def on_t4(monkeypatch):
    """A T4 for everything that asks what card is here."""
    card = types.SimpleNamespace(name="Tesla T4", total_memory=int(14.6 * 2**30), major=7)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: card)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(hosted, "is_watched", lambda: True)


def test_the_first_cell_says_runtime_plan_and_cost_in_one_line_and_the_full_study_next(at, on_t4, watched, capsys):
    at("colab")
    hosted.show_runtime()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Colab, Tesla T4 with 14.6 GiB: profile quick trains unsloth/gemma-3-270m-it on 1,500 rows")
    assert "tests on 102; 01 to 05 take 4.4 to 9.5 min and 4.4 GiB" in first
    assert second.startswith(
        'the full study is profile = "t4" in the settings cell: profile t4 trains google/gemma-3-1b'
    )


def test_a_first_cell_without_a_gpu_says_how_to_get_one(at, watched, capsys):
    at("kaggle")
    hosted.show_runtime()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("Kaggle, no GPU") and "up to 10 min and 2.4 GiB" in first
    assert "Settings > Accelerator > GPU T4 x2" in second and "small demo" in third


def test_several_cards_and_a_headless_run_are_named(at, on_t4, monkeypatch, capsys):
    at("kaggle")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    hosted.show_runtime()
    assert capsys.readouterr().out.startswith("Kaggle, headless, 2 x Tesla T4 with 14.6 GiB: the setup cell shows")


def test_what_the_demo_takes_is_what_was_measured():
    rows = (CHECKOUT / "results/demo/results.csv").read_text(encoding="utf-8").splitlines()
    at = rows[0].split(",").index("peak_memory_gib")
    peaks = [next(csv.reader([row]))[at] for row in rows[1:]]
    assert pytest.approx(max(float(peak) for peak in peaks if peak), abs=0.05) == hosted.DEMO_GIB
    assert f"up to {'ten' if hosted.DEMO_MINUTES == 10 else '?'} minutes on two CPU cores" in (
        CHECKOUT / "README.md"
    ).read_text(encoding="utf-8")


def test_auto_is_quick_on_a_hosted_t4_until_a_full_study_stands_there(at, on_t4, watched, monkeypatch, tmp_path):
    at("colab")
    assert hosted.with_first_profile({"profile": "auto", "lora_rank": 8}) == {"profile": "quick", "lora_rank": 8}
    assert hosted.with_first_profile({"profile": "t4"}) == {"profile": "t4"}
    assert hosted.with_first_profile({"study": "mine"}) == {"study": "mine", "profile": "quick"}
    mine = config.resolve("t4", study="mine", model="packaged")
    Study.open(mine).freeze()
    assert hosted.with_first_profile({"study": "mine", "profile": "auto"}) == {"study": "mine", "profile": "t4"}
    monkeypatch.setattr(hosted, "remote_of", lambda name: types.SimpleNamespace(listing=lambda: {"a": name}))
    assert hosted.with_first_profile({}) == {}, "it is on Drive"
    monkeypatch.setattr(hosted, "remote_of", lambda name: None)
    (tmp_path / "runs" / "t4").mkdir(parents=True)
    assert hosted.with_first_profile({}) == {"profile": "quick"}, "nothing was built there"
    (tmp_path / "runs" / "t4" / "config.json").write_text("{}")
    assert hosted.with_first_profile({}) == {}
    at("")
    shutil.rmtree(tmp_path / "runs")
    assert hosted.with_first_profile({}) == {}, "elsewhere auto is what it was"


def test_a_notebook_opened_alone_makes_what_it_lacks_when_asked(at, monkeypatch, tiny_model, capsys):
    from tiny import TINY

    at("")
    given = {"profile": "demo", "study": "mine", "model": str(tiny_model), **TINY, "max_steps": 1}
    with pytest.raises(StudyError, match="run 01_data first.*make_missing = True"):
        open_notebook(monkeypatch, "04_eval", **given)
    assert "missing: data, qlora, galore; set make_missing = True" in capsys.readouterr().out
    study = open_notebook(monkeypatch, "02_qlora", **given, make_missing=True)
    assert study.manifest()["split_hash"] and "making data" in capsys.readouterr().out
    open_notebook(monkeypatch, "03_galore", **given)
    assert "missing: " not in capsys.readouterr().out
    study = open_notebook(monkeypatch, "05_hybrid", **given, make_missing=True)
    assert {r["method"]: "evaluation" in r for r in study.records()} == {"galore": True, "qlora": True}
    assert notebook.missing_inputs("05_hybrid", study) == []
