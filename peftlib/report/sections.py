"""The blocks of a report: its tables, lists and paragraphs, from a Report's numbers."""

import math

from peftlib.evaluation import forgetting, stats
from peftlib.evaluation.comparison import mean_of
from peftlib.evaluation.results import BASE, BASE_CUT
from peftlib.report import beside as report_beside
from peftlib.report import notes as report_notes
from peftlib.report.document import Bullets, Heading, Paragraph, Picture, Table
from peftlib.report.notes import UNKNOWN
from peftlib.report.results import gib

_ANSWER_CHARACTERS = 700
_METHOD_HEADER = (
    "technique",
    "BLEU-4 before",
    "BLEU-4 after (95 %)",
    "ROUGE-L before",
    "ROUGE-L after (95 %)",
    "test loss before",
    "test loss after",
    "general text loss (change)",
    "peak memory GiB",
    "training hours",
)
_SCORE_NAMES = {
    "bleu4": "BLEU-4",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "chrf": "chrF",
    "sample_bleu4": "BLEU-4 per sample",
    "sample_rougeL": "ROUGE-L per sample",
    "length_ratio": "length ratio",
    "empty_share": "empty",
    "truncated_share": "cut by limit",
    "repetition": "repetition",
}


def blocks_of(study, report, pairs, boot):
    """The report as document blocks."""
    found = report.study
    blocks = [Heading(f"Study {study.folder.name}", 1), *map(Paragraph, report_notes.opening(found))]
    blocks += [Heading("Result"), Table(*method_table(found, boot))]
    blocks += [Paragraph(report_notes.table_note(found))]
    if report.notes:
        blocks += [
            Paragraph("Not matched between runs, so differences may come from this:"),
            Bullets(tuple(report.notes)),
        ]
    if report.findings:
        blocks += [Heading("Findings"), Bullets(tuple(report.findings))]
    blocks += [Picture(path, report.alt[name], report.dark_figures[name]) for name, path in report.figures.items()]
    if pairs:
        blocks += [
            Heading("Differences between methods"),
            Paragraph(report_notes.pairs_note(pairs, max(boot.n_seeds.values()))),
            _pair_table(pairs),
        ]
    if report.judged or report.n_other_verdicts:
        blocks += [Heading("Judged by a language model"), *report_beside.judged_blocks(report)]
    if boot:
        blocks += [
            Heading("By source"),
            _source_table(report.per_source),
            Paragraph(report_notes.source_note(report.per_source)),
        ]
        blocks += [Heading("All scores"), _score_table(report.scores), Paragraph(report_notes.score_note())]
        blocks += report_beside.original_blocks(found)
    spread = _spread_table(found)
    if spread.rows:
        blocks += [Heading("Over seeds"), spread]
    blocks += [Heading("Runs"), _run_table(found)]
    if report.samples:
        blocks += [Heading("Answers side by side"), Paragraph(_SAMPLES_NOTE)]
        blocks += [block for number, sample in enumerate(report.samples, 1) for block in _sample_blocks(number, sample)]
    blocks += [Heading("What this does not show"), Bullets(tuple(report_notes.limits(found)))]
    blocks += [Heading("How it was measured"), Bullets(tuple(report_notes.methods(found)))]
    return blocks


def method_table(found, boot):
    """(header, rows of texts): one row a method with a record, and base cut at the median reference length."""
    groups = {}
    for run in found.runs:
        groups.setdefault(run.record["method"], []).append(run)
    rows = []
    for method, runs in groups.items():
        rows.append((_technique(method, runs), *_method_cells(method, runs, found, boot)))
        if method == BASE and found.base_cut is not None:
            name = f"base, cut at the median reference length ({found.cut_at_words} words)"
            cells = [part for metric in stats.METRICS for part in ("", _scored(boot, BASE_CUT, metric))]
            rows.append((name, *cells, *[""] * (len(_METHOD_HEADER) - 1 - len(cells))))
    return _METHOD_HEADER, tuple(rows)


def _technique(method, runs):
    counts = {}
    for run in runs:
        counts[run.record["status"]] = counts.get(run.record["status"], 0) + 1
    states = [f"{n} {status}" if len(runs) > 1 else status for status, n in counts.items() if status != "ok"]
    seeds = [f"{len(runs)} seeds"] if len(runs) > 1 else []
    notes = ", ".join(seeds + states)
    return f"{method} ({notes})" if notes else method


def _method_cells(method, runs, found, boot):
    finished = [run for run in runs if run.record["status"] == "ok"]
    is_base, cells = method == BASE, []
    for metric in stats.METRICS:
        before = _scored(boot, BASE, metric, with_interval=is_base)
        cells += [before, "" if is_base else _scored(boot, method, metric)]
    base_loss = mean_of(found.scored.get(BASE, []), lambda run: run.eval_loss)
    loss = mean_of(finished, lambda run: run.eval_loss)
    cells += [_number(base_loss, ".3f"), "" if is_base else _number(loss, ".3f")]
    cells.append(_general(finished, [] if is_base else found.scored.get(BASE, [])))
    if is_base:
        return [*cells, "", ""]
    memory = mean_of(finished, lambda run: gib(run.record["peak_memory_bytes"]))
    seconds = mean_of(finished, lambda run: run.record["train_seconds"])
    return [*cells, _number(memory, ".2f"), _hours(seconds)]


