"""Notebooks on Colab, Kaggle and elsewhere: print the hardware, the plan with its cost, and what is missing."""

import contextlib
import importlib.metadata
import shlex
import sys
import warnings

import psutil
from packaging.version import Version

from peftlib.core.config import resolve
from peftlib.core.env import output_root, profile_for_hardware, resolve_device
from peftlib.core.errors import ModelError
from peftlib.core.files import gib
from peftlib.core.paths import TORCHAO_MIN
from peftlib.core.session import host, is_watched
from peftlib.core.study import frozen_of
from peftlib.storage.remotes import remote_of

_CHANGED_BY_INSTALL = ("huggingface_hub", "tokenizers", "transformers", "accelerate", "peft", "torchao")
_CHOOSE_GPU = {
    "colab": "Runtime > Change runtime type > T4 GPU",
    "kaggle": "Settings > Accelerator > GPU T4 x2",
}
_DRIVE = (
    "or keep the study on Google Drive: let 01_data and this notebook mount it (they ask by default; if "
    "PEFTLIB_DRIVE=0 is set, use setup({name!r}, drive=True)). "
)
_KAGGLE_KEEPS = (
    "Kaggle keeps /kaggle/working if Settings > Persistence is on; you can also add another notebook's output with "
    "Add Input and copy it to {root}. "
)

# What `make demo` takes on two CPU cores (README), and its largest training (results/demo/results.csv).
DEMO_MINUTES, DEMO_GIB = 10, 2.4


def show_runtime():
    """Print one line with the hardware, what the profile will do, and its cost; more lines if there is no GPU.

    ModelError: see require_sound_packages.
    """
    require_sound_packages()
    if not is_watched():  # its settings are injected below this cell
        print(f"{runtime()}: the setup cell shows the plan")
        return
    cfg = resolve(**with_first_profile({}))
    print(f"{runtime()}: {plan(cfg)}")
    for line in without_gpu(resolve_device(cfg.device), cfg):
        print(line)
    if cfg.profile == "quick":
        print(f'the full study is profile = "t4" in the settings cell: {plan(resolve("t4"))}')


def with_first_profile(given):
    """Settings in which `auto` means quick on the T4 of Colab and Kaggle, unless the study exists here or remotely.

    The study is t4 if none is named. One that exists here keeps its profile.
    """
    is_open = given.get("profile") in (None, "auto")
    if not (is_open and host() and is_watched() and profile_for_hardware() == "t4"):
        return given
    named = given.get("study") not in (None, "auto")
    study = given["study"] if named else "t4"
    if not _exists(study):
        return {**given, "profile": "quick"}
    path = output_root() / study / "config.json"
    return {**given, "profile": frozen_of(path)["profile"]} if named and path.exists() else given


def _exists(study):
    with contextlib.suppress(OSError):
        remote = remote_of(study)
        return (output_root() / study / "config.json").exists() or bool(remote and remote.listing())
    return False


def runtime():
    """'Colab, Tesla T4 with 14.6 GiB': the host, whether it is headless, the card or CPU, and its memory."""
    import torch

    where = {"colab": "Colab", "kaggle": "Kaggle"}.get(host(), "Jupyter")
    where += "" if is_watched() else ", headless"
    if not torch.cuda.is_available():
        return f"{where}, no GPU, {psutil.cpu_count()} CPU cores with {gib(psutil.virtual_memory().total):.1f} GiB"
    card, n = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    return f"{where}, {f'{n} x ' * (n > 1)}{card.name} with {gib(card.total_memory):.1f} GiB"


