"""torch.compile by layer, and its cache in one file that outlives the session."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import torch

from peftlib.models import core

STEPS_TO_PAY = 100  # a run of fewer is over before compiling has paid for itself
_VARIANTS = 64  # sliding and full attention, with and without gradients, a few shapes: torch's limit of 8 is too low
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def resolve(asked, device, steps):
    """(is_on, reason) of a config's `compile` on a device for a run of so many steps. ModelError: 'on' but cannot be."""
    from peftlib.errors import ModelError

    if asked == "off":
        return False, "as set by compile"
    missing = None
    if device != "cuda":
        missing = "no GPU"
    elif importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    if missing and asked == "on":
        raise ModelError(f"compile='on', but {missing}: use compile='auto' or 'off', or pip install triton on a GPU")
    if missing or asked == "on":
        return (False, missing) if missing else (True, "as set by compile")
    if steps < STEPS_TO_PAY:
        return False, f"{steps} steps are over before compiling pays"
    return True, "GPU with Triton"


def compile_layers(model, *, backend="inductor"):
    """Compile each decoder layer, for any batch size and length; returns the model.

    By layer, not whole: all layers share two compiled forms (sliding and full attention), gradient checkpointing
    stays outside, and a layer's hooks run between the compiled pieces.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    # Else a layer with our FourBitProduct is traced anew in every session, which took 53 s on an H100 where 8 s do.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # A first layer whose input needs no gradient would be compiled apart from the others.
    core(model).get_input_embeddings().register_forward_hook(_with_gradient)
    for layer in core(model).model.layers:
        layer.compile(dynamic=True, backend=backend)
    return model


@contextlib.contextmanager
def uncompiled(model):
    """Within it the layers run as they were: for generation and evaluation, whose shapes would be compiled anew."""
    layers = [layer for layer in core(model).model.layers if layer._compiled_call_impl is not None]
    kept = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in zip(layers, kept, strict=True):
            layer._compiled_call_impl = call


def release(model):
    """Take the compiled forms off for good: what comes after training is generation."""
    for layer in core(model).model.layers:
        layer._compiled_call_impl = None


def _with_gradient(module, args, output):
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


class CompileCache:
    """What torch.compile made, in one file per GPU, torch and code, in the first of `folders` and copied to the others.

    A file that is damaged or of another card is as good as none: compiling again is all that is lost.
    """

    def __init__(self, folders):
        self.paths = [Path(folder) / f"compile-{_key()}.bin" for folder in folders]

    def load(self):
        """The path that was loaded, or None."""
        for path in self.paths:
            artifacts = _verified(path)
            if artifacts is not None and torch.compiler.load_cache_artifacts(artifacts) is not None:
                return path
        return None

    def save(self):
        """Write what has been compiled so far; returns the bytes written, 0 where there was nothing new to write."""
        from peftlib.files import atomic_path, rename

        made = torch.compiler.save_cache_artifacts()
        if made is None:
            return 0
        content = hashlib.sha256(made[0]).digest() + made[0]
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            own = path.with_name(f"{path.name}.{os.getpid()}")  # runs side by side write the same file
            with atomic_path(own) as beside:
                Path(beside).write_bytes(content)
            rename(own, path)
        return len(content)


def _verified(path):
    """The file's content behind its SHA-256, or None."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    is_whole = hashlib.sha256(content[32:]).digest() == content[:32]
    return content[32:] if is_whole else None


@functools.cache
def _key():
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    parts = [card, *(f"{name} {_version(name)}" for name in _PACKAGES)]
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in ("layers.py", "losses.py", "compiled.py"))
    digest = hashlib.sha256("\n".join(parts).encode() + code).hexdigest()[:16]
    return f"{''.join(c if c.isalnum() else '-' for c in card)}-{digest}"


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
