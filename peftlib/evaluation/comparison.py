"""What a scored study shows: intervals, paired differences, what was not matched, and findings in words.

Every sentence is made from numbers at hand; a number that is unknown makes no sentence.
"""

import math
from dataclasses import dataclass

from peftlib.core.files import gib
from peftlib.evaluation import forgetting, stats
from peftlib.evaluation.results import BASE, BASE_CUT

# Settings of one method alone: they may differ between methods without making them unequal.
_OWN_SETTINGS = ("lora_", "galore_", "apollo_", "full_", "seed")
_RUN_FACTS = ("planned_steps", "steps", "train_tokens", "model", "precision", "device")
PAIR_COLUMNS = ("metric", "method", "other", "difference", "low", "high", "p", "verdict")


@dataclass(frozen=True)
class Pair:
    """score(method) - score(other) with its 95 % interval and the p of the swap test (None where seeds do not pair)."""

    metric: str
    method: str
    other: str
    difference: stats.Interval
    p: float

    @property
    def verdict(self):
        if self.difference.is_noise:
            return "inside the noise"
        return "higher" if self.difference.value > 0 else "lower"

    def row(self):
        """{column: value} by PAIR_COLUMNS."""
        found = self.difference
        values = (self.metric, self.method, self.other, found.value, found.low, found.high, self.p, self.verdict)
        return dict(zip(PAIR_COLUMNS, values))


def pairs_of(systems, boot):
    """[Pair, ...] of every two methods and both metrics, the later method of the study's order first."""
    names, found = list(systems), []
    for metric in stats.METRICS:
        for at, method in enumerate(names):
            for other in names[:at]:
                if {method, other} == {BASE, BASE_CUT}:
                    continue  # the same answers, once cut
                counts = {1, len(systems[method]), len(systems[other])}
                p = stats.swap_test(systems[method], systems[other], metric) if len(counts) < 3 else None
                found.append(Pair(metric, method, other, boot.difference(method, other, metric), p))
    return found


def unmatched(runs):
    """['what: value (runs); value (runs)', ...] of settings and facts in which finished trained runs differ."""
    trained = [run for run in runs if run.record["method"] != BASE and run.record["status"] == "ok"]
    found = []
    settings = dict.fromkeys(name for run in trained for name in run.record["config"])
    for name in settings:
        if not name.startswith(_OWN_SETTINGS) and name not in ("study", "profile", "device", "precision"):
            found += _differing(name, trained, lambda run, name=name: run.record["config"].get(name))
    for name in _RUN_FACTS:
        if name not in settings or name in ("device", "precision"):
            found += _differing(name, trained, lambda run, name=name: run.record[name])
    seeds = {}
    for run in trained:
        seeds.setdefault(run.record["method"], []).append(run.record["seed"])
    if len({tuple(sorted(s)) for s in seeds.values()}) > 1:
        found.append("seeds: " + "; ".join(f"{', '.join(map(str, sorted(s)))} ({m})" for m, s in seeds.items()))
    scored = [run for run in runs if run.is_scored]
    for name in ("max_new_tokens", "precision", "device"):
        found += _differing(f"{name} of evaluation", scored, lambda run, name=name: run.record["evaluation"].get(name))
    return found


def _differing(name, runs, value_of):
    groups = {}
    for run in runs:
        groups.setdefault(value_of(run), []).append(run.name)
    if len(groups) < 2:
        return []
    return [f"{name}: " + "; ".join(f"{_shown(value)} ({', '.join(names)})" for value, names in groups.items())]


def _shown(value):
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def findings(study, boot, pairs):
    """[sentence, ...] on quality, memory, speed and answers of a ScoredStudy."""
    return [
        *_caution(boot),
        *_against_base(study, boot, pairs),
        *_best(study, boot, pairs),
        *_hybrid(pairs),
        *_loss(study),
        *_forgotten(study),
        *_cheapest(study),
        *_answers(study),
    ]


def _caution(boot):
    if boot.n_rows < stats.FEW_ROWS:
        yield f"Caution, {stats.few_rows_note(boot.n_rows)}."


def _against_base(study, boot, pairs):
    for method, runs in study.scored.items():
        if method == BASE or BASE not in study.scored:
            continue
        parts = []
        for metric, name in stats.METRICS.items():
            pair = _pair(pairs, metric, method, BASE)
            before, after = boot.value[BASE][metric], boot.value[method][metric]
            noise = ", inside the noise" if pair.difference.is_noise else ""
            parts.append(f"{name} from {before:.3f} to {after:.3f} ({_signed(pair.difference)}{noise})")
        yield f"{method} against base: {'; '.join(parts)}."
        cut = _pair(pairs, "rougeL", method, BASE_CUT)
        yield (
            f"{method} against base cut at {study.cut_at_words} words, the median reference length: ROUGE-L "
            f"{_signed(cut.difference)}, {_worth(cut.difference, mean_of(runs, lambda run: run.truncated_share))}."
        )


