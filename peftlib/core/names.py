"""Names of studies: folder names that every system takes, and that can be printed in a line."""

import unicodedata

from peftlib.core.errors import ConfigError

_NAME_BYTES = 200  # of a study's name; file systems take 255, and other names are made from it
_NOT_IN_NAMES = '/\\:<>"|?*'
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # of Windows


def require_folder_name(name, text):
    """ConfigError unless a text can name a folder on any system, and be printed in a line."""
    size_bytes = len(text.encode("utf-8", "replace"))
    if size_bytes > _NAME_BYTES:
        raise ConfigError(f"{name}={text[:30]!r}... has {size_bytes} bytes: a study's name has at most {_NAME_BYTES}")
    has_odd = any(c in _NOT_IN_NAMES or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
    is_reserved = text.split(".")[0].strip().lower() in _DEVICES
    # Windows drops dots and spaces from the end of a name.
    if has_odd or is_reserved or text != text.strip() or text.endswith(".") or not text:
        why = " (Windows keeps it for itself)" if is_reserved else ""
        raise ConfigError(f"{name}={text!r} is no folder name{why}: use letters, digits, '-' and '_'")
