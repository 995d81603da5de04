"""Estimate what training costs on a GPU before it starts: memory, micro-batch and hours of every method.

Hours come from speeds measured on that GPU, or from a range scaled from measurements on other GPUs.
"""

import json
import math
import time
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch

from peftlib import methods
from peftlib.core.errors import ConfigError
from peftlib.core.files import GIB
from peftlib.core.paths import shipped
from peftlib.models.inspect import PROJECTIONS
from peftlib.models.shapes import PRICED, SHAPES, card_of_device
from peftlib.train import memory_model

MEASURED = shipped("results/bench/methods.json")
_LENGTH, _RANKS = 1024, {"lora_rank", "galore_rank"}  # benchmark rows with other lengths or ranks show how cost grows
HEADER = ("method", "fits", "memory GiB", "micro-batch", "recompute", "tokens/s", "time", "")
_ALIGNED = "<<>><>><"
_MEASURED_MODEL = "gemma-3-1b"  # tests/bench/methods.py makes this shape
SLOWER = 1.5  # how far below the scaled speed a GPU may be: clocks, cooling, a slower host
_SHARES = (0.1, 0.4)  # fractions of a GPU's peak that training reached in our measurements


def flops_per_token(shape, method, *, length, rank=128):
    """Floating-point operations per training token, without recomputation.

    shape: a Shape. method: a MethodSpec. length: mean tokens per row; a token attends to half of them. rank: GaLore's.
    """
    # 2 per multiply-add. A projection runs forward and backward to its input; a trained one also to its weight, or to
    # GaLore's view of it. The frozen head runs forward and backward; attention's backward costs twice its forward.
    projections = 4 * sum(map(math.prod, shape.all_matrices(PROJECTIONS)))
    for kind, names in method.trains.items():
        for rows, columns in shape.all_matrices(names):
            whole, low = rows * columns, rank * (rows + columns)
            projections += 2 * {"adapters": 0, "galore": min(whole, low)}.get(kind, whole)
    attention = 3 * 2 * 2 * shape.attention[0] * length / 2
    return projections + shape.layers * attention + 2 * 2 * shape.vocabulary * shape.hidden


def matmul_ceiling(device, dtype, *, size=None, seconds=0.2):
    """Measure the FLOP/s of a large square matrix product on this device, which MFU is relative to."""
    size = size or (8192 if device == "cuda" else 1024)
    a = torch.randn(size, size, device=device).to(dtype)
    (a @ a).sum().item()  # the first product also loads the library
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - started)


@dataclass(frozen=True)
class Speed:
    """Training tokens per second, between low and high; equal if measured. basis: where the numbers come from."""

    low: float
    high: float
    basis: str

    @property
    def is_measured(self):
        return self.low == self.high


