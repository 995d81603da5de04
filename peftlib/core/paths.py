"""Where the repository's files are that are no modules: beside the package in a checkout, inside it in an installed copy.

pyproject.toml maps them into the wheel under the same names, so that a `pip install` of the address brings all.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def checkout(package=PACKAGE):
    """The checkout that a package runs from, or None for a copy that pip installed."""
    folder = package.parent
    return folder if (folder / "notebooks" / "01_data.ipynb").is_file() else None


def shipped(name, package=PACKAGE):
    """A file or folder of the repository, such as 'notebooks', wherever this copy has it."""
    return (checkout(package) or package) / name
