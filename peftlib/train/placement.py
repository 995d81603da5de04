"""How a run is laid out on its device: micro-batch, recomputation, compiled layers. None of it changes the result."""

import contextlib

import torch

from peftlib.core.errors import ConfigError
from peftlib.models import compile as compiled
from peftlib.models.compile import CompileCache
from peftlib.models.inspect import core
from peftlib.models.layers import checkpoint_layers
from peftlib.models.packaged import cache_root
from peftlib.models.shapes import Shape
from peftlib.train import memory_model as plan

_CPU_MICRO_BATCH = 4


@contextlib.contextmanager
def memory_cap(cfg, device):
    """Within it this process takes at most cfg.memory_gib of the card, where that is set; then what it could before."""
    if device != "cuda" or not cfg.memory_gib:
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.memory_gib * plan.GIB / whole))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


class Placement:
    """Prepares `model` in place. micro_batch: rows of max_length tokens at once; it may shrink.

    On a GPU with micro_batch_size=0 the planner chooses micro-batch and checkpointing. ConfigError: nothing fits.
    """

    def __init__(self, model, method, cfg, *, device, precision, steps, log):
        self.model, self.method, self.cfg, self.device, self.log = model, method, cfg, device, log
        self.micro_batch_size = cfg.micro_batch_size or _CPU_MICRO_BATCH
        self.is_compiled, why = compiled.resolve(cfg.compile, device, steps)
        if device == "cuda":
            self._choose(precision)
        checkpoint_layers(model, self.cfg)
        self._cache = CompileCache(cache_root() / "compile", log=log)
        if self.is_compiled:
            loaded = self._cache.load()
            log(f"compiles its layers ({why}{', from the cache' if loaded else ''})")
            compiled.compile_layers(model)
        self._is_first_step = True

    def _choose(self, precision):
        cfg = self.cfg
        if cfg.micro_batch_size == 0:
            available = plan.device_bytes(cfg)
            chosen = plan.choose(
                Shape.of(core(self.model).config),
                self.method,
                cfg,
                precision=precision,
                device_bytes=available,
                is_compiled=self.is_compiled,
            )
            self.log(f"plan for {available / plan.GIB:.1f} GiB: {chosen.line()}")
            self.micro_batch_size = chosen.micro_batch
            self.cfg = cfg.replace(activation_checkpointing=chosen.checkpointing)

    @property
    def facts(self):
        """What a record holds of it: rows of max_length tokens at once, recomputation, compiled layers or not."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "activation_checkpointing": self.cfg.activation_checkpointing,
            "is_compiled": self.is_compiled,
        }

    @property
    def description(self):
        """What two sessions must share for equal bits, in words."""
        return (
            f"micro_batch_size={self.micro_batch_size}, compiled={self.is_compiled}, {torch.get_num_threads()} threads"
        )

    @property
    def tokens(self):
        """Padded tokens of a micro-batch."""
        return self.micro_batch_size * self.cfg.max_length

    def make_room(self, step, error):
        """After an out-of-memory error: half the micro-batch, then recomputation. ConfigError: all of that is done."""
        if self.micro_batch_size > 1:
            self.micro_batch_size //= 2
        elif self.cfg.activation_checkpointing == "off":
            self.cfg = self.cfg.replace(activation_checkpointing="on")
            checkpoint_layers(self.model, self.cfg)
        else:
            raise ConfigError(
                f"{self.method} does not fit this GPU even with micro_batch_size=1 and "
                f"activation_checkpointing={self.cfg.activation_checkpointing}: lower max_length, or take a method that needs less memory"
            ) from error
        self.log(
            f"out of memory at step {step}: going on with micro_batch_size={self.micro_batch_size}, "
            f"activation_checkpointing={self.cfg.activation_checkpointing}"
        )

    def after_step(self):
        """Keep what the session's first step has compiled. Where that fails it is logged: later sessions compile again."""
        if self._is_first_step and self.is_compiled:
            try:
                self._cache.save()
            except Exception as error:  # noqa: BLE001 - a cache is never worth a run
                self.log(f"the compiled layers could not be kept ({type(error).__name__}: {error}); training goes on")
        self._is_first_step = False
