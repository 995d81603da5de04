"""What a reference study would take on a free T4: predicted from the 1B shape's memory and speeds on other cards."""

import statistics

from peftlib import costs
from peftlib.cards import SHAPES, card_of_device, find_card, short_name
from peftlib.config import resolve
from peftlib.hours import scaling_note
from peftlib.markdown import number, table

MODEL = "google/gemma-3-1b-it"


def section(found, bench_rows):
    """Paragraphs of Markdown. found: a summary. bench_rows: of results/bench/methods.json."""
    name, card = find_card("t4")
    cfg = resolve("t4", model=MODEL, memory_gib=14.5)
    tokens = statistics.fmean(found["train_tokens"])
    forecast = costs.forecast(cfg, name, card, shape=SHAPES["gemma-3-1b"])
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
        rows.append([cost.method, batch, f"{cost.memory_gib:.2f}", *cells, f"{hours[0]:.2g} to {hours[1]:.2g}"])
    yield (
        "The exact Gemma-3-1B shape (random weights) in fp16 under 14.5 GiB "
        f"([`results/bench/methods.json`](results/bench/methods.json)), and from it the hours of the same "
        f"{tokens:,.0f} training tokens on a T4, which nobody has measured here:"
    )
    yield table(rows)
    lengths = sorted({row["seq"] for row in used})
    cards = {short_name(row["device"]): card_of_device(row["device"]) for row in used}
    told = ", ".join(f"{name} {card.tflops:g} TFLOPS and {card.gb_per_s:g} GB/s" for name, card in cards.items())
    yield (
        f"How predicted: {scaling_note(card)}. Measured on rows of {' or '.join(f'{n:,}' for n in lengths)} tokens; published "
        f"figures: {told}."
    )


def _measured(bench_rows, method):
    """The row of the shape under a T4's memory in fp16, or None."""
    fitting = [
        r for r in bench_rows if r.get("method") == method and r.get("precision") == "fp16" and r.get("cap_gib") == 14.5
    ]
    return max(fitting, key=lambda row: row.get("tok_s") or 0.0) if fitting else None
