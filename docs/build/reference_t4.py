"""What a reference study would take on a free T4: predicted from the 1B shape's memory and speeds on other cards."""

import statistics

from peftlib.train.estimate import forecast as forecast_of, scaling_note
from peftlib.core.gpus import card_of_device, find_card, short_name
from peftlib.models.shapes import SHAPES
from peftlib.core.config import resolve
from peftlib.report.markdown import number, table

MODEL = "google/gemma-3-1b-it"


def section(found, bench_rows):
    """Paragraphs of Markdown. found: a summary. bench_rows: of results/bench/methods.json."""
    name, card = find_card("t4")
    cfg = resolve("t4", model=MODEL, memory_gib=14.5)
    tokens = statistics.fmean(found["train_tokens"])
    bench_rows = _of_one_card(bench_rows)
    forecast = forecast_of(cfg, name, card, shape=SHAPES["gemma-3-1b"], rows=bench_rows)
    rows = [
        [
            "method",
            "micro-batch",
            "planned GiB",
            "measured GiB",
            "measured tokens/s",
            "on",
            "predicted hours a seed on a T4",
        ]
    ]
    used = []
    for cost in forecast.costs:
        row = _measured(bench_rows, cost.method)
        cells = [number(row and row["peak_gib"], "{:.2f}"), number(row and row["tok_s"], "{:,.0f}")]
        cells.append(short_name(row["device"]) if row else "")
        used += [row] if row else []
        if not cost.fits:
            rows.append([cost.method, "", f"{cost.memory_gib:.2f}", *cells, "does not fit"])
            continue
        hours = [tokens / speed / 3600 for speed in (cost.speed.high, cost.speed.low)]
        batch = f"{cost.micro_batch}, recompute {cost.checkpointing}"
        rows.append([cost.method, batch, f"{cost.memory_gib:.2f}", *cells, f"{hours[0]:.2f} to {hours[1]:.2f}"])
    yield (
        "The exact Gemma-3-1B shape (random weights) in fp16 under 14.5 GiB "
        f"([`results/bench/methods.json`](results/bench/methods.json)), and from it the hours of the same "
        f"{tokens:,.0f} training tokens on a T4, which nobody has measured here:"
    )
    yield table(rows)
    if not used:
        return
    lengths = sorted({row["seq"] for row in used})
    cards = {short_name(row["device"]): card_of_device(row["device"]) for row in used}
    told = ", ".join(f"{name} {card.tflops:g} TFLOPS and {card.gb_per_s:g} GB/s" for name, card in cards.items())
    here = found.get("tokens_per_row")
    short = f"rows here hold {here:,.0f} tokens" if here else "rows here are shorter"
    yield (
        f"How predicted: {scaling_note(card)}. Measured on rows of {' or '.join(f'{n:,}' for n in lengths)} tokens; published "
        f"figures: {told}. It is a kind prediction: {short}, and a fast card waits for launches on short rows (see rows of real "
        "lengths below), which a slower one does less; the sweep, compiling and answering come on top."
    )


def _of_one_card(bench_rows):
    """The usable rows of the card that measured the most methods, for speeds of two cards are not to be compared."""
    methods = {}
    for row in filter(_is_usable, bench_rows):
        methods.setdefault(row["device"], set()).add(row["method"])
    best = max(methods, key=lambda device: len(methods[device]), default=None)
    return [row for row in bench_rows if _is_usable(row) and row["device"] == best]


def _is_usable(row):
    """Whether a row is one of our methods on a known card under a T4's memory, in fp16."""
    if "peer" in row:
        return False
    is_t4_like = row.get("precision") == "fp16" and row.get("cap_gib") == 14.5
    return is_t4_like and bool(row.get("method") and row.get("tok_s")) and card_of_device(row["device"]) is not None


def _measured(bench_rows, method):
    """The fastest row of a method, or None."""
    fitting = [row for row in bench_rows if row["method"] == method]
    return max(fitting, key=lambda row: row["tok_s"]) if fitting else None
