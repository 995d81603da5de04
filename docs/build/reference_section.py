"""README's section on the reference study, made from results/reference alone."""

import statistics

import reference_precision
import reference_t4
from peftlib.core.files import read_json
from peftlib.report.markdown import number, table
from reference_findings import claims, findings, pair_of
from reference_numbers import NAMES, best_trial, ends, mean
from reference_results import FIRST_LOOK_TOKENS
from peftlib.evaluation.results import BASE

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
        "\n".join(f"- {sentence}" for sentence in findings(found)),
        "Claims of the original study:",
        table([["claim", "verdict", "why"], *(list(row) for row in claims(found))]),
        *_pictures(found),
        *_part("Scores", _scores(found), *_sources(found), _pairs(found)),
        *_part("Memory, speed and learning rates", _costs(found), *_spent(found, plan)),
        *_part("fp16 against bf16", *reference_precision.tables(found)),
        *_part("Beside other studies", *_others(found)),
        *_part("Without a result", *_empty(found)),
        *_part("On a free T4", *reference_t4.section(found, bench_rows)),
        *_part("What was not possible here", _not_possible()),
    ]
    return "\n\n".join(parts)


def _part(title, *paragraphs):
    return [f"### {title}", *paragraphs] if paragraphs else []


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
        "untrained, in its 4 bits",
    ]
    rows = [head]
    for method, known in found["methods"].items():
        cells = []
        for metric in ("rougeL", "bleu4"):
            scores, gain = known["scores"], known["over_base"]
            cells += [
                _spread(scores[metric]["seeds"], "{:.3f}") if scores else "",
                ends(gain[metric]) if gain else "",
            ]
        losses = [_spread(known[name], "{:.3f}") for name in ("eval_loss", "general_loss")]
        rounded = number(known.get("general_loss_nf4"), "{:.3f}")
        rows.append([method, str(len(known["seeds"])), *cells, *losses, rounded])
    return (
        table(rows)
        + "\n\nMeans over seeds, ± their standard deviation. Gains are 95 % intervals over rows and seeds: rows drawn again, "
        "the mean over seeds from Student's t (base, which answers greedily, has one). Losses in nats per token; the last column "
        "is the untrained model's, its matrices rounded to 4 bits as the method holds them."
    )


def _sources(found):
    """ROUGE-L of each source, which may tell methods apart more or less."""
    known = found.get("sources", {})  # a summary may be from before it was known
    if len(known) < 2:
        return
    methods = [method for method in found["methods"] if all(method in part["scores"] for part in known.values())]
    rows = [["ROUGE-L by source", *methods]]
    for source, part in known.items():
        scores = [f"{part['scores'][method]['rougeL']:.3f}" for method in methods]
        rows.append([f"{source} ({part['rows']:,} rows)", *scores])
    yield table(rows)


def _spread(values, form):
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {form.format(statistics.stdev(known))}" if len(known) > 1 else ""
    return form.format(statistics.fmean(known)) + spread


def _costs(found):
    rows = [["method", "trains", "peak GiB", "tokens/s", "training min", "first step s", "learning rate", "swept"]]
    for method, known in found["methods"].items():
        if method == BASE:
            continue
        seconds = mean(known["train_seconds"])
        rates = " and ".join(f"{known[name]:g}" for name in ("learning_rate", "learning_rate_2") if known[name])
        rows.append(
            [
                method,
                number(known["trainable_params"], "{:,}"),
                _spread(known["peak_memory_gib"], "{:.2f}"),
                _spread(known["median_tokens_per_second"], "{:,.0f}"),
                number(seconds and seconds / 60, "{:.1f}"),
                number(mean(known["first_step_seconds"]), "{:.0f}"),
                rates,
                _swept(known["sweep"]),
            ]
        )
    return (
        table(rows)
        + "\n\nUseful tokens/s, the median over steps (`results.csv` has tokens over all of the time); the first step compiles, "
        "and the minutes hold it. Swept: validation loss after a short run at each factor of the default rates. Of two rates the "
        "first is the projections', the second that of LoRA's adapters in the hybrid and of the norms elsewhere."
    )


def _swept(sweep):
    if not sweep:
        return "no"
    basis = sweep["from"]
    best = best_trial(basis)
    edge = ", at the edge" if basis.get("is_at_edge") else ""
    tried = ", ".join(
        f"{trial['factor']:g}: {number(trial['valid_loss'], '{:.3f}', 'inf')}" for trial in basis["tried"]
    )
    return f"factor {best['factor']:g}{edge} ({tried})"


