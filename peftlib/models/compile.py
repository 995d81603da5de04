"""torch.compile per layer, and its cache in a file on this machine that outlives the session."""

import contextlib
import functools
import hashlib
import importlib.util
import os
from pathlib import Path, PurePath

import torch

from peftlib.core import record
from peftlib.core.errors import ModelError, PeftlibError
from peftlib.core.files import atomic_path, read_json, write_json
from peftlib.models.inspect import core
from peftlib.models.layers import sum_norm_gradients

# Fraction of a step's time that compiling is expected to save. Steps of the 270M with real rows took 0.42 (full) to
# 0.57 (lora) less time on an H200; we did not measure it for larger models.
GAIN = 0.4
ADAPTERS_S, PLAIN_S, CACHED_S = 25.0, 20.0, 5.0  # compile times by kind of layers and from the cache, until measured
_VARIANTS = 64  # sliding and full attention, with and without gradients, a few shapes: torch's limit of 8 is too low
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
_CODE = (
    "kernels/attention.py",
    "kernels/adapters.py",
    "kernels/projections.py",
    "layers.py",
    "kernels/losses.py",
    "compile.py",
)  # versions that affect the compiled code


def resolve(asked, device, steps, costs):
    """(is_on, reason) for a config's `compile` and the number of steps left. ModelError: 'on', but not possible.

    costs: returns (seconds to compile, seconds per uncompiled step); called only for 'auto'.
    """
    if asked == "off":
        return False, "as set by compile"
    has_triton = importlib.util.find_spec("triton") is not None
    missing = "no GPU" if device != "cuda" else None if has_triton else "Triton is not installed"
    if asked == "on":
        if missing:
            raise ModelError(
                f"compile='on', but {missing}: use compile='auto' or 'off', or pip install triton on a GPU"
            )
        return True, "as set by compile"
    if missing:
        return False, missing
    compile_s, step_s = costs()
    saved_s = GAIN * step_s * steps
    pays = saved_s > compile_s
    saves = "saves" if pays else "would save"
    return pays, f"about {compile_s:.0f} s, {saves} about {saved_s:.0f} s over {steps} steps"


def compile_layers(model, *, backend="inductor", activation_budget=1.0):
    """Compile each decoder layer, for any batch size and length; returns the model.

    Per layer, not the whole model: all layers share one compiled version (two if rows have masks: sliding and full
    attention), gradient checkpointing stays outside, and a layer's hooks run between the compiled parts.
    activation_budget: torch's activation memory budget, the fraction of activations kept for backward; below 1 it
    recomputes the cheap ones.
    """
    torch._functorch.config.activation_memory_budget = activation_budget
    sum_norm_gradients(model)
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # used by sum_norm_gradients
    torch._dynamo.config.specialize_float = True  # else an adapter's scaling becomes a CPU kernel: 40 s of gcc
    torch.fx.experimental._config.use_duck_shape = False  # lengths that are equal once need not stay equal
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    # A first layer whose input needs no gradient would be compiled separately from the others.
    core(model).get_input_embeddings().register_forward_hook(_with_gradient)
    for layer in core(model).model.layers:
        layer.compile(dynamic=True, backend=backend)
    return model


@contextlib.contextmanager
def uncompiled(model):
    """Temporarily bypass torch.compile: the shapes of generation and evaluation would trigger recompiles."""
    compiled = [(layer, layer._compiled_call_impl) for layer in core(model).model.layers]
    release(model)
    try:
        yield
    finally:
        for layer, call in compiled:
            layer._compiled_call_impl = call


def release(model):
    """Drop the compiled code for good: after training comes generation."""
    for layer in core(model).model.layers:
        layer._compiled_call_impl = None


def is_failure(error):
    """Whether an error's class shows that it is the compiler's. Other classes may be too: Triton has its own."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def cause(error):
    """A compiler error's message, in one line."""
    inner = getattr(error, "inner_exception", error)  # without the compiler's advice on how to debug it
    return f"{type(inner).__name__}: {_brief(inner)}"


