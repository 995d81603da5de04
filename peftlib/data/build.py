"""Build a study's data, from its sources to the files in its folder."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peftlib.core.config import Config
from peftlib.core.errors import DataError, require_writable, writing
from peftlib.core.files import MANIFEST, readable_path
from peftlib.data.dedup import GRAM_WORDS, THRESHOLD
from peftlib.data.outcomes import (
    NOTES,
    REASONS,
    Tally,
    in_proportion,
    require_row_per_split,
    require_rows,
    shortfall_line,
    shortfalls,
)
from peftlib.data.sampling import Stream
from peftlib.data.sources import parse_sources
from peftlib.data.split import SPLITS, Queue, choose
from peftlib.data.store import split_hash, standing_manifest, write_data
from peftlib.models import chat_template
from peftlib.models.load import tokenizer_sha256
from peftlib.storage.lock import held

_CODE_VERSION = 2  # increase when existing data must be rebuilt
_SPARE = 1.25  # candidates held per wanted row, so that a second pass over the source is rarely needed


def build_data(cfg: Config, folder: str | Path, log: Callable[[str], object] = print) -> dict[str, Any]:
    """Write train/valid/test.parquet, rejects.jsonl, README.md and, last, manifest.json; returns the manifest.

    Existing data from the same inputs are kept. log: called with progress lines.
    DataError: a source cannot be read or has too few rows (see allow_short). ConfigError: `sources` is malformed.
    ModelError: no tokenizer. DiskError: the folder cannot be written. StudyError: another session is using it.
    """
    folder, sources = Path(folder), parse_sources(cfg.sources, most=cfg.max_read_rows)
    try:
        for source in sources:
            source.check()
    except DataError as error:  # such as a file that a new machine does not have
        if (folder / MANIFEST).exists():
            kept = f"What was built before is in {readable_path(folder)}, and the next notebooks need no source"
            error.args = (f"{error}. {kept}",)
        raise
    inputs = _inputs(cfg, sources)
    manifest = standing_manifest(folder, inputs)
    if manifest is not None:
        log(f"data already built from the same inputs: split {manifest['split_hash']}")
        return manifest

    require_writable(folder)
    asked = {"test": cfg.test_rows, "valid": cfg.valid_rows, "train": cfg.train_rows}
    quotas = {(source.name, split): n for source in sources for split, n in asked.items()}
    while True:  # repeated if a stream runs out and its rows have to be divided among its splits
        tallies = {source.name: Tally(source, log) for source in sources}
        queues = _read_candidates(cfg, tallies, asked)  # each tokenizes rows on demand
        splits = choose(queues, quotas)  # without leaks; a rejected row is replaced by the next
        found = {split: Counter(row.source for row in rows) for split, rows in splits.items()}
        counts = {split: {name: found[split][name] for name in tallies} for split in sorted(splits)}
        require_rows(counts, asked, tallies, allow_short=cfg.allow_short)
        shared_out = _shared_out(queues, counts, asked, quotas, log)
        if not shared_out:
            break
        quotas |= shared_out
    require_row_per_split(counts, asked, tallies)

    manifest = _manifest(queues, splits, counts, asked, inputs)
    for line in _remarks(manifest):
        log(line)
    examples = [example for tally in tallies.values() for example in tally.examples]
    with writing(folder), held(folder.parent, "building the data", log=log):
        return write_data(folder, splits, examples, manifest)


def _inputs(cfg, sources):
    """Everything that determines the rows, as JSON values."""
    fields = ("train_rows", "valid_rows", "test_rows", "split_seed", "allow_short", "max_length")
    return {
        "code_version": _CODE_VERSION,
        "sources": {source.name: source.identity() for source in sources},
        **{name: getattr(cfg, name) for name in fields},
        **({"max_read_rows": cfg.max_read_rows} if cfg.max_read_rows else {}),  # older data lack this field
        "tokenizer_sha256": tokenizer_sha256(cfg.model),
        "template_sha256": chat_template.TEMPLATE_SHA256,
    }


def _read_candidates(cfg, tallies, asked):
    """{(source, split): Queue}; splits that draw from the same rows share one."""
    queues = {}
    for source, tally in tallies.items():
        has_own = "test" in tally.source.streams
        for name, splits in ({"test": ("test",), "main": ("valid", "train")} if has_own else {"main": SPLITS}).items():
            expected = sum(asked[split] for split in splits)
            stream = Stream(name, tally, seed=cfg.split_seed, n_held=int(expected * _SPARE) + 512)
            queue = Queue(stream, cfg, expected)
            queues |= {(source, split): queue for split in splits}
    return queues


def _shared_out(queues, counts, asked, quotas, log):
    """New quotas that divide each exhausted stream's rows among its splits in the requested proportions."""
    new = {}
    for queue in dict.fromkeys(queues.values()):
        keys = [key for key, drawn in queues.items() if drawn is queue]
        n_rows = sum(counts[split][source] for source, split in keys)
        is_done = any(quotas[source, split] != asked[split] for source, split in keys)
        if not is_done and n_rows < sum(asked[split] for _, split in keys):
            log(f"{keys[0][0]} has only {n_rows:,} usable rows: dividing them in the requested proportions")
            shares = in_proportion(n_rows, {split: asked[split] for _, split in keys})
            # Training rows are chosen last and take everything that is left.
            new |= {(source, split): shares[split] for source, split in keys if split != "train"}
    return {key: n for key, n in new.items() if quotas[key] != n}