def _pairs(found):
    rows = [["difference", *(part for name in NAMES.values() for part in (name, "verdict"))]]
    methods = [method for method, known in found["methods"].items() if method != BASE and known["scores"]]
    for at, method in enumerate(methods):
        for other in methods[:at]:
            cells = []
            for metric in NAMES:
                gap = pair_of(found, metric, method, other)
                verdict = "inside the noise" if gap["is_noise"] else "higher" if gap["value"] > 0 else "lower"
                cells += [ends(gap), verdict]
            rows.append([f"{method} − {other}", *cells])
    pairs = len(rows) - 1
    return (
        f"Differences between the trained methods, 95 % intervals over rows and seeds, {pairs} pairs of methods, not corrected "
        "for their number:\n\n" + table(rows)
    )


def _others(found):
    look = found["first_look"]
    limit = look and look["max_new_tokens"]
    head = ["BLEU-4 / ROUGE-L", "here", *([f"cut at {limit} tokens"] if look else []), "first look"]
    rows = [[*head, "a public study of the 1B"]]
    for method in _FIRST_LOOK:
        scores = found["methods"].get(method, {}).get("scores")
        here = {metric: scores[metric]["value"] for metric in NAMES} if scores else None
        cut = [look["scores"].get(method)] if look else []
        quoted = [dict(zip(NAMES, numbers[method])) for numbers in (_FIRST_LOOK, _PUBLIC)]
        rows.append([method, *map(_both_scores, [here, *cut, *quoted])])
    yield (
        "Others' figures are of other rows, so they show the order of size alone: the first look (270M, rough scripts, 6,000 "
        f"rows, 300 test rows, one seed, at most {FIRST_LOOK_TOKENS} tokens an answer) and a public study (Gemma 3 1B, three epochs)."
    )
    yield table(rows)
    if look:
        share = found["methods"].get(BASE, {}).get("truncated_share")
        if share is not None and share > 0.5:
            yield (
                f"The untrained model seldom stops by itself ({share:.1%} of its answers here met the limit), so that its "
                f"scores fall with every token that it may add; the column of answers cut at {limit} tokens is the one to put "
                "beside the first look's."
            )
    low = [
        f"{method} in {name}"
        for method, numbers in _FIRST_LOOK.items()
        if method != BASE and (scores := found["methods"].get(method, {}).get("scores"))
        for (metric, name), first in zip(NAMES.items(), numbers)
        if scores[metric]["value"] < first
    ]
    if low:
        yield (
            f"Below the first look: {', '.join(low)}. Its 300 test rows are others, so that the untrained model's scores "
            "differ too; what can be compared is the gain over base in the table above."
        )


def _both_scores(scores):
    return f"{scores['bleu4']:.3f} / {scores['rougeL']:.3f}" if scores else ""


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
    planned, spent, loss_s = 0.0, 0.0, plan["assumptions"]["test_loss_s"]
    by_run = {row["run"]: row for row in plan["runs"]}
    for method, known in found["methods"].items():
        for seed, train, answer in zip(known["seeds"], known["train_seconds"], known["generate_seconds"]):
            row = by_run.get(f"{method}-s{seed}")
            if row is not None and answer is not None:
                planned += (row["train_s"] + row["evaluate_s"] - loss_s) / 60
                spent += ((train or 0.0) + answer) / 60
    shared = f", {found['side_by_side']} sharing each GPU" if found["side_by_side"] > 1 else ""
    yield (
        f"Planned for training and answering of the runs above were {planned:.0f} minutes of runs alone on a GPU "
        f"([the plan](results/reference/plan.md)); they took {spent:.0f}{shared}."
    )


def _not_possible():
    return f"""With the command that does it:

- The gated 1B weights (with `HF_TOKEN` and the licence accepted): `python -m peftlib reference --study gemma-1b -p model {reference_t4.MODEL}`
- A real T4 (fp16, the 1B): `python -m peftlib reference --study gemma-1b-t4 --profile t4`
- The unquantized 270M: `python -m peftlib reference --study gemma-270m -p model google/gemma-3-270m`. The packaged weights come
  from a Q4_K_M file, so what 4 bits cost on them is not what they cost on the original."""
