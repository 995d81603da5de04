"""`python -m peftlib plan`: which method fits a GPU, in which micro-batch, and for how many hours."""

from peftlib import hours, plan
from peftlib.cards import find_card, shape_of
from peftlib.config import resolve
from peftlib.errors import ConfigError

_HEADER = ("method", "fits", "memory GiB", "micro-batch", "recompute", "tokens/s", "hours", "")
_FULL_PROFILE_GIB = 17  # as env.profile_for_hardware draws the line


def lines(gpu, model, overrides, study=None):
    """The plan as lines of text. overrides: {field: value} of the config. study: a Study whose config and data hold.

    ConfigError: an unknown GPU or setting, or a card on which no method fits. ModelError: see cards.shape_of.
    """
    name, card = find_card(gpu)
    cfg = _config(card, model, overrides, study)
    shape = shape_of(cfg.model)
    precision = card.precision if cfg.precision == "auto" else cfg.precision
    gib = min(card.gib, cfg.memory_gib) if cfg.memory_gib else card.gib
    found = plan.table(shape, cfg, precision=precision, device_bytes=int(gib * plan.GIB))
    if not any(row["fits"] for row in found):
        least = min(found, key=lambda row: row["total_gib"])
        raise ConfigError(
            f"no method trains {cfg.model} on a {name} with {gib:.1f} GiB: the least is {least['method']} with "
            f"{least['total_gib']:.1f} GiB. Lower max_length (now {cfg.max_length}), or take a smaller model or a larger card"
        )
    manifest = study.manifest() if study is not None and study.manifest_path.exists() else None
    tokens = hours.study_tokens(cfg, manifest)
    speeds = _speeds(card, shape, cfg, found, precision)
    yield (
        f"{cfg.model} on a {name}: {gib:.1f} GiB, {precision}, rows of up to {cfg.max_length} tokens, "
        f"{cfg.sequences_per_step} a step"
    )
    yield from _table([_HEADER, *(_cells(row, speeds.get(row["method"]), tokens) for row in found)])
    yield from _notes(card, tokens, speeds)


def _config(card, model, overrides, study):
    given = {name: value for name, value in overrides.items() if name != "profile"}
    if model is not None:
        given["model"] = model
    if study is not None:
        return study.cfg.replace(**given)
    profile = overrides.get("profile") or ("gpu" if card.gib > _FULL_PROFILE_GIB and card.precision == "bf16" else "t4")
    return resolve(profile, **given)


def _speeds(card, shape, cfg, found, precision):
    rows = hours.measured_rows()
    return {
        row["method"]: hours.speed(
            card,
            shape,
            row["method"],
            precision=precision,
            length=cfg.max_length,
            micro_batch=row["micro_batch"],
            rows=rows,
        )
        for row in found
        if row["fits"]
    }


def _cells(row, speed, tokens):
    memory = f"{row['total_gib']:.2f}"
    if not row["fits"]:
        return (row["method"], "no", memory, "", "", "", "", "at least this much memory")
    shortest, longest = tokens[0] / speed.high / 3600, tokens[1] / speed.low / 3600
    rate = _span(speed.low, speed.high, _figure)
    mark = "measured speed" if speed.is_measured else "estimate"
    setting = (str(row["micro_batch"]), row["checkpointing"])
    return (row["method"], "yes", memory, *setting, rate, _span(shortest, longest, "{:.2g}".format), mark)


def _figure(value):
    """Two digits that count: more would say more than is known."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _span(low, high, form):
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def _table(rows):
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADER))]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) if at in (0, 1, 4, 7) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()


def _notes(card, tokens, speeds):
    yield f"memory: the planner's prediction of training, held below {plan.HEADROOM:.0%} of the card"
    yield f"hours: one run of one seed, training alone, {tokens[2]}; answering the test rows comes on top"
    bases = {}
    for method, speed in speeds.items():
        bases.setdefault(speed.basis, []).append(method)
    for basis, names in bases.items():
        yield f"{', '.join(names)}: {basis}"
    if any(basis.startswith("estimate from") for basis in bases):
        yield hours.scaling_note(card)
