"""How a run executes on its device, and the memory it uses there.

It changes results only by rounding; with CUDA graphs, GaLore's bases are refreshed in other steps, several at once.
"""

import contextlib
import functools
import gc
import math
import threading
from pathlib import Path

import psutil
import torch

from peftlib import methods
from peftlib.core.errors import ConfigError, PeftlibError
from peftlib.core.files import GIB
from peftlib.models import compile as compiled
from peftlib.models.adapters import adapter_path
from peftlib.models.inspect import core
from peftlib.models.kernels.attention import choose_kernel, use_kernel
from peftlib.models.layers import checkpoint_layers
from peftlib.models.packaged import cache_root
from peftlib.models.shapes import Shape, card_at_hand, find_card
from peftlib.train import estimate, memory_model
from peftlib.train.batching import longest_row
from peftlib.train.graphs import CAPTURE_PASSES
from peftlib.train.parallel.exchange import divide
from peftlib.train.parallel.processes import n_processes

_CPU_MICRO_BATCH = 4
_SAMPLED_EVERY_S = 0.1
_SAMPLED_STEPS = 256  # whose lengths stand for those of all steps
_FIRST_STEPS = 3  # of a session: any error in them is blamed on the compiler; later ones are told apart by class


class ExecutionPlan:
    """Micro-batch, recomputation, attention kernel, compiled layers and CUDA graphs of a run; prepares `model`.

    micro_batch_size: rows of max_length tokens at once; it may shrink. On a GPU with cfg.micro_batch_size=0 the memory
    model chooses it and the recomputation. steps: remaining. tokens: of this process in a step, on average.
    ConfigError: nothing fits.
    """

    def __init__(self, model, method, cfg, *, device, precision, steps, tokens, log):
        self.model, self.method, self.cfg, self.log = model, method, cfg, log
        self.micro_batch_size = cfg.micro_batch_size or _CPU_MICRO_BATCH
        self.recomputed = None  # number of recomputed layers; None: all, if any
        shape = Shape.of(core(model).config)
        work = f"{method}-{shape.layers}x{shape.hidden}-{precision}"
        self._cache = compiled.CompileCache(cache_root() / "compile", work, log=log)
        costs = functools.partial(self._compile_costs, shape, precision, tokens)
        self.is_compiled, why = compiled.resolve(cfg.compile, device, steps, costs)
        self.attention, why_masks = choose_kernel(model, device=device, precision=precision)
        self.is_graphed = self.attention is not None and cfg.cuda_graphs == "auto"
        budget = 1.0
        if device == "cuda" and cfg.micro_batch_size == 0:
            budget = self._choose(precision, tokens)
        self.chunk = memory_model.chunk_of(self.cfg.activation_checkpointing, device)
        checkpoint_layers(model, self.cfg, self.recomputed)
        if self.attention:
            use_kernel(model, self.attention, longest=self.longest)
        if device == "cuda":
            how = (
                f"packing rows without masks ({self.attention})"
                if self.attention
                else f"packing rows with masks ({why_masks})"
            )
            log(f"{how}, {'running steps as CUDA graphs' if self.is_graphed else 'running steps without CUDA graphs'}")
        self.compile_error, self._steps = None, 0
        self.captured = 0  # micro-batch lengths captured in this session
        if self.is_compiled:
            loaded = self._cache.load()
            log(f"compiling the layers{', from the cache' if loaded else ''}: {why}")
            try:
                compiled.compile_layers(model, activation_budget=budget)
            except Exception as error:  # noqa: BLE001  re-raised if it is not the compiler's
                self.recover_from(error, step=0)
        elif device == "cuda":
            log(f"not compiling the layers: {why}")

    def _compile_costs(self, shape, precision, tokens):
        """Estimated (seconds to compile, seconds per uncompiled step)."""
        has_adapters = "adapters" in methods.find(self.method).trains
        compile_s = self._cache.expected_seconds(compiled.ADAPTERS_S if has_adapters else compiled.PLAIN_S)
        rows = self.cfg.batch_size / n_processes()
        step_s = step_seconds(shape, self.method, precision=precision, tokens=tokens, rows=rows)
        return compile_s, step_s / (1 - compiled.GAIN)

    def _choose(self, precision, tokens):
        """Set micro-batch and recomputation from the memory model; returns torch.compile's activation budget."""
        shape, available = Shape.of(core(self.model).config), memory_limit(self.cfg, "cuda")
        how = {"precision": precision, "device_bytes": available, "is_compiled": self.is_compiled}
        chosen = memory_model.choose(shape, self.method, self.cfg, **how, is_graphed=self.is_graphed, tokens=tokens)
        self.log(f"plan for {available / GIB:.1f} GiB: {chosen.line()}")
        self.micro_batch_size, self.recomputed = chosen.micro_batch, chosen.recomputed
        self.cfg = self.cfg.replace(activation_checkpointing=chosen.checkpointing)
        return memory_model.CHEAP_BUDGET if chosen.is_cheap else 1.0

    @property
    def facts(self):
        """What the record stores about the plan."""
        failed = {"compile_error": self.compile_error} if self.compile_error else {}
        path = adapter_path(self.model)
        return {
            "micro_batch_size": self.micro_batch_size,
            "activation_checkpointing": self.cfg.activation_checkpointing,
            "recomputed_layers": self.recomputed,
            "is_compiled": self.is_compiled,
            **failed,
            **({"adapter_path": path} if path else {}),
            "attention": self.attention or "masks",
            "is_graphed": self.is_graphed,
            "captured_lengths": self.captured,
        }

    @property
    def description(self):
        """What two sessions must have in common for bit-identical results on a CPU, as text."""
        parts = [f"micro_batch_size={self.micro_batch_size}", f"compiled={self.is_compiled}"]
        parts.append(f"{torch.get_num_threads()} threads")
        parts += [f"{self.attention} attention"] * (self.attention is not None) + ["CUDA graphs"] * self.is_graphed
        return ", ".join(parts)

    @property
    def tokens(self):
        """Padded tokens of a micro-batch."""
        return min(self.micro_batch_size, self.cfg.batch_size) * self.cfg.max_length

    @property
    def longest(self):
        """Tokens of the longest row in a micro-batch."""
        return longest_row(self.cfg.max_length, self.tokens)

    def use_graphs(self, stepper, rows, plan, first, processes):
        """Run the plan's steps from `first` on as CUDA graphs, if possible.

        The shapes of `rows` are limited to a few, so that few are captured, but not in the first steps: they run
        without graphs, where more padding only costs time and memory.
        """
        if not self.is_graphed:
            return
        steps = range(first, plan.steps)
        sample = steps[:: max(1, len(steps) // _SAMPLED_STEPS)]
        parts = [divide(plan.rows_of(step), rows.lengths, processes.world)[processes.rank] for step in sample]
        limits = {"remaining": len(steps), "capture": CAPTURE_PASSES, "longest": self.longest}
        stepper.use_graphs(self.tokens, when_warm=lambda: rows.limit_shapes(parts, self.tokens, **limits))

    def recover_from(self, error, step):
        """Change the plan after a failed step, to retry it. ConfigError: out of memory, and nothing is left to reduce.

        After a compiler error, training continues uncompiled; any other error is re-raised.
        """
        if isinstance(error, torch.OutOfMemoryError):
            self._shrink(step, error)
        else:
            self._uncompile(error)

    def _shrink(self, step, error):
        """Halve the micro-batch, or recompute activations. ConfigError: both were already done."""
        before, how = self.tokens, self.cfg.activation_checkpointing
        if before > self.cfg.max_length:
            while self.tokens == before:  # it may be more than the rows of a step
                self.micro_batch_size //= 2
        elif how == "off" or (how == "on" and self.recomputed is not None):
            self.recomputed, self.cfg = None, self.cfg.replace(activation_checkpointing="on")
            checkpoint_layers(self.model, self.cfg)
        else:
            raise ConfigError(
                f"{self.method} does not fit this GPU even with micro_batch_size=1 and activation_checkpointing="
                f"{self.cfg.activation_checkpointing}: lower max_length, or use a method that needs less memory"
            ) from error
        self.log(
            f"out of memory at step {step}: continuing with micro_batch_size={self.micro_batch_size}, "
            f"activation_checkpointing={self.cfg.activation_checkpointing}"
        )

    def _uncompile(self, error):
        is_compilers = self._steps < _FIRST_STEPS or compiled.is_failure(error)
        if not self.is_compiled or not is_compilers or isinstance(error, PeftlibError):
            raise error
        compiled.release(self.model)
        self.is_compiled, self.compile_error = False, compiled.cause(error)
        self.log(f"compiling failed ({self.compile_error}): training continues uncompiled")

    def after_step(self, seconds):
        """Save what the session's first step compiled; a failure is logged, and later sessions compile again.

        seconds: how long the step took.
        """
        if self._steps == 0 and self.is_compiled:
            try:
                self._cache.save()
                self._cache.keep_seconds(seconds)
            except Exception as error:  # noqa: BLE001 - a cache failure must not end a run
                self.log(f"could not cache the compiled layers ({type(error).__name__}: {error}); training continues")
        self._steps += 1


def step_seconds(shape, method, *, precision, tokens, rows):
    """Estimated seconds per step with this many tokens and rows on the local GPU, with compiled layers.

    The midpoint of the forecast for one micro-batch; an unlisted GPU is treated as an A100.
    """
    _, card = card_at_hand() or find_card("a100")
    how = {"precision": precision, "length": tokens / rows, "micro_batch": rows, "rows": estimate.measured_rows()}
    found = estimate.speed(card, shape, method, **how)
    return tokens / math.sqrt(found.low * found.high)


@contextlib.contextmanager
def memory_cap(cfg, device):
    """Context in which this process may use at most cfg.memory_gib of the GPU, if set; restores the limit after."""
    if device != "cuda" or not cfg.memory_gib:
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction()
    whole = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.memory_gib * GIB / whole))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


