"""Candidates into test, valid and train: exact numbers, no leak, in a fixed order of precedence.

Test rows are chosen before valid rows and these before train rows, each split source by source. A candidate that comes
too near to a row chosen before is rejected, and the next candidate of its source takes its place.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass

import numpy as np

from peftlib.data import near
from peftlib.data.tokens import tokenize

SPLITS = ("test", "valid", "train")  # in order of precedence


@dataclass
class Row:
    """One chosen conversation, cut to length. grams: near.Grams of texts."""

    source: str
    texts: list
    notes: tuple
    origin: str
    ids: np.ndarray
    is_scored: np.ndarray
    grams: list

    @property
    def content_sha256(self):
        return hashlib.sha256(json.dumps(self.texts, ensure_ascii=True).encode()).hexdigest()

    @property
    def id(self):
        return f"{self.source}-{self.content_sha256[:16]}"


class Queue:
    """The usable rows of one stream in order, tokenized some at a time. expected: rows that will be taken at least."""

    def __init__(self, stream, cfg, expected):
        self.source, self.tally = stream.source.name, stream.tally
        self.stream, self.cfg, self.expected = stream, cfg, expected
        self.taken = 0  # rows of the stream that were looked at
        self._grams = near.Grams()
        self._rows = self._usable()

    def __iter__(self):
        return self._rows

    def _usable(self):
        for batch in self.stream.batches():
            at = 0
            while at < len(batch):
                # Some will be rejected; a twentieth more is cheaper than many small batches.
                size = max(256, self.expected - self.taken + self.expected // 20)
                part = batch[at : at + size]
                at += len(part)
                tokenized = tokenize(self.cfg.model, part, max_length=self.cfg.max_length, workers=self.cfg.workers)
                yield from filter(None, map(self._row, part, tokenized))

    def _row(self, candidate, tokenized):
        self.taken += candidate.copies
        shown = {"stream": self.stream.name, "origin": candidate.origin, "excerpt": candidate.texts[0][:200]}
        if candidate.copies > 1:
            self.tally.reject(self.source, "duplicate", copies=candidate.copies - 1, **shown)
        kept = len(tokenized.turn_ends)
        if not kept:
            self.tally.reject(self.source, "too_long", **shown)
            return None
        notes = candidate.notes if kept == len(candidate.texts) else (*candidate.notes, "cut_to_length")
        texts = candidate.texts[:kept]
        return Row(self.source, texts, notes, candidate.origin, tokenized.ids, tokenized.is_scored, self._grams(texts))


class Judge:
    """Says whether a row may join a split, given all rows that joined one before."""

    def __init__(self):
        self.index = near.NearIndex()
        self.placed = []  # (split, id) by number in the index
        self.prompts = {}  # normalised prompt of each placed row -> (split, id)

    def objection(self, row, split):
        """(reason, id of the row in the way), or None."""
        own = near.prompt_sha256(row.texts[:-1])
        # Training scores every answer, so each turn's history is a prompt of the row.
        for n in range(1, len(row.texts), 2):
            holder = self.prompts.get(near.prompt_sha256(row.texts[:n]))
            if holder and holder[0] != split:
                return f"prompt_in_{holder[0]}", holder[1]
        if own in self.prompts:
            return "prompt_repeated", self.prompts[own][1]
        found = [self.placed[number] for number in self.index.near(row.grams)]
        if not found:
            return None
        where, identity = min(found, key=lambda holder: SPLITS.index(holder[0]))
        return ("near_duplicate" if where == split else f"near_duplicate_of_{where}"), identity

    def place(self, row, split):
        self.index.add(row.grams)
        self.placed.append((split, row.id))
        self.prompts[near.prompt_sha256(row.texts[:-1])] = (split, row.id)


def choose(queues, wanted):
    """({split: [Row, ...]}, {(split, source): rows missing}).

    queues: {(source, split): Queue}, one Queue standing for several splits where they share a stream; sources in order
    of precedence. wanted: {split: rows a source}.
    """
    judge, chosen, missing = Judge(), {}, {}
    for split in SPLITS:
        chosen[split] = []
        for source in dict.fromkeys(source for source, _ in queues):
            rows = list(itertools.islice(_accepted(queues[source, split], judge, split), wanted[split]))
            chosen[split] += rows
            if len(rows) < wanted[split]:
                missing[split, source] = wanted[split] - len(rows)
    return chosen, missing


def _accepted(queue, judge, split):
    for row in queue:
        objection = judge.objection(row, split)
        if objection is None:
            judge.place(row, split)
            yield row
        else:
            reason, other = objection
            queue.tally.reject(queue.source, reason, split=split, id=row.id, other=other, excerpt=row.texts[0][:200])
