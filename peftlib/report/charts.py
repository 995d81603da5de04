"""The charts of a report, and their numbers."""

from dataclasses import dataclass

from peftlib.core.files import gib
from peftlib.evaluation import stats
from peftlib.evaluation.benchmarks import scores
from peftlib.evaluation.comparison import mean_of
from peftlib.methods import BASE
from peftlib.report import figures
from peftlib.report.chart import save
from peftlib.report.palette import DARK, LIGHT

# Charts by the names that a user picks.
_SCORES = {  # {name: (metric, whether against memory)}; for each source's rows alone, too
    "ROUGE-L": ("rougeL", False),
    "BLEU-4": ("bleu4", False),
    "ROUGE-L against memory": ("rougeL", True),
    "BLEU-4 against memory": ("bleu4", True),
}
MEMORY, TRAINING = "peak memory", "training loss by step"
_MEANS = {  # {name: (field of Numbers, title, unit, format)}
    "test loss": ("eval_loss", "Loss on the test rows: shorter is better", "nats per token", ".3f"),
    "general text loss": ("general_loss", "Loss on general text: shorter is better", "nats per token", ".3f"),
    MEMORY: ("peak_gib", "Peak memory of training", "GiB", ".2f"),
    "training speed": ("tokens_per_second", "Speed of training", "tokens/s", ",.0f"),
}
KINDS = (*_SCORES, *_MEANS, TRAINING)
REWIND = "between base and tuned"  # an additional chart if a study has rewound a method
ALL_ROWS, EACH_SOURCE = "all rows", "each source"


@dataclass(frozen=True)
class Numbers:
    """The numbers of the charts."""

    records: list  # of all runs
    intervals: dict  # {method: {metric: stats.Interval}}, base cut included
    per_source: dict  # {source: the same without base cut}
    peak_gib: dict  # this and the next five: {method: mean over its finished runs}, if all runs have it
    reserved_gib: dict
    eval_loss: dict
    general_loss: dict
    tokens_per_second: dict
    train_seconds: dict
    rewound: dict  # of rewind.curves
    benchmarks: list  # of scores.TaskScores
    trade: dict  # {method: (Interval of its gain of ROUGE-L, of its change on the tasks lost_on)} against base
    lost_on: list


def numbers_of(found, boot, by_source, rewound, benchmarks):
    """The Numbers of a ScoredStudy. boot: Bootstrap over all rows, or None; by_source: {source: Bootstrap}."""
    changes, lost_on = scores.lost(benchmarks)
    known = boot.value if boot else {}
    both = [method for method in changes if method in known and BASE in known]
    texts = [run.general.text_sha256 for run in found.runs if run.general]

    def general_loss(run):  # losses on another text than the first run's are not comparable
        return run.general.loss if run.general and run.general.text_sha256 == texts[0] else None

    def means(value_of):
        groups = by_method(run for run in found.runs if run.record["status"] == "ok")
        found_means = {method: mean_of(runs, value_of) for method, runs in groups.items()}
        return {method: mean for method, mean in found_means.items() if mean is not None}

    return Numbers(
        records=[run.record for run in found.runs],
        intervals=_intervals(boot) if boot else {},
        per_source={source: _intervals(part) for source, part in by_source.items()},
        peak_gib=means(lambda run: gib(run.record["peak_memory_bytes"])),
        reserved_gib=means(lambda run: gib(run.record["peak_reserved_bytes"])),
        eval_loss=means(lambda run: run.eval_loss),
        general_loss=means(general_loss),
        tokens_per_second=means(lambda run: run.record["tokens_per_second"]),
        train_seconds=means(lambda run: run.record["train_seconds"]),
        rewound=rewound,
        benchmarks=benchmarks,
        trade={method: (boot.difference(method, BASE, "rougeL"), changes[method]) for method in both},
        lost_on=lost_on,
    )


def by_method(runs):
    """{method: [Run, ...]}, in order."""
    groups = {}
    for run in runs:
        groups.setdefault(run.record["method"], []).append(run)
    return groups


def _intervals(boot):
    return {method: {metric: boot.interval(method, metric) for metric in stats.METRICS} for method in boot.value}


def chart_of(numbers, kind, rows=ALL_ROWS, theme=LIGHT):
    """One chart by a name of KINDS, or REWIND. rows: one of row_choices(numbers, kind)."""
    if kind == TRAINING:
        return figures.loss_curves(numbers.records, theme)
    if kind == REWIND:
        return figures.rewind_curves(numbers.rewound, theme)
    if kind in _MEANS:
        field, *words = _MEANS[kind]
        outlines = numbers.reserved_gib if kind == MEMORY else None
        return figures.value_bars(getattr(numbers, field), *words, theme, outlines=outlines)
    metric, is_against_memory = _SCORES[kind]
    if rows == EACH_SOURCE:
        return figures.source_bars(numbers.per_source, metric, theme)
    source = "" if rows == ALL_ROWS else rows
    intervals = numbers.per_source[source] if source else numbers.intervals
    if is_against_memory:
        return figures.quality_against_memory(intervals, numbers.peak_gib, metric, theme, rows=source)
    return figures.score_bars(intervals, (metric,), rows=source, theme=theme)


def row_choices(numbers, kind):
    """The values for `rows` of chart_of: scores are known per row, losses and memory are not."""
    if kind not in _SCORES:
        return [ALL_ROWS]
    return [ALL_ROWS, *([] if _SCORES[kind][1] else [EACH_SOURCE]), *numbers.per_source]


def charts_of(numbers, theme=LIGHT):
    """{name: Chart} of a report, without charts whose data are unknown."""
    drawn = {
        "loss": chart_of(numbers, TRAINING, theme=theme),
        "scores": figures.score_bars(numbers.intervals, theme=theme),
        "rougeL_by_source": chart_of(numbers, "ROUGE-L", EACH_SOURCE, theme),
        "bleu4_by_source": chart_of(numbers, "BLEU-4", EACH_SOURCE, theme),
        "rougeL_against_memory": chart_of(numbers, "ROUGE-L against memory", theme=theme),
        "bleu4_against_memory": chart_of(numbers, "BLEU-4 against memory", theme=theme),
        "memory": chart_of(numbers, MEMORY, theme=theme),
        "rewind": chart_of(numbers, REWIND, theme=theme),
        "benchmarks": figures.benchmark_points(numbers.benchmarks, theme),
        "gain_against_loss": figures.gain_against_loss(numbers.trade, numbers.lost_on, theme),
    }
    return {name: chart for name, chart in drawn.items() if not chart.is_empty}


def save_charts(numbers, folder):
    """Write each chart of a report as PNG and SVG, and as NAME-dark.png for dark pages.

    Returns ({name: PNG path}, {name: path of the dark PNG}, {name: alt text}).
    """
    light, dark = charts_of(numbers, LIGHT), charts_of(numbers, DARK)
    paths = {name: save(chart, folder, name) for name, chart in light.items()}
    dark_paths = {name: save(chart, folder, f"{name}-dark", ("png",)) for name, chart in dark.items()}
    return paths, dark_paths, {name: chart.alt for name, chart in light.items()}
