"""Where the package and the repository's other files are, the address of both, and import paths of the first edition.

In a checkout the notebooks and results lie beside the package. pyproject.toml maps them into the wheel under the same
names, so that a `pip install` of the address brings them too.
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
# In the install cell, and in messages. pip would compile all of transformers, a third of the time; Python compiles what
# it imports.
INSTALL = '%pip install -q --no-compile "peftlib[{extras}] @ git+{address}"'
TORCHAO_MIN = "0.16"  # PEFT refuses older ones, even for layers that torchao has nothing to do with


def checkout(package=PACKAGE):
    """The checkout that a package runs from, or None for a copy that pip installed."""
    folder = package.parent
    return folder if (folder / "notebooks" / "01_data.ipynb").is_file() else None


def shipped(name, package=PACKAGE):
    """A file or folder of the repository, such as 'notebooks', wherever this copy has it."""
    return (checkout(package) or package) / name


def code_id(package=PACKAGE):
    """The version and 8 hex digits of the SHA-256 over the package's Python files, such as 0.2.0+1f3a09bc: equal
    wherever the same code is installed."""
    from peftlib import __version__

    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(
            f"{path.relative_to(package).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode()
        )
    return f"{__version__}+{digest.hexdigest()[:8]}"


def address():
    """The repository's public address, from the checkout or from what pip noted when it installed this copy."""
    folder = checkout()
    if folder is not None:
        return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    urls = importlib.metadata.metadata("peftlib").get_all("Project-URL")
    return next(url.partition(", ")[2] for url in urls if url.startswith("Repository, "))


def install_line(*extras):
    """The line that a cell runs to get peftlib with these extras, without a restart."""
    return INSTALL.format(extras=",".join(extras), address=address())


def pip_line(extra):
    """The command that installs what an extra names. PyPI has no peftlib: it is the checkout or the public address."""
    here = checkout()
    return f"pip install -e '{here}[{extra}]'" if here else f"pip install 'peftlib[{extra}] @ git+{address()}'"


# Named by model cards that the first edition published.
ALIASES = {"peftlib.trained": "peftlib.models.saved", "peftlib.packaged": "peftlib.models.packaged"}


class _AliasFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in ALIASES else None

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(ALIASES[module.__name__])


def install_aliases():
    """Let the old paths be imported; what they stand for is loaded only then."""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())
