"""How long a study trains on a card: from speeds measured on it, else a range scaled from those of other cards."""

import json
from dataclasses import dataclass
from pathlib import Path

from peftlib import methods
from peftlib.core.gpus import card_of_device
from peftlib.core.paths import shipped
from peftlib.models.shapes import SHAPES
from peftlib.train.flops import flops_per_token

MEASURED = shipped("results/bench/methods.json")
_MEASURED_MODEL = "gemma-3-1b"  # tests/bench/methods.py makes this shape
_SLOWER = 1.5  # how far below the scaled speed a card may stay: clocks, cooling, a slower host
_SHARES = (0.1, 0.4)  # of a card's peak that training reached where it was measured at all


@dataclass(frozen=True)
class Speed:
    """Training tokens a second, between low and high; equal where it was measured. basis: where it comes from."""

    low: float
    high: float
    basis: str

    @property
    def is_measured(self):
        return self.low == self.high


def measured_rows(path=MEASURED):
    """The benchmark's rows that hold a speed of one of our methods on a known card; [] where there is no file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    named = ("method", "precision", "tok_s", "seq", "device", "micro_batch")
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and all(row.get(name) for name in named)
        and row["method"] in methods.METHODS
        and "peer" not in row  # another library's speed
        and card_of_device(row["device"])
    ]


def speed(card, shape, method, *, precision, length, micro_batch, rows):
    """The Speed of a method. card: cards.Card. shape: plan.Shape. length: tokens of a row. rows: measured_rows()."""
    usable = [row for row in rows if row["precision"] == precision]
    own = [row for row in usable if row["method"] == method]
    here = [row for row in own if card_of_device(row["device"]) == card]
    fitting = [row for row in here if row["micro_batch"] == micro_batch]
    if fitting and shape == SHAPES[_MEASURED_MODEL]:
        best = max(fitting, key=_tokens_per_second)
        return Speed(best["tok_s"], best["tok_s"], f"measured, {_said(best)}")
    needed = flops_per_token(shape, methods.find(method), length=length)
    if not usable:
        low, high = (share * card.tflops * 1e12 / needed for share in _SHARES)
        share = f"{_SHARES[0]:.0%} to {_SHARES[1]:.0%}"
        return Speed(low, high, f"estimate, {share} of the card's published {card.tflops:g} TFLOPS")
    return _scaled(card, max(here or own or usable, key=_tokens_per_second), needed, micro_batch)


def scaling_note(card):
    """How estimates come from speeds measured elsewhere, in words."""
    return (
        f"estimates are scaled from speeds of the {_MEASURED_MODEL} shape by the work of a token and by published figures "
        f"(this card: {card.tflops:g} TFLOPS, {card.gb_per_s:g} GB/s), the faster end by the kinder of the two, the slower "
        f"end by the other and {_SLOWER:g} times slower still, and slower as the micro-batch is smaller than the measured one"
    )


def _scaled(card, row, needed, micro_batch):
    """A measured speed by the ratio of work, and of the cards' arithmetic and bandwidth; the wider range of the two."""
    source = card_of_device(row["device"])
    done = flops_per_token(SHAPES[_MEASURED_MODEL], methods.find(row["method"]), length=row["seq"])
    base = row["tok_s"] * done / needed
    ratios = card.tflops / source.tflops, card.gb_per_s / source.gb_per_s
    # A small micro-batch leaves a large card idle, in the worst case in proportion.
    low = base * min(ratios) / _SLOWER * min(1.0, micro_batch / row["micro_batch"])
    return Speed(low, base * max(ratios), f"estimate from {_said(row)}")


def _tokens_per_second(row):
    return row["tok_s"]


def _said(row):
    card = card_of_device(row["device"])
    return (
        f"{row['method']}'s {row['tok_s']:,.0f} tokens/s on {row['device']} ({row['precision']}, micro-batch "
        f"{row['micro_batch']}, {row['seq']} tokens a row; {card.tflops:g} TFLOPS, {card.gb_per_s:g} GB/s)"
    )


def study_tokens(cfg, manifest=None):
    """(fewest, most, basis) training tokens of one run of a study, padding apart.

    manifest: data/manifest.json where the data stand; without it rows are thought a fifth to all of max_length long.
    """
    known = manifest and [found for found in manifest["tokens"]["train"].values() if found]
    if known:
        n_rows = sum(manifest["counts"]["train"].values())
        mean = sum(found["total"] for found in known) / n_rows
        low, high, basis = mean, mean, f"{n_rows:,} training rows of {mean:,.0f} tokens, as the study's data have them"
    else:
        n_rows = cfg.train_rows * len([part for part in cfg.sources.split(";") if part.strip()])
        low, high = cfg.max_length / 5, float(cfg.max_length)
        basis = f"{n_rows:,} training rows of {low:,.0f} to {high:,.0f} tokens (no data yet)"
    seen = n_rows * cfg.epochs
    if cfg.max_steps:
        seen = min(seen, cfg.max_steps * cfg.batch_size)
    return seen * low, seen * high, basis


def duration(low_s, high_s):
    """'20 s to 3 min', two digits that count, nothing below 1 s; 'about 2 h' where both ends read the same."""
    low, high = _time_text(low_s), _time_text(high_s)
    if low == high:
        return f"about {low}"
    return f"{low.split()[0]} to {high}" if low.split()[1] == high.split()[1] else f"{low} to {high}"


def _time_text(seconds):
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size or unit == "s":
            return f"{max(1.0, float(f'{seconds / size:.2g}')):g} {unit}"
