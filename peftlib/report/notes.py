"""What a report says in sentences: what was compared, how it was measured, what it does not show."""

from peftlib.evaluation import forgetting, rouge, stats
from peftlib.evaluation.comparison import mean_of
from peftlib.evaluation.metrics import bleu_signature
from peftlib.evaluation.results import BASE
from peftlib.train import run_record

UNKNOWN = "n/a"


def opening(found):
    """Sentences on the model, its provenance and the test rows."""
    records = [run.record for run in found.runs]
    models = dict.fromkeys((record["model"], record["model_provenance"]) for record in records)
    for model, provenance in models:
        yield f"Model: {model} ({provenance or 'where its weights come from is not recorded'})."
    counts = {source: sum(row["source"] == source for row in found.test_rows) for source in found.sources}
    listed = ", ".join(f"{n} {source}" for source, n in counts.items())
    yield f"Test rows: {len(found.test_rows)} ({listed}), the same for every method; split {found.split_hash}."


def table_note(found):
    """How to read the table of methods, and what became of runs without a result."""
    parts = [
        "Before: the untrained model. After: the trained one, scores in 0-1, mean over seeds.",
        "Test loss: nats per assistant token. Memory and time: of training, mean over finished seeds.",
        f"{UNKNOWN}: not known.",
    ]
    known = [run.general for run in found.runs if run.general is not None]
    if known:
        tokens = " or ".join(f"{n:,}" for n in dict.fromkeys(loss.n_tokens for loss in known))
        parts.insert(
            2,
            f"General text loss: nats per token on {tokens} tokens of {forgetting.TEXT_NAME}, which nobody trained on; "
            "a rise against base is what was forgotten.",
        )
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


def pairs_note(pairs, n_seeds):
    """How to read the paired differences. n_seeds: the most that a method has."""
    noise = sum(pair.difference.is_noise for pair in pairs)
    many = (
        " The interval also counts that other seeds might come out otherwise, and p does not: a small p beside 'inside the "
        "noise' says that these very runs differ, and that too few seeds were run to tell whether the methods do."
    )
    return (
        f"Each line is score(method) - score(other) on the same rows. {noise} of {len(pairs)} differences are inside the "
        "noise: their 95 % interval contains 0. Of methods that do not differ, about one pair in twenty looks different "
        "by chance. p: two-sided, by swapping the methods' answers row by row." + (many if n_seeds > 1 else "")
    )


def source_note(per_source):
    """Whether each source has rows enough."""
    few = [f"{s} {n}" for s, n in per_source.groupby("source", sort=False)["n"].first().items() if n < stats.FEW_ROWS]
    if not few:
        return "Each source has enough rows for its intervals."
    return f"Sources with fewer than {stats.FEW_ROWS} rows ({', '.join(few)}): their intervals are wide and rough."


def score_note():
    """What the less known scores mean."""
    return (
        "length ratio: words of the answers over words of the references. repetition: share of an answer's 4-grams that "
        "stood in it before. cut by limit: answers that met the token limit."
    )


def limits(found):
    """What the numbers do not show."""
    for run in found.runs:
        yield from run_record.change_sentences(run.record)
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


def methods(found):
    """How each number was made."""
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
