"""The report of a study: results.csv, report.md, report.html and figures, made from records and predictions alone.

The same inputs give the same bytes. Nothing is written before everything was read, checked and scored.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from peftlib.core.files import write_text
from peftlib.evaluation import comparison, stats
from peftlib.evaluation import results as scored
from peftlib.evaluation.judging import verdicts as judge_verdicts
from peftlib.report import charts as report_charts
from peftlib.report import results
from peftlib.report.sections import blocks_of, method_table

N_SAMPLES = 10


@dataclass(frozen=True)
class Report:
    """results: results.csv as a DataFrame. table: the field's table, one row a method, texts. per_source, pairs,
    scores: DataFrames of numbers. findings: sentences. figures, dark_figures: {name: PNG path}. alt: {name: text}.
    numbers: of the charts. samples: dicts of source, id, prompt, reference and one answer a method. notes: what was not
    matched. judged: [judge_verdicts.Judged, ...]. n_other_verdicts: verdicts on other answers or under another rubric.
    study: the ScoredStudy. folder: of the study. theme: 'light' or 'dark', as its notebooks show charts."""

    results: object
    table: object
    per_source: object
    pairs: object
    scores: object
    findings: list
    figures: dict
    dark_figures: dict
    alt: dict
    numbers: report_charts.Numbers = field(repr=False)
    samples: list = field(repr=False)
    notes: list
    judged: list
    n_other_verdicts: int
    study: scored.ScoredStudy = field(repr=False)
    folder: Path
    theme: str


def build(study):
    """Score the study's runs, write its results.csv, report.md, report.html and figures; returns the Report.

    StudyError: no data or records yet, or records and predictions that do not belong together (nothing is written).
    Too few test rows for narrow intervals are the first of its findings.
    """
    found = scored.load(study)
    judged, n_other_verdicts = judge_verdicts.load(study, found)
    rows = [results.result_row(run) for run in found.runs]
    systems = found.systems()
    boot = _bootstrap(systems) if systems else None
    by_source = _by_source(found)
    pairs = comparison.pairs_of(systems, boot) if boot else []
    numbers = report_charts.numbers_of(found, boot, by_source)
    notes = comparison.unmatched(found.runs)
    sentences = list(comparison.findings(found, boot, pairs)) if boot else []
    sentences += [*judge_verdicts.findings(judged), *judge_verdicts.uncounted(study)]
    samples = _samples(found)
    paths, dark_paths, alt = report_charts.save_charts(numbers, study.figures_dir)
    report = Report(
        results=results.frame(rows),
        table=_frame(*method_table(found, boot)),
        per_source=_source_frame(by_source),
        pairs=_dict_frame([pair.row() for pair in pairs], comparison.PAIR_COLUMNS),
        scores=_dict_frame(_all_scores(found)),
        findings=sentences,
        figures=paths,
        dark_figures=dark_paths,
        alt=alt,
        numbers=numbers,
        samples=samples,
        notes=notes,
        judged=judged,
        n_other_verdicts=n_other_verdicts,
        study=found,
        folder=study.folder,
        theme=study.cfg.theme,
    )
    _write(study, report, rows, pairs, boot)
    return report


def _write(study, report, rows, pairs, boot):
    from peftlib.report.document import to_html, to_markdown

    blocks = blocks_of(study, report, pairs, boot)
    write_text(study.folder / "report.html", to_html(blocks, f"Study {study.folder.name}"))
    write_text(study.report_path, to_markdown(blocks, study.folder))
    write_text(study.results_path, results.to_csv(rows))


def _bootstrap(systems):
    """stats.bootstrap without its warning: a report says in its own words where rows are few."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.FewRowsWarning)
        return stats.bootstrap(systems)


def _by_source(found):
    """{source: Bootstrap} over the rows of each source."""
    import numpy as np

    names = np.array([row["source"] for row in found.test_rows])
    made = {}
    for source in found.sources:
        systems = {method: [run.rows.subset(names == source) for run in runs] for method, runs in found.scored.items()}
        if systems:
            made[source] = _bootstrap(systems)
    return made


def _samples(found):
    """Up to N_SAMPLES test rows with every method's answer (its first seed), sources in turn.

    Within a source by the hash of the prompt, so that nobody chose them.
    """
    order = sorted(range(len(found.test_rows)), key=lambda i: found.test_rows[i]["prompt_sha256"])
    queues = {s: [i for i in order if found.test_rows[i]["source"] == s] for s in found.sources}
    picked = []
    while len(picked) < N_SAMPLES and any(queues.values()):
        picked += [queue.pop(0) for queue in queues.values() if queue]
    return [_sample(found, i) for i in picked[:N_SAMPLES]] if found.scored else []


def _sample(found, i):
    row = found.test_rows[i]
    answers = {method: runs[0].answers[i] for method, runs in found.scored.items()}
    return {
        "source": row["source"],
        "id": row["id"],
        "prompt": scored.prompt_text(row),
        "reference": found.references[i],
        **answers,
    }


def _all_scores(found):
    """[{method, seed, metric: value}] of every score of every scored run."""
    return [
        {
            "method": run.record["method"],
            "seed": run.record["seed"],
            **run.rows.scores(),
            "chrf": run.chrf,
            "truncated_share": run.truncated_share,
        }
        for runs in found.scored.values()
        for run in runs
    ]


def _source_frame(by_source):
    rows = []
    for source, boot in by_source.items():
        for method in boot.value:
            row = {"source": source, "method": method, "n": boot.n_rows}
            for metric in stats.METRICS:
                found = boot.interval(method, metric)
                row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
            rows.append(row)
    return _dict_frame(rows)


def _frame(header, rows):
    import pandas as pd

    return pd.DataFrame(rows, columns=list(header))


def _dict_frame(rows, columns=None):
    import pandas as pd

    return pd.DataFrame(rows, columns=list(columns) if columns else None)


def compare_cli(argv):
    """`python -m peftlib compare A B ...`: studies side by side; returns the exit code."""
    from peftlib.report.compare import main

    return main(argv)
