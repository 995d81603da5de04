"""Paths of the package and the repository's other files, their address, and import paths of the first edition.

In a checkout the notebooks and results are next to the package. pyproject.toml maps them into the wheel under the
same names, so `pip install` of the address includes them.
"""

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# For the install cell and messages. Without --no-compile, pip spends a third of the time compiling transformers; Python
# compiles what it imports anyway.
INSTALL = '%pip install -q --no-compile "peftlib[{extras}] @ git+{address}"'
TORCHAO_MIN = "0.16"  # PEFT rejects older versions, even for layers that do not use torchao


def checkout(package=PACKAGE):
    """The checkout that the package runs from, or None if pip installed it."""
    folder = package.parent
    return folder if (folder / "notebooks" / "01_data.ipynb").is_file() else None


def shipped(name, package=PACKAGE):
    """Path of a file or folder of the repository, such as 'notebooks', in this copy."""
    return (checkout(package) or package) / name


def code_id(package=PACKAGE):
    """The version and 8 hex digits of the SHA-256 over the package's Python files, such as 0.2.0+1f3a09bc. It is the
    same wherever the same code is installed."""
    from peftlib import __version__

    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(
            f"{path.relative_to(package).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode()
        )
    return f"{__version__}+{digest.hexdigest()[:8]}"


def address():
    """The repository's public address, from the checkout or from the installed package's metadata."""
    folder = checkout()
    if folder is not None:
        return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    urls = importlib.metadata.metadata("peftlib").get_all("Project-URL")
    return next(url.partition(", ")[2] for url in urls if url.startswith("Repository, "))


def install_line(*extras):
    """The line that installs peftlib with these extras in a notebook cell, without a restart."""
    return INSTALL.format(extras=",".join(extras), address=address())


def pip_line(extra):
    """The command that installs an extra. peftlib is not on PyPI, so it uses the checkout or the public address."""
    here = checkout()
    return f"pip install -e '{here}[{extra}]'" if here else f"pip install 'peftlib[{extra}] @ git+{address()}'"


# Model cards published by the first edition use these.
ALIASES = {"peftlib.trained": "peftlib.models.saved", "peftlib.packaged": "peftlib.models.packaged"}


class _AliasFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in ALIASES else None

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(ALIASES[module.__name__])


def install_aliases():
    """Make the old import paths work; the modules they stand for are loaded on use."""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())
