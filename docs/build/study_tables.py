"""Tables of the reference study and the demo."""

import statistics

from cells import ends, loss_gap, number, pair_of, signed, spread

from peftlib.evaluation.stats import METRICS

# (BLEU-4, ROUGE-L) that others published, by method: an early look at the 270M, and a public study of the 1B.
FIRST_LOOK = {"base": (0.046, 0.097), "qlora": (0.122, 0.400), "galore": (0.150, 0.439)}
PUBLIC_STUDY = {"base": (0.058, 0.163), "qlora": (0.111, 0.233), "galore": (0.106, 0.227)}


def summary(results):
    """README's table: the reference study in one row a method."""
    yield "method", "peak GiB", "tokens/s", "test loss", "ROUGE-L", "BLEU-4", "loss on general text"
    for method, known in results.reference["methods"].items():
        scores = [f"{known['scores'][metric]['value']:.3f}" for metric in ("rougeL", "bleu4")]
        losses = [f"{statistics.fmean(known[name]):.3f}" for name in ("eval_loss", "general_loss")]
        cost = [
            spread(known["peak_memory_gib"], "{:.2f}", False),
            spread(known["median_tokens_per_second"], "{:,.0f}", False),
        ]
        label, cost = ("untrained", ("", "")) if method == "base" else (f"`{method}`", cost)
        yield label, *cost, losses[0], *scores, losses[1]


def second(results):
    """What is there of the second edition: one seed, so its intervals are over rows alone."""
    yield "method", "ROUGE-L", "BLEU-4", "test loss", "loss on general text", "peak GiB", "trains"
    for method, known in results.next["methods"].items():
        scores = [known["scores"][metric] for metric in ("rougeL", "bleu4")]
        cells = [f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})" for found in scores]
        losses = [spread(known[name], "{:.3f}") for name in ("eval_loss", "general_loss")]
        trained = f"{known['trainable_params']:,}" if known["trainable_params"] else ""
        yield method, *cells, *losses, spread(known["peak_memory_gib"], "{:.2f}"), trained


def scores(results):
    yield (
        *("method", "seeds", "ROUGE-L", "gain over base", "BLEU-4", "gain over base"),
        *("test loss", "general text loss", "untrained, in its 4 bits"),
    )
    for method, known in results.reference["methods"].items():
        cells = []
        for metric in ("rougeL", "bleu4"):
            gain = known["over_base"] and ends(known["over_base"][metric])
            cells += [spread(known["scores"][metric]["seeds"], "{:.3f}"), gain or ""]
        losses = [spread(known[name], "{:.3f}") for name in ("eval_loss", "general_loss")]
        yield method, str(len(known["seeds"])), *cells, *losses, number(known["general_loss_nf4"], "{:.3f}")


def sources(results):
    methods = list(results.reference["methods"])
    yield "ROUGE-L by source", *methods
    for source, part in results.reference["sources"].items():
        values = [f"{part['scores'][method]['rougeL']:.3f}" for method in methods]
        yield f"{source} ({part['rows']:,} rows)", *values


def pairs(results):
    yield "difference", "BLEU-4", "verdict", "ROUGE-L", "verdict"
    methods = list(results.trained)
    for at, method in enumerate(methods):
        for other in methods[:at]:
            cells = []
            for metric in METRICS:
                gap = pair_of(results, metric, method, other)
                cells += [
                    ends(gap),
                    "inside the noise" if gap["is_noise"] else "higher" if gap["value"] > 0 else "lower",
                ]
            yield f"{method} − {other}", *cells


def general(results):
    """How the loss on general text rose over the untrained model's, and how much of it rounding to 4 bits explains."""
    yield "method", "rise of the loss on general text", "of it by 4 bits alone, before training"
    base = results.reference["methods"]["base"]["general_loss"][0]
    for method, known in results.trained.items():
        rounded = known["general_loss_nf4"]
        yield (
            method,
            signed(loss_gap(results, "general_loss", method, "base")),
            number(rounded and rounded - base, "{:+.3f}"),
        )


def cost(results):
    yield "method", "trains", "peak GiB", "tokens/s", "training min", "first step s", "learning rate", "swept"
    for method, known in results.trained.items():
        rates = " and ".join(f"{known[name]:g}" for name in ("learning_rate", "learning_rate_2") if known[name])
        yield (
            method,
            f"{known['trainable_params']:,}",
            spread(known["peak_memory_gib"], "{:.2f}"),
            spread(known["median_tokens_per_second"], "{:,.0f}"),
            spread([seconds / 60 for seconds in known["train_seconds"]], "{:.1f}", False),
            spread(known["first_step_seconds"], "{:.0f}", False),
            rates,
            _swept(known["sweep"]),
        )


def _swept(sweep):
    if not sweep:
        return "no"
    trials = sweep["from"]["tried"]
    best = min((t for t in trials if t["valid_loss"] is not None), key=lambda trial: trial["valid_loss"])
    edge = ", at the edge" if sweep["from"].get("is_at_edge") else ""
    tried = ", ".join(f"{_factors(trial)}: {number(trial['valid_loss'], '{:.3f}', 'inf')}" for trial in trials)
    return f"factor {_factors(best)}{edge} ({tried})"


def _factors(trial):
    return " and ".join(f"{trial[name]:.3g}" for name in ("factor", "factor_2") if name in trial)


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
        gap = ends(both["difference"]["rougeL"]) if both["difference"] else ""
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


TABLES = (summary, second, scores, sources, pairs, general, cost, precision, others, demo)
