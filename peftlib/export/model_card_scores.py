"""The scores part of a model card: one run against the untrained model, with intervals; unknown is said to be unknown."""

import warnings
from dataclasses import dataclass

from peftlib.evaluation import forgetting, stats
from peftlib.evaluation import results as scored
from peftlib.report.notes import UNKNOWN

_DIGITS = ".3f"
_KINDS = {"bleu4": "bleu", "rougeL": "rouge"}  # as the hub calls them


@dataclass(frozen=True)
class Scores:
    """run: the scored.Run. base: the untrained model's, or None. boot: stats.Bootstrap of both, None without answers."""

    run: scored.Run
    base: scored.Run
    boot: stats.Bootstrap
    n_test: int
    sources: tuple
    cut_at_words: int

    @property
    def has_gain(self):
        return self.boot is not None and scored.BASE in self.boot.value


def scores_of(study, method, seed):
    """The Scores of one run. StudyError: its records and predictions do not belong together."""
    found = scored.load(study)
    run = next(r for r in found.runs if (r.record["method"], r.record["seed"]) == (method, seed))
    base = next((r for r in found.runs if r.record["method"] == scored.BASE and r.is_scored), None)
    boot = None
    if run.is_scored:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.FewRowsWarning)  # the card says it in its own words
            boot = stats.bootstrap({r.record["method"]: [r.rows] for r in (base, run) if r is not None})
    return Scores(run, base, boot, len(found.test_rows), tuple(found.sources), found.cut_at_words)


def score_lines(scores):
    """The card's section on scores, as lines of Markdown."""
    if scores.boot is None:
        loss = scores.run.eval_loss
        known = "" if loss is None else f" Its loss on the test rows is {loss:.3f} nats per token."
        return [f"Not scored: this run has not answered the test rows yet.{known}"]
    return [*_table(scores), "", *_notes(scores)]


def _table(scores):
    rows = [("", "base", "this model", "gain, 95 % interval"), ("---",) * 4]
    method = scores.run.record["method"]
    for metric, name in stats.METRICS.items():
        gain = UNKNOWN
        if scores.has_gain:
            gain = _interval(scores.boot.difference(method, scored.BASE, metric), "+z.3f")
        rows.append((f"{name}, 0-1", _score(scores, scored.BASE, metric), _score(scores, method, metric), gain))
    losses = [None if run is None else run.eval_loss for run in (scores.base, scores.run)]
    rows.append(("test loss, nats per token", *map(_number, losses), _change(*losses)))
    general = [None if run is None else run.general for run in (scores.base, scores.run)]
    moved = forgetting.change(*general)
    shown = [_number(None if loss is None else loss.loss) for loss in general]
    rows.append(
        (
            "loss on general text (CIA World Factbook)",
            *shown,
            UNKNOWN if moved is None else f"{moved:+.1%}, no interval",
        )
    )
    return ["| " + " | ".join(row) + " |" for row in rows]


def _score(scores, method, metric):
    return _interval(scores.boot.interval(method, metric)) if method in scores.boot.value else UNKNOWN


def _interval(found, form=_DIGITS):
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def _number(value):
    return UNKNOWN if value is None else format(value, _DIGITS)


def _change(before, after):
    return UNKNOWN if None in (before, after) else f"{after - before:+z.3f}, no interval"


def _notes(scores):
    yield (
        f"{scores.n_test} test rows that training never saw ({', '.join(scores.sources)}), one reference each, greedy "
        f"answers of at most {scores.run.record['evaluation']['max_new_tokens']} tokens. In brackets: 95 % intervals "
        "(paired bootstrap over the rows); of one training run, so without the chance of training again. BLEU-4 is "
        "sacrebleu's, ROUGE-L an F1; both compare words with one reference."
    )
    if scores.n_test < stats.FEW_ROWS:
        yield ""
        yield f"Caution: {stats.few_rows_note(scores.n_test)}."
    if scores.base is None:
        yield ""
        yield "The untrained model was not scored, so no gain is known."
    else:
        yield ""
        yield (
            f"Base: the untrained model; {scores.base.truncated_share:.0%} of its answers met the token limit, and "
            f"overlong answers score low for that alone ({scores.cut_at_words} words are the references' median). Of this "
            f"model's answers {scores.run.truncated_share:.0%} met it."
        )


def eval_results(scores, record):
    """[huggingface_hub.EvalResult, ...] for the card's header; none without answers."""
    from huggingface_hub import EvalResult

    if scores.boot is None:
        return []
    shared = {
        "task_type": "text-generation",
        "dataset_type": "peftlib-study",
        "dataset_name": f"test rows of the study ({', '.join(scores.sources)})",
        "dataset_split": "test",
        "dataset_args": {"n_test": scores.n_test, "split_hash": record["split_hash"]},
    }
    made = []
    for metric, name in stats.METRICS.items():
        found = scores.boot.interval(record["method"], metric)
        words = f"{name} (0-1), 95 % interval {found.low:.3f} to {found.high:.3f}, {scores.n_test} rows"
        made.append(
            EvalResult(**shared, metric_type=_KINDS[metric], metric_name=words, metric_value=round(found.value, 4))
        )
    if scores.run.eval_loss is not None:
        words = f"test loss, nats per token, no interval, {scores.n_test} rows"
        made.append(
            EvalResult(**shared, metric_type="loss", metric_name=words, metric_value=round(scores.run.eval_loss, 4))
        )
    return made
