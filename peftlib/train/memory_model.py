"""Predict a method's GPU memory, and choose the micro-batch and the recomputation that fit a GPU.

Everything is counted from the model's shape: weights, gradients, optimizer state and the loss's logits exactly,
activations by what a layer keeps for backward. tests/bench/methods.py prints the prediction next to each measured peak.
"""

import itertools
import math
from dataclasses import dataclass

from peftlib import methods
from peftlib.core.errors import ConfigError
from peftlib.core.files import GIB
from peftlib.models.adapters import UNFUSED_LORA, Size, adapter_size
from peftlib.models.inspect import PROJECTIONS
from peftlib.models.kernels.losses import CHUNK
from peftlib.optim.sums import GATHERED
from peftlib.train.parallel.processes import n_processes

_WORKSPACE = 0.05 * GIB  # cuBLAS, small buffers
HEADROOM = 0.86  # of the GPU's memory: fragmentation, CUDA graph pools and the driver take the rest
GPU_CHUNK = 512  # see chunk_of
# Elements per token that a compiled layer keeps for backward, in units of the hidden, intermediate and attention
# widths; the second factor is the peak of the backward pass itself.
_KEPT = {"hidden": 8.0, "intermediate": 3.0, "attention": 4.0}
_BACKWARD = {"hidden": 4.0, "intermediate": 2.5}
_EAGER = 1.45  # how much more a layer keeps without torch.compile's fusion
# Fraction of a layer's activations that is left if backward recomputes the cheap ones, and the time that costs.
CHEAP_BUDGET = 0.8  # torch.compile's activation memory budget
_CHEAP_KEPT, _CHEAP_TIME = (
    0.65,
    {"adapters": 1.0, **dict.fromkeys(("full", "apollo", "muon", "galore_torch"), 1.055)},
)  # GaLore's layers: nearly all are recomputed
# A step's time relative to infinitely large micro-batches without recomputation: the tokens that launching all kernels
# is worth, and the fractions that recomputing or offloading every layer adds. Fitted by hand to an H200's speeds of the
# 1B shape, except for kernel launches and offloading, which are assumed.
_LAUNCH = {"graphs": 720, "kernels": 4096}
_UNEVEN = 1.3  # passes per step relative to perfect packing: steps of real rows differ in size
_RECOMPUTING = {"off": 0.0, "on": 0.22, "offload": 0.8}
_SIZES = (16, 12, 8, 6, 4, 3, 2, 1)


@dataclass(frozen=True)
class Plan:
    """How to run a step, and its peak memory in bytes. micro_batch: rows of max_length tokens at once."""

    micro_batch: int
    checkpointing: str
    recomputed: int  # number of layers, counted from the first
    is_cheap: bool  # compiled layers recompute cheap operations
    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int  # less than the sum: gradients and activations do not peak together

    def fits(self, device_bytes):
        """Whether the peak stays within HEADROOM of a GPU's memory."""
        return self.total <= HEADROOM * device_bytes

    def line(self):
        """Describe the plan in one line, in GiB."""
        parts = ("weights", "gradients", "optimizer", "activations", "total")
        sizes = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in parts)
        of_layers = f" for {self.recomputed} layers" if self.checkpointing != "off" else ""
        cheap = ", cheap activations recomputed" if self.is_cheap else ""
        how = f"activation_checkpointing={self.checkpointing}{of_layers}{cheap}"
        return f"micro_batch_size={self.micro_batch}, {how}: {sizes} GiB"


def estimate(
    shape,
    method,
    cfg,
    *,
    precision,
    micro_batch,
    checkpointing,
    recomputed=None,
    is_cheap=False,
    is_compiled=True,
    is_graphed=True,
    chunk=None,
):
    """Predict the Plan of one setting.

    shape: Shape. recomputed: layers that checkpoint, None for all. chunk: positions whose logits are in memory at once;
    None: chunk_of.
    """
    chunk = chunk or chunk_of(checkpointing)
    counts = _Counts(shape, method, cfg)
    weights, (first, later), optimizer = counts.weights(), counts.gradients(is_graphed), counts.optimizer()
    tokens = micro_batch * cfg.max_length
    kept, backward, loss = _activations(shape, tokens, precision, is_compiled, chunk, bool(counts.whole))
    casts = counts.casts()
    kept = kept * (_CHEAP_KEPT if is_cheap else 1.0) * counts.size.kept + casts
    recomputed = 0 if checkpointing == "off" else shape.layers if recomputed is None else recomputed
    wide = 4 if precision == "fp16" else 2  # the residual stream is float32 with fp16
    held = 0 if checkpointing == "offload" else tokens * shape.hidden * wide
    # Candidates for the peak: the last layer's backward pass, when few gradients exist yet; the first layer's, when all
    # do; and the loss. In step 1 there is no optimizer state, but there are some full gradients.
    whole_layers, layer = shape.layers - recomputed, backward + (kept if recomputed else 0)
    stack = whole_layers * kept + recomputed * (held + (0 if is_compiled else casts))  # autocast caches its casts
    activations = stack + max(backward if whole_layers else layer, loss)
    # Gradients of earlier passes, and buffers that CUDA graphs write to, coexist with the activations.
    stay = counts.sums() if is_graphed or micro_batch < cfg.batch_size else 0
    at_peak = max(activations + stay, layer + max(later, first - optimizer))
    sizes = (weights, max(first, later), optimizer, activations, weights + optimizer + at_peak + _WORKSPACE)
    return Plan(micro_batch, checkpointing, recomputed, is_cheap, *map(int, sizes))


