"""Candidates of a stream, in an order that depends only on their content and the seed, in constant memory.

While the stream is read, only the first n_held convertible rows in that order are kept. If these are not enough, the
stream is read again for the next ones.
"""

import hashlib
import heapq
import itertools
import json
import time

from peftlib.data.outcomes import Broken, RowRejected
from peftlib.data.schemas import SCHEMAS, convert, schema_of

_SILENT_SECONDS = 10.0  # at most about this long between log lines while reading
_LOOK_AHEAD = 100  # rows that determine a stream's schema


class Stream:
    """The rows of one stream of a source as candidates, ordered by `seed`; the first pass detects `schema`.

    tally: the source's. n_held: candidates in memory at a time.
    """

    def __init__(self, name, tally, *, seed, n_held):
        self.source, self.name, self.tally, self.schema = tally.source, name, tally, None
        self._seed, self._n_held = seed, n_held

    def batches(self):
        """Yield lists of distinct Rows, sorted, each list after the one before. Each takes one pass over the stream."""
        after, is_last = -1, False
        while not is_last:
            batch, is_last = self._pass(after)
            if batch:
                yield batch
                after = batch[-1].key

    def _pass(self, after):
        """(the first n_held candidates after the key `after`, whether there are no more)."""
        held, heap, is_last = {}, [], True
        for number, given in self._rows():
            row = self._converted(number, given, is_counted=after < 0)
            if row is None:
                continue
            key = int.from_bytes(hashlib.sha256(b"%d\0" % self._seed + row.content()).digest(), "big")
            if key <= after:
                continue
            if key in held:
                known = held[key]
                known.copies += 1
                # The smallest, so that the order of rows does not matter.
                known.origin, known.notes = min(known.origin, row.origin), min(known.notes, row.notes)
            elif len(heap) < self._n_held or key < -heap[0]:
                if len(heap) == self._n_held:
                    # A dropped candidate never comes back: n_held smaller keys are known. So `copies` is exact.
                    del held[-heapq.heappop(heap)]
                    is_last = False
                heapq.heappush(heap, -key)
                row.key, held[key] = key, row
            else:
                is_last = False
        return [held[key] for key in sorted(held)], is_last

    def _rows(self):
        """Yield (row number, row or Broken); detects the schema first, and logs progress from time to time."""
        rows = self.source.rows(self.name)
        if self.schema is None:
            head, label = list(itertools.islice(rows, _LOOK_AHEAD)), self.source.label(self.name)
            self.schema = schema_of(head, label)
            self.tally.log(f"{self.source.name}: {label} is read as {SCHEMAS[self.schema]}")
            rows = itertools.chain(head, rows)
        last = time.monotonic()
        for number, row in rows:
            if number % 1000 == 0 and time.monotonic() - last > _SILENT_SECONDS:
                last = time.monotonic()
                self.tally.log(f"{self.source.name}: {number:,} rows read")
            yield number, row

    def _converted(self, number, given, *, is_counted):
        """Convert what a reader gave to a Row, or None; counts it in the tally."""
        self.tally.read += is_counted
        try:
            if isinstance(given, Broken):
                raise RowRejected(given.reason)
            row = convert(given, self.schema)
        except RowRejected as rejected:
            if is_counted:
                excerpt = given.excerpt if isinstance(given, Broken) else _excerpt(given)
                shown = {"stream": self.name, "row": number, "field": rejected.field, "excerpt": excerpt}
                self.tally.reject(rejected.reason, **shown)
            return None
        if is_counted:
            self.tally.ignored.update(row.ignored)
        return row


def _excerpt(row):
    try:
        return json.dumps(row, ensure_ascii=True, default=ascii)[:200]
    except (RecursionError, ValueError, TypeError):
        return f"a {type(row).__name__} that cannot be shown"
