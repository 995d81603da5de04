"""How much GPU memory a method takes, and which micro-batch and recomputation fit a card.

Everything is counted from the model's shape: weights, gradients, optimizer and the loss's logits exactly, activations
by what a layer keeps for its backward pass. tests/bench/methods.py prints the prediction beside each measured peak.
"""

from dataclasses import dataclass

import torch

from peftlib import methods
from peftlib.core.errors import ConfigError
from peftlib.core.files import GIB
from peftlib.models.inspect import ATTENTION, PROJECTIONS
from peftlib.models.losses import CHUNK

_WORKSPACE = 0.05 * GIB  # cuBLAS, small buffers
HEADROOM = 0.92  # of the card: the allocator's fragments and what the driver keeps
# Numbers that a compiled layer keeps for its backward pass, in units of a token's hidden, intermediate and attention
# widths; the second factor is what the backward pass itself holds at its widest.
_KEPT = {"hidden": 8.0, "intermediate": 3.0, "attention": 4.0}
_BACKWARD = {"hidden": 4.0, "intermediate": 2.5}
_EAGER = 1.45  # how much more a layer keeps when torch.compile fuses nothing


@dataclass(frozen=True)
class Plan:
    """How to run a step, and the bytes it takes at its peak. micro_batch: rows of max_length tokens at once."""

    micro_batch: int
    checkpointing: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int  # below the sum: gradients and activations do not peak together

    def line(self):
        """The plan as one line of text, in GiB."""
        parts = ("weights", "gradients", "optimizer", "activations", "total")
        sizes = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in parts)
        return f"micro_batch_size={self.micro_batch}, activation_checkpointing={self.checkpointing}: {sizes} GiB"


def estimate(shape, method, cfg, *, precision, micro_batch, checkpointing, is_compiled=True, chunk=CHUNK, tokens=None):
    """The Plan of one setting. tokens: of a row, cfg.max_length where not given."""
    found = methods.find(method)
    counts = _Counts(shape, found, cfg)
    rows = micro_batch * (tokens or cfg.max_length)
    weights, (first, later), optimizer = counts.weights(), counts.gradients(), counts.optimizer()
    residual, layer, loss = _activations(shape, rows, precision, checkpointing, is_compiled, chunk, counts)
    # The widest moments: the last layer's backward pass, while few gradients are there yet; the first layer's, when
    # all are; and the loss. In step 1 there is no optimizer state, but some whole gradients.
    kept = residual * shape.layers
    at_peak = max(kept + layer, kept + loss, layer + max(later, first - optimizer))
    return Plan(
        micro_batch,
        checkpointing,
        int(weights),
        int(max(first, later)),
        int(optimizer),
        int(max(kept + layer, kept + loss)),
        int(weights + optimizer + at_peak + _WORKSPACE),
    )


def optimizer_bytes(shape, method, cfg):
    """Bytes of a method's optimizer state: moments and bases."""
    return int(_Counts(shape, methods.find(method), cfg).optimizer())


def candidates(cfg):
    """(micro_batch, checkpointing) from the fastest to the smallest: many tokens at once first, then no recomputation."""
    sizes = [size for size in (16, 8, 4, 2, 1) if size <= max(1, cfg.batch_size)]
    whole = [(size, "off") for size in sizes]
    # Recomputing costs a third more work; a micro-batch half as large costs less than that.
    pairs = [*whole[:1], *((size, "on") for size in sizes), *((size, "offload") for size in sizes)]
    return [pair for pair in pairs if not (pair[1] == "offload" and cfg.lora_dropout > 0)]


def choose(shape, method, cfg, *, precision, device_bytes, is_compiled=True):
    """The first candidate that fits. ConfigError: none does, with the numbers and what to change."""
    limit = HEADROOM * device_bytes
    for micro_batch, checkpointing in candidates(cfg):
        plan = estimate(
            shape,
            method,
            cfg,
            precision=precision,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            is_compiled=is_compiled,
        )
        if plan.total <= limit:
            return plan
    raise ConfigError(
        f"{method} does not fit {device_bytes / GIB:.1f} GiB in any way: the least is {plan.line()}. Lower max_length "
        f"(now {cfg.max_length}), take a smaller model, or a method that needs less (qlora; galore with "
        "galore_weights='bf16', moment_bits=8)"
    )


def table(shape, cfg, *, precision, device_bytes, is_compiled=True):
    """[{method, fits, micro_batch, checkpointing, weights_gib, ..., total_gib}, ...] for every method.

    Where cfg.micro_batch_size is set, that setting; else the planner's choice, and where nothing fits, the setting that takes
    the least memory.
    """
    rows = []
    for method in methods.METHODS:
        if cfg.micro_batch_size:
            plan = _as_set(shape, method, cfg, precision=precision, is_compiled=is_compiled)
        else:
            plan = _chosen(shape, method, cfg, precision=precision, device_bytes=device_bytes, is_compiled=is_compiled)
        sizes = {f"{name}_gib": getattr(plan, name) / GIB for name in ("weights", "optimizer", "activations", "total")}
        run = {"micro_batch": plan.micro_batch, "checkpointing": plan.checkpointing}
        rows.append({"method": method, "fits": plan.total <= HEADROOM * device_bytes, **run, **sizes})
    return rows