def plan(cfg):
    """What a config will do here, with the planner's time and memory, as text."""
    from peftlib.models.shapes import card_at_hand, shape_of
    from peftlib.notebook.planner import TRAINED, notebooks_cost
    from peftlib.train.estimate import duration, forecast

    n = len([part for part in cfg.sources.split(";") if part.strip()])
    doing = f"profile {cfg.profile} trains {_model_of(cfg)} on {n * cfg.train_rows:,} rows"
    doing += f" and tests on {n * cfg.test_rows:,}"
    here = card_at_hand() if resolve_device(cfg.device) == "cuda" else None
    if here is None:
        is_demo = cfg.fields_of("data", "math") == resolve("demo").fields_of("data", "math")
        known = f"up to {DEMO_MINUTES} min and {DEMO_GIB} GiB for 01 to 05, measured on two cores"
        return f"{doing}; {known if is_demo else 'the time on this machine is unknown'}"
    with contextlib.suppress(ModelError):
        found = forecast(cfg, *here, shape=shape_of(cfg.model), names=TRAINED)
        low, high, size = notebooks_cost(found) or (0, 0, 0)
        if not size:
            return f"{doing}; {found.refusal or 'not every method fits this card'}"
        return f"{doing}; 01 to 05 take {duration(low, high)} and {size:.1f} GiB (estimate, without downloads)"
    return f"{doing}; time and memory are unknown for this model"


def require_sound_packages(modules=None, version=importlib.metadata.version):
    """ModelError: a package was loaded before another version was installed, or torchao is too old for PEFT.

    modules: the loaded ones, as sys.modules. version: as importlib.metadata.version.
    """
    for name in _CHANGED_BY_INSTALL:
        loaded = getattr((sys.modules if modules is None else modules).get(name), "__version__", None)
        installed = _installed(name, version)
        if loaded and installed and Version(loaded) != Version(installed):
            menu = {"colab": "Runtime > Restart session", "kaggle": "Run > Restart & clear cell outputs"}.get(host())
            raise ModelError(
                f"{name} {loaded} was imported before {installed} was installed, and the two do not mix: restart the "
                f"session ({menu or 'the kernel'}) and run the cells from the top, starting with the install cell"
            )
    torchao = _installed("torchao", version)
    if torchao and Version(torchao) < Version(TORCHAO_MIN):
        raise ModelError(
            f"torchao {torchao} is installed, but PEFT needs {TORCHAO_MIN} or newer: run "
            f'%pip install -q "torchao>={TORCHAO_MIN}" in a cell, or %pip uninstall -y torchao, and continue '
            "(no restart needed)"
        )


def quiet_torchao():
    """Silence torchao's SyntaxWarning (an escape in a docstring), which Colab's cells would show."""
    if host() in _CHOOSE_GPU:
        warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*torchao")


def _installed(name, version):
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def without_gpu(device, cfg):
    """Lines for a Colab or Kaggle session without a GPU: how to get one, and what happens without; else []."""
    if device != "cpu" or host() not in _CHOOSE_GPU:
        return []
    lines = [f"no GPU     choose one with {_CHOOSE_GPU[host()]}, then run the cells from the top"]
    if cfg.profile == "demo":
        what = f"{_model_of(cfg)}, {cfg.train_rows} rows per source, minutes"
        return [*lines, f"           without a GPU everything runs as a small demo: {what}"]
    return [*lines, f'           without a GPU profile = {cfg.profile!r} takes days: use profile = "demo"']


def _model_of(cfg):
    return "Gemma 3 270M" if cfg.model == "packaged" else cfg.model


def where_data_come_from(name, study):
    """What to do on Colab or Kaggle if a notebook finds no data of its study; '' elsewhere."""
    if host() not in _CHOOSE_GPU:
        return ""
    cfg = study.cfg
    plain = resolve(cfg.profile, study=cfg.study).study_fields()
    changed = {field: value for field, value in cfg.study_fields().items() if value != plain[field]}
    fields = [word for field, value in changed.items() for word in ("-p", field, str(value))]
    line = "%run -m peftlib " + shlex.join(["data", "--profile", cfg.profile, "--study", cfg.study, *fields])
    kept = _DRIVE.format(name=name) if host() == "colab" else _KAGGLE_KEEPS.format(root=study.folder.parent)
    return (
        f"Every notebook opened from its badge gets its own machine. To build the data here, run this line in a "
        f"cell:\n    {line}\n{kept}Then run this cell again."
    )
