"""The scores as `evaluate.Metric` classes, imported directly: `evaluate.load` would ask a hub and fail without one.

    from peftlib.hf_metrics import AnswerScores
    AnswerScores().compute(predictions=answers, references=references)["rougeL"]

This module imports `evaluate` (and with it `datasets`), so nothing else of peftlib imports it.
"""

import datasets
import evaluate

from peftlib.evaluation import metrics

_PAIRS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})


class _PairMetric(evaluate.Metric):
    """An answer and one reference a row; rows are held in memory, nothing is written to a cache."""

    keys = ()  # what of metrics.score's result it returns
    description = ""

    def __init__(self, **settings):
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self):
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions, references: lists of text",
            features=_PAIRS,
        )

    def _compute(self, predictions, references):
        found = metrics.score(predictions, references)
        return {key: found[key] for key in self.keys or found}


class Bleu4(_PairMetric):
    """Corpus BLEU-4 by sacrebleu in 0-1, with its signature."""

    keys = ("bleu4", "bleu_signature")
    description = "corpus BLEU-4 by sacrebleu, 0-1"


class Rouge(_PairMetric):
    """ROUGE-1, -2, -L and -Lsum: mean F1 in 0-1, with the variant named."""

    keys = ("rouge1", "rouge2", "rougeL", "rougeLsum", "rouge_variant")
    description = "ROUGE F1 as rouge_score computes it, words of any script, 0-1"


class Chrf(_PairMetric):
    """Corpus chrF2 by sacrebleu in 0-1, with its signature."""

    keys = ("chrf", "chrf_signature")
    description = "corpus chrF2 by sacrebleu, 0-1"


class AnswerScores(_PairMetric):
    """Everything that `peftlib.evaluation.metrics.score` returns."""

    description = "BLEU-4, ROUGE, chrF, lengths, empty answers and repetition"
