"""The wheel: built from a copy of the checkout, installed into a clean environment, used far from any checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PARTS = (
    "pyproject.toml",
    "setup.py",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "peftlib",
    "notebooks",
    "results/bench",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel's path."""
    pytest.importorskip("setuptools", minversion="77")  # as [build-system] asks
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(CHECKOUT / name, source / name)
    build = [sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [made] = out.glob("peftlib-*.whl")
    return made


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """run(program, *args) -> its output, in an environment that holds the wheel and, behind it, this one's
    libraries."""
    folder = tmp_path_factory.mktemp("clean")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PEFTLIB"))}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    bin_dir = folder / "venv" / "bin"
    install = ["-m", "pip", "--python", bin_dir / "python", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], env=env, check=True)
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(
        sysconfig.get_path("purelib")
    )  # after the wheel, and no .pth of theirs is read

    def call(program, *args):
        done = subprocess.run(
            [bin_dir / program, *args], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_wheel_holds_every_file_of_the_package_and_what_is_mapped_into_it(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (CHECKOUT / "peftlib").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(CHECKOUT).as_posix() for path in files} - held == set()
    assert {f"peftlib/notebooks/{path.name}" for path in (CHECKOUT / "notebooks").glob("*.ipynb")} <= held
    assert {"peftlib/py.typed", "peftlib/results/bench/methods.json", "peftlib/data/sample/alpaca.jsonl"} <= held
    assert not [name for name in held if name.startswith(("tests", "docs", "peftlib/tests"))]


def test_an_installed_copy_finds_its_own_files(run):
    code = (
        "import peftlib, peftlib.core.paths as paths; from importlib.resources import files;"
        "found = [paths.shipped('notebooks') / '01_data.ipynb', paths.shipped('results/bench/methods.json'),"
        " files('peftlib.models') / 'gemma3_chat_template.jinja', files('peftlib.data') / 'sample/tulu.jsonl',"
        " files('peftlib.evaluation') / 'general/factbook.jsonl', files('peftlib') / 'py.typed'];"
        "print(paths.checkout(), all(path.is_file() for path in found), 'clean' in peftlib.__file__)"
    )
    assert run("python", "-c", code).split() == ["None", "True", "True"]


def test_the_console_script_helps_and_plans_without_a_checkout(run):
    assert "study" in run("peftlib", "--help")
    planned = run("peftlib", "plan", "--gpu", "t4", "--model", "gemma-3-1b")
    assert all(method in planned for method in ("qlora", "galore", "hybrid")) and "14" in planned
