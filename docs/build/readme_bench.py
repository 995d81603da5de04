"""README's tables of training speed and memory, made from the rows of tests/bench/methods.py."""

from peftlib.core.gpus import short_name
from peftlib.report.markdown import number, table


def methods(rows):
    """Markdown of results/bench/methods.json: each row of ours, peers at their best, real lengths, a checkpoint's cost."""
    head = [
        "card",
        "setting",
        "precision",
        "cap GiB",
        "micro-batch",
        "tokens/s",
        "peak GiB",
        "planned GiB",
        "first step s",
    ]
    shown = [
        [
            ", ".join([short_name(row["device"]), row["date"], *([row["run"]] if "run" in row else [])]),
            row["name"],
            row["precision"],
            number(row["cap_gib"] or None, "{:g}", "none"),
            str(row["micro_batch"]),
            number(row["tok_s"], "{:,.0f}"),
            f"{row['peak_gib']:.2f}",
            number(row.get("predicted_gib"), "{:.2f}"),
            number(row.get("first_step_cold_s", row["first_step_s"]), "{:.0f}"),
        ]
        for row in rows
        if "error" not in row and "grid" not in row
    ]
    return "\n".join([table([head, *shown]), *_peers(rows), *_mixed(rows), *_saving(rows)])


def _peers(rows):
    """Lines on each peer at the best of its grid, beside ours of the same run and cap; none where no grid was run."""
    grids = {}
    for row in (row for row in rows if "grid" in row and row.get("tok_s")):
        grids.setdefault((row["device"], row["date"], row["run"], row["cap_gib"], row["method"]), []).append(row)
    lines, ratios, key = [["", "micro-batch", "recomputes", "tokens/s", "peak GiB", "first step s"]], [], None
    for key, tried in grids.items():
        of_run = {"device": key[0], "date": key[1], "run": key[2], "cap_gib": key[3], "method": key[4]}
        ours = [r for r in rows if "peer" not in r and r.get("tok_s") and of_run.items() <= r.items()]
        best = {
            peer: max((row for row in tried if row["grid"] == peer), key=lambda row: row["tok_s"])
            for peer in dict.fromkeys(row["grid"] for row in tried)
        }
        for name, row in [*((row["name"], row) for row in ours), *best.items()]:
            lines.append(
                [
                    name,
                    str(row["micro_batch"]),
                    "no" if row["checkpointing"] == "off" else "yes",
                    f"{row['tok_s']:,.0f}",
                    f"{row['peak_gib']:.2f}",
                    f"{row['first_step_s']:.0f}",
                ]
            )
        for row in ours:
            ratios += [
                f"{row['name']} ran at {row['tok_s'] / b['tok_s']:.2f} times {name}'s speed" for name, b in best.items()
            ]
    if key is None:
        return
    count = sum("grid" in row for row in rows)
    yield from [
        "",
        (
            f"Peers at the best of a grid under the same cap of {key[3]:g} GiB (micro-batch 4 to 32, recomputation on and off; "
            f"{count} settings; {short_name(key[0])}, {key[1]}, {key[2]}):"
        ),
        "",
        table(lines),
        "",
        f"So {', '.join(ratios)}.",
    ]


def _mixed(rows):
    """Lines on packing against padding; none where it was not measured."""
    for row in (row for row in rows if "mixed_found" in row):
        speed = {way: found["useful_tok_s"] for way, found in row["mixed_found"].items()}
        sizes = sorted(int(way.split("_")[1]) for way in speed if way.startswith("random_"))
        lines = [["rows of a pass", *map(str, sizes)]]
        for way, name in (("random", "random order, padded"), ("packed", "packed, as much room")):
            lines.append([name, *(number(speed.get(f"{way}_{n}"), "{:,.0f}") for n in sizes)])
        ratios = [speed.get(f"packed_{n}") and speed[f"packed_{n}"] / speed[f"random_{n}"] for n in sizes]
        lines.append(["ratio", *(number(ratio, "{:.2f}") for ratio in ratios)])
        yield from [
            "",
            f"Rows of real lengths, useful tokens/s ({row['method']}, {short_name(row['device'])}, {row['date']}):",
            "",
        ]
        yield table(lines)


def _saving(rows):
    for row in (row for row in rows if "checkpoint_gib" in row):
        yield ""
        yield (
            f"A checkpoint of {row['name']} ({row['checkpoint_gib']:.2f} GiB, {short_name(row['device'])}, {row['date']}) holds training up "
            f"for {row['save_stall_s']:.1f} s; a thread then writes it for {row['save_written_s']:.0f} s, while a step takes "
            f"{row['save_step_s']:.2f} s instead of {16 * row['seq'] / row['tok_s']:.2f} s."
        )