def _manifest(queues, splits, counts, asked, inputs):
    """What the data are and how they were made, as JSON values. For each source, read = chosen + rejected + unused."""
    streams = [queue.stream for queue in dict.fromkeys(queues.values())]
    tallies = {stream.source.name: stream.tally for stream in streams}
    chosen = {name: [row for rows in splits.values() for row in rows if row.source == name] for name in tallies}
    rejected = {name: dict(sorted(tally.rejected.items())) for name, tally in tallies.items()}
    notes = {name: dict(sorted(Counter(n for row in rows for n in row.notes).items())) for name, rows in chosen.items()}
    return {
        "counts": counts,
        "short": shortfalls(counts, asked),
        "rejected": rejected,
        "split_hash": split_hash(splits),
        "read": {name: tally.read for name, tally in tallies.items()},
        "unused": {name: t.read - t.rejected.total() - len(chosen[name]) for name, t in tallies.items()},
        "conversions": notes,
        "ignored_fields": {name: dict(sorted(tally.ignored.items())) for name, tally in tallies.items()},
        "tokens": {split: {name: _token_statistics(splits[split], name) for name in tallies} for split in counts},
        "sources": {
            name: {
                **tally.source.provenance(),
                **inputs["sources"][name],
                "schema": {stream.name: stream.schema for stream in streams if stream.source.name == name},
            }
            for name, tally in tallies.items()
        },
        "template_sha256": chat_template.TEMPLATE_SHA256,
        "template_source": chat_template.TEMPLATE_SOURCE,
        "tokenizer_sha256": inputs["tokenizer_sha256"],
        "near_duplicate": {"jaccard_at_least": THRESHOLD, "words_a_gram": GRAM_WORDS},
        "meaning": {"rejected": _meaning(REASONS, rejected), "conversions": _meaning(NOTES, notes)},
        "inputs": inputs,
    }


def _token_statistics(rows, source):
    """Token counts of a source's rows in one split; None if it has no rows."""
    own = [row for row in rows if row.source == source]
    if not own:
        return None
    lengths = np.array([row.ids.size for row in own])
    return {
        "total": int(lengths.sum()),
        "scored": int(sum(row.is_scored.sum() for row in own)),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
    }


def _meaning(texts, counted):
    return {name: text for name, text in texts.items() if any(name in counts for counts in counted.values())}


def _remarks(manifest):
    """Yield lines about sources with too few rows and about unused fields."""
    yield from (shortfall_line(name, splits) for name, splits in manifest["short"].items())
    for name, found in manifest["ignored_fields"].items():
        if found:
            yield f"{name}: unused fields: {', '.join(map(ascii, found))[:300]}"
