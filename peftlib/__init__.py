"""peftlib: QLoRA, GaLore and a layer-wise hybrid compared on Gemma 3, on free hardware.

Importing it is free: no torch, GPU check, download, seed or folder creation happens before a name of the API is used.
"""

import importlib

from peftlib.core import aliases

__version__ = "0.2.0"
SCHEMA_VERSION = 1  # of every JSON file in a study folder
aliases.install()

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
    "ask": ("peftlib.evaluation.generate", "ask"),
    "load_trained": ("peftlib.models.saved", "load_trained"),
    "build_report": ("peftlib.report.build", "build"),
    "compare_studies": ("peftlib.report.compare", "blocks_of"),
    "export_model": ("peftlib.export.export", "export"),
}
__all__ = ["SCHEMA_VERSION", "__version__", *_API]


def __getattr__(name):
    if name not in _API:
        raise AttributeError(f"module 'peftlib' has no attribute {name!r}")
    module, there = _API[name]
    found = globals()[name] = getattr(importlib.import_module(module), there)
    return found


def __dir__():
    return sorted({*globals(), *_API})
