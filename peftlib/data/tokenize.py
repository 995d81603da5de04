"""Convert rows to token ids and loss masks, truncated after whole turns, in batches and with worker processes."""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from peftlib.core.errors import DataError
from peftlib.models import chat_template
from peftlib.models.load import load_tokenizer

_ROWS_WORTH_A_WORKER = 400  # starting a worker costs about as much as tokenizing this many rows
_BATCH = 64


def tokenize(model, rows, *, max_length, workers):
    """[(ids, is_scored, n_turns), ...] of rows, with at most `max_length` ids each.

    ids: (T,) int32. is_scored: (T,) bool. n_turns: turns kept, the last of them scored; 0 if not even the first
    scored answer fits. model: as in a config. workers: processes, 0: one per core; they do not change the result.
    """
    workers = min(workers or os.cpu_count() or 1, 1 + len(rows) // _ROWS_WORTH_A_WORKER)
    _tokenizer(model)  # load it before the workers start, so that forks share it
    encode = functools.partial(_encode_batch, model=model, max_length=max_length)
    pairs = [(row.texts, row.unscored) for row in rows]
    batches = [pairs[at : at + _BATCH] for at in range(0, len(pairs), _BATCH)]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers share the cores; forking with threads would warn
    if workers == 1:
        made = map(encode, batches)
    else:
        try:
            with ProcessPoolExecutor(workers) as pool:
                made = list(pool.map(encode, batches))
        except BrokenProcessPool:
            killed = f"one of {workers} tokenizing processes was killed, perhaps out of memory"
            raise DataError(f"{killed}: set workers = 1") from None
    return [row for batch in made for row in batch]


def _encode_batch(pairs, *, model, max_length):
    encoded = chat_template.encode_many(_tokenizer(model), [as_messages(texts) for texts, _ in pairs])
    rows = []
    for one, (_, unscored) in zip(encoded, pairs, strict=True):
        n_turns = sum(end <= max_length for end in one.turn_ends) // 2 * 2  # complete exchanges
        while n_turns and n_turns - 1 in unscored:  # nothing after the last scored answer is trained on
            n_turns -= 2
        end = one.turn_ends[n_turns - 1] if n_turns else 0
        is_scored = np.array(one.is_scored[:end], bool)
        for turn in unscored:
            is_scored[one.turn_ends[turn - 1] : one.turn_ends[turn]] = False
        rows.append((np.array(one.input_ids[:end], np.int32), is_scored, n_turns))
    return rows


def as_messages(texts):
    """[{role, content}, ...] from alternating texts, user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@functools.cache
def _tokenizer(model):
    return load_tokenizer(model)
