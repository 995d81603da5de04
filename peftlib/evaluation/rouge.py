"""ROUGE as rouge_score computes it, with words of any script and a longest common subsequence fast enough for 6,000 rows.

rouge_score drops every character outside a-z and 0-9, so that Russian or Chinese text scores 0. Here a word is a run of
letters, digits and marks of any script, or one character of a script written without spaces. On ASCII text the words are
rouge_score's own, and so are the scores (tested to 1e-12). No stemming.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

VARIANT = (
    "F1, mean over rows; words: rouge_score's on ASCII, any script beyond it; no stemmer; rougeL: whole text, "
    "rougeLsum: by line"
)
_ASCII_WORD = re.compile(r"[a-z0-9]+")
# First and last code point of the scripts that put no space between words.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration mark and zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0xFF66, 0xFF9D),  # half-width Katakana
    (0x20000, 0x3FFFF),  # Han, extensions B and later
)


def words(text):
    """[word, ...] in lower case; equal to rouge_score's default tokenizer where the text is ASCII."""
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    found, run, is_after_one = [], [], False
    for character in unicodedata.normalize("NFC", text):
        kind = kind_of(character)
        if kind == "letter" or (kind == "mark" and run):
            run.append(character)
            is_after_one = False
            continue
        if run:
            found.append("".join(run))
            run = []
        if kind == "unspaced":
            found.append(character)
        elif kind == "mark" and is_after_one:
            found[-1] += character  # a vowel sign belongs to the character before it
        is_after_one = kind == "unspaced" or (kind == "mark" and is_after_one)
    return [*found, "".join(run)] if run else found


def ascii_words(text):
    """[word, ...] of a-z and 0-9 in lower case: rouge_score's default tokenizer."""
    return _ASCII_WORD.findall(text.lower())


def is_unspaced(character):
    """True for a letter of a script written without spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar)."""
    return kind_of(character) == "unspaced"


@lru_cache(maxsize=4096)
def kind_of(character):
    """'letter' (or digit), 'mark' (on the letter before it), 'unspaced' (a word by itself), or 'gap'."""
    category = unicodedata.category(character)[0]
    if category == "M":
        return "mark"
    if category not in "LN":
        return "gap"
    point = ord(character)
    return "unspaced" if any(low <= point <= high for low, high in _UNSPACED) else "letter"


def rouge_n(prediction, reference, n):
    """F1 over n-grams of two word lists, 0-1."""
    left, right = ngrams(prediction, n), ngrams(reference, n)
    hits = sum((left & right).values())
    return _f1(hits, max(sum(left.values()), 1), max(sum(right.values()), 1))


def rouge_l(prediction, reference):
    """F1 over the longest common subsequence of two word lists, 0-1; 0 where one is empty."""
    if not prediction or not reference:
        return 0.0
    rows = _lcs_rows(reference, prediction)
    return _f1(rows[-1].bit_count(), len(prediction), len(reference))


def rouge_lsum(prediction_lines, reference_lines):
    """F1 over the union of each reference line's longest common subsequences with the answer's lines, 0-1.

    Both are lists of word lists. A word counts as often as it stands in both texts, as in ROUGE-1.5.5.
    """
    n_prediction, n_reference = sum(map(len, prediction_lines)), sum(map(len, reference_lines))
    if not n_prediction or not n_reference:
        return 0.0
    left = Counter(word for line in reference_lines for word in line)
    right = Counter(word for line in prediction_lines for word in line)
    hits = 0
    for line in reference_lines:
        matched = set().union(*(_lcs_positions(line, other) for other in prediction_lines))
        for position in sorted(matched):
            word = line[position]
            if left[word] > 0 and right[word] > 0:
                hits += 1
                left[word] -= 1
                right[word] -= 1
    return _f1(hits, n_prediction, n_reference)


def lines_of(text):
    """The text's lines that are not empty: what rougeLsum takes for sentences."""
    return [line for line in text.split("\n") if line]


def _f1(hits, n_prediction, n_reference):
    # The same order of operations as rouge_score's, so that the last digit agrees too.
    precision, recall = hits / n_prediction, hits / n_reference
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def ngrams(tokens, n):
    """Counter of the tuples of n consecutive tokens."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def _lcs_rows(reference, prediction):
    """One integer per prefix of `reference`: bit j is set where the table of LCS lengths grows at column j.

    Hyyro's bit-parallel recurrence (2004); a row's length up to column j is the number of set bits there.
    """
    places = {}
    for j, word in enumerate(prediction):
        places[word] = places.get(word, 0) | (1 << j)
    full = (1 << len(prediction)) - 1
    flat = full  # bit j set: no growth at column j
    rows = [0]
    for word in reference:
        match = places.get(word)
        if match is not None:
            hit = flat & match
            flat = ((flat + hit) | (flat - hit)) & full
        rows.append(full & ~flat)
    return rows


def _lcs_positions(reference, prediction):
    """Positions in `reference` of the subsequence that rouge_score's walk back through its table picks."""
    if not prediction:
        return []
    rows = _lcs_rows(reference, prediction)
    i, j, picked = len(reference), len(prediction), []
    while i > 0 and j > 0:
        mask = (1 << j) - 1
        if reference[i - 1] == prediction[j - 1]:
            picked.append(i - 1)
            i, j = i - 1, j - 1
        elif (rows[i] & mask).bit_count() > (rows[i - 1] & mask).bit_count():
            j -= 1  # the cell to the left is the larger one
        else:
            i -= 1
    return picked
