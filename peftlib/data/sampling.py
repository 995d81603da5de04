"""Candidates of a stream in an order that only their content and the seed decide, in memory that a stream's size does
not change.

Of all convertible rows only the first so many are kept while the stream passes by. Should these not be enough, the
stream passes by again for the next ones.
"""

import hashlib
import heapq
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from peftlib.data.detection import schema_of
from peftlib.data.outcomes import Broken, RowRejected
from peftlib.data.schemas import SCHEMAS, convert

_EXAMPLES = 5  # rejected rows kept a reason, to look at
_SILENT_SECONDS = 10.0  # of reading, at most about
_LOOK_AHEAD = 100  # rows that decide a stream's schema


@dataclass
class Candidate:
    """One distinct conversation. key: its place in the order. copies: rows of the stream that hold it. unscored: places
    in `texts` of answers that are not learned."""

    key: int
    texts: list
    notes: tuple
    origin: str
    unscored: tuple = ()
    copies: int = 1


@dataclass
class Tally:
    """What became of a source's rows.

    log: takes lines of text on how it goes. ignored: {field that was not used and may mean something: rows with it}.
    """

    log: Callable = print
    read: int = 0
    rejected: Counter = field(default_factory=Counter)
    ignored: Counter = field(default_factory=Counter)
    examples: list = field(default_factory=list)  # dicts for rejects.jsonl

    def reject(self, source, reason, *, copies=1, **shown):
        """Count `copies` rows, and keep what is shown of them while examples of the reason are few."""
        if sum(e["reason"] == reason for e in self.examples) < _EXAMPLES:
            self.examples.append({"source": source, "reason": reason, **shown})
        self.rejected[reason] += copies


@dataclass(frozen=True)
class Limits:
    """rows: candidates held at a time. chars: more of them cannot fit max_length, whatever they are."""

    rows: int
    chars: int


class Stream:
    """The rows of one stream of a source as candidates, ordered by `seed`; `schema` is found on the first pass."""

    def __init__(self, source, name, tally, *, seed, limits):
        self.source, self.name, self.tally = source, name, tally
        self.seed, self.limits = seed, limits
        self.schema = None

    def batches(self):
        """Yields lists of Candidate, each in order and all behind the one before; the next pass runs when asked for."""
        after = -1
        while True:
            batch, is_last = self._pass(after)
            if batch:
                yield batch
            if is_last:
                return
            after = batch[-1].key

    def _pass(self, after):
        """(the first limits.rows candidates behind the key `after`, whether these are all)."""
        held, heap, is_last = {}, [], True
        for number, row in self._told(self._rows()):
            converted = self._converted(number, row, is_counted=after < 0)
            if converted is None:
                continue
            key = self._key(converted)
            if key <= after:
                continue
            if key in held:
                held[key].copies += 1
                held[key].origin = min(held[key].origin, converted.origin)
                held[key].notes = min(held[key].notes, converted.notes)  # so that the order of rows decides nothing
            elif len(heap) < self.limits.rows or key < -heap[0]:
                if len(heap) == self.limits.rows:
                    # What falls out never comes back: as many smaller keys as are held are known. So `copies` is exact.
                    del held[-heapq.heappop(heap)]
                    is_last = False
                heapq.heappush(heap, -key)
                texts = self._affordable(converted.texts)
                held[key] = Candidate(key, texts, converted.notes, converted.origin, converted.unscored)
            else:
                is_last = False
        return [held[key] for key in sorted(held)], is_last

    def _rows(self):
        rows = self.source.rows(self.name)
        if self.schema is None:
            head = list(itertools.islice(rows, _LOOK_AHEAD))
            label = self.source.label(self.name)
            self.schema = schema_of(head, label)
            self.tally.log(f"{self.source.name}: {label} is read as {SCHEMAS[self.schema]}")
            rows = itertools.chain(head, rows)
        return rows

    def _told(self, rows):
        """The rows, with a line now and then for who waits."""
        last = time.monotonic()
        for number, row in rows:
            if number % 1000 == 0 and time.monotonic() - last > _SILENT_SECONDS:
                last = time.monotonic()
                self.tally.log(f"{self.source.name}: {number:,} rows read")
            yield number, row

    def _converted(self, number, row, *, is_counted):
        """The Conversation of a row, or None; counts it in the tally."""
        self.tally.read += is_counted
        try:
            if isinstance(row, Broken):
                raise RowRejected(row.reason)
            converted = convert(row, self.schema)
            if is_counted:
                self.tally.ignored.update(converted.ignored)
            return converted
        except RowRejected as rejected:
            if is_counted:
                excerpt = row.excerpt if isinstance(row, Broken) else _excerpt(row)
                shown = {"stream": self.name, "row": number, "field": rejected.field, "excerpt": excerpt}
                self.tally.reject(self.source.name, rejected.reason, **shown)
            return None

    def _key(self, conversation):
        content = content_of(conversation.texts, conversation.unscored)
        return int.from_bytes(hashlib.sha256(b"%d\0" % self.seed + content).digest(), "big")

    def _affordable(self, texts):
        """The turns up to and with the first that goes beyond limits.chars, that one cut but still too long for certain."""
        room = self.limits.chars
        for i, text in enumerate(texts):
            if len(text) > room:
                # One character more than fits is as much too long as a million.
                return [*texts[:i], text[: room + 1]]
            room -= len(text)
        return texts


def content_of(texts, unscored):
    """Bytes that are equal where conversations are: texts, and which answers are not learned."""
    return json.dumps([texts, unscored] if unscored else texts, ensure_ascii=True).encode()


def _excerpt(row):
    """A row's beginning as ASCII text, however it is made."""
    try:
        return json.dumps(row, ensure_ascii=True, default=ascii)[:200]
    except (RecursionError, ValueError, TypeError):
        return f"a {type(row).__name__} that cannot be shown"
