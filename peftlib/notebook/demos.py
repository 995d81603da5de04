"""The notebooks' demonstrations on real numbers: NF4's levels, a merged adapter, GaLore's directions, memory.

Charts carry `alt`, as in report.figures.
"""

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch

from peftlib.core.errors import ModelError
from peftlib.data.store import load_split
from peftlib.models.inspect import PROJECTIONS, named_weights
from peftlib.models.kernels.losses import batch_loss_sum
from peftlib.models.precision import autocast
from peftlib.optim.subspace import kept_energy
from peftlib.report.chart import drawing, finished, stacked_bars
from peftlib.report.palette import LIGHT
from peftlib.train import memory_model as plan
from peftlib.train.batching import Rows

BLOCK = 64  # weights that share a scale in NF4
_SCALES = 256  # scales that share a second-level scale under double quantization
# Position of the outermost quantile: it gives the levels of QLoRA's code; 0 would give infinite ones.
_OUTERMOST = 0.9677083
_PARTS = {  # of a memory_model.Plan: (colour, hatch)
    "weights": ("#0072b2", ""),
    "optimizer": ("#e69f00", "//"),
    "gradients": ("#56b4e9", ".."),
    "activations": ("#cc79a7", "xx"),
}


@dataclass(frozen=True)
class FourBit:
    """A weight matrix quantized to NF4, by hand and by bitsandbytes.

    levels: (16,). scaled: (blocks, 64), each weight over the largest of its block. by_library: a matrix, as by_hand.
    """

    weight: torch.Tensor = field(repr=False)
    levels: torch.Tensor = field(repr=False)
    scaled: torch.Tensor = field(repr=False)
    by_library: torch.Tensor = field(repr=False)

    @property
    def by_hand(self):
        """The weight with each number rounded to the nearest NF4 level, times its block's scale."""
        return self.nearest(self.levels)

    def error(self, restored):
        """Relative L2 distance of another matrix from the weight."""
        return float((restored - self.weight).norm() / self.weight.norm())

    def nearest(self, levels):
        """The weight with each number rounded to the nearest of `levels`, times its block's scale."""
        scales = self.weight.reshape(-1, BLOCK).abs().amax(1, keepdim=True)
        at = torch.bucketize(self.scaled, (levels[1:] + levels[:-1]) / 2)
        return (levels[at] * scales).reshape(self.weight.shape)


def one_weight(model, ending="layers.0.mlp.up_proj.weight"):
    """(name, (m, n) float32) of one matrix of a model. model: as in a config. ModelError: no such tensor."""
    from peftlib.models.locate import BaseWeights, hub_errors

    with hub_errors(model):
        files = BaseWeights(model)
    name = next((name for name in files.names if name.endswith(ending)), None)
    if name is None:
        raise ModelError(f"model={model!r} has no tensor that ends in {ending}: give another ending")
    return name, files.get(name, torch.float32)


def nf4_levels():
    """(16,) float32: 8 quantiles of the normal distribution above 0, 7 below, and 0 itself, the largest made 1."""
    quantile = NormalDist().inv_cdf
    above = [quantile(_OUTERMOST + (0.5 - _OUTERMOST) * i / 8) for i in range(8)]
    below = [-quantile(_OUTERMOST + (0.5 - _OUTERMOST) * i / 7) for i in range(7)]
    levels = torch.tensor(sorted([*below, 0.0, *above]))
    return levels / levels.abs().max()


def in_four_bits(weight):
    """The FourBit of an (m, n) float32 matrix, whose size must be a multiple of 64. No double quantization."""
    from peftlib.models.load import without_advice

    without_advice()
    from bitsandbytes import functional

    levels, blocks = nf4_levels(), weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return FourBit(weight, levels, scaled, functional.dequantize_4bit(packed, state))


def bits_per_weight(*, is_doubled=True):
    """4 bits plus a weight's share of its block's scale: 32 bits, or 8 plus a share of 32 with double quantization."""
    return 4 + ((8 + 32 / _SCALES) if is_doubled else 32) / BLOCK


def level_chart(found, name="a weight matrix", theme=LIGHT):
    """The histogram of a FourBit's scaled weights, with a line at each of its levels."""
    chart, axes = drawing(7.0, 3.0, "weight / largest of its block", "share of the weights", theme)
    values = found.scaled.flatten().numpy()
    axes.hist(values, bins=120, weights=np.full(len(values), 1 / len(values)), color="#56b4e9")
    for level in found.levels.tolist():
        axes.axvline(level, color="#d55e00", linewidth=1.0)
    near_zero = float((found.scaled.abs() < 0.5).float().mean())
    alt = (
        f"Histogram of {name}, each weight over the largest of its block of {BLOCK}: {near_zero:.0%} lie between -0.5 "
        f"and 0.5, where 10 of the 16 levels are; towards -1 and 1 weights and levels get rare."
    )
    return finished(chart, axes, f"{name}: its numbers, and NF4's 16 levels (lines)", alt)


def merged(layer):
    """W + alpha/r B A, (m, n) float32, of a PEFT LoRA layer; a 4-bit W is dequantized first.

    With DoRA each row is scaled to its trained norm.
    """
    base, scale = layer.base_layer.weight, layer.scaling["default"]
    weight = base.data
    if getattr(base, "quant_state", None) is not None:
        from bitsandbytes import functional

        weight = functional.dequantize_4bit(base.data, base.quant_state)
    down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    whole = weight.float() + scale * up.float() @ down.float()
    if "default" not in layer.lora_magnitude_vector:
        return whole
    lengths = layer.lora_magnitude_vector["default"].weight.detach().float()
    return whole * (lengths / whole.norm(dim=1))[:, None]


