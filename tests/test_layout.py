"""The rules of the layout: four files and twelve folders, at most 12 modules each, at most 300 lines a module."""

from peftlib.core.paths import PACKAGE

FOLDERS = [
    "core",
    "storage",
    "models",
    "data",
    "optim",
    "methods",
    "train",
    "evaluation",
    "report",
    "export",
    "notebook",
    "runner",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_four_files_and_twelve_folders():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "cli.py", "py.typed"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"notebooks", "results"} == set(FOLDERS)  # a wheel has these two beside


def test_no_folder_holds_more_than_12_modules():
    folders = {path.parent for path in MODULES}
    assert {folder.name: n for folder in folders if (n := len(modules_of(folder))) > 12} == {}


def modules_of(folder):
    return [path for path in folder.glob("*.py") if path.name != "__init__.py"]


def test_no_module_has_more_than_300_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > 300} == {}
