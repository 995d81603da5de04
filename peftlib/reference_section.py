"""README's section on the reference study, made from results/reference alone."""

import statistics

from peftlib import costs
from peftlib.cards import SHAPES, find_card
from peftlib.config import resolve
from peftlib.files import read_json
from peftlib.hours import scaling_note
from peftlib.markdown import number, table
from peftlib.reference_findings import NAMES, claims, findings, pair_of
from peftlib.reference_results import mean

_T4_MODEL = "google/gemma-3-1b-it"
# (BLEU-4, ROUGE-L) of others, by method.
_FIRST_LOOK = {"base": (0.046, 0.097), "qlora": (0.122, 0.400), "galore": (0.150, 0.439)}
_PUBLIC = {"base": (0.058, 0.163), "qlora": (0.111, 0.233), "galore": (0.106, 0.227)}
_NOT_RUN = "The reference study on larger data is not run yet"


def section(folder, bench_rows):
    """Markdown of the section. folder: results/reference. bench_rows: of results/bench/methods.json.

    One line where the study has no results there yet.
    """
    plan = read_json(folder / "plan.json") if (folder / "plan.json").exists() else None
    if not (folder / "summary.json").exists():
        minutes = (
            ""
            if plan is None
            else (f"; [the plan](results/reference/plan.md) expects {plan['run_minutes']:.0f} minutes of runs")
        )
        return f"{_NOT_RUN}{minutes}."
    found = read_json(folder / "summary.json")
    parts = [
        _about(found),
        *_pictures(found),
        _scores(found),
        _costs(found),
        "Differences between the trained methods, 95 % intervals over rows and seeds:",
        _pairs(found),
        *_precision(found),
        "What was found:",
        "\n".join(f"- {sentence}" for sentence in findings(found)),
        "Claims of the original study:",
        table([["claim", "verdict", "why"], *(list(row) for row in claims(found))]),
        *_others(found),
        *_empty(found),
        *_spent(found, plan),
        *_on_a_t4(found, bench_rows),
        _not_possible(),
    ]
    return "\n\n".join(parts)


def _about(found):
    rows, many = found["rows"], found["side_by_side"]
    precisions = sorted({p for m in found["methods"].values() for p in m["precision"]} - {"fp32"}) or ["fp32"]
    shared = f", {many} runs sharing each GPU" if many > 1 else ""
    notes = f" Not matched between runs: {'; '.join(found['notes'])}." if found["notes"] else ""
    return (
        f"{found['model_provenance']}; {rows['train']:,} training, {rows['valid']:,} validation and {rows['test']:,} test "
        f"rows, {_range(found['steps'])} steps and {_range(found['train_tokens'])} tokens for every method and seed, split "
        f"`{found['split_hash']}`, {' and '.join(precisions)}, {' and '.join(found['devices'])}{shared}, {found['date']}. "
        "Raw: [`results/reference`](results/reference), one record a run in "
        f"[`records`](results/reference/records).{notes}"
    )


def _range(values):
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _pictures(found):
    for picture in found["figures"]:
        yield f"![{picture['alt']}](results/reference/figures/{picture['file']})"


def _scores(found):
    head = [
        "method",
        "seeds",
        "ROUGE-L",
        "gain over base",
        "BLEU-4",
        "gain over base",
        "test loss",
        "general text loss",
    ]
    rows = [head]
    for method, known in found["methods"].items():
        cells = []
        for metric in ("rougeL", "bleu4"):
            scores, gain = known["scores"], known["over_base"]
            cells += [
                _spread(scores[metric]["seeds"], "{:.3f}") if scores else "",
                f"{gain[metric]['low']:+z.3f} to {gain[metric]['high']:+z.3f}" if gain else "",
            ]
        losses = [_spread(known[name], "{:.3f}") for name in ("eval_loss", "general_loss")]
        rows.append([method, str(len(known["seeds"])), *cells, *losses])
    return (
        table(rows)
        + "\n\nMeans over seeds, ± their standard deviation. Gains are 95 % intervals over rows and seeds: rows drawn again, "
        "the mean over seeds from Student's t (base, which answers greedily, has one). Losses in nats per token."
    )


