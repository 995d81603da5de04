"""Answer scoring with our own `evaluate.Metric` classes, which need no network and load nothing from the hub.

    import evaluate
    from peftlib.evaluation.hf_metrics import Bleu4, RougeL
    evaluate.combine([Bleu4(), RougeL()]).compute(predictions=answers, references=references)

Importing `evaluate` takes seconds, so import this module only to score answers.
"""

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import CHRF

from peftlib.core.errors import DataError
from peftlib.evaluation import metrics, rouge

_FEATURES = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
_BLEU_PAPER = "Papineni et al. 2002, BLEU; Post 2018, A Call for Clarity in Reporting BLEU Scores (sacrebleu)"
_ROUGE_PAPER = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries"


def score(predictions, references, *, tokenizer=None):
    """{metric: value} of answers with one reference each: all metrics below, and n, the number of rows.

    tokenizer: of corpus BLEU; None uses 13a, or the one that references in scripts without spaces need, see
    metrics.bleu_tokenizer. DataError: no rows, lists of different lengths, or an entry that is not a text.
    """
    return scored(predictions, references, tokenizer=tokenizer)[0]


def scored(predictions, references, *, tokenizer=None):
    """(result of `score`, its RowScores). DataError: as in `score`."""
    predictions, references = _texts("prediction", predictions), _texts("reference", references)
    if len(predictions) != len(references):
        counts = f"{len(predictions)} predictions and {len(references)} references"
        raise DataError(f"{counts}: give one reference for each prediction")
    parts = [Bleu4(tokenizer), RougeL(), Chrf(), PerSample(), AnswerForm()]
    found = evaluate.combine(parts).compute(predictions=predictions, references=references)
    rows = {name: values for part in parts for name, values in part.rows.items()}
    return {"n": len(predictions), **found}, metrics.RowScores(**rows)


def _texts(name, given):
    """A list of texts. DataError: no texts, or other values."""
    if isinstance(given, str):
        raise DataError(f"{name}s must be a list of texts, one per row, not a single text")
    texts = list(given)
    if not texts:
        raise DataError(f"no {name}s: nothing to score, generate answers first")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{name} of row {row} is {text!r}, not a text: give a text for every row ('' if empty)")
    return texts


class _PairMetric(evaluate.Metric):
    """A metric of answers with one reference each. After `compute`, `rows` is {column of RowScores: values}."""

    description = citation = ""

    def __init__(self, **settings):
        super().__init__(**{"keep_in_memory": True, **settings})
        self.rows = {}

    def _build_data_dir(self):
        return ""  # rows stay in memory: no cache folder is needed

    def _info(self):
        inputs = "predictions: [answer, ...] as text; references: [text, ...], one for each answer"
        how = {"inputs_description": inputs, "features": datasets.Features(_FEATURES)}
        return evaluate.MetricInfo(description=self.description, citation=self.citation, **how)

    def _compute(self, predictions, references):
        columns, of_corpus = self.measure(predictions, references)
        self.rows = {name: np.array(values) for name, values in columns.items()}
        return {**metrics.scores_of(self.rows), **of_corpus}

    def measure(self, predictions, references):
        """({column of RowScores: one number per row}, {name: value} that these do not determine)."""
        raise NotImplementedError


class Bleu4(_PairMetric):
    """{'bleu4': 0-1, 'bleu_signature'}. tokenizer: sacrebleu's; None uses the one that the references need."""

    description, citation = "Corpus BLEU-4 by sacrebleu with 'exp' smoothing, 0-1.", _BLEU_PAPER

    def __init__(self, tokenizer=None, **settings):
        super().__init__(**settings)
        self.tokenizer = tokenizer

    def measure(self, predictions, references):
        tokenizer = self.tokenizer or metrics.bleu_tokenizer(references)
        counts = metrics.bleu_counts(predictions, references, tokenizer)
        return {"bleu": counts}, {"bleu_signature": metrics.bleu_signature(tokenizer)}


class RougeL(_PairMetric):
    """{'rougeL': 0-1, 'rouge_variant'}."""

    description = "Mean F1 over the longest common subsequence of words of any script, 0-1."
    citation = _ROUGE_PAPER

    def measure(self, predictions, references):
        scores = map(rouge.rouge_l, map(rouge.words, predictions), map(rouge.words, references))
        return {"rougeL": list(scores)}, {"rouge_variant": rouge.VARIANT}


class Chrf(_PairMetric):
    """{'chrf': 0-1, 'chrf_signature'}."""

    description = "Corpus chrF2 by sacrebleu, 0-1."
    citation = "Popović 2015, chrF: character n-gram F-score for automatic MT evaluation"

    def measure(self, predictions, references):
        metric = CHRF()
        value = metric.corpus_score(predictions, [references]).score / 100
        return {}, {"chrf": value, "chrf_signature": str(metric.get_signature())}


class PerSample(_PairMetric):
    """{'sample_bleu4', 'sample_rougeL'}, 0-1: means of the rows' own scores, as in tutorials."""

    description = "Means over rows of nltk's sentence BLEU-4 (method1 smoothing) and rouge_score's ROUGE-L (a-z, 0-9)."
    citation = f"{_BLEU_PAPER}; {_ROUGE_PAPER}"

    def measure(self, predictions, references):
        bleu = map(metrics.sentence_bleu, predictions, references)
        rouge_l = map(rouge.rouge_l, map(rouge.ascii_words, predictions), map(rouge.ascii_words, references))
        return {"sample_bleu4": list(bleu), "sample_rougeL": list(rouge_l)}, {}


class AnswerForm(_PairMetric):
    """{'length_ratio', 'empty_share', 'repetition'}: whether a model rambles, says nothing or repeats itself.

    repetition: mean over answers of the share of 4-grams (whitespace words) that occurred earlier in the answer.
    """

    description = "Words of answers over words of references, share of empty answers, mean share of repeated 4-grams."

    def measure(self, predictions, references):
        columns = {
            "n_words": [len(text.split()) for text in predictions],
            "n_reference_words": [len(text.split()) for text in references],
            "repetition": list(map(metrics.repeated_share, predictions)),
            "empty_share": [not text.strip() for text in predictions],
        }
        return columns, {}
