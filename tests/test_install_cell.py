"""The first code cell of each notebook: what it runs on Colab, on Kaggle and elsewhere, and what it leaves alone."""

import importlib.util
import os
import runpy
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from peftlib import badges

CHECKOUT = Path(badges.__file__).resolve().parent.parent
# What Colab's machine held in June 2026, from its own list (github.com/googlecolab/backend-info, pip-freeze.gpu.txt);
# Kaggle's image is made from it. Of these a running kernel has some loaded, and torch fits the driver.
COLAB = {
    "torch": "2.11.0",
    "numpy": "2.0.2",
    "pandas": "2.2.2",
    "pyarrow": "18.1.0",
    "datasets": "4.0.0",
    "matplotlib": "3.10.0",
    "ipykernel": "6.17.1",
    "ipython": "7.34.0",
    "ipywidgets": "7.7.1",
    "jupyter-client": "7.4.9",
    "nbclient": "0.10.4",
    "nbformat": "5.10.4",
    "psutil": "5.9.5",
    "pyyaml": "6.0.3",
    "requests": "2.32.4",
    "tornado": "6.5.1",
    "traitlets": "5.7.1",
    "tqdm": "4.67.3",
    "pyzmq": "26.2.1",
    "fsspec": "2025.3.0",
    "dill": "0.3.8",
    "multiprocess": "0.70.16",
    "jinja2": "3.1.6",
    "pillow": "11.3.0",
    "packaging": "26.2",
}
PYTHON_312 = {
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(host, *, has_peftlib, code): run the cell there; the commands that it ran, which end with `code`."""
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cloned, commands = set(), []
    cell = tmp_path / "cell.py"
    cell.write_text(badges.install_cell())

    def enter(host, *, has_peftlib=False, code=0):
        if host == "kaggle":
            monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        if host:
            monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")  # Kaggle's machine has it as well
        if host == "colab":
            monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))

        def run(command, check):
            commands.append(command)
            if command[0] == "git" and code == 0:
                cloned.add(command[-1])
            return types.SimpleNamespace(returncode=code)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(os.path, "isdir", lambda path: path in cloned)
        is_there = has_peftlib or any("peftlib-checkout" in path for path in sys.path)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_there else None)
        runpy.run_path(str(cell))
        return commands

    return enter


@pytest.mark.parametrize("host, folder", [("colab", "/content"), ("kaggle", "/kaggle/working")])
def test_a_hosted_machine_gets_checkout_and_packages_once(machine, host, folder):
    clone, packages = machine(host)
    assert clone[:2] == ["git", "clone"] and clone[-2:] == [badges.address(), f"{folder}/peftlib-checkout"]
    assert packages[:4] == [sys.executable, "-m", "pip", "install"]
    assert packages[-2:] == ["-r", f"{folder}/peftlib-checkout/requirements.txt"]
    assert "-q" in clone and "-q" in packages
    assert not {"-U", "--upgrade", "--force-reinstall"} & set(packages)
    assert sys.path[-1] == f"{folder}/peftlib-checkout"
    assert len(machine(host)) == 2, "a second run of the cell runs nothing"


def test_a_new_kernel_on_the_same_machine_does_not_clone_again(machine):
    machine("colab")
    sys.path.remove("/content/peftlib-checkout")
    assert [command[0] for command in machine("colab")] == ["git", sys.executable, sys.executable]


@pytest.mark.parametrize("host", ["", "colab", "kaggle"])
def test_where_peftlib_is_there_nothing_is_run(machine, host):
    assert machine(host, has_peftlib=True) == []


def test_elsewhere_a_kernel_without_peftlib_gets_the_two_ways_out(machine):
    with pytest.raises(ModuleNotFoundError, match=r"choose \.venv as the kernel, or run `pip install -e"):
        machine("")


def test_without_a_network_the_command_and_kaggles_switch_are_named_and_the_next_run_tries_again(machine):
    with pytest.raises(RuntimeError, match=r"^`git clone .*` failed: on Kaggle switch Internet on"):
        machine("kaggle", code=128)
    assert not any("peftlib-checkout" in path for path in sys.path)
    assert [command[0] for command in machine("kaggle")] == ["git", "git", sys.executable]


def test_the_packages_leave_what_colab_has_loaded_as_it_is():
    """Walks what `pip install -r requirements.txt` would bring: pip changes only what does not satisfy a requirement."""
    lines = (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    todo = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert "torch" in lines, "any version"
    changed, seen = [], set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in COLAB:
            if not wanted.specifier.contains(COLAB[name]):
                changed.append(f"{wanted}, where Colab has {COLAB[name]}")
            continue
        if name not in seen:
            seen.add(name)
            todo += needs(name, wanted.extras)
    assert changed == []
    assert {"transformers", "accelerate", "peft", "bitsandbytes", "galore-torch"} <= seen, "and these were looked at"


def needs(name, extras):
    """The requirements of an installed package on Colab's Python; [] for one that only another Python needs."""
    try:
        listed = [Requirement(text) for text in distribution(name).requires or []]
    except PackageNotFoundError:
        return []
    asked = ["", *extras]
    return [r for r in listed if r.marker is None or any(r.marker.evaluate({**PYTHON_312, "extra": e}) for e in asked)]
