"""Candidates into test, valid and train: exact numbers, no leak, in a fixed order of precedence.

Test rows are chosen before valid rows and these before train rows, each split source by source. A candidate that comes
too near to a row chosen before is rejected, and the next candidate of its source takes its place.
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from peftlib.data import dedup as near
from peftlib.data.sampling import content_of
from peftlib.data.tokenize import tokenize

SPLITS = ("test", "valid", "train")  # in order of precedence
_SAMPLE = 500  # candidates of a stream that say which grams are common


@dataclass
class Row:
    """One usable conversation, cut to length. ids: (T,) int32. is_scored: (T,) bool, all answers that are learned.
    unscored: places in `texts` of the others."""

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
    """The usable rows of one stream in order, tokenized some at a time. expected: rows that will be taken at least."""

    def __init__(self, stream, cfg, expected):
        self.source, self.tally = stream.source.name, stream.tally
        self.stream, self.cfg, self.expected = stream, cfg, expected
        self.taken = 0  # rows of the stream that were looked at
        self._batches = stream.batches()
        self._rows = self._usable()

    def __iter__(self):
        return self._rows

    def sample(self):
        """Turns of the first candidates, none of which is taken thereby."""
        first = next(self._batches, [])
        self._batches = itertools.chain([first], self._batches)
        return [candidate.texts for candidate in first[:_SAMPLE]]

    def _usable(self):
        for batch in self._batches:
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
        unscored = tuple(turn for turn in candidate.unscored if turn < kept)
        return Row(self.source, texts, notes, candidate.origin, tokenized.ids, tokenized.is_scored, unscored)


class Judge:
    """Lets rows join a split, or says why not, given all rows that joined one before. sample: see near.Grams."""

    def __init__(self, sample):
        self._grams = near.Grams(sample)
        self._index = near.NearIndex()
        self._placed = []  # (split, id) by number in the index
        self._prompts = {}  # normalised prompt of each placed row -> (split, id)

    def objection(self, row, split):
        """None, and the row has joined; or (reason, id of the row in the way)."""
        # Training scores every answer, so each turn's history is a prompt of the row; the last is its own.
        prompts = [near.prompt_key(row.texts[:n]) for n in range(1, len(row.texts), 2)]
        for where, other in (self._prompts[p] for p in prompts if p in self._prompts):
            if where != split:
                return f"prompt_in_{where}", other
        if prompts[-1] in self._prompts:
            return "prompt_repeated", self._prompts[prompts[-1]][1]
        grams = self._grams(row.texts)
        near_ones = [self._placed[number] for number in self._index.near(grams)]
        if near_ones:
            where, other = min(near_ones, key=lambda holder: SPLITS.index(holder[0]))
            return ("near_duplicate" if where == split else f"near_duplicate_of_{where}"), other
        self._index.add(grams)
        self._placed.append((split, row.id))
        self._prompts[prompts[-1]] = (split, row.id)
        return None


def choose(queues, wanted):
    """{split: [Row, ...]}: fewer of a source than wanted where it runs out.

    queues: {(source, split): Queue}, one Queue standing for several splits where they share a stream; sources in order
    of precedence. wanted: {(source, split): rows}.
    """
    judge = Judge([texts for queue in dict.fromkeys(queues.values()) for texts in queue.sample()])
    chosen = {}
    for split in SPLITS:
        chosen[split] = []
        for source in dict.fromkeys(source for source, _ in queues):
            chosen[split] += itertools.islice(_accepted(queues[source, split], judge, split), wanted[source, split])
    return chosen


def _accepted(queue, judge, split):
    for row in queue:
        objection = judge.objection(row, split)
        if objection is None:
            yield row
        else:
            reason, other = objection
            queue.tally.reject(queue.source, reason, split=split, id=row.id, other=other, excerpt=row.texts[0][:200])
