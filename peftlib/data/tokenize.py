"""Candidates as token ids and masks, cut after whole turns, in batches and with worker processes."""

import contextlib
import functools
import os
from dataclasses import dataclass

import numpy as np

from peftlib.models import chat_template as chat
from peftlib.models.load import load_tokenizer

_ROWS_WORTH_A_WORKER = 400  # starting one costs about as much as tokenizing these
_BATCH = 64
_THREADS = "TOKENIZERS_PARALLELISM"
_COLUMNS = {"ids": "int32", "is_scored": "bool", "turn_ends": "int32"}


@dataclass
class Tokenized:
    """ids: (T,) int32. is_scored: (T,) bool. turn_ends: ids up to and with each kept turn, the last of
    them scored; empty where not even the first scored answer fits."""

    ids: np.ndarray
    is_scored: np.ndarray
    turn_ends: list


def tokenize(model, candidates, *, max_length, workers):
    """[Tokenized, ...] of candidates, with at most `max_length` ids each.

    model: as in a config; workers open its tokenizer themselves where they do not inherit it. workers: processes, 0 is
    one per core. The result does not depend on it.
    """
    workers = min(workers or os.cpu_count() or 1, 1 + len(candidates) // _ROWS_WORTH_A_WORKER)
    _tokenizer(model)  # opened before the workers start, so that a fork has it
    made = _mapped(candidates, workers, {"model": model, "max_length": max_length})
    return [row for batch in made.data.to_batches() for row in _unpacked(batch)]


def _mapped(candidates, workers, settings):
    import datasets

    columns = {name: datasets.List(datasets.Value(kind)) for name, kind in _COLUMNS.items()}
    given = {name: [getattr(candidate, name) for candidate in candidates] for name in ("texts", "unscored")}
    with _quiet_workers(datasets):
        return datasets.Dataset.from_dict(given).map(
            _encode_batch,
            batched=True,
            batch_size=_BATCH,
            num_proc=workers if workers > 1 else None,
            remove_columns=list(given),
            features=datasets.Features(columns),
            fn_kwargs=settings,
            new_fingerprint=f"peftlib-{os.urandom(8).hex()}",  # else the tokenizer would be hashed for a cache
            keep_in_memory=True,
        )


@contextlib.contextmanager
def _quiet_workers(datasets):
    """No progress bars; and one thread a worker, as they share the cores, and a fork of a threaded tokenizer warns."""
    were_off, threads = datasets.are_progress_bars_disabled(), os.environ.get(_THREADS)
    datasets.disable_progress_bars()
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
        if threads is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = threads


def _unpacked(batch):
    columns = [batch.column(name) for name in _COLUMNS]
    flat = [column.flatten().to_numpy(zero_copy_only=False) for column in columns]
    ends = [np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False)) for column in columns]
    for i in range(batch.num_rows):
        ids, is_scored, turn_ends = (
            values[(end[i - 1] if i else 0) : end[i]] for values, end in zip(flat, ends, strict=True)
        )
        yield Tokenized(ids, is_scored, turn_ends.tolist())


def _encode_batch(batch, *, model, max_length):
    conversations = [as_messages(texts) for texts in batch["texts"]]
    columns = {name: [] for name in _COLUMNS}
    for encoded, unscored in zip(chat.encode_many(_tokenizer(model), conversations), batch["unscored"], strict=True):
        kept = sum(end <= max_length for end in encoded.turn_ends) // 2 * 2  # whole exchanges
        while kept and kept - 1 in unscored:  # what follows the last scored answer teaches nothing
            kept -= 2
        end = encoded.turn_ends[kept - 1] if kept else 0
        columns["ids"].append(encoded.input_ids[:end])
        columns["is_scored"].append(_scored(encoded, unscored)[:end])
        columns["turn_ends"].append(encoded.turn_ends[:kept])
    return columns


def _scored(encoded, unscored):
    """The flags of is_scored, without the turns that are not learned."""
    scored = list(encoded.is_scored)
    for turn in unscored:
        start, end = encoded.turn_ends[turn - 1], encoded.turn_ends[turn]
        scored[start:end] = [False] * (end - start)
    return scored


def as_messages(texts):
    """[{role, content}, ...] of texts that take turns, user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@functools.cache
def _tokenizer(model):
    return load_tokenizer(model)


def max_chars(model, max_length):
    """Characters beyond which a text has more than `max_length` tokens, as none stands for more than the longest."""
    return max_length * max(map(len, _tokenizer(model).get_vocab()))
