"""Assign candidates to test, valid and train: exact numbers, no leaks, in a fixed order of precedence.

Test rows are chosen first, then valid rows, then train rows, each split source by source. A candidate that is too
similar to a row chosen before is rejected, and the next candidate of its source takes its place.
"""

import itertools

from peftlib.data.dedup import Grams, NearIndex, prompt_key
from peftlib.data.tokenize import tokenize

SPLITS = ("test", "valid", "train")  # in order of precedence
_SAMPLE = 500  # candidates of a stream that determine which grams are common


class Queue:
    """Iterator over the usable rows of one stream in order; tokenizes them on demand, in batches.

    expected: the minimum number of rows that will be drawn. sample: turns of the first candidates.
    """

    def __init__(self, stream, cfg, expected):
        self.stream, self._cfg, self._expected = stream, cfg, expected
        batches = stream.batches()
        first = next(batches, [])
        self.sample = [row.texts for row in first[:_SAMPLE]]
        self._rows = self._usable(itertools.chain([first], batches))

    def __iter__(self):
        return self._rows

    def _usable(self, batches):
        cfg, taken = self._cfg, 0  # rows of the stream seen so far
        for batch in batches:
            at = 0
            while at < len(batch):
                # Some will be rejected; 5% more is cheaper than many small batches.
                part = batch[at : at + max(256, self._expected - taken + self._expected // 20)]
                at += len(part)
                encoded = tokenize(cfg.model, part, max_length=cfg.max_length, workers=cfg.workers)
                for row, tokens in zip(part, encoded, strict=True):
                    taken += row.copies
                    if self._is_usable(row, *tokens):
                        yield row

    def _is_usable(self, row, ids, is_scored, n_turns):
        """Whether a scored answer fits; truncates the row to what fits."""
        reject = self.stream.tally.reject
        shown = {"stream": self.stream.name, "origin": row.origin, "excerpt": row.texts[0][:200]}
        if row.copies > 1:
            reject("duplicate", copies=row.copies - 1, **shown)
        if not n_turns:
            reject("too_long", **shown)
            return False
        if n_turns < len(row.texts):
            row.notes = (*row.notes, "cut_to_length")
        row.texts, row.unscored = row.texts[:n_turns], tuple(turn for turn in row.unscored if turn < n_turns)
        row.source, row.ids, row.is_scored = self.stream.source.name, ids, is_scored
        return True


class LeakFilter:
    """Admits rows to a split, or says which admitted row they would leak. sample: as for dedup.Grams."""

    def __init__(self, sample):
        self._grams, self._index = Grams(sample), NearIndex()
        self._admitted = []  # (split, id) by number in the index
        self._prompts = {}  # prompt_key of each admitted row -> (split, id)

    def admit(self, row, split):
        """Add a row to a split; returns None or, if it is not admitted, (reason, id of the conflicting row)."""
        # Training scores every answer, so each turn's history is one of the row's prompts; the last is its own.
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
    """{split: [Row, ...]}, fewer than a source's quota if it runs out. A rejected row is replaced by the next.

    queues: {(source, split): Queue}, one Queue for all splits that share a stream; sources in order of
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
            shown = {"split": split, "id": row.id, "other": other, "excerpt": row.texts[0][:200]}
            queue.stream.tally.reject(reason, **shown)
