"""Writes what holds the project's public address: each notebook's badge and install cell, and README's badge table.

The address stands once, as `Repository` under [project.urls] of pyproject.toml. `make badges` calls this.
"""

import re
import sys
import tomllib
from pathlib import Path

from peftlib import executed
from peftlib.errors import ConfigError
from peftlib.files import write_text

CHECKOUT = Path(__file__).resolve().parent.parent
BRANCH = "main"
INSTALL = "# Install"  # how the install cell begins
BADGES_BEGIN, BADGES_END = "<!-- badges -->", "<!-- /badges -->"  # what stands between them in README is written here
_BADGE_IMAGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
_KAGGLE_IMAGE = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
# The folder's name must not be the package's: Python would take the folder, seen from its parent, for a package.
# Kaggle keeps /kaggle/working, so studies below the checkout outlive a session there.
_INSTALL_CELL = """\
{install}: on Colab and Kaggle alone, in seconds, once and without a restart. Their own torch stays as it is.
import importlib.util
import os
import subprocess
import sys

host = "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "colab" if "google.colab" in sys.modules else ""
checkout = {{"colab": "/content/peftlib-checkout", "kaggle": "/kaggle/working/peftlib-checkout"}}.get(host)
if importlib.util.find_spec("peftlib") is None:
    if checkout is None:
        raise ModuleNotFoundError(
            "this kernel has no peftlib: run `make .venv/installed` in the checkout and choose .venv as the kernel, "
            "or run `pip install -e PATH_OF_THE_CHECKOUT` in this kernel's environment"
        )
    clone = f"git clone -q --depth 1 --branch {branch} {address} {{checkout}}"
    packages = f"{{sys.executable}} -m pip install -q --no-warn-conflicts -r {{checkout}}/requirements.txt"
    for command in [packages] if os.path.isdir(checkout) else [clone, packages]:
        if subprocess.run(command.split(), check=False).returncode != 0:
            raise RuntimeError(f"`{{command}}` failed: on Kaggle switch Internet on (Settings), then run this cell again")
    importlib.invalidate_caches()
    sys.path.append(checkout)"""


def address(checkout=CHECKOUT):
    """The project's public address. ConfigError: pyproject.toml names none on GitHub."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = project.get("urls", {}).get("Repository", "")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", found):
        raise ConfigError(f"Repository={found!r} in pyproject.toml is no https://github.com/OWNER/NAME: set it there")
    return found


def badge(name, checkout=CHECKOUT):
    """The Markdown of a notebook's badges, one for Colab and one for Kaggle."""
    place = f"{address(checkout)}/blob/{BRANCH}/notebooks/{name}.ipynb"
    colab = place.replace("https://github.com/", "https://colab.research.google.com/github/")
    return f"{_BADGE_IMAGE}({colab}) {_KAGGLE_IMAGE}(https://kaggle.com/kernels/welcome?src={place})"


def install_cell(checkout=CHECKOUT):
    """The source of the install cell, the same in every notebook."""
    return _INSTALL_CELL.format(install=INSTALL, branch=BRANCH, address=address(checkout))


def badge_table(names, checkout=CHECKOUT):
    """README's table of the notebooks, markers included."""
    rows = [f"| [`{name}`](notebooks/{name}.ipynb) | {badge(name, checkout)} |" for name in names]
    return "\n".join([BADGES_BEGIN, "| notebook | |", "|---|---|", *rows, BADGES_END])


def with_address(notebook, name, checkout=CHECKOUT):
    """Put badge and install cell into a notebook (a dict), replacing those it has; returns it."""
    first = notebook["cells"][0]
    lines = [line for line in executed.source_of(first).split("\n") if not line.startswith(_BADGE_IMAGE)]
    first["source"] = "\n".join([badge(name, checkout), "", *lines[next((i for i, x in enumerate(lines) if x), 0) :]])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and executed.source_of(cell).startswith(INSTALL):
            cell["source"] = install_cell(checkout)
    for cell in notebook["cells"]:  # as Jupyter writes them, so that a save there changes nothing
        cell["source"] = executed.source_of(cell).splitlines(keepends=True)
    return notebook


def with_badge_table(readme, names, checkout=CHECKOUT):
    """README's text with the table between its markers written anew. ConfigError: the markers are not there."""
    pattern = re.compile(re.escape(BADGES_BEGIN) + ".*?" + re.escape(BADGES_END), re.DOTALL)
    if not pattern.search(readme):
        raise ConfigError(f"README.md has no lines {BADGES_BEGIN} and {BADGES_END}: put them where the table belongs")
    return pattern.sub(lambda _: badge_table(names, checkout), readme)


def write_all(checkout=CHECKOUT):
    """Write the address into every notebook and into README; returns the paths that changed."""
    notebooks = sorted((checkout / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    changed = []
    for path in notebooks:
        before = path.read_text(encoding="utf-8")
        executed.save(path, with_address(executed.load(path), path.stem, checkout))
        changed += [path] if path.read_text(encoding="utf-8") != before else []
    readme = checkout / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = with_badge_table(before, [path.stem for path in notebooks], checkout)
    if after != before:
        write_text(readme, after)
        changed.append(readme)
    return changed


def main():
    try:
        changed = write_all()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"{address()} stands in every badge;", f"changed: {', '.join(p.name for p in changed) or 'nothing'}")


if __name__ == "__main__":
    main()