def _as_set(shape, method, cfg, **how):
    rows = min(cfg.micro_batch_size, cfg.batch_size)
    return estimate(shape, method, cfg, micro_batch=rows, checkpointing=cfg.activation_checkpointing, **how)


def _chosen(shape, method, cfg, *, device_bytes, **how):
    try:
        return choose(shape, method, cfg, device_bytes=device_bytes, **how)
    except ConfigError:
        return _least(shape, method, cfg, **how)


def _least(shape, method, cfg, *, precision, is_compiled):
    """The Plan of the candidate that takes the least memory."""
    plans = (
        estimate(shape, method, cfg, precision=precision, micro_batch=size, checkpointing=how, is_compiled=is_compiled)
        for size, how in candidates(cfg)
    )
    return min(plans, key=lambda plan: plan.total)


def device_bytes(cfg):
    """What training may take of the GPU at hand: all of it, or cfg.memory_gib."""
    whole = torch.cuda.get_device_properties(0).total_memory
    return min(whole, int(cfg.memory_gib * GIB)) if cfg.memory_gib else whole


class _Counts:
    """Bytes that do not depend on the batch."""

    def __init__(self, shape, method, cfg):
        self.shape, self.method, self.cfg = shape, method, cfg
        self.moment_bytes = cfg.moment_bits // 8
        self.kinds = method.trains  # {kind of training: projections}
        self.adapter_numbers = shape.layers * sum(
            cfg.lora_rank * (rows + columns) for rows, columns in shape.matrices(self.kinds.get("adapters", ()))
        )
        self.whole = {kind: leaves for kind, leaves in self.kinds.items() if kind != "adapters"}

    def weights(self):
        """Embedding, projections in the form they are held in, adapters."""
        total = 2 * self.shape.vocabulary * self.shape.hidden + 4 * self.adapter_numbers
        trained = {leaf for leaves in self.whole.values() for leaf in leaves}
        for leaf in PROJECTIONS:
            ((rows, columns),) = self.shape.matrices([leaf])
            if leaf in self.method.four_bit:
                # 4 bits, an 8-bit scale for each 64 and the fused layers' float32 copy of it
                each = 0.5 + 1 / 64 + 4 / 64
            else:
                each = 4 if leaf in trained and not self._is_light else 2
            total += self.shape.layers * rows * columns * each
        return total

    @property
    def _is_light(self):
        return "galore" in self.kinds and self.cfg.galore_weights == "bf16"

    def gradients(self):
        """(in the first step, later), summed over the step, at the end of its backward pass."""
        adapters = 4 * self.adapter_numbers
        if "galore" in self.kinds:
            shapes = self.shape.matrices(self.kinds["galore"]) * self.shape.layers
            low = 4 * self.cfg.galore_rank * sum(max(shape) for shape in shapes)
            whole = 4 * sum(rows * columns for rows, columns in shapes)
            return adapters + low + min(whole, GIB), adapters + low + 4 * max(a * b for a, b in shapes)
        whole = (
            4 * self.shape.layers * sum(a * b for leaves in self.whole.values() for a, b in self.shape.matrices(leaves))
        )
        return adapters + whole, adapters + whole

    def optimizer(self):
        """Moments and bases."""
        total = 2 * self.moment_bytes * self.adapter_numbers
        for kind, leaves in self.whole.items():
            for shape in self.shape.matrices(leaves) * self.shape.layers:
                short, long = min(shape), max(shape)
                if kind == "galore":
                    total += self.cfg.galore_rank * (4 * short + 2 * self.moment_bytes * long)
                elif kind == "apollo":
                    total += self.cfg.apollo_rank * (4 * short + 8 * long)
                else:
                    total += 2 * short * long
        return total


def _activations(shape, tokens, precision, checkpointing, is_compiled, chunk, counts):
    """(bytes kept of one layer, bytes that one layer's backward pass holds beside, bytes of the loss)."""
    wide = 4 if precision == "fp16" else 2  # the residual stream is float32 with fp16
    attention = sum(shape.attention)
    kept = tokens * (
        (_KEPT["hidden"] * shape.hidden + _KEPT["intermediate"] * shape.intermediate + _KEPT["attention"] * attention)
        * 2
        + (wide - 2) * 3 * shape.hidden
    )
    kept *= 1.0 if is_compiled else _EAGER
    backward = tokens * 2 * (_BACKWARD["hidden"] * shape.hidden + _BACKWARD["intermediate"] * shape.intermediate)
    largest = max(a * b for a, b in shape.matrices([*ATTENTION, *PROJECTIONS[4:]]))
    backward += 2 * largest * (4 if counts.whole else 2)
    logits = min(chunk, tokens) * shape.vocabulary * 2 * 2
    loss = logits + tokens * shape.hidden * (4 + wide)
    if checkpointing == "off":
        return kept, backward, loss
    held = 0 if checkpointing == "offload" else tokens * shape.hidden * wide
    return held, kept + backward, loss