def measured_rows(path=MEASURED):
    """Read the benchmark rows with a speed of one of our methods on a known GPU; [] if there is no file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and all(row.get(name) for name in ("method", "precision", "tok_s", "device", "micro_batch"))
        and row["method"] in methods.METHODS
        and "peer" not in row  # not another library's speed
        and row.get("seq") == _LENGTH
        and not _RANKS & row.get("fields", {}).keys()
        and card_of_device(row["device"])
    ]


def speed(card, shape, method, *, precision, length, micro_batch, rows, checkpointing=None, spec=None):
    """The Speed of a method. card: shapes.Card. shape: the model's. length: tokens per row. rows: measured_rows();
    a row with the same micro-batch and checkpointing (None: any) gives this setting's own speed. spec: a config's."""
    spec = spec or methods.find(method)
    usable = [row for row in rows if row["precision"] == precision]
    own = [row for row in usable if row["method"] == method]
    here = [row for row in own if card_of_device(row["device"]) == card]
    alike = [row for row in here if checkpointing in (None, row["checkpointing"])]
    fitting = [row for row in alike if row["micro_batch"] == micro_batch]
    if fitting and shape == SHAPES[_MEASURED_MODEL] and spec.trains == methods.find(method).trains:
        best = max(fitting, key=itemgetter("tok_s"))
        return Speed(best["tok_s"], best["tok_s"], f"measured, {_source(best)}")
    needed = flops_per_token(shape, spec, length=length)
    if not usable:
        low, high = (share * card.tflops * 1e12 / needed for share in _SHARES)
        share = f"{_SHARES[0]:.0%} to {_SHARES[1]:.0%}"
        return Speed(low, high, f"estimate, {share} of the card's published {card.tflops:g} TFLOPS")
    # Scale by the ratio of work, and by the cards' FLOP/s and bandwidth ratios, whichever gives the wider range.
    row = max(here or own or usable, key=itemgetter("tok_s"))
    source = card_of_device(row["device"])
    base = row["tok_s"] * flops_per_token(SHAPES[_MEASURED_MODEL], methods.find(row["method"]), length=row["seq"])
    ratios = card.tflops / source.tflops, card.gb_per_s / source.gb_per_s
    # A small micro-batch leaves a large card idle, in the worst case proportionally.
    low = base / needed * min(ratios) / SLOWER * min(1.0, micro_batch / row["micro_batch"])
    return Speed(low, base / needed * max(ratios), f"estimate from {_source(row)}")


def _source(row):
    card = card_of_device(row["device"])
    return (
        f"{row['method']}'s {row['tok_s']:,.0f} tokens/s on {row['device']} ({row['precision']}, micro-batch "
        f"{row['micro_batch']}, {row['seq']} tokens per row; {card.tflops:g} TFLOPS, {card.gb_per_s:g} GB/s)"
    )


def scaling_note(card):
    """Explain how estimates are derived from speeds measured elsewhere."""
    return (
        f"estimates scale speeds of the {_MEASURED_MODEL} shape by the work per token and by published figures (this "
        f"GPU: {card.tflops:g} TFLOPS, {card.gb_per_s:g} GB/s): the fast end by the better ratio, the slow end by "
        f"{SLOWER:g} times the worse one, and further if the micro-batch is smaller than the measured one"
    )


def study_tokens(cfg, manifest=None):
    """(fewest, most, basis) training tokens of one run of a study, without padding.

    manifest: data/manifest.json if the data exist; without it, rows are assumed to have a fifth of max_length to all
    of it.
    """
    known = manifest and [found for found in manifest["tokens"]["train"].values() if found]
    if known:
        n_rows = sum(manifest["counts"]["train"].values())
        low = high = sum(found["total"] for found in known) / n_rows
        basis = f"{n_rows:,} training rows of {low:,.0f} tokens on average, from the study's data"
    else:
        n_rows = cfg.train_rows * len([part for part in cfg.sources.split(";") if part.strip()])
        low, high = cfg.max_length / 5, float(cfg.max_length)
        basis = f"{n_rows:,} training rows of {low:,.0f} to {high:,.0f} tokens (no data yet)"
    seen = min(n_rows * cfg.epochs, cfg.max_steps * cfg.batch_size or math.inf)
    return seen * low, seen * high, basis


@dataclass(frozen=True)
class Cost:
    """One method on one GPU.

    memory_gib: predicted peak of training; if nothing fits, the minimum; 0: unknown. variant: as MethodSpec.variant.
    hours: (shortest, longest) of one run, or None. speed: a Speed, or None. refused: why it cannot be trained, or ''.
    """

    method: str
    fits: bool
    memory_gib: float
    micro_batch: int
    checkpointing: str
    speed: Speed | None
    hours: tuple | None
    refused: str
    variant: str = ""

    @property
    def mark(self):
        """How reliable the hours are, as text; if the method does not fit, why."""
        if not self.fits:
            return self.refused or "at least this much memory"
        return "measured speed" if self.speed.is_measured else "estimate"


@dataclass(frozen=True)
class Forecast:
    """Every method's Cost on a GPU with `gib` GiB. tokens: (fewest, most, basis) of one run, as study_tokens."""

    cfg: object
    card: object
    card_name: str
    gib: float
    precision: str
    costs: list
    tokens: tuple

    @property
    def headline(self):
        """One line that says what the forecast is for."""
        cfg = self.cfg
        return (
            f"{cfg.model} on a {self.card_name}: {self.gib:.1f} GiB, {self.precision}, rows of up to {cfg.max_length} "
            f"tokens, {cfg.batch_size} per step"
        )

    @property
    def refusal(self):
        """Why no method can be trained there, and what to change; '' if one can."""
        if any(cost.fits for cost in self.costs):
            return ""
        least = min((cost for cost in self.costs if not cost.refused), key=lambda cost: cost.memory_gib, default=None)
        if least is None:
            return f"no method can train {self.cfg.model} with these settings: {self.costs[0].refused}"
        change = "Set micro_batch_size to 0, lower" if self.cfg.micro_batch_size else "Lower"
        return (
            f"no method can train {self.cfg.model} on a {self.card_name} with {self.gib:.1f} GiB: the smallest is "
            f"{least.method} with {least.memory_gib:.1f} GiB. {change} max_length (now {self.cfg.max_length}), or use "
            "a smaller model or a larger GPU"
        )

    def notes(self):
        """Yield one line for each assumption behind the numbers."""
        yield f"memory: the planner's prediction for training, kept below {memory_model.HEADROOM:.0%} of the card"
        yield f"hours: training of one run with one seed, {self.tokens[2]}; answering the test rows takes extra time"
        if self.cfg.micro_batch_size:
            yield f"micro-batch: set by micro_batch_size={self.cfg.micro_batch_size}; 0 lets the planner choose"
        bases = dict.fromkeys(cost.speed.basis for cost in self.costs if cost.speed)
        for basis in bases:
            names = [cost.method for cost in self.costs if cost.speed and cost.speed.basis == basis]
            yield f"{', '.join(names)}: {basis}"
        if any(basis.startswith("estimate from") for basis in bases):
            yield scaling_note(self.card)
        if self.card.dollars:
            each = (f"{cost.method} {self.card.cost(cost.hours)}" for cost in self.costs if cost.hours)
            yield f"cost at ${self.card.dollars:.2f} per hour ({PRICED}): {', '.join(each)}"

    def lines(self):
        """Yield headline, table and notes as lines of text."""
        rows = [HEADER, *map(cells, self.costs)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield self.headline
        for row in rows:
            aligned = zip(row, _ALIGNED, widths, strict=True)
            yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in aligned).rstrip()
        yield from self.notes()


