"""Compare the runs of a scored study: paired differences of scores, and settings that differ."""

from dataclasses import dataclass

from peftlib.evaluation import stats
from peftlib.evaluation.results import BASE_CUT
from peftlib.methods import BASE

# Settings of single methods: they may differ without making runs unmatched.
_OWN_SETTINGS = ("lora_", "galore_", "apollo_", "full_", "loraplus_", "oft_", "seed")
_SCORED_AFTER = ("benchmark", "rewind")  # settings that add scores to a run
_RUN_FACTS = ("planned_steps", "steps", "train_tokens", "model", "precision", "device")  # of the record
PAIR_COLUMNS = ("metric", "method", "other", "difference", "low", "high", "p", "verdict")


@dataclass(frozen=True)
class Pair:
    """score(method) - score(other) with its 95 % interval and the p of the swap test (None if seeds do not pair)."""

    metric: str
    method: str
    other: str
    difference: stats.Interval
    p: float

    @property
    def verdict(self):
        return self.difference.verdict

    def row(self):
        """{column: value} by PAIR_COLUMNS."""
        gap = self.difference
        values = (self.metric, self.method, self.other, gap.value, gap.low, gap.high, self.p, gap.verdict)
        return dict(zip(PAIR_COLUMNS, values))


def pairs_of(systems, boot):
    """[Pair, ...] of every two methods and both metrics, the later method of the study's order first."""
    names, found = list(systems), []
    for metric in stats.METRICS:
        for at, method in enumerate(names):
            for other in names[:at]:
                if {method, other} == {BASE, BASE_CUT}:
                    continue  # the same answers, cut and uncut
                counts = {1, len(systems[method]), len(systems[other])}
                p = stats.swap_test(systems[method], systems[other], metric) if len(counts) < 3 else None
                found.append(Pair(metric, method, other, boot.difference(method, other, metric), p))
    return found


def unmatched(runs):
    """['what: value (runs); value (runs)', ...] of settings and facts in which finished runs differ.

    Each model that was trained elsewhere gets a line, because its settings are unknown.
    """
    finished = [run for run in runs if run.record["method"] != BASE and run.record["status"] == "ok"]
    trained = [run for run in finished if not run.is_external]
    found = [_elsewhere(run.record) for run in finished if run.is_external]
    for name in dict.fromkeys(name for run in trained for name in run.record["config"]):
        if not name.startswith((*_OWN_SETTINGS, *_SCORED_AFTER)) and name not in ("study", "profile", *_RUN_FACTS):
            found += _differing(name, [(run, run.record["config"].get(name)) for run in trained])
    for name in _RUN_FACTS:
        found += _differing(name, [(run, run.record[name]) for run in trained])
    seeds = {}
    for run in trained:
        seeds.setdefault(run.record["method"], []).append(run.record["seed"])
    if len({tuple(sorted(s)) for s in seeds.values()}) > 1:
        found.append("seeds: " + "; ".join(f"{', '.join(map(str, sorted(s)))} ({m})" for m, s in seeds.items()))
    scored = [run for run in runs if run.is_scored]
    for name in ("max_new_tokens", "precision", "device"):
        found += _differing(f"{name} of evaluation", [(run, run.record["evaluation"].get(name)) for run in scored])
    return found


def _elsewhere(record):
    scored_on = record["trained_elsewhere"].get("scored_on")
    found = f"{record['method']} was trained elsewhere" + (f" and scored on {scored_on}" if scored_on else "")
    return f"{found}: its data, settings and steps are unknown, and it may have seen the test rows"


def _differing(name, values):
    """['name: value (runs); value (runs)'] of (run, value) pairs, [] if all values are equal."""
    groups = {}
    for run, value in values:
        groups.setdefault(value, []).append(run.name)
    shown = "; ".join(f"{_shown(value)} ({', '.join(names)})" for value, names in groups.items())
    return [f"{name}: {shown}"] if len(groups) > 1 else []


def _shown(value):
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def mean_of(runs, value_of):
    """Mean of a number over runs, None if any is unknown or there are no runs."""
    values = [value_of(run) for run in runs]
    return None if not values or None in values else sum(values) / len(values)
