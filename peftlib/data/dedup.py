"""Find the earlier conversations that are near-duplicates of a new one, by an exact set-similarity search.

Two conversations whose gram sets have a Jaccard similarity of t or more must share a gram among the first
n - ceil(t n) + 1 of each in any fixed order of all grams (prefix filtering: Chaudhuri et al. 2006; Bayardo et al. 2007,
"Scaling up all pairs similarity search"). We order by hash, with grams that are common in a sample last, so that rows
that only share a template share no prefix. The order affects the time of a search, never its result.
"""

import hashlib
import math
import re
import unicodedata
from collections import Counter

import numpy as np

THRESHOLD = 0.8
GRAM_WORDS = 5
# Two readings: a word is a run of letters and digits, or a run of anything but white space. Rows are near-duplicates if
# either reading says so: each one alone misses some in Tulu's rows.
READINGS = (re.compile(r"\w+"), re.compile(r"\S+"))
_SHARE = THRESHOLD / (1 + THRESHOLD)  # fraction of the summed sizes that must be shared to reach the threshold
_WORDS_REMEMBERED = 500_000
_COMMON = 3  # a gram is common if this many conversations of a sample have it
_ROUNDING = 1e-9  # keeps a product like 0.8 * 35 from being rounded up past the exact integer
_QUOTES = "\"'"
_STRAIGHT_QUOTES = str.maketrans(dict.fromkeys("“”„‟«»", '"') | dict.fromkeys("‘’‚‛‹›", "'"))
_QUOTES_AND_STOPS = re.compile(r"[\"'.,;:!?]{2,}")
# Odd multipliers, so that a gram's hash depends on word order.
_MIX = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
    dtype=np.uint64,
)


def normalised(texts):
    """The text of turns for comparison: NFKC, casefolded, white space collapsed, turns joined by a space."""
    return " ".join(unicodedata.normalize("NFKC", " ".join(texts)).casefold().split())


def prompt_sha256(texts):
    """SHA-256 of the normalised text of a prompt's turns. Files refer to prompts by it, so it never changes."""
    return hashlib.sha256(normalised(texts).encode()).hexdigest()


def prompt_key(texts):
    """Digest of a prompt's turns, equal for prompts that must not be in two splits.

    In addition to `normalised`, all kinds of quotes are equal, and so are 'this.' and 'this'. with the full stop
    inside or outside the quotes.
    """
    text = normalised(texts).translate(_STRAIGHT_QUOTES)
    return hashlib.sha256(_QUOTES_AND_STOPS.sub(_quotes_first, text).encode()).digest()


def _quotes_first(found):
    return "".join(sorted(found[0], key=lambda mark: mark not in _QUOTES))


class Grams:
    """Texts as sorted arrays of 63-bit hashes of their distinct word 5-grams, one array for each of READINGS.

    sample: the turns of some conversations; grams that several of them share get the 64th bit set, so they sort last.
    """

    def __init__(self, sample=()):
        self._word_hashes = _WordHashes()
        self._common = [np.empty(0, dtype=np.uint64) for _ in READINGS]
        if sample:
            self._common = [_frequent(sets) for sets in zip(*map(self, sample), strict=True)]

    def __call__(self, texts):
        """[(n,) uint64 ascending, n >= 1, for each of READINGS] of a conversation; under five words are one gram."""
        text = normalised(texts)
        found = [self._grams(text, reading.findall(text)) for reading in READINGS]
        return [_common_last(grams, common) for grams, common in zip(found, self._common, strict=True)]

    def _grams(self, text, words):
        if len(words) < GRAM_WORDS:
            return np.array([_hash(" ".join(words) or text)], dtype=np.uint64) >> np.uint64(1)
        if len(self._word_hashes) > _WORDS_REMEMBERED:  # otherwise rare words would fill the memory
            self._word_hashes.clear()
        hashes = np.fromiter(map(self._word_hashes.__getitem__, words), dtype=np.uint64, count=len(words))
        n = len(words) - GRAM_WORDS + 1
        mixed = sum(hashes[i : i + n] * _MIX[i] for i in range(GRAM_WORDS))  # modulo 2**64
        mixed ^= mixed >> np.uint64(32)
        return np.unique(mixed * _MIX[0] >> np.uint64(1))


def _frequent(sets):
    grams, counts = np.unique(np.concatenate(sets), return_counts=True)
    return grams[counts >= _COMMON]


def _common_last(grams, common):
    is_common = np.isin(grams, common, assume_unique=True)
    return np.sort(grams | is_common.astype(np.uint64) << np.uint64(63)) if is_common.any() else grams


class _WordHashes(dict):
    def __missing__(self, word):
        self[word] = value = _hash(word)
        return value


def _hash(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def jaccard(a, b):
    """Shared grams divided by all grams of two gram sets."""
    shared = np.intersect1d(a, b, assume_unique=True).size
    return shared / (a.size + b.size - shared)


class NearIndex:
    """An index of conversations, numbered from 0, that finds the near-duplicates of a new one."""

    def __init__(self):
        self._readings = [_SetIndex() for _ in READINGS]

    def add(self, grams):
        """Add what a Grams call returned."""
        for index, one in zip(self._readings, grams, strict=True):
            index.add(one)

    def near(self, grams):
        """Ascending numbers of all conversations with a Jaccard similarity of THRESHOLD or more in any reading."""
        return sorted({n for index, one in zip(self._readings, grams, strict=True) for n in index.near(one)})


class _SetIndex:
    """The gram sets of one reading."""

    def __init__(self):
        self._sets, self._prefix_ends, self._lefts = [], [], []  # last gram of each prefix; number of grams behind it
        self._holders = {}  # gram -> number of the set whose prefix has it, or a list of them

    def add(self, grams):
        number, prefix = len(self._sets), _prefix(grams)
        self._sets.append(grams)
        self._prefix_ends.append(int(prefix[-1]))
        self._lefts.append(grams.size - prefix.size)
        for gram in prefix.tolist():
            holders = self._holders.get(gram)
            if holders is None:
                self._holders[gram] = number  # most grams have one holder, and a list for each would fill the memory
            elif isinstance(holders, list):
                holders.append(number)
            else:
                self._holders[gram] = [holders, number]

    def near(self, grams):
        shared, prefix = Counter(), _prefix(grams).tolist()
        for gram in prefix:
            holders = self._holders.get(gram, ())
            shared.update(holders if isinstance(holders, (list, tuple)) else (holders,))
        return [number for number, n in shared.items() if self._is_near(grams, prefix, number, n)]

    def _is_near(self, grams, prefix, number, n_shared):
        # All shared grams are known up to the end of the prefix that ends first; after it, that set has so many left.
        left = grams.size - len(prefix) if prefix[-1] <= self._prefix_ends[number] else self._lefts[number]
        least = _SHARE * (grams.size + self._sets[number].size) - _ROUNDING
        return n_shared + left >= least and jaccard(grams, self._sets[number]) >= THRESHOLD


def _prefix(grams):
    return grams[: grams.size - math.ceil(THRESHOLD * grams.size - _ROUNDING) + 1]
