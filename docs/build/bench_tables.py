"""Tables of what was measured on cards: memory, speed, checkpoints, generation."""

from cells import number

from peftlib.methods import find
from peftlib.models.shapes import short_name


def sweeps(results):
    """Each method's rates that were tried, best in bold, with the validation loss of each."""
    yield "method", "trials", "rates and validation losses", "bracketed by"
    for found in results.sweeps:
        rates = find(found["method"]).rates
        parts = []
        for trial in sorted(found["tried"], key=lambda trial: [trial[name] for name in rates]):
            cut = f"stopped at step {trial['stopped_at']}" if trial["stopped_at"] else "not finite"
            words = (
                f"{' and '.join(f'{trial[name]:.1g}' for name in rates)}: {number(trial['valid_loss'], '{:.3f}', cut)}"
            )
            parts.append(f"**{words}**" if all(trial[name] == found["best"][name] for name in rates) else words)
        sides = "nothing on one side" if found["is_at_edge"] else "worse on both sides"
        yield f"`{found['method']}`", str(len(found["tried"])), "; ".join(parts), sides


def methods(results):
    yield (
        *("card", "setting", "precision", "cap GiB", "micro-batch", "tokens/s", "peak GiB"),
        *("planned GiB", "first step s"),
    )
    for row in results.methods:
        if "error" not in row and "grid" not in row:
            yield (
                ", ".join([short_name(row["device"]), row["date"], *([row["run"]] if "run" in row else [])]),
                row["name"],
                row["precision"],
                f"{row['cap_gib']:g}" if row["cap_gib"] else "none",
                str(row["micro_batch"]),
                number(row["tok_s"], "{:,.0f}"),
                f"{row['peak_gib']:.2f}",
                number(row.get("predicted_gib"), "{:.2f}"),
                number(row.get("first_step_cold_s", row["first_step_s"]), "{:.0f}"),
            )


def peers(results):
    """Each peer at the best of its grid, after ours of the same run and cap."""
    yield "", "card", "micro-batch", "recomputes", "tokens/s", "peak GiB", "first step s", "ours / its speed"
    for ours, best in best_of_grids(results.methods):
        for row in (*ours, *best):
            yield (
                row.get("grid") or f"`{row['name']}` (ours{'' if 'graphs' in row else ', before CUDA graphs'})",
                short_name(row["device"]),
                str(row["micro_batch"]),
                _recomputes(row),
                f"{row['tok_s']:,.0f}",
                f"{row['peak_gib']:.2f}",
                f"{row['first_step_s']:.0f}",
                " and ".join(f"{mine['tok_s'] / row['tok_s']:.2f}" for mine in ours) if "grid" in row else "",
            )


def _recomputes(row):
    if row["checkpointing"] == "off":
        return "cheap parts" if row.get("is_cheap") else "no"
    return {"on": "layers", "offload": "layers, from the host's memory"}[row["checkpointing"]]


def best_of_grids(rows):
    """[(our rows, the fastest row of each peer's grid), ...], one entry a card, run, cap and method, ours on steps of
    equal rows."""
    grids = {}
    for row in rows:
        if "grid" in row and row.get("tok_s"):
            key = tuple(row[name] for name in ("device", "date", "run", "cap_gib", "method"))
            grids.setdefault(key, {}).setdefault(row["grid"], []).append(row)
    for key, tried in grids.items():
        of_run = dict(zip(("device", "date", "run", "cap_gib", "method"), key))
        ours = [row for row in rows if "peer" not in row and row.get("tok_s") and of_run.items() <= row.items()]
        ours = [row for row in ours if row["precision"] == "bf16" and "mixed_found" not in row]
        yield ours, [max(found, key=lambda row: row["tok_s"]) for found in tried.values()]


def lengths(results):
    """Steps of rows of real lengths: useful tokens/s, and the share of a step in which the card computes."""
    yield "setting", "card", "rows a pass has room for", "useful tokens/s", "padding", "step ms", "kernels' share"
    for row in results.methods:
        for way, found in row.get("mixed_found", {}).items():
            kernels = found.get("kernels_s")
            if way.startswith("packed"):
                yield (
                    f"`{row['method']}`" + ("" if "graphs" in row else ", before CUDA graphs, with masks"),
                    short_name(row["device"]),
                    way.split("_")[1],
                    f"{found['useful_tok_s']:,.0f}",
                    number(found.get("padded_share"), "{:.1%}"),
                    number(found.get("step_s") and 1e3 * found["step_s"], "{:.0f}"),
                    f"{kernels[0] / kernels[1]:.0%}" if kernels else "",
                )


