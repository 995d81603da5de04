"""Tables of what training takes by the planner, and of what shows how far it is right: the 1B under a T4's cap."""

import statistics

from cells import number

from peftlib.core.config import resolve
from peftlib.methods import study_order
from peftlib.models.shapes import SHAPES, card_of_device, find_card, short_name
from peftlib.notebook import planner
from peftlib.train import estimate

T4_GIB = 14.5  # of a T4's memory that training may take


def t4(results):
    """Memory measured under a T4's cap, and hours a T4 is expected to take for the reference study's tokens."""
    name, card = find_card("t4")
    cfg = resolve("t4", model="google/gemma-3-1b-it", memory_gib=T4_GIB)
    tokens = statistics.fmean(results.reference["train_tokens"])
    rows = one_cards_rows(results.methods)
    names = sorted({row["method"] for row in rows}, key=study_order)
    forecast = estimate.forecast(cfg, name, card, shape=SHAPES["gemma-3-1b"], rows=rows, names=names)
    yield "method", "planned", "planned GiB", "measured", "GiB", "tokens/s", "on", "hours expected on a T4"
    for found in forecast.costs:
        row = max((row for row in rows if row["method"] == found.method), key=lambda row: row["tok_s"], default=None)
        if row is None:
            continue  # not measured yet
        measured = number(row.get("peak_gib"), "{:.2f}"), number(row.get("tok_s"), "{:,.0f}")
        hours = [tokens / speed / 3600 for speed in (found.speed.high, found.speed.low)] if found.fits else None
        yield (
            f"`{found.method}`",
            f"{found.micro_batch}, recompute {found.checkpointing}" if found.fits else "",
            f"{found.memory_gib:.2f}",
            f"{row['micro_batch']}, recompute {row['checkpointing']}",
            *measured,
            short_name(row["device"]),
            f"{hours[0]:.2f} to {hours[1]:.2f}" if hours else "does not fit",
        )


def cards(results):
    """What a seed of the reference study takes on three cards, as `peftlib plan` says, and answering the test rows."""
    yield "card", "what", "GiB", "micro-batch", "recompute", "tokens/s", "time of a seed", "cost"
    for name in ("t4", "l4", "a100"):
        found = study_on(results, name)
        for each in found.costs:
            method, _, *cells, mark = estimate.cells(each)
            yield name.upper(), f"`{method}`", *cells, found.card.cost(each.hours) if each.fits else mark
        if seconds := answering(results, found.card):
            paid = found.card.cost([time / 3600 for time in seconds])
            yield name.upper(), "answering", "", "", "", "", estimate.duration(*seconds), paid


def study_on(results, name):
    """The Forecast of the reference study's rows for the 1B on a card."""
    n_rows, tokens = results.reference["rows"]["train"], statistics.fmean(results.reference["train_tokens"])
    manifest = {"counts": {"train": {"all": n_rows}}, "tokens": {"train": {"all": {"total": tokens}}}}
    cfg = resolve("gpu", model="google/gemma-3-1b-it")
    how = {"shape": SHAPES["gemma-3-1b"], "manifest": manifest, "names": (*planner.TRAINED, "lora", "full")}
    return estimate.forecast(cfg, *find_card(name), **how)


def answering(results, card):
    """(shortest, longest) seconds of the 1B to answer the test rows, by what the 270M took; None: no record says."""
    done = [run["evaluation"] for run in results.records if run["method"] != "base" and run.get("evaluation")]
    # None were generated where answers stood already.
    done = [found for found in done if found.get("generated_tokens") and card_of_device(found["device"])]
    if not done:
        return None
    tokens = statistics.median(found["generated_tokens"] for found in done)
    speeds = []
    for found in done:
        measured = found["generated_tokens"] / found["generate_seconds"], card_of_device(found["device"])
        speeds += planner.answering_speeds(*measured, card, SHAPES["gemma-3-1b"])
    return tokens / max(speeds), tokens / min(speeds)


def one_cards_rows(rows):
    """Our fp16 rows under a T4's cap, of the card and day that measured the most methods: speeds of two cards do not
    compare."""
    usable = [row for row in rows if _is_t4_like(row) and "_fp16" in row["name"]]  # others have other lengths and ranks
    methods = {}
    for row in usable:
        methods.setdefault((row["device"], row["date"]), set()).add(row["method"])
    best = max(methods, key=lambda day: len(methods[day]), default=None)
    return [row for row in usable if (row["device"], row["date"]) == best]


def growth(results):
    """What a token costs at other lengths and ranks than in a method's first row of the same card and day, in the 1B
    under a T4's cap."""
    yield (
        "method",
        "on",
        "tokens a row",
        "rank",
        "micro-batch",
        "recompute",
        "tokens/s",
        "peak GiB",
        "planned GiB",
        "time a token",
    )
    usable = [row for row in results.methods if _is_t4_like(row)]
    for method in planner.TRAINED:
        rows = [row for row in usable if row["method"] == method]
        for row in rows:
            day = row["device"], row["date"]
            first = next(other for other in rows if (other["device"], other["date"]) == day)
            yield (
                f"`{method}`",
                f"{short_name(row['device'])}, {row['date']}",
                f"{row['seq']:,}",
                ", ".join(f"{name.split('_')[0]} {rank}" for name, rank in row["fields"].items()) or "default",
                *_how(row),
                f"{row['tok_s']:,.0f}",
                f"{row['peak_gib']:.2f}",
                f"{row['predicted_gib']:.2f}",
                f"{first['tok_s'] / row['tok_s']:.2f}",
            )


def _how(row):
    """(micro-batch, what is recomputed) of a row."""
    layers = f"{row['recomputed']} layers" if row["checkpointing"] == "on" else "no layer"
    return str(row["micro_batch"]), layers + (", cheap parts" if row["is_cheap"] else "")


def _is_t4_like(row):
    is_capped = row.get("is_planned") and row.get("precision") == "fp16" and row.get("cap_gib") == T4_GIB
    return is_capped and bool(row.get("tok_s")) and card_of_device(row["device"]) is not None


TABLES = (t4, cards, growth)