def _spread(values, form):
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {form.format(statistics.stdev(known))}" if len(known) > 1 else ""
    return form.format(statistics.fmean(known)) + spread


def _costs(found):
    rows = [["method", "trains", "peak GiB", "tokens/s", "training min", "learning rate", "swept"]]
    for method, known in found["methods"].items():
        if method == "base":
            continue
        seconds = mean(known["train_seconds"])
        rates = " and ".join(f"{known[name]:g}" for name in ("learning_rate", "learning_rate_2") if known[name])
        rows.append(
            [
                method,
                number(known["trainable_params"], "{:,}"),
                _spread(known["peak_memory_gib"], "{:.2f}"),
                _spread(known["tokens_per_second"], "{:,.0f}"),
                number(seconds and seconds / 60, "{:.1f}"),
                rates,
                _swept(known["sweep"]),
            ]
        )
    return table(rows)


def _swept(sweep):
    if not sweep:
        return "no"
    basis = sweep["from"]
    known = [trial for trial in basis["tried"] if trial["valid_loss"] is not None]
    best = min(known, key=lambda trial: trial["valid_loss"])
    edge = ", at the edge" if basis.get("is_at_edge") else ""
    tried = ", ".join(
        f"{trial['factor']:g}: {number(trial['valid_loss'], '{:.3f}', 'inf')}" for trial in basis["tried"]
    )
    return f"factor {best['factor']:g}{edge} ({tried})"


def _pairs(found):
    rows = [["difference", *(part for name in NAMES.values() for part in (name, "verdict"))]]
    methods = [method for method, known in found["methods"].items() if method != "base" and known["scores"]]
    for at, method in enumerate(methods):
        for other in methods[:at]:
            cells = []
            for metric in NAMES:
                gap = pair_of(found, metric, method, other)
                verdict = "inside the noise" if gap["is_noise"] else "higher" if gap["value"] > 0 else "lower"
                cells += [f"{gap['low']:+z.3f} to {gap['high']:+z.3f}", verdict]
            rows.append([f"{method} − {other}", *cells])
    return table(rows)


def _precision(found):
    if not found["precision"]:
        return
    rows = [
        ["fp16 against bf16", "ROUGE-L", "difference", "test loss", "general text loss", "peak GiB", "skipped steps"]
    ]
    for method, both in found["precision"].items():
        pairs = [
            f"{number(both['fp16'][name], form, 'n/a')} / {number(both['bf16'][name], form, 'n/a')}"
            for name, form in (
                ("rougeL", "{:.3f}"),
                ("eval_loss", "{:.4f}"),
                ("general_loss", "{:.4f}"),
                ("peak_memory_gib", "{:.2f}"),
            )
        ]
        gap = both["difference"]["rougeL"]
        skipped = number(both["fp16"]["skipped_steps"], "{}")
        rows.append([method, pairs[0], f"{gap['low']:+z.3f} to {gap['high']:+z.3f}", *pairs[1:], skipped])
    yield "One seed of each, trained in fp16 / in bf16, both evaluated alike:"
    yield table(rows)


def _others(found):
    rows = [["BLEU-4 / ROUGE-L", "here", "first look", "a public study of the 1B"]]
    for method in _FIRST_LOOK:
        scores = found["methods"].get(method, {}).get("scores")
        here = f"{scores['bleu4']['value']:.3f} / {scores['rougeL']['value']:.3f}" if scores else ""
        rows.append(
            [method, here, *(f"{other[method][0]:.3f} / {other[method][1]:.3f}" for other in (_FIRST_LOOK, _PUBLIC))]
        )
    yield (
        "Others' figures are of other rows, so they show the order of size alone: the first look (270M, rough scripts, 6,000 "
        "rows, 300 test rows, one seed) and a public study (Gemma 3 1B, three epochs)."
    )
    yield table(rows)
    low = [
        f"{method} in {name}"
        for method, numbers in _FIRST_LOOK.items()
        if method != "base" and (scores := found["methods"].get(method, {}).get("scores"))
        for name, value, first in zip(NAMES.values(), (scores["bleu4"]["value"], scores["rougeL"]["value"]), numbers)
        if value < first
    ]
    if low:
        yield (
            f"Below the first look: {', '.join(low)}. Its 300 test rows are others, so that the untrained model's scores "
            "differ too; what can be compared is the gain over base in the table above."
        )


