"""Which earlier conversations nearly equal a new one: an exact set-similarity search, so none is missed.

Two conversations of Jaccard similarity t or more on their gram sets must share a gram among the first
n - ceil(t n) + 1 of each in any fixed order of all grams (prefix filtering: Chaudhuri et al. 2006; Bayardo et al. 2007,
"Scaling up all pairs similarity search"). The order here is by hash, so it depends on no corpus, no seed and no machine.
"""

import hashlib
import math
import re
import unicodedata
from collections import Counter

import numpy as np

THRESHOLD = 0.8
GRAM_WORDS = 5
_WORD = re.compile(r"\w+")
_WORDS_REMEMBERED = 500_000
# Odd multipliers that make a gram's hash depend on the order of its words.
_MIX = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
    dtype=np.uint64,
)


def normalised(texts):
    """The text of turns for comparison: NFKC, casefolded, white space runs as one space, turns joined by a space."""
    return " ".join(unicodedata.normalize("NFKC", " ".join(texts)).casefold().split())


def prompt_sha256(texts):
    """SHA-256 of the normalised text of a prompt's turns."""
    return hashlib.sha256(normalised(texts).encode()).hexdigest()


class Grams:
    """Texts as sorted arrays of 64-bit hashes of their distinct word 5-grams."""

    def __init__(self):
        self._word_hashes = {}

    def __call__(self, texts):
        """(n,) uint64, ascending, n >= 1: texts of fewer than five words are one gram as a whole."""
        text = normalised(texts)
        words = _WORD.findall(text)
        if len(words) < GRAM_WORDS:
            return np.array([_hash(" ".join(words) or text)], dtype=np.uint64)
        hashes = self._hashes(words)
        n = len(words) - GRAM_WORDS + 1
        mixed = sum(hashes[i : i + n] * _MIX[i] for i in range(GRAM_WORDS))  # modulo 2**64
        mixed ^= mixed >> np.uint64(32)
        return np.unique(mixed * _MIX[0])

    def _hashes(self, words):
        known = self._word_hashes
        if len(known) > _WORDS_REMEMBERED:  # else a source's rare words would fill the memory
            known.clear()
        for word in set(words) - known.keys():
            known[word] = _hash(word)
        return np.fromiter(map(known.__getitem__, words), dtype=np.uint64, count=len(words))


def _hash(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def jaccard(a, b):
    """Shared grams over all grams of two gram sets."""
    shared = np.intersect1d(a, b, assume_unique=True).size
    return shared / (a.size + b.size - shared)


class NearIndex:
    """Gram sets in the order added, and the search for those near a new one."""

    def __init__(self):
        self.sets = []
        self._holders = {}  # gram -> number of the set whose prefix holds it, or a list of them

    def add(self, grams):
        number = len(self.sets)
        self.sets.append(grams)
        for gram in _prefix(grams).tolist():
            holders = self._holders.get(gram)
            if holders is None:
                self._holders[gram] = number
            elif isinstance(holders, list):
                holders.append(number)
            else:
                self._holders[gram] = [holders, number]

    def near(self, grams):
        """Numbers of all sets of Jaccard similarity >= THRESHOLD to `grams`, ascending."""
        shared = Counter()
        for gram in _prefix(grams).tolist():
            holders = self._holders.get(gram)
            if holders is not None:
                shared.update(holders if isinstance(holders, list) else (holders,))
        return [n for n in sorted(shared) if self._may_be_near(grams, n) and jaccard(grams, self.sets[n]) >= THRESHOLD]

    def _may_be_near(self, grams, number):
        size, other = grams.size, self.sets[number].size
        return min(size, other) >= THRESHOLD * max(size, other)


def _prefix(grams):
    return grams[: grams.size - math.ceil(THRESHOLD * grams.size - 1e-9) + 1]
