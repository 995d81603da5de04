"""The data of a study, from sources to the files in its folder."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.data import card
from peftlib.data import dedup as near
from peftlib.data.outcomes import NOTES, REASONS
from peftlib.data.sampling import Limits, Stream, Tally
from peftlib.data.shortage import in_proportion, refuse, refuse_empty, refuse_useless, short_line, short_of
from peftlib.data.sources import parse_sources
from peftlib.data.split import SPLITS, Queue, choose
from peftlib.data.store import MANIFEST, file_hashes, split_hash, standing_manifest, write_rejects, write_split
from peftlib.data.tokenize import max_chars
from peftlib.models import chat_template as chat
from peftlib.models.load import tokenizer_sha256
from peftlib.storage.lock import held

_CODE_VERSION = 2  # raised whenever the same inputs would give other rows
_SPARE = 1.25  # candidates held for each row wanted, so that a second pass over the source is rarely needed


def build_data(cfg, folder, log=print):
    """Write train/valid/test.parquet, rejects.jsonl, README.md and, last, manifest.json; returns the manifest.

    Data that stand there already, made from the same inputs, are left as they are.
    DataError: a source that cannot be read, or that falls short (see allow_short). ConfigError: `sources` is malformed.
    ModelError: no tokenizer. StudyError: the folder cannot be written, or another session works in it.
    """
    folder = Path(folder)
    sources = parse_sources(cfg.sources)
    for source in sources:
        source.check()
    inputs = _inputs(cfg, sources)
    manifest = standing_manifest(folder, inputs)
    if manifest is not None:
        log(f"data stand already: split {manifest['split_hash']}, made from the same inputs")
        return manifest
    wanted = {"test": cfg.test_rows, "valid": cfg.valid_rows, "train": cfg.train_rows}
    queues, chosen, tallies = _chosen(cfg, sources, wanted, log)
    manifest = _manifest(sources, queues, chosen, inputs, wanted)
    _say(manifest, log)
    try:
        with held(folder.parent, "building the data", log=log):
            _write(folder, manifest, chosen, tallies)
    except OSError as error:
        raise StudyError(
            f"{folder} cannot be written ({error.strerror or error}): free some space there, or set PEFTLIB_ROOT to another "
            "place"
        ) from error
    return read_json(folder / MANIFEST)


def _chosen(cfg, sources, wanted, log):
    """(queues, {split: [Row, ...]}, {source: Tally}). DataError: a source falls short, or a split stays empty.

    Where a stream runs out and that is allowed, all is chosen again, with a limit on what each split takes of it.
    """
    limits = {(source.name, split): n for source in sources for split, n in wanted.items()}
    shared_out = []
    while True:
        tallies = {source.name: Tally(log) for source in sources}
        queues = _queues(cfg, sources, wanted, tallies)
        chosen = choose(queues, limits)
        counts = {split: {source.name: _count(chosen[split], source.name) for source in sources} for split in SPLITS}
        short = short_of(counts, wanted)
        refuse_useless(counts, sources, tallies)
        if short and not cfg.allow_short:
            refuse(short, sources, tallies)
        ran_out = [places for places in _ran_out(queues, counts, wanted) if places not in shared_out]
        if not ran_out:
            refuse_empty({split: counts[split] for split in SPLITS if wanted[split]}, sources, tallies)
            return queues, chosen, tallies
        for places in ran_out:
            n_rows = sum(counts[split][source] for source, split in places)
            log(f"{places[0][0]} runs out after {n_rows:,} rows: they are shared out in the proportions asked")
            shares = in_proportion(n_rows, {split: wanted[split] for _, split in places})
            # Training rows are chosen last and take all that is left.
            limits |= {(source, split): shares[split] for source, split in places if split != "train"}
        shared_out += ran_out


def _ran_out(queues, counts, wanted):
    """[[(source, split), ...], ...] of the streams that gave fewer rows than their splits want together."""
    streams = [[place for place, drawn in queues.items() if drawn is queue] for queue in dict.fromkeys(queues.values())]
    return [
        places
        for places in streams
        if sum(counts[split][source] for source, split in places) < sum(wanted[split] for _, split in places)
    ]


def _say(manifest, log):
    for name, splits in manifest["short"].items():
        log(short_line(name, splits))
    for name, found in manifest["ignored_fields"].items():
        if found:
            log(f"{name}: fields that are not used: {', '.join(map(ascii, found))[:300]}")


def _write(folder, manifest, chosen, tallies):
    (folder / MANIFEST).unlink(missing_ok=True)  # it must never stand beside files that it does not describe
    for split in SPLITS:
        write_split(folder, split, chosen[split])
    write_rejects(folder, [example for tally in tallies.values() for example in tally.examples])
    card.write_card(folder, manifest)
    write_json(folder / MANIFEST, {**manifest, "files": file_hashes(folder)})


def _inputs(cfg, sources):
    """Everything that decides what the rows are, JSON values."""
    fields = ("train_rows", "valid_rows", "test_rows", "split_seed", "allow_short", "max_length")
    return {
        "code_version": _CODE_VERSION,
        "sources": {source.name: source.identity() for source in sources},
        **{name: getattr(cfg, name) for name in fields},
        "tokenizer_sha256": tokenizer_sha256(cfg.model),
        "template_sha256": chat.TEMPLATE_SHA256,
    }


def _queues(cfg, sources, wanted, tallies):
    """{(source, split): Queue}; splits that draw on the same rows share one."""
    chars = max_chars(cfg.model, cfg.max_length)
    queues = {}
    for source in sources:
        own = {"test": ("test",), "main": ("valid", "train")} if "test" in source.streams else {"main": SPLITS}
        for name, splits in own.items():
            expected = sum(wanted[split] for split in splits)
            limits = Limits(rows=int(expected * _SPARE) + 512, chars=chars)
            stream = Stream(source, name, tallies[source.name], seed=cfg.split_seed, limits=limits)
            queue = Queue(stream, cfg, expected)
            queues |= {(source.name, split): queue for split in splits}
    return queues


def _manifest(sources, queues, chosen, inputs, wanted):
    names = [source.name for source in sources]
    per_source = {name: [row for rows in chosen.values() for row in rows if row.source == name] for name in names}
    tallies = {queue.source: queue.tally for queue in queues.values()}
    rejected = {name: dict(sorted(tallies[name].rejected.items())) for name in names}
    notes = {
        name: dict(sorted(Counter(note for row in per_source[name] for note in row.notes).items())) for name in names
    }
    schemas = defaultdict(dict)
    for queue in queues.values():
        schemas[queue.source][queue.stream.name] = queue.stream.schema
    counts = {split: {name: _count(chosen[split], name) for name in names} for split in sorted(SPLITS)}
    return {
        "counts": counts,
        "short": short_of(counts, wanted),
        "rejected": rejected,
        "split_hash": split_hash(chosen),
        "read": {name: tallies[name].read for name in names},
        "unused": {name: tallies[name].read - sum(rejected[name].values()) - len(per_source[name]) for name in names},
        "conversions": notes,
        "ignored_fields": {name: dict(sorted(tallies[name].ignored.items())) for name in names},
        "tokens": {split: {name: _token_statistics(chosen[split], name) for name in names} for split in sorted(SPLITS)},
        "sources": {
            s.name: {**s.provenance(), **inputs["sources"][s.name], "schema": schemas[s.name]} for s in sources
        },
        "template_sha256": chat.TEMPLATE_SHA256,
        "template_source": chat.TEMPLATE_SOURCE,
        "tokenizer_sha256": inputs["tokenizer_sha256"],
        "near_duplicate": {"jaccard_at_least": near.THRESHOLD, "words_a_gram": near.GRAM_WORDS},
        "meaning": {
            "rejected": {
                reason: text for reason, text in REASONS.items() if any(reason in r for r in rejected.values())
            },
            "conversions": {note: text for note, text in NOTES.items() if any(note in n for n in notes.values())},
        },
        "inputs": inputs,
    }


def _count(rows, source):
    return sum(row.source == source for row in rows)


def _token_statistics(rows, source):
    """Numbers of tokens of a source's rows in one split; None where there is no row."""
    lengths = np.array([row.ids.size for row in rows if row.source == source])
    if not lengths.size:
        return None
    return {
        "total": int(lengths.sum()),
        "scored": int(sum(row.is_scored.sum() for row in rows if row.source == source)),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
    }
