"""What the planner says of every card, model, length and method, for the page's calculator."""

from peftlib.core.config import resolve
from peftlib.methods import METHODS
from peftlib.models.shapes import CARDS, SHAPES
from peftlib.train import estimate

# Those whose adapter has to be built to be counted take seconds for each model: `peftlib plan --methods` has them.
COUNTED = tuple(name for name, spec in METHODS.items() if not spec.is_counted)
LENGTHS = (256, 512, 1024, 2048, 4096)
ROWS = resolve("gpu").train_rows  # of a source, which the page's reader changes; hours are in proportion to it


def plan_data():
    """{"cards", "models", "lengths", "methods", "table"}: table[card][model][length] = one list a method.

    Such a list is as `_entry` makes it. The times are of `ROWS` rows a source.
    """
    speeds = estimate.measured_rows()
    table = {
        name: {model: [_plans(name, card, model, length, speeds) for length in LENGTHS] for model in SHAPES}
        for name, card in CARDS.items()
    }
    cards = {name: {"gib": card.gib, "precision": card.precision} for name, card in CARDS.items()}
    default = resolve("gpu")
    return {
        "cards": cards,
        "models": {model: f"google/{model}-it" for model in SHAPES},
        "lengths": LENGTHS,
        "methods": COUNTED,
        "rows": ROWS,
        "sources": len(default.sources.split(";")),
        "max_length": default.max_length,
        "table": table,
    }


def _plans(name, card, model, length, speeds):
    cfg = resolve("gpu", model=f"google/{model}-it", max_length=length)
    found = estimate.forecast(cfg, name, card, shape=SHAPES[model], rows=speeds, names=COUNTED)
    return [_entry(cost) for cost in found.costs]


def _entry(cost):
    """[memory GiB, what speaks against it] or [memory GiB, "", micro-batch, recomputation, tokens/s from, to, seconds
    from, to, is measured]."""
    memory = round(cost.memory_gib, 2)
    if not cost.fits:
        return [memory, cost.mark]
    speed, seconds = cost.speed, [round(3600 * hours, 2) for hours in cost.hours]
    return [
        memory,
        "",
        cost.micro_batch,
        cost.checkpointing,
        round(speed.low),
        round(speed.high),
        *seconds,
        int(speed.is_measured),
    ]
