"""Findings of a scored study as sentences from its numbers; an unknown number gives no sentence."""

import math

from peftlib.evaluation import forgetting, stats
from peftlib.evaluation.benchmarks.scores import BALANCED
from peftlib.evaluation.comparison import mean_of
from peftlib.evaluation.results import BASE, BASE_CUT

_RANKED = {"rougeL": "ROUGE-L", "bleu4": "BLEU-4"}
_FEW, _MOST = 6, 12  # methods and differences that a sentence lists
_BEYOND = {
    "higher": "higher, beyond the noise,",
    "lower": "lower, beyond the noise,",
    "inside the noise": "unchanged, within the noise,",
}


def summary(found, boot, pairs, notes, numbers):
    """[sentence, ...], at most five: which method is best, by how much, memory and time, forgetting, and cautions.

    found: results.ScoredStudy. boot: stats.Bootstrap, None without scores. pairs: [comparison.Pair, ...]. notes: what
    differs between the runs' setups. numbers: charts.Numbers.
    """
    told = [*_best(found, boot, pairs), *_against_base(boot, pairs)]
    if not told:
        told = ["Fewer than two methods have scores, so there is nothing to compare."]
    return [*told, *_cost(numbers), *_forgetting(found), *_cautions(found, notes)]


def details(found, pairs):
    """[sentence, ...] with findings that are not in the summary or a table; arguments as in `summary`."""
    return [*_against_cut_base(found, pairs), *_losses(found), *_four_bit(found), *_unended(found)]


def _best(found, boot, pairs):
    trained = [method for method in found.scored if method != BASE]
    if len(trained) < 2:
        return
    leads, beaten = {}, []
    for metric, name in _RANKED.items():
        first, second = sorted(trained, key=lambda method: -boot.value[method][metric])[:2]
        value, base = boot.value[first][metric], boot.value.get(BASE, {}).get(metric, 0.0)
        noise = "inside" if _pair(pairs, metric, first, second).difference.is_noise else "beyond"
        leads.setdefault((first, second, noise), []).append(f"{name} ({value:.3f})")
        beaten += [f"; the untrained model has a higher {name}: {base:.3f}"] if base > value else []
    clauses = (
        f"{first} has the highest {_listed(scores)}; its lead over {second} is {noise} the noise"
        for (first, second, noise), scores in leads.items()
    )
    yield f"Of the trained methods, {'; '.join(clauses)}{''.join(beaten)}."


def _against_base(boot, pairs):
    verdicts, groups = {}, {}
    for metric in _RANKED:
        for pair in pairs:
            if pair.other == BASE and pair.metric == metric:
                verdicts.setdefault((metric, pair.verdict), []).append(pair.method)
    every = [method for method in (boot.value if boot else ()) if method not in (BASE, BASE_CUT)]
    for (metric, verdict), methods in verdicts.items():
        methods = [f"all {len(every)} methods"] if len(every) > _FEW and set(methods) == set(every) else methods
        name = f"{_RANKED[metric]} (base {boot.value[BASE][metric]:.3f})"
        groups.setdefault((verdict, tuple(methods)), []).append(name)
    clauses = (
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {_BEYOND.get(verdict, verdict)} with {_listed(methods)}"
        for (verdict, methods), names in groups.items()
    )
    if groups:
        yield f"Compared with the untrained model, {'; '.join(clauses)}."


def _cost(numbers):
    """Training memory and speed, best first."""
    clauses = []
    memory, speed = numbers.peak_gib, numbers.tokens_per_second
    if memory:
        least, *rest = sorted(memory, key=memory.get)
        more = _shortened([f", {method} {memory[method]:.2f}" for method in rest])
        clauses.append(f"{least} {'uses the least memory:' if rest else 'uses'} {memory[least]:.2f} GiB{more}")
    if speed:
        first, *rest = sorted(speed, key=lambda method: -speed[method])
        more = _shortened([f", {method} {_figure(speed[method])}" for method in rest])
        took = f" ({numbers.train_seconds[first] / 60:,.1f} min)" if first in numbers.train_seconds else ""
        clauses.append(f"{first} {'is fastest with' if rest else 'reads'} {_figure(speed[first])} tokens/s{took}{more}")
    if clauses:
        yield f"In training, {'; '.join(clauses)}."


def _forgetting(found):
    base, parts = _changes(found, lambda run: run.general)
    if parts:
        yield (
            f"Loss on general text ({forgetting.TEXT_NAME}, {base.n_tokens:,} tokens), where a rise is forgetting, in "
            f"nats per token: base {base.loss:.3f}, {', '.join(parts)}."
        )