def saving(results):
    """What one checkpoint costs a training that goes on beside it."""
    yield "checkpoint of", "card", "GiB", "training waits s", "written after s", "step meanwhile s", "step else s"
    for row in results.methods:
        if "checkpoint_gib" in row:
            card = f"{short_name(row['device'])}, {row['date']}"
            seconds = row["save_stall_s"], row["save_written_s"], row["save_step_s"], 16 * row["seq"] / row["tok_s"]
            forms = ("{:.1f}", "{:.0f}", "{:.2f}", "{:.2f}")
            shown = (form.format(value) for form, value in zip(forms, seconds))
            yield row["name"], card, f"{row['checkpoint_gib']:.2f}", *shown


def fp16(results):
    yield "method", "seed", "bf16", "fp16", "difference", "skipped steps"
    runs = {(r["method"], r["seed"], r["precision"]): r for r in results.fp16["runs"] if "galore_on_refresh" not in r}
    for method, seed in dict.fromkeys(key[:2] for key in sorted(runs)):
        bf16, half = runs[method, seed, "bf16"], runs[method, seed, "fp16"]
        found = [bf16["last_losses"], half["last_losses"]]
        change = f"{found[1] / found[0] - 1:+.2%}"
        yield method, str(seed), *(f"{loss:.4f}" for loss in found), change, str(half["skipped_steps"])


def generate(results):
    yield "device", "engine", "rows at a time", "dtype", "rows", "tokens/s", "against", "ratio"
    for row in results.generate:
        yield (
            short_name(row["device"]) + (" (2 cores)" if "2 cores" in row["device"] else ""),
            row["engine"],
            str(row["batch"] or "its own"),
            row["dtype"],
            f"{row['rows']:,}",
            f"{row['tok_s']:,.1f}",
            row["baseline"],
            f"{row['ratio']:.2f}",
        )


def resume(results):
    yield "method", "device", "seconds to the next step", "saves", "share of the time held up", "checkpoint GiB"
    for row in results.resume:
        seconds, share = f"{row['resume_s']:.0f}", f"{100 * row['stall_share']:.1f} %"
        yield row["method"], row["device"], seconds, str(row["saves"]), share, f"{row['checkpoint_gib']:.2f}"


def parity(results):
    """The same rows in the same order by ours and by stock libraries: validation losses, speed, memory."""
    yield (
        *("training", "rate", "validation loss", "against stock", "useful tokens/s", "mean"),
        *("kernels' share", "peak GiB"),
    )
    names = {"ours": "ours", "compiled": "ours, compiled", "stock": "stock"}
    for row in results.parity:
        if row["who"] in names:
            yield (
                *(f"`{row['method']}`, {names[row['who']]}", f"{row['learning_rate']:g}", f"{row['valid_loss']:.4f}"),
                *(number(row.get("loss_over_stock"), "{:+.2%}"), f"{row['tok_s']:,.0f}", f"{row['tok_s_mean']:,.0f}"),
                *(number(row.get("kernel_share"), "{:.0%}"), f"{row['peak_gib']:.2f}"),
            )


def scale(results):
    """One run on several cards, 16 rows a card."""
    yield "method", "cards", "card", "tokens/s", "ratio to one card", "MiB exchanged a step", "peak GiB a card"
    for row in results.scale:
        exchanged = f"{row['exchanged_mib']:.1f}" if row["gpus"] > 1 else ""
        speed = f"{row['tok_s']:,.0f}", f"{row['ratio']:.2f}"
        yield (
            f"`{row['method']}`",
            str(row["gpus"]),
            short_name(row["device"]),
            *speed,
            exchanged,
            f"{row['peak_gib']:.2f}",
        )


def loras(results):
    """What a LoRA adapter of weights that trained whole keeps."""
    yield "method", "rank", "energy kept", "loss as trained", "with the adapter", "on the 16-bit base"
    for row in results.export["lora"]:
        losses = [number(row.get(name), "{:.3f}") for name in ("exact", "adapter", "on_16_bit")]
        yield row["method"], str(row["rank"]), f"{row['kept']:.1%}", *losses


def merges(results):
    """The loss of adapters that were trained over NF4, on both bases."""
    yield "method", "run", "test loss on the base in NF4", "on the 16-bit base", "untrained: in NF4", "in 16 bits"
    for row in results.export["merges"]:
        losses = (row[name] for name in ("into_dequantized", "into_16_bit", "base_nf4", "base_16_bit"))
        yield row["method"], row["run"], *(number(loss, "{:.3f}") for loss in losses)


TABLES = (methods, peers, lengths, saving, fp16, generate, resume, parity, scale, loras, merges, sweeps)