def first_adapted(model):
    """(name, module) of the first layer with a LoRA adapter. ModelError: there is none."""
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None):
            return name, module
    raise ModelError("no layer has a LoRA adapter: train with qlora, lora or hybrid first")


def captured_energy(run, layers, *, rows=4):
    """The share of each gradient that its best basis keeps, before training. run: a train.TrainingRun.

    layers: layer numbers. Returns [{layer, projection, shape, kept, by_chance}, ...] for the gradients of the first
    `rows` training rows: the share of the squared Frobenius norm inside the leading galore_rank directions, and
    the share r / m that random directions would keep.
    """
    data = Rows(load_split(run.study.data_dir, "train")[:rows])
    weights = {
        name: weight
        for name, weight in named_weights(run.model, PROJECTIONS).items()
        if any(f"layers.{layer}." in name for layer in layers)
    }
    grads = None
    for n in range(len(data)):  # one by one, as several rows may not fit a card that trains with recomputation
        with autocast(run.device, run.precision):
            loss = batch_loss_sum(run.model, data.batch([[n]], run.device))
        found = torch.autograd.grad(loss, list(weights.values()))
        grads = found if grads is None else [total + part for total, part in zip(grads, found, strict=True)]
    return [
        {
            "layer": int(name.split("layers.")[1].split(".")[0]),
            "projection": name.split(".")[-2],
            "shape": tuple(grad.shape),
            "kept": kept_energy(grad, run.cfg.galore_rank),
            "by_chance": run.cfg.galore_rank / min(grad.shape),
        }
        for name, grad in zip(weights, grads, strict=True)
    ]


def moved_directions(*, shape=(48, 96), rank=4, gap=5, steps=25):
    """[(step, rank of the total change), ...] of one weight under GaLore's own optimizer, on a toy problem.

    The weight starts at 0 and is trained towards a random full-rank matrix.
    """
    from peftlib.optim.galore import GaLoreAdamW

    goal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": rank, "update_gap": gap, "scale": 1.0}
    optimizer = GaLoreAdamW([group], lr=0.1, max_grad_norm=0.0)
    seen = []
    for step in range(1, steps + 1):
        (0.5 * (weight - goal).square().sum()).backward()
        optimizer.finish_accumulation(1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((step, int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-4))))
    optimizer.detach()
    return seen


def direction_chart(seen, *, rank, gap, theme=LIGHT):
    """Step plot of moved_directions: how many directions of a weight have moved after each step."""
    chart, axes = drawing(6.4, 2.8, "optimizer step", "rank of the change", theme)
    steps, ranks = zip(*seen)
    axes.step(steps, ranks, where="mid", color="#d55e00", linewidth=1.8)
    for step in range(gap, steps[-1], gap):
        axes.axvline(step + 0.5, color="#888888", linestyle=":", linewidth=1.0)
    axes.set_ylim(0, max(ranks) + rank)
    at_ends = ", ".join(f"{ranks[step - 1]} after step {step}" for step in range(gap, steps[-1] + 1, gap))
    alt = f"Rank of a weight's change under GaLore of rank {rank}: {at_ends}."
    return finished(chart, axes, f"Rank {rank} at a time, new directions every {gap} steps (dotted)", alt)


def memory_parts(shape, cfg, names, *, precision="bf16"):
    """{method: plan.Plan} at one micro-batch, with recomputation, so that the parts can be compared."""
    rows = min(cfg.micro_batch_size or 4, cfg.batch_size)
    how = {"precision": precision, "micro_batch": rows, "checkpointing": "on"}
    return {name: plan.estimate(shape, name, cfg, **how) for name in names}


def memory_chart(parts, theme=LIGHT):
    """memory_parts as stacked bars in GiB. The parts do not all peak at the same time."""
    chart, axes = drawing(7.0, 1.4 + 0.45 * len(parts), "GiB on a GPU, as planned", "", theme, grid="x")
    sizes = {part: np.array([getattr(found, part) / plan.GIB for found in parts.values()]) for part in _PARTS}
    looks = {part: {"color": color, "hatch": hatch, "height": 0.6} for part, (color, hatch) in _PARTS.items()}
    stacked_bars(axes, list(parts), sizes, looks)
    said = (f"{name}: {', '.join(f'{part} {sizes[part][at]:.2f}' for part in _PARTS)}" for at, name in enumerate(parts))
    chart.alt = f"Planned GPU memory by part, in GiB. {'; '.join(said)}."
    return chart


def resampled_means(values, *, resamples=2000, seed=0):
    """(resamples,) means of len(values) draws from `values` with replacement, as in the bootstrap."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    return values[rng.integers(0, len(values), size=(resamples, len(values)))].mean(axis=1)


def resampling_chart(means, interval, name="ROUGE-L", theme=LIGHT):
    """The histogram of resampled_means with an interval (low, high) marked."""
    chart, axes = drawing(6.4, 2.8, f"mean {name} of a resample (0-1)", "resamples", theme)
    axes.hist(means, bins=50, color="#999999")
    axes.axvspan(*interval, color="#0072b2", alpha=0.15)
    for edge in interval:
        axes.axvline(edge, color="#0072b2", linewidth=1.5)
    alt = (
        f"Histogram of {len(means):,} resampled means of {name}, from {means.min():.3f} to {means.max():.3f}; 95 % lie "
        f"between {interval[0]:.3f} and {interval[1]:.3f}."
    )
    return finished(chart, axes, "What other test rows could have given (band: 95 %)", alt)
