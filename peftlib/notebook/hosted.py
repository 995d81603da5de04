"""Notebooks on Colab and Kaggle: tell before work begins what a session lacks."""

import importlib.metadata
import shlex
import sys
import warnings

from packaging.version import Version

from peftlib.core.config import resolve
from peftlib.core.errors import ModelError
from peftlib.core.paths import TORCHAO_MIN
from peftlib.core.session import host

_CHANGED_BY_INSTALL = ("huggingface_hub", "tokenizers", "transformers", "accelerate", "peft", "torchao")
_CHOOSE_GPU = {
    "colab": "Runtime > Change runtime type > T4 GPU",
    "kaggle": "Settings > Accelerator > GPU T4 x2",
}
_DRIVE = (
    "or keep the study on Google Drive: let 01_data and this notebook mount it, as they ask by default; where "
    "PEFTLIB_DRIVE=0 is set, setup({name!r}, drive=True) mounts it. "
)
_KAGGLE_KEEPS = (
    "Kaggle keeps /kaggle/working where Settings > Persistence says so; another notebook's output can be added by "
    "Add Input and copied to {root}. "
)


def require_sound_packages(modules=None, version=importlib.metadata.version):
    """ModelError: a package was loaded before another version was installed, or torchao is one that PEFT refuses.

    modules: those that are loaded, as sys.modules. version: name -> what is installed, PackageNotFoundError for none.
    """
    for name in _CHANGED_BY_INSTALL:
        loaded = getattr((sys.modules if modules is None else modules).get(name), "__version__", None)
        installed = _installed(name, version)
        if loaded and installed and Version(loaded) != Version(installed):
            menu = {"colab": "Runtime > Restart session", "kaggle": "Run > Restart & clear cell outputs"}.get(host())
            raise ModelError(
                f"{name} {loaded} was loaded before {installed} was installed, and the two do not mix: restart the "
                f"session ({menu or 'the kernel'}) and run the cells from the top, nothing before the install cell"
            )
    torchao = _installed("torchao", version)
    if torchao and Version(torchao) < Version(TORCHAO_MIN):
        raise ModelError(
            f"torchao {torchao} is installed, and PEFT works with none older than {TORCHAO_MIN}: run "
            f'%pip install -q "torchao>={TORCHAO_MIN}" in a cell, or %pip uninstall -y torchao, and go on '
            "(no restart needed)"
        )


def quiet_torchao():
    """Keep torchao's own SyntaxWarning (a docstring's escape), which Colab's cells would show, out of the way."""
    if host() in _CHOOSE_GPU:
        warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*torchao")


def _installed(name, version):
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def without_gpu(device, cfg):
    """Lines for a session of Colab or Kaggle without a GPU: how to get one, and what happens else; [] elsewhere."""
    if device != "cpu" or host() not in _CHOOSE_GPU:
        return []
    lines = [f"no GPU     this session has none: {_CHOOSE_GPU[host()]}, then run the cells from the top"]
    if cfg.profile == "demo":
        what = "Gemma 3 270M" if cfg.model == "packaged" else cfg.model
        return [
            *lines,
            f"           without one all works as a small demo: {what}, {cfg.train_rows} rows a source, minutes",
        ]
    return [*lines, f'           without one profile = {cfg.profile!r} takes days: profile = "demo" is made for it']


def where_data_come_from(name, study):
    """What to do on Colab or Kaggle when a notebook finds no data of its study: text, '' elsewhere."""
    if host() not in _CHOOSE_GPU:
        return ""
    cfg = study.cfg
    plain = resolve(cfg.profile, study=cfg.study).study_fields()
    changed = {field: value for field, value in cfg.study_fields().items() if value != plain[field]}
    fields = [word for field, value in changed.items() for word in ("-p", field, str(value))]
    line = "%run -m peftlib " + shlex.join(["data", "--profile", cfg.profile, "--study", cfg.study, *fields])
    kept = _DRIVE.format(name=name) if host() == "colab" else _KAGGLE_KEEPS.format(root=study.folder.parent)
    return (
        f"Every notebook that is opened by its badge has a machine of its own. Make the data here, by this line in a "
        f"cell:\n    {line}\n{kept}Then run this cell again."
    )