def _empty(found):
    groups = {}
    for cell in found["cells"]:
        if cell["status"] != "ok":
            groups.setdefault((cell["method"], cell["status"], cell["reason"]), []).append(str(cell["seed"]))
    if groups:
        n_empty = sum(map(len, groups.values()))
        rows = [[method, ", ".join(seeds), status, reason] for (method, status, reason), seeds in groups.items()]
        yield f"Without a result ({len(found['cells']) - n_empty} of {len(found['cells'])} runs have one):"
        yield table([["method", "seeds", "status", "reason"], *rows])


def _spent(found, plan):
    """Minutes of training and answering against those that were planned."""
    if plan is None:
        return
    planned, spent = 0.0, 0.0
    by_run = {row["run"]: row for row in plan["runs"]}
    for method, known in found["methods"].items():
        for seed, train, answer in zip(known["seeds"], known["train_seconds"], known["generate_seconds"]):
            row = by_run.get(f"{method}-s{seed}")
            if row is not None and answer is not None:
                planned += (row["train_s"] + row["evaluate_s"]) / 60
                spent += ((train or 0.0) + answer) / 60
    yield (
        f"Planned for the runs above were {planned:.0f} minutes of training and answering "
        f"([the plan](results/reference/plan.md)); they took {spent:.0f}, the loss on test rows not counted."
    )


def _on_a_t4(found, bench_rows):
    """Hours of the full study on a T4: the 1B under its memory, speeds scaled from other cards."""
    name, card = find_card("t4")
    cfg = resolve("t4", model=_T4_MODEL, memory_gib=14.5)
    tokens = statistics.fmean(found["train_tokens"])
    forecast = costs.forecast(cfg, name, card, shape=SHAPES["gemma-3-1b"])
    rows = [
        ["method", "micro-batch", "planned GiB", "measured GiB", "measured tokens/s", "predicted hours a seed on a T4"]
    ]
    bases = {}
    for cost in forecast.costs:
        row = _measured(bench_rows, cost.method)
        cells = [number(row and row["peak_gib"], "{:.2f}"), number(row and row["tok_s"], "{:,.0f}")]
        if not cost.fits:
            rows.append([cost.method, "", f"{cost.memory_gib:.2f}", *cells, "does not fit"])
            continue
        hours = [tokens / speed / 3600 for speed in (cost.speed.high, cost.speed.low)]
        batch = f"{cost.micro_batch}, recompute {cost.checkpointing}"
        rows.append([cost.method, batch, f"{cost.memory_gib:.2f}", *cells, f"{hours[0]:.2g} to {hours[1]:.2g}"])
        bases.setdefault(cost.speed.basis, []).append(cost.method)
    yield (
        "The exact Gemma-3-1B shape (random weights) in fp16 under 14.5 GiB, measured on the card that "
        f"[`results/bench/methods.json`](results/bench/methods.json) names, and from it the hours of the same "
        f"{tokens:,.0f} training tokens on a T4:"
    )
    yield table(rows)
    yield (
        "How predicted: "
        + "; ".join([*(f"{', '.join(m)}: {basis}" for basis, m in bases.items()), scaling_note(card)])
        + "."
    )


def _measured(bench_rows, method):
    """The row of the shape under a T4's memory in fp16, or None."""
    fitting = [
        r for r in bench_rows if r.get("method") == method and r.get("precision") == "fp16" and r.get("cap_gib") == 14.5
    ]
    return max(fitting, key=lambda row: row.get("tok_s") or 0.0) if fitting else None


def _not_possible():
    return f"""What was not possible here, and the command that does it:

- The gated 1B weights (with `HF_TOKEN` and the licence accepted): `python -m peftlib reference --study gemma-1b -p model {_T4_MODEL}`
- A real T4 (fp16, the 1B): `python -m peftlib reference --study gemma-1b-t4 --profile t4`
- The unquantized 270M: `python -m peftlib reference --study gemma-270m -p model google/gemma-3-270m`. The packaged weights come
  from a Q4_K_M file, so what 4 bits cost on them is not what they cost on the original."""
