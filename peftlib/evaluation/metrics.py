"""Per-row statistics that determine all scores, so that 2,000 bootstrap resamples are one matrix product.

All scores are in 0-1. hf_metrics uses them to score answers.
"""

import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np

from peftlib.evaluation import rouge

_ORDER = 4
_EPSILON = 0.1  # nltk's SmoothingFunction().method1
_MEANS = (
    "rougeL",
    "sample_bleu4",
    "sample_rougeL",
    "empty_share",
    "repetition",
)  # scores that are the mean of a column


@dataclass(frozen=True)
class RowScores:
    """Per-row statistics, one entry per row, in the order of the predictions.

    bleu: (n, 10), see bleu_counts. rougeL, sample_bleu4, sample_rougeL: (n,) F1 or score, 0-1.
    n_words, n_reference_words: (n,) whitespace words. repetition: (n,) share of 4-grams seen before in the answer.
    empty_share: (n,) 1 for an answer with only whitespace.
    """

    bleu: np.ndarray
    rougeL: np.ndarray
    sample_bleu4: np.ndarray
    sample_rougeL: np.ndarray
    n_words: np.ndarray
    n_reference_words: np.ndarray
    repetition: np.ndarray
    empty_share: np.ndarray

    def __len__(self):
        return len(self.rougeL)

    def subset(self, rows):
        """The statistics of some rows (a mask or positions)."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def scores(self):
        """{name: value} of all scores that the rows determine (all except chrF)."""
        return scores_of(vars(self))


def scores_of(rows):
    """{name: value} of the scores that {column of RowScores: values} determines, for any subset of columns."""
    found = {"bleu4": float(corpus_bleu(rows["bleu"].sum(axis=0)))} if "bleu" in rows else {}
    found |= {name: float(np.mean(rows[name])) for name in _MEANS if name in rows}
    if "n_words" in rows:
        found["length_ratio"] = float(rows["n_words"].sum() / max(rows["n_reference_words"].sum(), 1))
    return found


def bleu_counts(predictions, references, tokenizer):
    """(n, 10) integers from sacrebleu: answer length, reference length, matched 1-4-grams, answer's 1-4-grams."""
    metric = _sacrebleu(tokenizer)
    found = [metric.corpus_score([answer], [[wanted]]) for answer, wanted in zip(predictions, references)]
    return np.array([[f.sys_len, f.ref_len, *f.counts, *f.totals] for f in found], dtype=np.float64)


def corpus_bleu(counts):
    """BLEU-4 in 0-1 from summed statistics, like sacrebleu's compute_bleu with its default 'exp' smoothing.

    counts: (..., 10), see bleu_counts; the result has the leading shape.
    """
    counts = np.asarray(counts, dtype=np.float64)
    length, reference = counts[..., 0], counts[..., 1]
    matched, total = counts[..., 2:6], counts[..., 6:10]
    is_zero = matched == 0
    # The k-th order without a match counts as 1 / 2^k of one match.
    smoothed = np.where(is_zero, 0.5 ** np.cumsum(is_zero, axis=-1), matched)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log(smoothed) - np.log(total)
        penalty = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        value = penalty * np.exp(log_precision.mean(axis=-1))
    is_undefined = is_zero.all(axis=-1) | (total == 0).any(axis=-1) | (length == 0)
    return np.where(is_undefined, 0.0, value)


def sentence_bleu(prediction, reference):
    """BLEU-4 of one answer on whitespace words, 0-1: nltk's sentence_bleu with SmoothingFunction().method1."""
    left, right = prediction.split(), reference.split()
    logs = []
    for n in range(1, _ORDER + 1):
        grams = ngrams(left, n)
        matched = sum((grams & ngrams(right, n)).values())
        if n == 1 and not matched:
            return 0.0
        logs.append(math.log((matched or _EPSILON) / max(sum(grams.values()), 1)))
    penalty = 1.0 if len(left) > len(right) else math.exp(1 - len(right) / len(left))
    return penalty * math.exp(math.fsum(logs) / _ORDER)


def ngrams(tokens, n):
    """Counter of the tuples of n consecutive tokens."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def bleu_tokenizer(references):
    """sacrebleu's tokenizer for these references: '13a', or 'zh' / 'char' if most letters need it.

    13a treats a Chinese, Japanese or Thai clause as one word, which makes BLEU-4 0. Only the references decide, so
    that all methods of a comparison use the same tokenizer.
    """
    text = "".join(references)
    unspaced = rouge.UNSPACED.findall(text)
    if 2 * len(unspaced) <= sum(map(str.isalpha, text)):
        return "13a"
    return "zh" if all("\u3400" <= character <= "\u9fff" for character in unspaced) else "char"


def bleu_signature(tokenizer):
    """sacrebleu's signature of the BLEU used here, with its version."""
    metric = _sacrebleu(tokenizer)
    metric.corpus_score(["a"], [["a"]])  # the signature includes the number of references only after a first score
    return str(metric.get_signature())


def repeated_share(text, n=4):
    """Share of an answer's n-grams of whitespace words that occurred in it before, 0-1; 0 below n words."""
    grams = ngrams(text.split(), n)
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def median_words(references):
    """Median number of whitespace words of the references, rounded up."""
    return math.ceil(statistics.median(len(text.split()) for text in references))


def cut_words(text, n_words):
    """The text up to the end of its n-th whitespace word, with its whitespace unchanged; the whole text if shorter."""
    ends = [0, *(word.end() for word in re.finditer(r"\S+", text))]
    return text[: ends[n_words]] if n_words < len(ends) else text


def _sacrebleu(tokenizer):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer)
