"""Functions and widgets of the notebooks' cells; `from peftlib.notebook import NAME` loads them lazily."""

import importlib

# {public name: (module, its name there)}
_API = {
    "study_form": ("peftlib.notebook.planner", "study_form"),
    "browse": ("peftlib.notebook.dataset", "browse"),
    "mask_text": ("peftlib.notebook.dataset", "mask_text"),
    "kept_chart": ("peftlib.notebook.dataset", "kept_chart"),
    "length_chart": ("peftlib.notebook.dataset", "length_chart"),
    "train_live": ("peftlib.notebook.training_panel", "train_live"),
    "loss_curves": ("peftlib.report.figures", "loss_curves"),
    "THEMES": ("peftlib.report.palette", "THEMES"),
    "side_by_side": ("peftlib.notebook.answers", "side_by_side"),
    "trained_methods": ("peftlib.evaluation.evaluate", "trained_methods"),
    "show_charts": ("peftlib.notebook.results", "show_charts"),
    "show_benchmarks": ("peftlib.notebook.results", "show_benchmarks"),
    "explore": ("peftlib.notebook.results", "explore"),
    "ask_box": ("peftlib.notebook.ask", "ask_box"),
    "chat_box": ("peftlib.notebook.ask", "chat_box"),
    "drive_box": ("peftlib.notebook.hand_on", "drive_box"),
    "hub_box": ("peftlib.notebook.hand_on", "hub_box"),
    "gguf_box": ("peftlib.notebook.hand_on", "gguf_box"),
    "require_finished": ("peftlib.notebook.session", "require_finished"),
    "loss_text": ("peftlib.core.record", "loss_text"),
    "show_runtime": ("peftlib.notebook.hosted", "show_runtime"),
    "ExportPreview": ("peftlib.export.export", "Preview"),
}
__all__ = list(_API)


def __getattr__(name):
    if name not in _API:
        raise AttributeError(f"module 'peftlib.notebook' has no attribute {name!r}")
    module, there = _API[name]
    found = globals()[name] = getattr(importlib.import_module(module), there)
    return found
