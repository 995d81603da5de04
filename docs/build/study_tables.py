"""Tables of the reference study and the demo."""

import statistics

from cells import ends, loss_gap, number, pair_of, signed, spread, told

from peftlib.core.config import resolve
from peftlib.evaluation.benchmarks.scores import BALANCED
from peftlib.evaluation.benchmarks.tasks import RETENTION, SETS
from peftlib.evaluation.stats import METRICS
from peftlib.models.shapes import SHAPES, short_name
from peftlib.train.memory_model import best_plan

NOT_MEASURED = ("not measured in this edition",)  # the header of a table whose data are not there
AGAINST = ("qlora", "galore", "hybrid", "lora")  # what every method is compared with
FACTORS = (0.25, 0.5, 0.75, 1.0)
CARDS_GIB = (4, 8, 15, 24)
# (BLEU-4, ROUGE-L) that others published, by method: an early look at the 270M, and a public study of the 1B.
FIRST_LOOK = {"base": (0.046, 0.097), "qlora": (0.122, 0.400), "galore": (0.150, 0.439)}
PUBLIC_STUDY = {"base": (0.058, 0.163), "qlora": (0.111, 0.233), "galore": (0.106, 0.227)}


def summary(results):
    """README's table: the reference study in one row a method."""
    yield "method", "peak GiB", "test loss", "ROUGE-L", "BLEU-4", "loss on general text"
    for method, known in results.reference["methods"].items():
        scores = [f"{known['scores'][metric]['value']:.3f}" for metric in ("rougeL", "bleu4")]
        losses = [f"{statistics.fmean(known[name]):.3f}" for name in ("eval_loss", "general_loss")]
        label = "untrained" if method == "base" else f"`{method}`"
        yield label, spread(known["peak_memory_gib"], "{:.2f}", False), losses[0], *scores, losses[1]


def scores(results):
    yield (
        *("method", "seeds", "ROUGE-L", "gain over base", "BLEU-4", "gain over base"),
        *("test loss", "general text loss", "untrained, in its 4 bits", "met the limit"),
    )
    cut, at = results.reference["base_cut"], results.reference["cut_at_words"]
    for method, known in results.reference["methods"].items():
        cells = []
        for metric in ("rougeL", "bleu4"):
            gain = known["over_base"] and ends(known["over_base"][metric])
            cells += [spread(known["scores"][metric]["seeds"], "{:.3f}"), gain or ""]
        losses = [spread(known[name], "{:.3f}") for name in ("eval_loss", "general_loss")]
        rounded, share = number(known["general_loss_nf4"], "{:.3f}"), number(known["truncated_share"], "{:.1%}")
        yield method, str(len(known["seeds"])), *cells, *losses, rounded, share
        if method == "base" and cut:
            yield f"base, cut at {at} words", "1", f"{cut['rougeL']:.3f}", "", f"{cut['bleu4']:.3f}", *[""] * 5


def sources(results):
    parts = results.reference["sources"]
    yield "ROUGE-L by source", *(f"{source} ({part['rows']:,} rows)" for source, part in parts.items())
    for method in results.reference["methods"]:
        yield (
            method,
            *(f"{part['scores'][method]['rougeL']:.3f}" for part in parts.values() if method in part["scores"]),
        )


def pairs(results):
    """Every method against those that readers ask about; all pairs are in summary.json and pairs.csv."""
    others = [method for method in AGAINST if method in results.trained]
    yield "method, score", *(f"− {other}" for other in others)
    for metric, label in reversed(METRICS.items()):
        for method, known in results.trained.items():
            if known["scores"]:
                gaps = (told(pair_of(results, metric, method, o)) if o != method else "" for o in others)
                yield f"{method}, {label}", *gaps


def general(results):
    """How the loss on general text rose over the untrained model's, and how much of it rounding to 4 bits explains."""
    yield "method", "rise of the loss on general text", "of it by 4 bits alone, before training"
    base = results.reference["methods"]["base"]["general_loss"][0]
    for method, known in results.trained.items():
        rounded = known["general_loss_nf4"]
        if len(known["seeds"]) > 1:
            rise = signed(loss_gap(results, "general_loss", method, "base"))
        else:  # nothing says how far seeds are apart
            rise = number(known["general_loss"][0] and known["general_loss"][0] - base, "{:+.3f} (one seed)")
        yield method, rise, number(rounded and rounded - base, "{:+.3f}")


