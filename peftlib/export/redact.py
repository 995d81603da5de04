"""Redact published content: models and files by name, without local paths."""

import re
from pathlib import Path

from peftlib.core.config import PACKAGED_MODEL
from peftlib.data.sources import parse_sources

PACKAGED_RELEASE = "google/gemma-3-270m"  # what the packaged weights were made from
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def hub_base(model):
    """The hub id of a config's `model` (for the packaged model, its original release); None for a folder."""
    if model == PACKAGED_MODEL:
        return PACKAGED_RELEASE
    return None if _is_folder(model) else model


def public_model(model):
    """A config's `model`; a folder is reduced to its name."""
    return Path(model).name if _is_folder(model) else model


def public_sources(sources):
    """A config's `sources`; files are reduced to their names."""
    shown = []
    for source in parse_sources(sources):
        is_file = source.where == "file"
        shown.append(f"{source.name}={','.join(p.name for p in source.streams.values()) if is_file else source.where}")
    return "; ".join(shown)


def public_config(fields):
    """{name: value} of a config, without local paths."""
    return {**fields, "model": public_model(fields["model"]), "sources": public_sources(fields["sources"])}


def without_folders(text):
    """A message with file names instead of absolute paths; URLs are kept."""
    plain = text and re.sub(r"file://(?=/)", "", text)
    return plain and re.sub(r"(?<![\w:/.])/(?:(?:My Drive|[^/\s'\"]+)/)+", "", plain)


def _is_folder(model):
    return model != PACKAGED_MODEL and (Path(model).expanduser().is_dir() or not _HUB_ID.fullmatch(model))