def forecast(cfg, card_name, card, *, shape, manifest=None, rows=None, names=None):
    """The Forecast of a config on a GPU. card: shapes.Card. shape: cfg.model's. manifest: the data's, if they exist.

    rows: measured speeds, by default measured_rows(). names: of methods, by default those of a study.
    """
    precision = card.precision if cfg.precision == "auto" else cfg.precision
    gib = min(card.gib, cfg.memory_gib) if cfg.memory_gib else card.gib
    tokens = study_tokens(cfg, manifest)
    rows = measured_rows() if rows is None else rows
    costs = []
    for spec in map(methods.find, names or methods.default_methods()):
        refused, found, hours, size, how = "", None, None, 0.0, {"micro_batch": 0, "checkpointing": ""}
        try:
            spec = spec.resolve(cfg, shape.layers)
            plan = memory_model.best_plan(shape, spec.name, cfg, precision=precision, device_bytes=int(gib * GIB))
            size, how = plan.total / GIB, {"micro_batch": plan.micro_batch, "checkpointing": plan.checkpointing}
            spec.require_ranks(cfg, shape.matrices)
        except ConfigError as error:
            refused = str(error)
        fits = not refused and plan.fits(int(gib * GIB))
        if fits:
            of = {"precision": precision, "length": cfg.max_length, "rows": rows, "spec": spec}
            found = speed(card, shape, spec.name, **how, **of)
            hours = tokens[0] / found.high / 3600, tokens[1] / found.low / 3600
        costs.append(Cost(spec.name, fits, size, *how.values(), found, hours, refused, spec.variant(vars(cfg))))
    return Forecast(cfg, card, card_name, gib, precision, costs, tokens)


def cells(cost):
    """A Cost as text cells in the order of HEADER, with ranges where the value is uncertain."""
    memory = f"{cost.memory_gib:.2f}" if cost.memory_gib else ""
    name = f"{cost.method} ({cost.variant})" if cost.variant else cost.method
    if not cost.fits:
        return (name, "no", memory, "", "", "", "", cost.mark)
    ends = dict.fromkeys(f"{_two_digits(value):,.0f}" for value in (cost.speed.low, cost.speed.high))
    time_ = duration(*(3600 * hours for hours in cost.hours))
    return (name, "yes", memory, str(cost.micro_batch), cost.checkpointing, " to ".join(ends), time_, cost.mark)


def duration(low_s, high_s):
    """'20 s to 3 min' with two significant digits, at least 1 s; 'about 2 h' if both ends round to the same."""
    low, high = _time_text(low_s), _time_text(high_s)
    if low == high:
        return f"about {low}"
    return f"{low.split()[0]} to {high}" if low.split()[1] == high.split()[1] else f"{low} to {high}"


def _time_text(seconds):
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size or unit == "s":
            return f"{max(1.0, _two_digits(seconds / size)):g} {unit}"


def _two_digits(value):
    return float(f"{value:.2g}")
