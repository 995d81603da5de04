"""The report of a study: tables, report.md, report.html and figures, made only from records and predictions.

The same inputs give the same bytes. Nothing is written before everything has been read, checked and scored.
"""

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from peftlib.core.files import gib, write_text
from peftlib.core.study import Study
from peftlib.evaluation import comparison, forgetting, results, rouge, stats
from peftlib.evaluation.benchmarks import rewind
from peftlib.evaluation.benchmarks import scores as benchmark_scores
from peftlib.evaluation.judging import judge, verdicts
from peftlib.evaluation.metrics import bleu_signature
from peftlib.methods import BASE
from peftlib.report import charts, findings, tables
from peftlib.report.render import UNKNOWN, render
from peftlib.train import run_record
from peftlib.train.sweep import verdict

N_SAMPLES = 10
_MOST_PAIRS, _COMPARED = (
    60,
    6,
)  # maximum number of listed pairs; beyond it, number of methods that all are compared with
_ANSWER_CHARACTERS = 700  # of an answer in the report


@dataclass(frozen=True)
class Report:
    """A study's report, as its templates and notebooks show it."""

    results: pd.DataFrame  # results.csv
    table: pd.DataFrame  # texts: before and after training, one row per method
    per_source: pd.DataFrame  # numbers, as `pairs` and `scores`
    pairs: pd.DataFrame
    scores: pd.DataFrame
    summary: list  # of at most five sentences
    details: list  # of further sentences
    figures: dict  # {name: PNG path}
    dark_figures: dict
    alt: dict  # {name: text}
    numbers: charts.Numbers = field(repr=False)
    samples: list = field(repr=False)  # dicts of source, id, prompt, reference and one answer per method
    notes: list  # differences in setup that limit the comparison
    judged: list  # of verdicts.Judged
    agreed: list  # of rates.Agreement
    n_other_verdicts: int  # on other answers or under another rubric
    benchmarks: list  # of scores.TaskScores
    rates: dict  # {method: verdict on its swept rates}
    study: results.ScoredStudy = field(repr=False)
    folder: Path
    theme: str  # of the study's notebooks, 'light' or 'dark'

    @property
    def findings(self):
        """All sentences."""
        return [*self.summary, *self.details]