def memory_limit(cfg, device):
    """Bytes that training may use: the GPU's memory or cfg.memory_gib; on CPUs the memory of this machine or
    container."""
    if device == "cuda":
        whole = torch.cuda.get_device_properties("cuda").total_memory
        return min(whole, int(cfg.memory_gib * GIB)) if cfg.memory_gib else whole
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    found = [path.read_text(encoding="utf-8").strip() for path in limits if path.is_file()]
    return min([psutil.virtual_memory().total, *(int(text) for text in found if text.isdigit())])


class PeakMemory:
    """Context manager that measures peak memory; read `peak_bytes` and `reserved_bytes` inside it or afterwards.

    On CUDA the peaks are exact: allocated, and reserved from the driver. On CPUs the resident memory of the process
    tree is sampled ten times per second; `peak_bytes` is its increase since the start, `reserved_bytes` is None.
    """

    def __init__(self, device):
        self.device, self.peak_bytes, self.reserved_bytes = device, 0, None
        self._is_over = threading.Event()

    def __enter__(self):
        if self.device == "cuda":
            gc.collect()  # free an earlier run's model, which is in a reference cycle
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._start_bytes = self._resident_bytes = _tree_bytes()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *exc):
        self._is_over.set()
        if self.device == "cuda":
            self.read()
        else:
            self._sampler.join()

    def read(self):
        """(peak_bytes, reserved_bytes) so far."""
        if self.device == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated()
            self.reserved_bytes = torch.cuda.max_memory_reserved()
        else:
            self._resident_bytes = _tree_bytes()
            self.peak_bytes = max(self.peak_bytes, self._resident_bytes - self._start_bytes)
        return self.peak_bytes, self.reserved_bytes

    def now(self):
        """(bytes in use, bytes reserved or None, peak bytes) without waiting: on a CPU, from the last sample."""
        if self.device == "cuda":
            return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), self.read()[0]
        return self._resident_bytes, None, self.peak_bytes

    def _sample(self):
        while not self._is_over.wait(_SAMPLED_EVERY_S):
            self.read()


def _tree_bytes():
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return total
