"""peftlib: QLoRA, GaLore and a layer-wise hybrid compared on Gemma 3, on free hardware.

Importing it is cheap: torch, GPU checks, downloads, seeding and new folders wait until a name of the API is used.
"""

import importlib
from typing import TYPE_CHECKING

from peftlib.core.paths import install_aliases

__version__ = "0.2.0"
SCHEMA_VERSION = 1  # of every JSON file in a study folder
install_aliases()

# {public name: (module, its name there)}
_API = {
    "Config": ("peftlib.core.config", "Config"),
    "resolve": ("peftlib.core.config", "resolve"),
    "Study": ("peftlib.core.study", "Study"),
    "PeftlibError": ("peftlib.core.errors", "PeftlibError"),
    "setup": ("peftlib.notebook.session", "setup"),
    "finish": ("peftlib.notebook.session", "finish"),
    "build_data": ("peftlib.data.build", "build_data"),
    "load_split": ("peftlib.data.store", "load_split"),
    "load_tokenizer": ("peftlib.models.load", "load_tokenizer"),
    "METHODS": ("peftlib.methods", "METHODS"),
    "TrainingRun": ("peftlib.train.loop", "TrainingRun"),
    "run_training": ("peftlib.train.loop", "run_training"),
    "sweep": ("peftlib.train.sweep", "sweep"),
    "evaluate": ("peftlib.evaluation.evaluate", "evaluate"),
    "evaluate_path": ("peftlib.evaluation.evaluate", "evaluate_path"),
    "ask": ("peftlib.evaluation.generate", "ask"),
    "load_trained": ("peftlib.models.saved", "load_trained"),
    "build_report": ("peftlib.report.build", "build_report"),
    "compare_studies": ("peftlib.report.compare", "compare_studies"),
    "export_model": ("peftlib.export.export", "export_model"),
}
__all__ = [
    "METHODS",
    "SCHEMA_VERSION",
    "Config",
    "PeftlibError",
    "Study",
    "TrainingRun",
    "__version__",
    "ask",
    "build_data",
    "build_report",
    "compare_studies",
    "evaluate",
    "export_model",
    "finish",
    "load_split",
    "load_tokenizer",
    "load_trained",
    "resolve",
    "run_training",
    "setup",
    "sweep",
]

if TYPE_CHECKING:
    from peftlib.core.config import Config as Config
    from peftlib.core.config import resolve as resolve
    from peftlib.core.errors import PeftlibError as PeftlibError
    from peftlib.core.study import Study as Study
    from peftlib.data.build import build_data as build_data
    from peftlib.data.store import load_split as load_split
    from peftlib.evaluation.evaluate import evaluate as evaluate
    from peftlib.evaluation.generate import ask as ask
    from peftlib.export.export import export_model as export_model
    from peftlib.methods import METHODS as METHODS
    from peftlib.models.load import load_tokenizer as load_tokenizer
    from peftlib.models.saved import load_trained as load_trained
    from peftlib.notebook.session import finish as finish
    from peftlib.notebook.session import setup as setup
    from peftlib.report.build import build_report as build_report
    from peftlib.report.compare import compare_studies as compare_studies
    from peftlib.train.loop import TrainingRun as TrainingRun
    from peftlib.train.loop import run_training as run_training
    from peftlib.train.sweep import sweep as sweep


def __getattr__(name):
    if name not in _API:
        raise AttributeError(f"module 'peftlib' has no attribute {name!r}")
    module, there = _API[name]
    found = globals()[name] = getattr(importlib.import_module(module), there)
    return found


def __dir__():
    return sorted({*globals(), *_API})
