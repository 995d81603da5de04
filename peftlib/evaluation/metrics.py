"""Scores of answers against references: corpus BLEU-4 (sacrebleu), ROUGE (rouge_score's), chrF, and plain warnings.

All scores lie in 0-1. A row's share in them is kept as numbers that can be summed (`RowScores`), so that a bootstrap
of 2,000 resamples is a matrix product and not 2,000 evaluations.
"""

import math
import re
import statistics
from dataclasses import dataclass, fields, replace

import numpy as np

from peftlib.core.errors import DataError
from peftlib.evaluation import rouge

_ORDER = 4
_EPSILON = 0.1  # nltk's SmoothingFunction().method1
_DEFAULT_TOKENIZER = "13a"


@dataclass(frozen=True)
class RowScores:
    """Per-row statistics, one entry a row, in the order of the predictions.

    bleu: (n, 10) float64 whole numbers: answer length, reference length, matched 1-4-grams, answer's 1-4-grams.
    rouge1, rouge2, rougeL, rougeLsum, sample_bleu4, sample_rougeL: (n,) F1 or score, 0-1.
    n_words, n_reference_words: (n,) words by whitespace. repetition: (n,) share of 4-grams seen before in the answer.
    is_empty: (n,) answer of nothing but whitespace.
    """

    bleu: np.ndarray
    rouge1: np.ndarray
    rouge2: np.ndarray
    rougeL: np.ndarray
    rougeLsum: np.ndarray
    sample_bleu4: np.ndarray
    sample_rougeL: np.ndarray
    n_words: np.ndarray
    n_reference_words: np.ndarray
    repetition: np.ndarray
    is_empty: np.ndarray

    def __len__(self):
        return len(self.rougeL)

    def subset(self, rows):
        """The statistics of some rows (a mask or positions)."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def scores(self):
        """{name: value} of everything that follows from the rows alone (all but chrF)."""
        return {
            "bleu4": float(corpus_bleu(self.bleu.sum(axis=0))),
            **{name: _mean(getattr(self, name)) for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
            "sample_bleu4": _mean(self.sample_bleu4),
            "sample_rougeL": _mean(self.sample_rougeL),
            "length_ratio": float(self.n_words.sum() / max(self.n_reference_words.sum(), 1)),
            "empty_share": _mean(self.is_empty),
            "repetition": _mean(self.repetition),
        }


def score(predictions, references, *, tokenizer=None):
    """{metric: value} of answers against one reference each.

    bleu4: corpus BLEU-4 by sacrebleu (tokenizer 13a unless most of the references' letters belong to scripts without
    spaces, see `bleu_tokenizer`), 0-1. rouge1, rouge2, rougeL, rougeLsum: mean F1, 0-1. chrf: corpus chrF2, 0-1.
    sample_bleu4: mean over rows of sentence BLEU on whitespace words, as nltk's sentence_bleu with method1 smoothing.
    sample_rougeL: mean over rows of rouge_score's own ROUGE-L (a-z and 0-9 only). length_ratio: words of the answers
    over words of the references. empty_share: answers of nothing but whitespace. repetition: mean over answers of the
    share of 4-grams (whitespace words) that stood in the same answer before. n: rows. bleu_signature, chrf_signature,
    rouge_variant: how they were made.
    DataError: no rows, lists of unequal length, or an entry that is no text.
    """
    predictions, references = checked_pairs(predictions, references)
    tokenizer = tokenizer or bleu_tokenizer(references)
    rows = row_scores(predictions, references, tokenizer=tokenizer)
    chrf, chrf_signature = corpus_chrf(predictions, references)
    return {
        "n": len(predictions),
        **rows.scores(),
        "chrf": chrf,
        "bleu_signature": bleu_signature(tokenizer),
        "chrf_signature": chrf_signature,
        "rouge_variant": rouge.VARIANT,
    }


def row_scores(predictions, references, *, tokenizer=None):
    """RowScores of answers against one reference each. Errors as in `score`."""
    predictions, references = checked_pairs(predictions, references)
    bleu = _sacrebleu(tokenizer or bleu_tokenizer(references))
    counts = [_bleu_counts(bleu, *pair) for pair in zip(predictions, references)]
    rows = [_row(*pair) for pair in zip(predictions, references)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return RowScores(bleu=np.array(counts, dtype=np.float64), **columns)


def corpus_bleu(counts):
    """BLEU-4 in 0-1 from summed statistics, as sacrebleu's compute_bleu with its default 'exp' smoothing.

    counts: (..., 10), see RowScores.bleu; the result has the leading shape.
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
        grams = rouge.ngrams(left, n)
        matched = sum((grams & rouge.ngrams(right, n)).values())
        if n == 1 and not matched:
            return 0.0
        logs.append(math.log((matched or _EPSILON) / max(sum(grams.values()), 1)))
    penalty = 1.0 if len(left) > len(right) else math.exp(1 - len(right) / len(left))
    return penalty * math.exp(math.fsum(logs) / _ORDER)


