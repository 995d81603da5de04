"""What a session of Colab or Kaggle lacks is said before work begins, with the line that mends it."""

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
        ModelError, match=r"huggingface_hub 1\.27\.0 was loaded before 2\.4\.0.*restart the session"
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
        ModelError, match=r"torchao 0\.10\.0 .* none older than 0\.16: .*torchao>=0\.16.*uninstall -y torchao"
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


@pytest.mark.parametrize(
    "host, way", [("colab", "Runtime > Change runtime type > T4 GPU"), ("kaggle", "Settings > Accelerator")]
)
def test_without_a_gpu_a_hosted_session_says_how_to_get_one_and_what_happens_else(at, host, way):
    at(host)
    demo = hosted.without_gpu("cpu", config.resolve("demo"))
    assert way in demo[0] and "small demo" in demo[1] and "24 rows a source" in demo[1]
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
        with pytest.raises(ModelError, match="in a cell and go on, without a restart") as told:
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
    assert "a machine of its own" in words and f'setup("{name}", drive=True)' in words.replace("'", '"')
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
