"""What training costs on a card, method by method: memory, micro-batch, hours, or the reason why it cannot be."""

from dataclasses import dataclass

from peftlib import methods
from peftlib.core.errors import ConfigError
from peftlib.train import hours
from peftlib.train import memory_model as plan


@dataclass(frozen=True)
class Cost:
    """One method on one card.

    fits: whether it can be trained there. memory_gib: predicted peak of training; where nothing fits, the least.
    hours: (shortest, longest) of one run, or None. speed: hours.Speed, or None. refused: why it cannot be, or ''.
    """

    method: str
    fits: bool
    memory_gib: float
    micro_batch: int
    checkpointing: str
    speed: hours.Speed | None = None
    hours: tuple | None = None
    refused: str = ""

    @property
    def mark(self):
        """How much a reader may build on the hours, in words; for what does not fit, why."""
        if not self.fits:
            return self.refused or "at least this much memory"
        return "measured speed" if self.speed.is_measured else "estimate"


@dataclass(frozen=True)
class Forecast:
    """Every method's Cost on a card of `gib` GiB. tokens: (fewest, most, basis) of one run, as hours.study_tokens."""

    cfg: object
    card: object
    card_name: str
    gib: float
    precision: str
    costs: list
    tokens: tuple

    @property
    def headline(self):
        """What is planned for, in a line."""
        cfg = self.cfg
        return (
            f"{cfg.model} on a {self.card_name}: {self.gib:.1f} GiB, {self.precision}, rows of up to {cfg.max_length} "
            f"tokens, {cfg.batch_size} a step"
        )

    @property
    def refusal(self):
        """Why no method can be trained there and what to change, or ''."""
        if any(cost.fits for cost in self.costs):
            return ""
        small = [cost for cost in self.costs if not cost.refused]
        if not small:
            return f"no method trains {self.cfg.model} as set: {self.costs[0].refused}"
        least = min(small, key=lambda cost: cost.memory_gib)
        change = "Set micro_batch_size to 0, lower" if self.cfg.micro_batch_size else "Lower"
        return (
            f"no method trains {self.cfg.model} on a {self.card_name} with {self.gib:.1f} GiB: the least is "
            f"{least.method} with {least.memory_gib:.1f} GiB. {change} max_length (now {self.cfg.max_length}), or take a "
            "smaller model or a larger card"
        )

    def notes(self):
        """What the numbers rest on, a line each."""
        yield f"memory: the planner's prediction of training, held below {plan.HEADROOM:.0%} of the card"
        yield f"hours: one run of one seed, training alone, {self.tokens[2]}; answering the test rows comes on top"
        if self.cfg.micro_batch_size:
            yield f"micro-batch: as set by micro_batch_size={self.cfg.micro_batch_size}; 0 lets the planner choose what fits"
        bases = {}
        for cost in self.costs:
            if cost.speed is not None:
                bases.setdefault(cost.speed.basis, []).append(cost.method)
        for basis, names in bases.items():
            yield f"{', '.join(names)}: {basis}"
        if any(basis.startswith("estimate from") for basis in bases):
            yield hours.scaling_note(self.card)


def forecast(cfg, card_name, card, *, shape, manifest=None, rows=None):
    """The Forecast of a config on a card. card: cards.Card. shape: plan.Shape of cfg.model. manifest: of standing data.

    rows: speeds to go by, as hours.measured_rows() gives them, which is what is taken without.
    """
    precision = card.precision if cfg.precision == "auto" else cfg.precision
    gib = min(card.gib, cfg.memory_gib) if cfg.memory_gib else card.gib
    tokens = hours.study_tokens(cfg, manifest)
    rows = hours.measured_rows() if rows is None else rows
    found = plan.table(shape, cfg, precision=precision, device_bytes=int(gib * plan.GIB))
    costs = [_cost(row, card, shape, cfg, precision=precision, tokens=tokens, rows=rows) for row in found]
    return Forecast(cfg, card, card_name, gib, precision, costs, tokens)


def _cost(row, card, shape, cfg, *, precision, tokens, rows):
    method, refused = row["method"], _refused(shape, row["method"], cfg)
    known = (method, row["fits"] and not refused, row["total_gib"], row["micro_batch"], row["checkpointing"])
    if not known[1]:
        return Cost(*known, refused=refused)
    speed = hours.speed(
        card, shape, method, precision=precision, length=cfg.max_length, micro_batch=row["micro_batch"], rows=rows
    )
    return Cost(*known, speed=speed, hours=(tokens[0] / speed.high / 3600, tokens[1] / speed.low / 3600))


def _refused(shape, method, cfg):
    """What the method's own checks would say of its ranks, or ''."""
    try:
        methods.find(method).require_ranks(cfg, shape.matrices)
    except ConfigError as error:
        return str(error)
    return ""
