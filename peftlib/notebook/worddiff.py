"""Which words of an answer are the reference's, in its order, and which are not."""

import difflib
import re
import unicodedata
from itertools import groupby

from peftlib.evaluation import rouge

SAME, OTHER = "same", "other"
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+")


def marked(answer, reference):
    """[(SAME or OTHER, text), ...] whose texts join to the answer.

    Words are ROUGE's (any script, case and punctuation do not count); what stands between two words belongs to the
    one before it. Longest common runs first (difflib), so that a phrase stays in one piece.
    """
    places, wanted = _places(answer), [_key(reference[a:b]) for a, b in _places(reference)]
    own = [_key(answer[a:b]) for a, b in places]
    blocks = difflib.SequenceMatcher(None, wanted, own, autojunk=False).get_matching_blocks()
    shared = {at for block in blocks for at in range(block.b, block.b + block.size)}
    starts = [0, *(a for a, _ in places[1:])] if places else []
    ends = [*starts[1:], len(answer)]
    words = [(SAME if at in shared else OTHER, answer[a:b]) for at, (a, b) in enumerate(zip(starts, ends))]
    if not words and answer:
        return [(OTHER, answer)]
    return [(kind, "".join(text for _, text in run)) for kind, run in groupby(words, key=lambda word: word[0])]


def _key(word):
    return unicodedata.normalize("NFC", word).lower()


def _places(text):
    """[(start, end), ...] of the words in a text."""
    if text.isascii():
        return [found.span() for found in _ASCII_WORD.finditer(text)]
    places, start = [], None
    for at, character in enumerate(text):
        kind = rouge.kind_of(character)
        if kind == "letter" or (kind == "mark" and start is not None):
            start = at if start is None else start
            continue
        if start is not None:
            places.append((start, at))
            start = None
        if kind == "unspaced":
            places.append((at, at + 1))
        elif kind == "mark" and places and places[-1][1] == at:
            places[-1] = places[-1][0], at + 1
    return places if start is None else [*places, (start, len(text))]
