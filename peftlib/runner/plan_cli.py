"""`python -m peftlib plan`: which method fits a GPU, in which micro-batch, and for how long."""

from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError
from peftlib.core.gpus import card_at_hand, find_card
from peftlib.models.shapes import shape_of
from peftlib.train import costs
from peftlib.train.hours import duration

HEADER = ("method", "fits", "memory GiB", "micro-batch", "recompute", "tokens/s", "time", "")
_FULL_PROFILE_GIB = 17  # as env.profile_for_hardware draws the line


def lines(gpu, model, overrides, study=None):
    """The plan as lines of text. gpu: a name; None: the one here, or a t4, which is said. overrides: {field: value} of the config. study: a Study whose config and data hold.

    ConfigError: an unknown GPU or setting, or a card on which no method fits. ModelError: see cards.shape_of.
    """
    name, card = find_card(gpu) if gpu else card_at_hand() or find_card("t4")
    if gpu is None:
        yield f"no --gpu given: planned for a {name}"
    cfg = _config(card, model, overrides, study)
    manifest = study.manifest() if study is not None and study.manifest_path.exists() else None
    found = costs.forecast(cfg, name, card, shape=shape_of(cfg.model), manifest=manifest)
    if found.refusal:
        raise ConfigError(found.refusal)
    yield found.headline
    yield from _table([HEADER, *map(cells, found.costs)])
    yield from found.notes()


def _config(card, model, overrides, study):
    given = {name: value for name, value in overrides.items() if name != "profile"}
    if model is not None:
        given["model"] = model
    if study is not None:
        return study.cfg.replace(**given)
    profile = overrides.get("profile") or ("gpu" if card.gib > _FULL_PROFILE_GIB and card.precision == "bf16" else "t4")
    return resolve(profile, **given)


def cells(cost):
    """A costs.Cost as texts in the order of HEADER; a range where more than one number is possible."""
    memory = f"{cost.memory_gib:.2f}"
    if not cost.fits:
        return (cost.method, "no", memory, "", "", "", "", cost.mark)
    rate = _span(cost.speed.low, cost.speed.high, _figure)
    setting = (str(cost.micro_batch), cost.checkpointing)
    return (cost.method, "yes", memory, *setting, rate, duration(*(3600 * hours for hours in cost.hours)), cost.mark)


def _figure(value):
    """Two digits that count: more would say more than is known."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _span(low, high, form):
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def _table(rows):
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEADER))]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) if at in (0, 1, 4, 7) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