def _worth(difference, cut_share):
    if cut_share >= 0.5:  # then it has not learnt to stop, and the cut base is spared what lengthens its own answers
        verdict = "inside the noise" if difference.is_noise else "higher" if difference.value > 0 else "lower"
        return (
            f"{verdict}; {cut_share:.0%} of its own answers met the token limit uncut, and score low for that, so this "
            "compares lengths as much as answers"
        )
    if difference.is_noise:
        return "inside the noise, so the gain may be no more than knowing when to stop"
    if difference.value > 0:
        return "so the gain is more than knowing when to stop"
    return "so the cut base is the better one"


def _best(study, boot, pairs):
    trained = [method for method in study.scored if method != BASE]
    if len(trained) < 2:
        return
    for metric, name in stats.METRICS.items():
        first, second = sorted(trained, key=lambda m: -boot.value[m][metric])[:2]
        pair = _pair(pairs, metric, first, second)
        lead = _signed(pair.difference, flip=pair.method != first)
        worth = "inside the noise" if pair.difference.is_noise else "outside the noise"
        base = boot.value.get(BASE, {}).get(metric)
        beaten = f" The untrained model has more: {base:.3f}." if (base or 0) > boot.value[first][metric] else ""
        yield (
            f"Highest {name} of the trained methods: {first} with {boot.value[first][metric]:.3f}; its lead over {second} "
            f"({lead}) is {worth}.{beaten}"
        )


def _hybrid(pairs):
    for metric in stats.METRICS:
        for other in ("qlora", "galore"):
            pair = _pair(pairs, metric, "hybrid", other)
            if pair is not None:
                yield _sentence(pair)


def _sentence(pair):
    text = stats.describe_difference(pair.difference, pair.method, pair.other, pair.metric)
    return text[0].upper() + text[1:]


def _loss(study):
    base = mean_of(study.scored.get(BASE, []), lambda run: run.eval_loss)
    if not base:
        return
    parts = []
    for method, runs in study.scored.items():
        loss = mean_of(runs, lambda run: run.eval_loss)
        if method != BASE and loss is not None:
            parts.append(f"{method} {loss:.3f} ({(loss - base) / base:+.1%})")
    if parts:
        yield f"Loss on test rows, nats per assistant token: base {base:.3f} (perplexity {math.exp(base):.1f}), " + (
            ", ".join(parts) + "."
        )


def _forgotten(study):
    base = forgetting.mean_over([run.general for run in study.scored.get(BASE, [])])
    parts = []
    for method, runs in study.scored.items():
        after = forgetting.mean_over([run.general for run in runs])
        moved = forgetting.change(base, after)
        if method != BASE and moved is not None:
            parts.append(f"{method} {after.loss:.3f} ({moved:+.1%})")
    if parts:
        yield (
            f"Loss on general text ({forgetting.TEXT_NAME}, {base.n_tokens:,} tokens), nats per token, where a rise is "
            f"what was forgotten: base {base.loss:.3f}, {', '.join(parts)}."
        )
    parts = []
    for method, runs in study.scored.items():
        rounded = forgetting.mean_over([run.rounded for run in runs])
        moved = forgetting.change(base, rounded)
        if moved is not None:
            parts.append(f"{method} {rounded.loss:.3f} ({moved:+.1%})")
    if parts:
        yield (
            f"The same of the untrained model, its matrices in 4 bits as the method holds them: {', '.join(parts)}. That much "
            "is there before training, which may repair a part of it."
        )


def _cheapest(study):
    finished = {}
    for run in study.runs:
        if run.record["method"] != BASE and run.record["status"] == "ok":
            finished.setdefault(run.record["method"], []).append(run)
    for what, unit, value_of, is_low in (
        ("Least memory in training", "GiB", lambda run: gib(run.record["peak_memory_bytes"]), True),
        ("Fastest training", "tokens/s", lambda run: run.record["tokens_per_second"], False),
    ):
        known = {m: mean_of(runs, value_of) for m, runs in finished.items()}
        known = {m: value for m, value in known.items() if value is not None}
        if len(known) > 1:
            order = sorted(known, key=lambda m: known[m] if is_low else -known[m])
            rest = ", ".join(f"{m} {_figure(known[m])}" for m in order[1:])
            yield f"{what}: {order[0]} with {_figure(known[order[0]])} {unit}; {rest}."


def _answers(study):
    limits = {method: mean_of(runs, lambda run: run.truncated_share) for method, runs in study.scored.items()}
    if limits:
        said = ", ".join(f"{method} {share:.0%}" for method, share in limits.items())
        yield f"Answers that ran into the token limit instead of ending by themselves: {said}."


def mean_of(runs, value_of):
    """Mean of a figure over runs, None where any is unknown or there are none."""
    values = [value_of(run) for run in runs]
    return None if not values or None in values else sum(values) / len(values)


def _pair(pairs, metric, method, other):
    """The Pair of two methods in either order, None where there is none."""
    wanted = {method, other}
    return next((p for p in pairs if p.metric == metric and {p.method, p.other} == wanted), None)


def _signed(interval, flip=False):
    value, low, high = interval.value, interval.low, interval.high
    if flip:
        value, low, high = -value, -high, -low
    return f"{value:+z.3f}, 95 % interval {low:+z.3f} to {high:+z.3f}"


def _figure(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