def chunk_of(checkpointing, device="cuda"):
    """Positions whose logits are in memory at once. Fewer with offloaded activations: the loss is the peak there."""
    return CHUNK if device == "cpu" or checkpointing == "offload" else GPU_CHUNK


def optimizer_bytes(shape, method, cfg):
    """Bytes of a method's optimizer state: moments and bases."""
    return int(_Counts(shape, method, cfg).optimizer())


def trained_numbers(shape, method, cfg):
    """Number of trained weights of a method, without norms."""
    counts = _Counts(shape, method, cfg)
    return counts.adapter_numbers + sum(map(math.prod, itertools.chain(*counts.whole.values())))


def candidates(cfg, *, layers, cheap_time=1.0, is_compiled=True, is_graphed=True, tokens=None):
    """Settings for `estimate` from the fastest to the slowest: micro-batches, layers that recompute, cheap or not.

    cheap_time: factor on a step's time if cheap activations are recomputed; None: keep them. tokens: per step, on
    average; None for rows of max_length.
    """
    found, most = [], cfg.batch_size * cfg.max_length
    tokens = min(tokens or most, most)
    uneven = _UNEVEN if tokens < most else 1.0
    for size in (size for size in _SIZES if size <= max(1, cfg.batch_size)):
        for kind, share in _RECOMPUTING.items():
            counts = sorted({-(-layers * n // 8) for n in range(1, 9)}) if kind == "on" else [layers]
            for count in [0] if kind == "off" else [] if kind == "offload" and cfg.lora_dropout > 0 else counts:
                for is_cheap in (False, True) if is_compiled and cheap_time else (False,):
                    passes = max(1.0, uneven * tokens / (size * cfg.max_length))
                    cost = 1 + _LAUNCH["graphs" if is_graphed else "kernels"] * passes / tokens
                    cost *= 1 + share * count / layers
                    cost *= cheap_time if is_cheap else 1.0
                    found.append((cost, is_cheap, size, kind, count))
    names = ("is_cheap", "micro_batch", "checkpointing", "recomputed")
    return [dict(zip(names, setting[1:], strict=True)) for setting in sorted(found)]


def best_plan(shape, method, cfg, *, device_bytes, tokens=None, **how):
    """The Plan for cfg.micro_batch_size if that is set, else for the first candidate that fits, else for the smallest.

    device_bytes: GPU memory that training may use. tokens: as in `candidates`. how: precision, is_compiled,
    is_graphed as in `estimate`.
    """
    if cfg.micro_batch_size:
        size = min(cfg.micro_batch_size, cfg.batch_size)
        settings = [{"micro_batch": size, "checkpointing": cfg.activation_checkpointing}]
    else:
        kinds = {name: value for name, value in how.items() if name in ("is_compiled", "is_graphed")}
        times = [
            _CHEAP_TIME[kind] for kind in methods.find(method).resolve(cfg, shape.layers).trains if kind in _CHEAP_TIME
        ]
        kinds |= {"cheap_time": max(times, default=None), "tokens": tokens}
        settings = candidates(cfg, layers=shape.layers, **kinds)
    plans = []
    for setting in settings:
        plans.append(estimate(shape, method, cfg, **setting, **how))
        if plans[-1].fits(device_bytes):
            return plans[-1]
    return min(plans, key=lambda plan: plan.total)


def choose(shape, method, cfg, *, device_bytes, **how):
    """The best_plan, if it fits. ConfigError: nothing fits; the message has the numbers and what to change."""
    plan = best_plan(shape, method, cfg, device_bytes=device_bytes, **how)
    if plan.fits(device_bytes):
        return plan
    raise ConfigError(
        f"{method} does not fit in {device_bytes / GIB:.1f} GiB: the smallest plan is {plan.line()}. {_of_cards(plan)}"
        f"Lower max_length (now {cfg.max_length}), or use a smaller model or a method that needs less (qlora; galore "
        "with galore_weights='bf16', moment_bits=8)"
    )


def _of_cards(plan):
    """A sentence on whether several GPUs help a run that does not fit on one; '' if there is one."""
    if n_processes() == 1:
        return ""
    return (
        f"{n_processes()} GPUs do not help: each holds all weights ({plan.weights / GIB:.2f} GiB), and only "
        "GaLore's moments can be divided (shard_optimizer=true). "
    )


class _Counts:
    """Bytes that do not depend on the batch."""

    def __init__(self, shape, method, cfg):
        self.shape, self.cfg = shape, cfg
        method = methods.find(method).resolve(cfg, shape.layers)
        self.moment_bytes = cfg.moment_bits // 8
        self.whole = {kind: shape.all_matrices(names) for kind, names in method.trains.items()}
        adapters = self.whole.pop("adapters", ())
        self.adapter_numbers = cfg.lora_rank * sum(map(sum, adapters))
        self.adapter_numbers += cfg.lora_use_dora * sum(rows for rows, _ in adapters)
        kept = UNFUSED_LORA.kept if adapters and cfg.lora_use_dora else 1.0
        self.size = Size(self.adapter_numbers, self.adapter_numbers, kept, 0.0)
        if method.is_counted:
            self.size = _counted(shape, method, cfg)
            self.adapter_numbers = self.size.trained
        self.four_bit = shape.all_matrices(method.four_bit)

    def weights(self):
        """Embedding, projections as stored, and adapters."""
        total = 2 * self.shape.vocabulary * self.shape.hidden + 4 * self.size.held
        is_light = "galore" in self.whole and self.cfg.galore_weights == "bf16"
        in_all, in_four = (sum(map(math.prod, kind)) for kind in (self.shape.all_matrices(PROJECTIONS), self.four_bit))
        trained = 0 if is_light else sum(map(math.prod, itertools.chain(*self.whole.values())))
        # 4 bits, an 8-bit scale per 64 weights, and the fused layers' float32 copy of it
        return total + 2 * (in_all - in_four) + 2 * trained + (0.5 + 1 / 64 + 4 / 64) * in_four

    def casts(self):
        """Per layer: 16-bit copies, kept for backward, of weights that train in float32, or of the matrices that an
        adapter computes.

        Observed for GaLore; assumed for full and apollo.
        """
        if "galore" in self.whole and self.cfg.galore_weights == "bf16":
            return 0
        copies = self.size.copies * sum(map(math.prod, self.shape.matrices(PROJECTIONS)))
        return int(2 * copies) + 2 * sum(map(math.prod, itertools.chain(*self.whole.values()))) // self.shape.layers

    def sums(self):
        """What a step accumulates over its passes: gradients, projected ones for GaLore."""
        total = 4 * self.adapter_numbers
        for kind, shapes in self.whole.items():
            for rows, columns in shapes:
                total += 4 * max(rows, columns) * (self.cfg.galore_rank if kind == "galore" else min(rows, columns))
        return total

    def gradients(self, is_graphed):
        """(in the first step, in later steps), accumulated over the step, at the end of its backward pass."""
        sums, sizes = self.sums(), [4 * rows * columns for rows, columns in self.whole.get("galore", ())]
        if not sizes:
            return sums, sums
        return sums + min(sum(sizes), GIB), sums + (min(sum(sizes), GATHERED) if is_graphed else max(sizes))

    def optimizer(self):
        """Moments and bases."""
        total = 2 * self.moment_bytes * self.adapter_numbers
        for kind, shapes in self.whole.items():
            for short, long in map(sorted, shapes):
                if kind in ("galore", "galore_torch"):
                    shares = n_processes() if self.cfg.shard_optimizer else 1
                    total += self.cfg.galore_rank * (4 * short + 2 * self.moment_bytes * long / shares)
                elif kind == "apollo":
                    total += self.cfg.apollo_rank * (4 * short + 8 * long)
                else:
                    total += {"muon": 4, "full": 2}[kind] * short * long  # float32 momentum, or 8-bit moments
        return total


_COUNTED: dict = {}  # results of `_counted`: some kinds take seconds


def _counted(shape, method, cfg):
    """The adapters.Size of a method's adapter. ConfigError: the adapter does not fit the model."""
    key = (shape, method.name, cfg.model, *(getattr(cfg, name) for name in method.settings))
    if key not in _COUNTED:
        _COUNTED[key] = adapter_size(shape, lambda model: method.prepare(model, cfg))
    return _COUNTED[key]


def _activations(shape, tokens, precision, is_compiled, chunk, trains_whole):
    """(bytes that one layer keeps, extra bytes of one layer's backward pass, bytes of the loss)."""
    wide = 4 if precision == "fp16" else 2
    widths = {"hidden": shape.hidden, "intermediate": shape.intermediate, "attention": sum(shape.attention)}
    kept = tokens * (2 * sum(_KEPT[name] * widths[name] for name in _KEPT) + (wide - 2) * 3 * shape.hidden)
    kept *= 1.0 if is_compiled else _EAGER
    backward = tokens * 2 * sum(_BACKWARD[name] * widths[name] for name in _BACKWARD)
    backward += 2 * max(rows * columns for rows, columns in shape.matrices(PROJECTIONS)) * (4 if trains_whole else 2)
    loss = min(chunk, tokens) * shape.vocabulary * (4 if is_compiled else 6) + tokens * shape.hidden * (4 + wide)
    return kept, backward, loss