def build_report(study: Study) -> Report:
    """Score the study's runs, write its results.csv, pairs.csv, report.md, report.html and figures; returns the Report.

    StudyError: no data or records yet, or records and predictions that do not match (nothing is written).
    """
    # Load and score.
    found, boot, by_source, numbers = scored(study)
    judged, agreed, n_other_verdicts = verdicts.load(study, found)
    # Compare.
    pairs = comparison.pairs_of(found.systems(), boot) if boot else []
    notes = comparison.unmatched(found.runs)
    details = [*findings.details(found, pairs), *verdicts.findings(judged), *verdicts.uncounted(study)]
    details += findings.of_benchmarks(numbers.benchmarks)
    # Draw.
    figures, dark_figures, alt = charts.save_charts(numbers, study.figures_dir)
    report = Report(
        results=tables.result_frame(found, judged, numbers.benchmarks),
        table=tables.method_table(found, boot),
        per_source=tables.source_frame(by_source),
        pairs=pd.DataFrame([pair.row() for pair in pairs], columns=comparison.PAIR_COLUMNS),
        scores=tables.score_frame(found),
        summary=findings.summary(found, boot, pairs, notes, numbers),
        details=details,
        figures=figures,
        dark_figures=dark_figures,
        alt=alt,
        numbers=numbers,
        samples=_samples(found),
        notes=notes,
        judged=judged,
        agreed=agreed,
        n_other_verdicts=n_other_verdicts,
        benchmarks=numbers.benchmarks,
        rates={name: verdict(of["from"]) for name, of in study.adopted_rates().items() if "tried" in of["from"]},
        study=found,
        folder=study.folder,
        theme=study.cfg.theme,
    )
    # Write.
    benchmark_pairs = [pair for scores in report.benchmarks for pair in scores.pairs()]
    content = _content(report, pairs, benchmark_pairs, by_source)
    write_text(study.folder / "report.html", render("report.html.jinja", **content))
    write_text(study.report_path, render("report.md.jinja", **content))
    every_pair = pd.DataFrame([p.row() for p in (*pairs, *benchmark_pairs)], columns=comparison.PAIR_COLUMNS)
    for path, frame in ((study.folder / "pairs.csv", every_pair), (study.results_path, report.results)):
        write_text(path, frame.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
    return report


def scored(study):
    """(ScoredStudy, Bootstrap over all rows or None, {source: Bootstrap}, charts.Numbers) of a study.

    StudyError: as results.load.
    """
    found = results.load(study)
    systems = found.systems()
    boot, by_source = stats.bootstrap(systems) if systems else None, _by_source(found)
    rewound = rewind.curves(study, found.runs)
    benchmarks = benchmark_scores.load([(run.record["method"], study, run.record) for run in found.runs])
    return found, boot, by_source, charts.numbers_of(found, boot, by_source, rewound, benchmarks)


def _by_source(found):
    """{source: Bootstrap} over the rows of each source."""
    names = np.array([row["source"] for row in found.test_rows])
    made = {}
    for source in found.sources if found.scored else ():
        systems = {method: [run.rows.subset(names == source) for run in runs] for method, runs in found.scored.items()}
        made[source] = stats.bootstrap(systems)
    return made


def _samples(found):
    """Up to N_SAMPLES test rows with every method's answer (its first seed), alternating between sources.

    Within a source they are ordered by the prompt's hash, so that nobody chose them.
    """
    order = sorted(range(len(found.test_rows)), key=lambda i: found.test_rows[i]["prompt_sha256"])
    by_source = ([i for i in order if found.test_rows[i]["source"] == source] for source in found.sources)
    picked = [i for turn in zip_longest(*by_source) for i in turn if i is not None] if found.scored else []
    return [
        {
            "source": found.test_rows[i]["source"],
            "id": found.test_rows[i]["id"],
            "prompt": results.prompt_text(found.test_rows[i]),
            "reference": found.references[i],
            **{method: runs[0].answers[i] for method, runs in found.scored.items()},
        }
        for i in picked[:N_SAMPLES]
    ]


def _pair_tables(pairs):
    """Tables of the differences from the first methods, [] if all pairs can be listed."""
    others = list(dict.fromkeys(pair.other for pair in pairs))[:_COMPARED]
    shown = [pair for pair in pairs if pair.other in others]
    if len(pairs) <= _MOST_PAIRS:
        return []
    if {pair.metric for pair in pairs} <= set(stats.METRICS):
        gaps = [(f"{p.method}, {stats.METRICS[p.metric]}", f"- {p.other}", p.difference) for p in shown]
    else:
        gaps = [(f"{p.method} - {p.other}", p.metric, p.difference) for p in shown if p.other == BASE]
    return tables.difference_tables(gaps)


def _content(report, pairs, benchmark_pairs, by_source):
    """The templates' variables."""
    found = report.study
    versions = {}
    for run in found.runs:
        for name, version in (run.record.get("versions") or {}).items():
            versions.setdefault(name, {})[version or UNKNOWN] = None
    return {
        "name": report.folder.name,
        "report": report,
        "found": found,
        "pairs": pairs,
        "pair_tables": _pair_tables(pairs),
        "by_source": by_source,
        "models": dict.fromkeys((run.record["model"], run.record["model_provenance"]) for run in found.runs),
        "one_seed": [method for method, runs in found.scored.items() if len(runs) == 1],
        "stats": stats,
        "forgetting": forgetting,
        "judge": judge,
        "benchmark_tables": tables.benchmark_tables(report.benchmarks),
        "benchmark_pairs": benchmark_pairs,
        "benchmark_pair_tables": _pair_tables(benchmark_pairs),
        "BASE": BASE,
        "rouge": rouge,
        "bleu_signature": bleu_signature(found.tokenizer),
        "changes": [sentence for run in found.runs for sentence in run_record.change_sentences(run.record)],
        "versions": versions,
        "longest": _ANSWER_CHARACTERS,
        "gib": gib,
        "perplexity": findings.perplexity,
    }