def _with_gradient(module, args, output):
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


class CompileCache:
    """torch.compile's artifacts in a file per GPU, torch, code and `work`, in this user's folder on this machine.

    work: what is compiled, as part of the file's name; a session rewrites the file with what it used. The compile time
    is stored next to it.

    Loading unpickles the file and may run its contents, so it is used only if this user wrote it and no one else could.
    It is not kept in a study, because studies get copied. If anything is wrong with it, one line is logged and layers
    are compiled again. log: called with that line.
    """

    def __init__(self, folder, work, *, log=print):
        self.path = Path(folder) / f"compile-{_key()}-{work}.bin"
        self._timed = self.path.with_suffix(".json")
        self._log, self._is_loaded = log, False

    def expected_seconds(self, default):
        """Expected compile time in seconds: measured here before, else CACHED_S if there is a file, else `default`."""
        is_cached = self.path.exists()
        found = self._seconds().get(_kind(is_cached))
        is_sound = isinstance(found, float) and found > 0
        return found if is_sound else CACHED_S if is_cached else default

    def keep_seconds(self, seconds):
        """Store how long the first compiled step took. Raises disk errors."""
        self._timed.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(self._timed, {"seconds": {**self._seconds(), _kind(self._is_loaded): float(seconds)}})

    def _seconds(self):
        try:
            return dict(read_json(self._timed)["seconds"])
        except (PeftlibError, KeyError, TypeError, ValueError):  # missing or incomplete
            return {}

    def load(self):
        """Whether compiled code was loaded."""
        try:
            if not self.path.exists():
                return False
            artifacts = _own_content(self.path)
            _require_own_places(artifacts)
            self._is_loaded = torch.compiler.load_cache_artifacts(artifacts) is not None
            return self._is_loaded
        except Exception as error:  # noqa: BLE001  torch may raise anything, and a cache must never stop a run
            self._log(f"the compile cache {self.path} is not used ({_brief(error)}): compiling again")
            return False

    def save(self):
        """Write what has been compiled so far; returns the bytes written, 0 if there was nothing or writing failed."""
        try:
            made = torch.compiler.save_cache_artifacts()
            if made is None:
                return 0
            content = hashlib.sha256(made[0]).digest() + made[0]
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_path(self.path) as beside:
                beside.touch(mode=0o600)
                beside.write_bytes(content)
            return len(content)
        except Exception as error:  # noqa: BLE001  as in load
            again = "the next session compiles again"
            self._log(f"the compile cache {self.path} could not be written ({_brief(error)}): {again}")
            return 0


def _kind(is_cached):
    return "from the cache" if is_cached else "anew"


def _own_content(path):
    """A cache file's content without its SHA-256. ModelError: another user could have written it, or it is damaged."""
    without_links = getattr(os, "O_NOFOLLOW", 0)
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | without_links)) as opened:
        status = os.fstat(opened.fileno())
        if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise ModelError("another user owns it or may write to it")
        content = opened.read()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ModelError("it is damaged")
    return content[32:]


def _require_own_places(artifacts):
    """ModelError: an artifact's name, which torch joins to the compiler's folder, would lead outside it."""
    from torch.compiler._cache import CacheArtifactManager

    found = CacheArtifactManager.deserialize(artifacts)
    if found is None:
        raise ModelError("torch cannot read it")
    for part in (part for parts in found.values() for part in parts):
        name = PurePath(part.key)
        if name.is_absolute() or ".." in name.parts:
            raise ModelError(f"artifact {part.key!r} points outside the cache folder")


def _brief(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


@functools.cache
def _key():
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = record.versions()
    parts = [card, *(f"{name} {versions[name]}" for name in _PACKAGES)]
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in _CODE)
    digest = hashlib.sha256("\n".join(parts).encode() + code).hexdigest()[:16]
    return f"{''.join(c if c.isalnum() else '-' for c in card)}-{digest}"
