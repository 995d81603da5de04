"""Assign candidates to test, valid and train: exact numbers, no leak, in a fixed order of precedence.

Test rows are chosen before valid rows and these before train rows, each split source by source. A candidate that comes
too near to a row chosen before is rejected, and the next candidate of its source takes its place.
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from peftlib.data.dedup import Grams, NearIndex, prompt_key
from peftlib.data.sampling import content_of
from peftlib.data.tokenize import tokenize

SPLITS = ("test", "valid", "train")  # in order of precedence
_SAMPLE = 500  # candidates of a stream that say which grams are common


@dataclass
class Row:
    """One usable conversation, cut to length. ids: (T,) int32. is_scored: (T,) bool, all answers that are learned.
    unscored: indices in `texts` of the other answers."""

    source: str
    texts: list
    notes: tuple
    origin: str
    ids: np.ndarray
    is_scored: np.ndarray
    unscored: tuple = ()

    @property
    def content_sha256(self):
        return hashlib.sha256(content_of(self.texts, self.unscored)).hexdigest()

    @property
    def id(self):
        return f"{self.source}-{self.content_sha256[:16]}"


class Queue:
    """Iterator of the usable rows of one stream in order; they are tokenized a batch at a time, as they are drawn.

    expected: the least number of rows that will be drawn. sample: turns of the first candidates.
    """

    def __init__(self, stream, cfg, expected):
        self.stream, self._cfg, self._expected = stream, cfg, expected
        batches = stream.batches()
        first = next(batches, [])
        self.sample = [candidate.texts for candidate in first[:_SAMPLE]]
        self._rows = self._usable(itertools.chain([first], batches))

    def __iter__(self):
        return self._rows

    def reject(self, reason, **shown):
        """Count a rejected row of the stream; see Tally.reject."""
        self.stream.tally.reject(self.stream.source.name, reason, **shown)

    def _usable(self, batches):
        taken = 0  # rows of the stream that were looked at
        for batch in batches:
            at = 0
            while at < len(batch):
                # Some will be rejected; a twentieth more is cheaper than many small batches.
                part = batch[at : at + max(256, self._expected - taken + self._expected // 20)]
                at += len(part)
                cfg = self._cfg
                encoded = tokenize(cfg.model, part, max_length=cfg.max_length, workers=cfg.workers)
                for candidate, tokens in zip(part, encoded, strict=True):
                    taken += candidate.copies
                    row = self._row(candidate, *tokens)
                    if row:
                        yield row

    def _row(self, candidate, ids, is_scored, n_turns):
        shown = {"stream": self.stream.name, "origin": candidate.origin, "excerpt": candidate.texts[0][:200]}
        if candidate.copies > 1:
            self.reject("duplicate", copies=candidate.copies - 1, **shown)
        if not n_turns:
            self.reject("too_long", **shown)
            return None
        texts, notes = candidate.texts[:n_turns], candidate.notes
        if n_turns < len(candidate.texts):
            notes = (*notes, "cut_to_length")
        unscored = tuple(turn for turn in candidate.unscored if turn < n_turns)
        return Row(self.stream.source.name, texts, notes, candidate.origin, ids, is_scored, unscored)


class LeakFilter:
    """Admits rows to a split, or says which row admitted before they would leak. sample: as for dedup.Grams."""

    def __init__(self, sample):
        self._grams, self._index = Grams(sample), NearIndex()
        self._admitted = []  # (split, id) by number in the index
        self._prompts = {}  # prompt_key of each admitted row -> (split, id)

    def admit(self, row, split):
        """Add a row to a split; returns None, or, where it is not admitted, (reason, id of the row in its way)."""
        # Training scores every answer, so each turn's history is a prompt of the row; the last is its own.
        prompts = [prompt_key(row.texts[:n]) for n in range(1, len(row.texts), 2)]
        for where, other in (self._prompts[p] for p in prompts if p in self._prompts):
            if where != split:
                return f"prompt_in_{where}", other
        if prompts[-1] in self._prompts:
            return "prompt_repeated", self._prompts[prompts[-1]][1]
        grams = self._grams(row.texts)
        near = [self._admitted[number] for number in self._index.near(grams)]
        if near:
            where, other = min(near, key=lambda holder: SPLITS.index(holder[0]))
            return ("near_duplicate" if where == split else f"near_duplicate_of_{where}"), other
        self._index.add(grams)
        self._admitted.append((split, row.id))
        self._prompts[prompts[-1]] = (split, row.id)
        return None


def choose(queues, quotas):
    """{split: [Row, ...]}, fewer of a source than its quota where it runs out. A rejected row is replaced by the next.

    queues: {(source, split): Queue}, one Queue for several splits where they share a stream; sources in order of
    precedence. quotas: {(source, split): rows}.
    """
    leaks = LeakFilter([texts for queue in dict.fromkeys(queues.values()) for texts in queue.sample])
    chosen = {split: [] for split in SPLITS}
    for split in SPLITS:
        for source in dict.fromkeys(source for source, _ in queues):
            rows = _admitted(queues[source, split], leaks, split)
            chosen[split] += itertools.islice(rows, quotas[source, split])
    return chosen


def _admitted(queue, leaks, split):
    for row in queue:
        refusal = leaks.admit(row, split)
        if refusal is None:
            yield row
        else:
            reason, other = refusal
            queue.reject(reason, split=split, id=row.id, other=other, excerpt=row.texts[0][:200])
