"""Candidates as token ids and loss masks, cut after whole turns, in batches and with worker processes."""

import contextlib
import functools
import os

from peftlib.models import chat_template
from peftlib.models.load import load_tokenizer

_ROWS_WORTH_A_WORKER = 400  # starting one costs about as much as tokenizing these
_BATCH = 64
_THREADS = "TOKENIZERS_PARALLELISM"


def tokenize(model, candidates, *, max_length, workers):
    """[(ids, is_scored, n_turns), ...] of candidates, with at most `max_length` ids each.

    ids: (T,) int32. is_scored: (T,) bool. n_turns: turns kept, the last of them scored; 0 where not even the first
    scored answer fits. model: as in a config. workers: processes, 0 is one per core; they do not change the result.
    """
    import datasets

    workers = min(workers or os.cpu_count() or 1, 1 + len(candidates) // _ROWS_WORTH_A_WORKER)
    _tokenizer(model)  # opened before the workers start, so that a fork has it
    given = {name: [getattr(candidate, name) for candidate in candidates] for name in ("texts", "unscored")}
    whole, flag = datasets.Value("int32"), datasets.Value("bool")
    columns = {"ids": datasets.List(whole), "is_scored": datasets.List(flag), "n_turns": whole}
    with _quiet_workers(datasets):
        made = datasets.Dataset.from_dict(given).map(
            _encode_batch,
            batched=True,
            batch_size=_BATCH,
            num_proc=workers if workers > 1 else None,
            remove_columns=list(given),
            features=datasets.Features(columns),
            fn_kwargs={"model": model, "max_length": max_length},
            new_fingerprint=f"peftlib-{os.urandom(8).hex()}",  # else the tokenizer would be hashed for a cache
            keep_in_memory=True,
        )
    return list(zip(*(made.data.column(name).to_numpy() for name in columns), strict=True))


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


def _encode_batch(batch, *, model, max_length):
    conversations = [as_messages(texts) for texts in batch["texts"]]
    rows = []
    encoded = chat_template.encode_many(_tokenizer(model), conversations)
    for one, unscored in zip(encoded, batch["unscored"], strict=True):
        n_turns = sum(end <= max_length for end in one.turn_ends) // 2 * 2  # whole exchanges
        while n_turns and n_turns - 1 in unscored:  # what follows the last scored answer teaches nothing
            n_turns -= 2
        for turn in unscored:
            start, end = one.turn_ends[turn - 1], one.turn_ends[turn]
            one.is_scored[start:end] = [False] * (end - start)
        end = one.turn_ends[n_turns - 1] if n_turns else 0
        rows.append((one.input_ids[:end], one.is_scored[:end], n_turns))
    return dict(zip(("ids", "is_scored", "n_turns"), map(list, zip(*rows, strict=True)), strict=True))


def as_messages(texts):
    """[{role, content}, ...] of texts that take turns, user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@functools.cache
def _tokenizer(model):
    return load_tokenizer(model)


def max_chars(model, max_length):
    """Characters beyond which a text has more than `max_length` tokens, as none stands for more than the longest."""
    return max_length * max(map(len, _tokenizer(model).get_vocab()))