def _hours(seconds):
    """Hours with two digits that count, for a demo takes minutes."""
    return UNKNOWN if seconds is None else f"{seconds / 3600:.2f}" if seconds >= 3600 else f"{seconds / 3600:.2g}"


def _general(runs, base_runs):
    """Loss on general text, and its change against base where both read the same."""
    after = forgetting.mean_over([run.general for run in runs])
    moved = forgetting.change(forgetting.mean_over([run.general for run in base_runs]), after)
    shown = UNKNOWN if after is None else f"{after.loss:.3f}"
    return shown if moved is None else f"{shown} ({moved:+.1%})"


def _scored(boot, method, metric, with_interval=True):
    if boot is None or method not in boot.value:
        return UNKNOWN
    found = boot.interval(method, metric)
    text = f"{found.value:.4f}"
    return f"{text} ({found.low:.4f} to {found.high:.4f})" if with_interval else text


def _number(value, form):
    return UNKNOWN if value is None else format(value, form)


def _pair_table(pairs):
    rows = []
    for pair in pairs:
        found = pair.difference
        numbers = (f"{found.value:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}", _number(pair.p, ".4f"))
        rows.append((f"{pair.method} - {pair.other}", stats.METRICS[pair.metric], *numbers, pair.verdict))
    return Table(("difference", "score", "value", "95 % interval", "p", "verdict"), tuple(rows), n_text=2)


def _source_table(per_source):
    rows = []
    for row in per_source.to_dict("records"):
        scores = (f"{row[m]:.4f} ({row[f'{m}_low']:.4f} to {row[f'{m}_high']:.4f})" for m in stats.METRICS)
        rows.append((row["source"], row["method"], str(row["n"]), *scores))
    return Table(
        ("source", "method", "rows", *(f"{name} (95 %)" for name in stats.METRICS.values())), tuple(rows), n_text=2
    )


def _score_table(scores):
    rows = [
        (f"{row['method']} (seed {row['seed']})", *(f"{row[name]:.4f}" for name in _SCORE_NAMES))
        for row in scores.to_dict("records")
    ]
    return Table(("run", *_SCORE_NAMES.values()), tuple(rows))


def _spread_table(found):
    """Mean and standard deviation over the seeds of methods that have several."""
    rows = []
    for method, runs in found.scored.items():
        if len(runs) > 1:
            scores = [run.rows.scores() for run in runs]
            parts = [stats.over_seeds([score[name] for score in scores]) for name in stats.METRICS]
            parts.append(stats.over_seeds([run.eval_loss for run in runs]))
            cells = (UNKNOWN if part is None else f"{part[0]:.4f} ({_number(part[1], '.4f')})" for part in parts)
            rows.append((method, str(len(runs)), *cells))
    header = ("method", "seeds", *(f"{name}, mean (sd)" for name in stats.METRICS.values()), "test loss, mean (sd)")
    return Table(header, tuple(rows))


def _run_table(found):
    header = (
        "run",
        "status",
        "trained parameters",
        "steps",
        "training tokens",
        "learning rate",
        "train loss",
        "test loss",
        "perplexity",
        "peak GiB",
        "tokens/s",
        "minutes",
        "precision",
        "device",
    )
    return Table(header, tuple(_run_cells(run) for run in found.runs), n_text=2)


def _run_cells(run):
    record, loss = run.record, run.eval_loss
    rates = [f"{rate:g}" for rate in (record["learning_rate"], record["learning_rate_2"]) if rate is not None]
    seconds = record["train_seconds"]
    done, planned = record["steps"], record["planned_steps"]
    return (
        run.name,
        record["status"],
        _number(record["trainable_params"], ",d"),
        UNKNOWN if done is None else str(done) if done == planned or planned is None else f"{done} of {planned}",
        _number(record["train_tokens"], ",d"),
        " and ".join(rates) or UNKNOWN,
        _number(record["train_loss"], ".3f"),
        _number(loss, ".3f"),
        UNKNOWN if loss is None else f"{math.exp(min(loss, 700)):.1f}",
        _number(gib(record["peak_memory_bytes"]), ".2f"),
        _number(record["tokens_per_second"], ",.0f"),
        UNKNOWN if seconds is None else f"{seconds / 60:.1f}",
        record["precision"] or UNKNOWN,
        record["device"] or UNKNOWN,
    )


_SAMPLES_NOTE = (
    "Sources in turn, within a source by the hash of the prompt: not chosen by anyone. Where a method has several seeds, "
    f"its first answers. Texts longer than {_ANSWER_CHARACTERS} characters are cut, with the rest counted."
)


def _sample_blocks(number, sample):
    yield Heading(f"{number}. {sample['source']}, row {sample['id']}", 3)
    names = [name for name in sample if name not in ("source", "id")]
    yield Table(("who", "text"), tuple((name, _shortened(sample[name])) for name in names), n_text=2)


def _shortened(text):
    if not text.strip():
        return "(empty)"
    rest = len(text) - _ANSWER_CHARACTERS
    return text if rest <= 0 else f"{text[:_ANSWER_CHARACTERS]} ... ({rest} more characters)"