def cost(results):
    everywhere = [short_name(device) for device in results.reference["devices"]]  # of an older summary
    on = {method: "; ".join(known.get("on") or everywhere) for method, known in results.trained.items()}
    same = f" ({next(iter(on.values()))})" if len(set(on.values())) == 1 else ""
    yield "method", "trains", "peak GiB", f"tokens/s{same}", "training min", "first step s", "learning rate", "swept"
    for method, known in results.trained.items():
        rates = " and ".join(f"{known[name]:.2g}" for name in ("learning_rate", "learning_rate_2") if known[name])
        yield (
            method,
            f"{known['trainable_params']:,}",
            spread(known["peak_memory_gib"], "{:.2f}"),
            spread(known["median_tokens_per_second"], "{:,.0f}") + ("" if same else f" ({on[method]})"),
            spread([seconds / 60 for seconds in known["train_seconds"]], "{:.1f}", False),
            spread(known["first_step_seconds"], "{:.0f}", False),
            rates,
            _swept(known["sweep"]),
        )


def _swept(sweep):
    if not sweep:
        return "no"
    where = "at the edge" if sweep["from"].get("is_at_edge") else "bracketed"
    return f"{len(sweep['from']['tried'])} tried, {where}"


def sides(results):
    """Runs of studies that change one setting, one seed each, below the run that each is compared with."""
    if not results.reference.get("sides"):
        yield NOT_MEASURED
        return
    yield "one seed", "ROUGE-L", "difference", "test loss", "validation loss", "general text loss", "peak GiB"
    shown = []  # what runs were compared with: the study's own, or a control, or an older one
    for side in sorted(results.reference["sides"].values(), key=lambda side: side.get("is_control", False)):
        who = "trained again as in the study" if side.get("is_control") else "as in the study"
        for method, both in side["methods"].items():
            if (method, who, both["main"]) not in shown:
                yield f"{method}, {who}", *_side(both["main"], "")
                shown.append((method, who, both["main"]))
            gap = told(both["difference"]["rougeL"]) if both["difference"] else both["unscored_because"]
            settings = (change.partition(": ")[::2] for change in side["changes"])
            changed = ", ".join(f"`{name}` = {values.rpartition(' -> ')[2]}" for name, values in settings)
            yield f"{method} with {changed}", *_side(both["side"], gap)


def _side(facts, gap):
    forms = {"eval_loss": "{:.3f}", "valid_loss": "{:.4f}", "general_loss": "{:.3f}", "peak_memory_gib": "{:.2f}"}
    cells = [number(facts[name], form) for name, form in forms.items()]
    return number(facts["rougeL"], "{:.3f}"), gap, *cells


def benchmarks_study(results):
    """What every method lost elsewhere and gained in skill, beside the untrained model."""
    known = results.reference.get("benchmarks", {"tasks": {}})
    if not known["tasks"]:
        yield NOT_MEASURED
        return
    tasks = [task for task in ("wikitext", "gsm8k", "ifeval") if task in known["tasks"]]
    lost_on = f"mean change on {len(known['lost_on'])} tasks"
    yield "method", "seeds", lost_on, *("wikitext, perplexity" if task == "wikitext" else task for task in tasks)
    for method, cells in _of_tasks(known, tasks):
        seeds = {len(of["methods"][method]["seeds"]) for of in known["tasks"].values() if method in of["methods"]}
        change = known["lost"].get(method)
        yield (
            method,
            " or ".join(map(str, sorted(seeds))),
            f"{change['value']:+z.3f} ({told(change)})" if change else "",
            *cells,
        )


def benchmarks_tasks(results):
    """All tasks of which the score is an accuracy of the retention set."""
    tasks = results.reference.get("benchmarks", {"tasks": {}})["tasks"]
    known = [name for task in SETS[RETENTION] for name in (task, task + BALANCED)]
    facts = {task: of for task, of in tasks.items() if task in known and not of["is_perplexity"]}
    if not facts:
        yield NOT_MEASURED
        return
    guessing = {task: f", guessing {of['chance']:.3f}" if of["chance"] else "" for task, of in facts.items()}
    yield "method", *(f"{task} ({of['n']:,} rows{guessing[task]})" for task, of in facts.items())
    for method, cells in _of_tasks(results.reference["benchmarks"], [*facts]):
        yield method, *cells


def _of_tasks(known, tasks):
    """(method, [its score in each task with the interval of its difference to base, ...]) of every method."""
    for method in dict.fromkeys(method for of in known["tasks"].values() for method in of["methods"]):
        cells = []
        for task in tasks:
            of, found = known["tasks"][task], known["tasks"][task]["methods"].get(method)
            score = number(found and found["value"], "{:.2f}" if of["is_perplexity"] else "{:.3f}")
            floor = ", at floor" if found and found["is_at_floor"] else ""
            cells.append(score + floor + (f" ({told(found['over_base'])})" if found and found["over_base"] else ""))
        yield method, cells