def repeated_share(text, n=4):
    """Share of an answer's n-grams of whitespace words that stood in it before, 0-1; 0 below n words."""
    grams = rouge.ngrams(text.split(), n)
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def corpus_chrf(predictions, references):
    """(chrF2 in 0-1, sacrebleu's signature)."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    value = metric.corpus_score(list(predictions), [list(references)]).score / 100
    return value, str(metric.get_signature())


def bleu_tokenizer(references):
    """sacrebleu's tokenizer for these references: '13a', or 'zh' / 'char' where most letters need it.

    13a takes a Chinese, Japanese or Thai clause for one word, and BLEU-4 of such text is then 0. Only references
    decide, so that all methods of a comparison get the same one.
    """
    letters = unspaced = han = 0
    for text in references:
        if text.isascii():
            letters += sum(map(str.isalpha, text))
            continue
        for character in text:
            letters += character.isalpha()
            if rouge.is_unspaced(character):
                unspaced += 1
                han += "\u3400" <= character <= "\u9fff"
    if unspaced * 2 <= letters:
        return _DEFAULT_TOKENIZER
    return "zh" if han == unspaced else "char"


def bleu_signature(tokenizer=_DEFAULT_TOKENIZER):
    """sacrebleu's signature of the BLEU used here, with its version."""
    metric = _sacrebleu(tokenizer)
    metric.corpus_score(["a"], [["a"]])  # the number of references enters the signature with the first score
    return str(metric.get_signature())


def median_words(references):
    """Median number of whitespace words of the references, rounded up."""
    return math.ceil(statistics.median(len(text.split()) for text in references))


def cut_words(text, n_words):
    """The text up to the end of its n-th whitespace word, its inner whitespace unchanged; whole where shorter."""
    if n_words <= 0:
        return ""
    for position, match in enumerate(re.finditer(r"\S+", text), start=1):
        if position == n_words:
            return text[: match.end()]
    return text


def checked_pairs(predictions, references):
    """Both as lists of texts. DataError: none, unequal lengths, or an entry that is no text."""
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise DataError(f"{name} is one text: give a list of texts, one a row")
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions and {len(references)} references: give one reference for each prediction"
        )
    if not predictions:
        raise DataError("no predictions: nothing to score, generate answers first")
    for name, texts in (("prediction", predictions), ("reference", references)):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{name} of row {row} is {text!r}, no text: give a text for every row ('' if empty)")
    return predictions, references


def _row(prediction, reference):
    left, right = rouge.words(prediction), rouge.words(reference)
    rouge_l = rouge.rouge_l(left, right)
    return {
        "rouge1": rouge.rouge_n(left, right, 1),
        "rouge2": rouge.rouge_n(left, right, 2),
        "rougeL": rouge_l,
        "rougeLsum": rouge.rouge_lsum(*([rouge.words(s) for s in rouge.lines_of(t)] for t in (prediction, reference))),
        "sample_bleu4": sentence_bleu(prediction, reference),
        "sample_rougeL": rouge.rouge_l(rouge.ascii_words(prediction), rouge.ascii_words(reference)),
        "n_words": len(prediction.split()),
        "n_reference_words": len(reference.split()),
        "repetition": repeated_share(prediction),
        "is_empty": not prediction.strip(),
    }


def _bleu_counts(metric, prediction, reference):
    found = metric.corpus_score([prediction], [[reference]])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _sacrebleu(tokenizer):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer)


def _mean(values):
    return float(np.mean(values))
