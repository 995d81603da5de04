"""The blocks of a report: its tables, lists and paragraphs, from a Report's numbers."""

import math

from peftlib import rouge, stats
from peftlib.comparison import mean_of
from peftlib.document import Bullets, Heading, Paragraph, Picture, Table
from peftlib.metrics import bleu_signature
from peftlib.results import gib
from peftlib.scored import BASE, BASE_CUT

UNKNOWN = "n/a"
_ANSWER_CHARACTERS = 700
# What the study this one grew from printed: mean over 5 samples of each sample's BLEU-4 and ROUGE-L.
_ORIGINAL = {"base": (0.0085, 0.1355), "qlora": (0.0227, 0.1632)}
_METHOD_HEADER = (
    "technique",
    "BLEU-4 before",
    "BLEU-4 after (95 %)",
    "ROUGE-L before",
    "ROUGE-L after (95 %)",
    "test loss before",
    "test loss after",
    "peak memory GiB",
    "training min",
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
    blocks = [Heading(f"Study {study.folder.name}", 1), *map(Paragraph, _opening(study, found))]
    blocks += [Heading("Result"), Table(*method_table(found, boot))]
    blocks += [Paragraph(_table_note(found))]
    if report.notes:
        blocks += [
            Paragraph("Not matched between runs, so differences may come from this:"),
            Bullets(tuple(report.notes)),
        ]
    if report.findings:
        blocks += [Heading("Findings"), Bullets(tuple(report.findings))]
    blocks += [Picture(path, report.alt[name]) for name, path in report.figures.items()]
    if pairs:
        blocks += [Heading("Differences between methods"), Paragraph(_pairs_note(pairs)), _pair_table(pairs)]
        blocks += [Heading("By source"), _source_table(report.per_source), Paragraph(_source_note(report.per_source))]
        blocks += [Heading("All scores"), _score_table(report.scores), *map(Paragraph, _score_notes(found))]
    spread = _spread_table(found)
    if spread.rows:
        blocks += [Heading("Over seeds"), spread]
    blocks += [Heading("Runs"), _run_table(found)]
    if report.samples:
        blocks += [Heading("Answers side by side"), Paragraph(_SAMPLES_NOTE)]
        blocks += [block for number, sample in enumerate(report.samples, 1) for block in _sample_blocks(number, sample)]
    blocks += [Heading("What this does not show"), Bullets(tuple(_limits(found, boot, pairs)))]
    blocks += [Heading("How it was measured"), Bullets(tuple(_methods(found)))]
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
            rows.append((name, *cells, "", "", "", ""))
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
    if is_base:
        return [*cells, "", ""]
    memory = mean_of(finished, lambda run: gib(run.record["peak_memory_bytes"]))
    seconds = mean_of(finished, lambda run: run.record["train_seconds"])
    return [*cells, _number(memory, ".2f"), _number(None if seconds is None else seconds / 60, ".1f")]


def _scored(boot, method, metric, with_interval=True):
    if boot is None or method not in boot.value:
        return UNKNOWN
    found = boot.interval(method, metric)
    text = f"{found.value:.4f}"
    return f"{text} ({found.low:.4f} to {found.high:.4f})" if with_interval else text


def _number(value, form):
    return UNKNOWN if value is None else format(value, form)


def _opening(study, found):
    records = [run.record for run in found.runs]
    models = dict.fromkeys((record["model"], record["model_provenance"]) for record in records)
    for model, provenance in models:
        yield f"Model: {model} ({provenance or 'where its weights come from is not recorded'})."
    counts = {source: sum(row["source"] == source for row in found.test_rows) for source in found.sources}
    listed = ", ".join(f"{n} {source}" for source, n in counts.items())
    yield f"Test rows: {len(found.test_rows)} ({listed}), the same for every method; split {found.split_hash}."


def _table_note(found):
    parts = [
        "Before: the untrained model. After: the trained one, scores in 0-1, mean over seeds.",
        "Test loss: nats per assistant token. Memory and time: of training, mean over finished seeds.",
        f"{UNKNOWN}: not known.",
    ]
    failed = [run for run in found.runs if run.record["status"] != "ok"]
    for run in failed:
        error = f": {run.record['error']}" if run.record["error"] else ""
        done, planned = run.record["steps"], run.record["planned_steps"]
        at = f" at step {done} of {planned}" if done is not None and planned is not None else ""
        parts.append(f"{run.name} {run.record['status']}{at}{error}.")
    unscored = [run.name for run in found.runs if run.record["status"] == "ok" and not run.is_scored]
    if unscored:
        parts.append(f"No answers yet, so no scores: {', '.join(unscored)} (04_eval makes them).")
    return " ".join(parts)


def _pairs_note(pairs):
    noise = sum(pair.difference.is_noise for pair in pairs)
    return (
        f"Each line is score(method) - score(other) on the same rows. {noise} of {len(pairs)} differences are inside the "
        "noise: their 95 % interval contains 0. Of methods that do not differ, about one pair in twenty looks different "
        "by chance. p: two-sided, by swapping the methods' answers row by row."
    )


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


def _source_note(per_source):
    few = [f"{s} {n}" for s, n in per_source.groupby("source", sort=False)["n"].first().items() if n < stats.FEW_ROWS]
    if not few:
        return "Each source has enough rows for its intervals."
    return f"Sources with fewer than {stats.FEW_ROWS} rows ({', '.join(few)}): their intervals are wide and rough."


def _score_table(scores):
    rows = [
        (f"{row['method']} (seed {row['seed']})", *(f"{row[name]:.4f}" for name in _SCORE_NAMES))
        for row in scores.to_dict("records")
    ]
    return Table(("run", *_SCORE_NAMES.values()), tuple(rows))


def _score_notes(found):
    yield (
        "length ratio: words of the answers over words of the references. repetition: share of an answer's 4-grams that "
        "stood in it before. cut by limit: answers that met the token limit."
    )
    listed = ", ".join(f"{m} {b:.4f} and {r:.4f}" for m, (b, r) in _ORIGINAL.items())
    yield (
        f"The study this one grew from printed per-sample BLEU-4 and ROUGE-L on 5 samples: {listed}. Its smoothing, its "
        "tokenizer and its rows are not known here, so they show the size of such figures and no more."
    )


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


def _limits(found, boot, pairs):
    n_rows = len(found.test_rows)
    yield (
        stats.few_rows_note(n_rows) + "."
        if n_rows < stats.FEW_ROWS
        else (f"{n_rows} test rows: what differs by less than the intervals above cannot be told apart.")
    )
    seeds = {method: len(runs) for method, runs in found.scored.items() if method != BASE}
    if seeds and min(seeds.values()) == 1:
        single = ", ".join(method for method, n in seeds.items() if n == 1)
        yield f"One seed ({single}): intervals hold the chance of the test rows, not that of training again."
    if len({run.record["method"] for run in found.runs if run.is_scored}) < 2:
        yield "Fewer than two methods are scored: nothing can be compared yet."
    for provenance in dict.fromkeys(run.record["model_provenance"] for run in found.runs):
        if provenance and "Q4_K_M" in provenance:
            yield (
                "The weights come from a 4-bit file (Q4_K_M), so what 4-bit training costs on them is not what it costs "
                "on the original release."
            )
    devices = dict.fromkeys(run.record["device"] for run in found.runs if run.record["device"])
    yield f"Memory and speed are those of {', '.join(devices) or 'an unrecorded device'}; other devices differ."
    yield "BLEU and ROUGE compare words with one reference; a correct answer in other words scores low."
    yield "One learning rate a method (run table) and one rank (config.json): others may order the methods otherwise."


def _methods(found):
    yield f"BLEU-4: corpus BLEU by sacrebleu, {bleu_signature(found.tokenizer)}, divided by 100."
    yield f"ROUGE: {rouge.VARIANT}."
    yield (
        "BLEU-4 per sample: nltk's sentence_bleu with smoothing method1 on whitespace words; ROUGE-L per sample: "
        "rouge_score with its own tokenizer (a-z and 0-9 only), no stemmer."
    )
    yield (
        "Intervals: 2,000 paired bootstrap resamples of the test rows (and of the seeds where there are several), "
        "percentiles widened for small samples; seeded, so the same inputs give the same report."
    )
    base = mean_of(found.scored.get(BASE, []), lambda run: run.truncated_share)
    if base is not None:
        yield (
            f"Base cut: base's answers end after {found.cut_at_words} whitespace words, the median of the references. "
            f"{base:.0%} of base's answers met the token limit, and overlong answers score low for that alone."
        )
    versions = {}
    for run in found.runs:
        for name, version in (run.record.get("versions") or {}).items():
            versions.setdefault(name, dict.fromkeys(()))[version or UNKNOWN] = None
    if versions:
        yield "Versions: " + ", ".join(f"{name} {' and '.join(found_)}" for name, found_ in versions.items()) + "."