def rewound(results):
    """Test loss / loss on general text / ROUGE-L / retention on the way from base to tuned."""
    curves = results.reference.get("rewound", {})
    if not curves:
        yield NOT_MEASURED
        return
    yield (
        "test loss / general text / ROUGE-L / retention",
        "0 (base)",
        *(f"{factor:g}" for factor in FACTORS[:-1]),
        "1 (tuned)",
    )
    for method, points in curves.items():
        at = {point["factor"]: point for point in points}
        yield method, *(_point(at.get(factor)) for factor in (0.0, *FACTORS))


def _point(point):
    forms = {"test_loss": "{:.3f}", "general_loss": "{:.3f}", "rougeL": "{:.3f}", "retention": "{:.3f}"}
    return " / ".join(number(point.get(name), form, "–") for name, form in forms.items()) if point else ""


def precision(results):
    """One seed of each method that also ran in fp16, beside its run in bf16."""
    forms = {"rougeL": "{:.3f}", "eval_loss": "{:.4f}", "valid_loss": "{:.4f}"}
    forms |= {"general_loss": "{:.4f}", "peak_memory_gib": "{:.2f}"}
    head = ("ROUGE-L", "difference", "test loss", "validation loss", "general text loss", "peak GiB", "skipped steps")
    yield "fp16 / bf16", *head
    for method, both in results.reference["precision"].items():
        cells = [
            " / ".join(number(both[name][field], form) for name in ("fp16", "bf16")) for field, form in forms.items()
        ]
        gap = told(both["difference"]["rougeL"]) if both["difference"] else ""
        yield method, cells[0], gap, *cells[1:], str(both["fp16"]["skipped_steps"])


def others(results):
    look = results.reference["first_look"]
    yield (
        "BLEU-4 / ROUGE-L",
        "here",
        f"cut at {look['max_new_tokens']} tokens",
        "first look",
        "a public study of the 1B",
    )
    for method, first in FIRST_LOOK.items():
        here = [results.reference["methods"][method]["scores"][metric]["value"] for metric in METRICS]
        cut = [look["scores"][method][metric] for metric in METRICS]
        rows = (here, cut, first, PUBLIC_STUDY[method])
        yield method, *(f"{bleu:.3f} / {rouge:.3f}" for bleu, rouge in rows)


def demo(results):
    found = results.demo
    known = list(found["eval_loss"])
    yield "", *known
    yield "test loss, nats per token", *(f"{found['eval_loss'][m]:.3f}" for m in known)
    yield "ROUGE-L", *(f"{found['scores'][m]['rougeL']:.3f}" for m in known)
    gains = found["rougeL_over_base"]
    yield "its gain over base, 95 % interval", *(ends(gains[m]) if m in gains else "" for m in known)
    yield "BLEU-4", *(f"{found['scores'][m]['bleu4']:.3f}" for m in known)
    yield "loss on general text", *(number(found["general_loss"][m], "{:.3f}") for m in known)
    yield "of it untrained, in the same 4 bits", *(number(found["general_loss_nf4"][m], "{:.3f}") for m in known)


def fits(results):
    """What training the 1B takes on cards of four sizes, by the planner."""
    yield "", *(f"{gib} GiB" for gib in CARDS_GIB)
    light = {"galore_weights": "bf16", "moment_bits": 8}
    for method, fields in [
        *((name, {}) for name in ("qlora", "hybrid", "galore", "lora", "full", "apollo")),
        ("galore", light),
    ]:
        cells, cfg = [], resolve("gpu", **fields)
        for gib in CARDS_GIB:
            plan = best_plan(SHAPES["gemma-3-1b"], method, cfg, device_bytes=gib * 2**30, precision="bf16")
            layers = "all" if plan.recomputed == SHAPES["gemma-3-1b"].layers else plan.recomputed
            how = f"; {layers} layers" if plan.checkpointing != "off" else "; cheap parts" if plan.is_cheap else ""
            is_enough = plan.fits(gib * 2**30)
            cells.append(f"{plan.total / 2**30:.1f} ({plan.micro_batch}{how})" if is_enough else "does not fit")
        yield f"`{method}`" + (", weights in bf16, 8-bit moments" if fields else ""), *cells


TABLES = (summary, scores, sources, pairs, general, cost, precision, others, demo, fits)
TABLES += (sides, benchmarks_study, benchmarks_tasks, rewound)