def _changes(found, loss_of):
    """(base's GeneralLoss, ['method loss (change from base)', ...] of the trained methods with known losses)."""
    base = forgetting.mean_over([run.general for run in found.scored.get(BASE, [])])
    losses = {m: forgetting.mean_over([loss_of(run) for run in runs]) for m, runs in found.scored.items() if m != BASE}
    changes = {method: forgetting.change(base, loss) for method, loss in losses.items()}
    known = [m for m, change in changes.items() if change is not None]
    if len(known) > _FEW:
        known.sort(key=changes.get)
    return base, [f"{m} {losses[m].loss:.3f} ({changes[m]:+.1%})" for m in known]


def _cautions(found, notes):
    n_rows = len(found.test_rows)
    cautions = [stats.few_rows_note(n_rows)] if found.scored and n_rows < stats.FEW_ROWS else []
    cautions += ["the runs differ in some settings (listed below the result)"] if notes else []
    if cautions:
        yield f"Caution: {'; '.join(cautions)}."


def _against_cut_base(found, pairs):
    for method, runs in found.scored.items():
        pair = _pair(pairs, "rougeL", method, BASE_CUT)
        if pair is not None:
            gap = pair.difference
            yield (
                f"{method} against base cut at {found.cut_at_words} words, the median reference length: ROUGE-L "
                f"{gap.value:+z.3f}, 95 % interval {gap.low:+z.3f} to {gap.high:+z.3f}, "
                f"{worth(gap, mean_of(runs, lambda run: run.truncated_share))}."
            )


def worth(difference, cut_share):
    """What a difference from the cut base means. cut_share: of the method's own answers, cut by the token limit."""
    verdict = difference.verdict
    if cut_share >= 0.5:  # it has not learned to stop, so its answers are long, unlike those of the cut base
        return (
            f"{verdict}; {cut_share:.0%} of its own answers reached the token limit uncut and score low for that, so "
            "this compares lengths as much as answers"
        )
    return {
        "inside the noise": "inside the noise, so the gain may be no more than knowing when to stop",
        "higher": "so the gain is more than knowing when to stop",
        "lower": "so the cut base is better",
    }[verdict]


def _losses(found):
    losses = {method: mean_of(runs, lambda run: run.eval_loss) for method, runs in found.scored.items()}
    base = losses.pop(BASE, None)
    parts = [f"{method} {loss:.3f} ({(loss - base) / base:+.1%})" for method, loss in losses.items() if base and loss]
    if parts:
        yield (
            f"Loss on test rows, nats per assistant token: base {base:.3f} (perplexity {perplexity(base):.1f}), "
            f"{', '.join(parts)}."
        )


def perplexity(loss):
    """exp of a loss in nats; None for an unknown loss, inf on overflow."""
    return None if loss is None else math.exp(loss) if loss < 700 else math.inf


def _four_bit(found):
    _, parts = _changes(found, lambda run: run.rounded)
    if parts:
        yield (
            "The untrained model's loss on general text with its matrices in 4 bits, as the method stores them: "
            f"{', '.join(parts)}. This increase exists before training, which may recover part of it."
        )


def _unended(found):
    shares = {method: mean_of(runs, lambda run: run.truncated_share) for method, runs in found.scored.items()}
    if shares:
        listed = ", ".join(f"{method} {share:.0%}" for method, share in shares.items())
        yield f"Answers that reached the token limit: {listed}."


def _pair(pairs, metric, method, other):
    """The Pair of two methods in either order, or None."""
    return next((p for p in pairs if p.metric == metric and {p.method, p.other} == {method, other}), None)


def _listed(names):
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _shortened(parts):
    """Parts of a list from best to worst as one text; of a long list only the first two and the last."""
    return "".join(parts if len(parts) < _FEW else (*parts[:2], f" to{parts[-1][1:]}"))


def _figure(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def of_benchmarks(benchmarks):
    """[sentence, ...] on differences from base beyond the noise, and on tasks at their floor.

    A task with a balanced accuracy counts once, by that one: plain accuracy changes if a model says "yes" less often.
    """
    tasks = {scores.task for scores in benchmarks}
    counted = [scores for scores in benchmarks if scores.task + BALANCED not in tasks]
    pairs = [pair for scores in counted for pair in scores.pairs() if pair.other == BASE]
    beyond = [pair for pair in pairs if not pair.difference.is_noise]
    if pairs:
        listed = ", ".join(f"{p.method} on {p.metric} {p.difference.value:+.3f} ({p.verdict})" for p in beyond[:_MOST])
        listed += f" and {len(beyond) - _MOST} more (table)" if len(beyond) > _MOST else ""
        yield (
            f"On standard benchmarks, {len(beyond)} of {len(pairs)} differences from base are beyond the noise"
            f"{': ' if listed else ''}{listed}."
        )
    floor = [scores.task for scores in benchmarks if all(map(scores.is_at_floor, scores.runs))]
    if floor:
        yield f"No method beats guessing on {', '.join(floor)}, so these tasks cannot show learning or forgetting."
