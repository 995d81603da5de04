"""The tasks of lm-evaluation-harness, the metric used of each, and the score of guessing.

Prompts, few-shot examples, answer parsers and metrics are the harness's own (https://github.com/EleutherAI/
lm-evaluation-harness); a task differs from `lm_eval --tasks NAME` only in the source of its rows, if at all.
"""

import difflib
import importlib.metadata
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from peftlib.core.errors import ConfigError, DataError, ModelError
from peftlib.core.paths import pip_line
from peftlib.evaluation.benchmarks import local

GENERATED = "generate_until"  # the harness's name for tasks whose answer is generated, not ranked
RETENTION, SKILL = "retention", "skill"
SETS = {
    RETENTION: (
        *("arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "openbookqa", "lambada_openai", "wikitext"),
    ),
    SKILL: ("ifeval", "gsm8k"),
}
# {task: (metric, filter of the answers, folder of the task in the harness)}. Length-normalised accuracy where the field
# reports it (Gu & Dao 2023, Mamba, section 4.2.2).
_KNOWN = {
    "arc_easy": ("acc", "none", "arc"),
    "arc_challenge": ("acc_norm", "none", "arc"),
    "piqa": ("acc", "none", "piqa"),
    "winogrande": ("acc", "none", "winogrande"),
    "boolq": ("acc", "none", "super_glue"),
    "openbookqa": ("acc_norm", "none", "openbookqa"),
    "lambada_openai": ("acc", "none", "lambada"),
    "wikitext": ("word_perplexity", "none", "wikitext"),
    "ifeval": ("prompt_level_strict_acc", "none", "ifeval"),
    "gsm8k": ("exact_match", "flexible-extract", "gsm8k"),
}
_NO_GUESS = ("lambada_openai", "gsm8k")  # a word or a number cannot be guessed


@dataclass(frozen=True)
class Benchmark:
    """task: the harness's. metric, filter: of its rows. is_perplexity: exp(sum of nats / sum of words), lower is
    better; else a mean over rows. source: where its rows come from, as text."""

    task: object
    metric: str
    filter: str
    is_perplexity: bool
    source: str

    @property
    def is_generated(self):
        return self.task.OUTPUT_TYPE == GENERATED

    def chance(self, docs):
        """The score of guessing on these rows, None where that is not known.

        For multiple choice: the mean of 1 / choices, or, if all rows have the same choices (yes and no), the share of
        the most frequent answer if that is higher.
        """
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return 0.0 if self.task.task_name in _NO_GUESS else None
        blind = sum(1 / len(self.task.doc_to_choice(doc)) for doc in docs) / len(docs)
        labels = self.labels(docs)
        return max(blind, Counter(labels).most_common(1)[0][1] / len(docs)) if labels else blind

    def labels(self, docs):
        """[correct answer, ...] of multiple choice if all rows have the same choices (yes and no), else None."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return None
        first, *others = {tuple(self.task.doc_to_choice(doc)) for doc in docs}
        if others:
            return None
        targets = (self.task.doc_to_target(doc) for doc in docs)
        return [str(first[target] if isinstance(target, int) else target) for target in targets]

    def row(self, sample):
        """(value, weight) of one row that the harness scored; a score is sum(value) / sum(weight)."""
        found = sample[self.metric]
        if self.is_perplexity:
            log_likelihood, words = found if isinstance(found, tuple) else (found, 1)
            return -float(log_likelihood), float(words)
        return float(found), 1.0


def chosen(words):
    """[task, ...] of comma-separated names and sets, without repeats. ConfigError: none is given."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    if not names:
        raise ConfigError(f"tasks {words!r}: give some, such as {RETENTION} or arc_easy,gsm8k")
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


def version():
    """The version of lm-evaluation-harness. ModelError: it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"benchmarks need lm-evaluation-harness: {pip_line('bench')}") from None


def load(name, folder=None):
    """The Benchmark of a task, with rows from a folder of files, or from the hub without a folder.

    ConfigError: no such task, a group of tasks, or one that runs code. DataError: the file is missing or has other
    rows, the download failed, or the harness has renamed the metric. ModelError: the harness or a library that the
    task needs is missing.
    """
    version()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its messages are for its own command line
    known = _KNOWN.get(name)
    manager = _manager(known and known[2])
    _require_task(name, manager)
    if name == "ifeval":
        _require_sentences()
    changed, source = local.overrides(name, folder) if folder else ({}, "the hub")
    try:
        # A group of one task: the harness only overrides a known task's config inside a group.
        task = manager.load([{"group": "peftlib", "task": [{"task": name, **changed}]}])["tasks"][name]
    except ImportError as error:
        raise ModelError(f"{name} needs a library that is missing ({error}): {pip_line('bench')}") from None
    except OSError as error:
        raise DataError(
            f"could not download the rows of {name} from the hub ({error}): check the network, or use --data DIR "
            "with a folder of its files"
        ) from None
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"{name} runs model-written code or uses images, which peftlib does not support")
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    return Benchmark(task, *_metric_of(name, task, known), source)


def _manager(folder):
    from lm_eval import tasks

    if folder is None:
        return tasks.TaskManager()  # reads all 13,000 tasks of the harness, which takes seconds
    return tasks.TaskManager(include_path=str(Path(tasks.__file__).parent / folder), include_defaults=False)


def _require_task(name, manager):
    if name in manager.all_subtasks:
        return
    if name in manager.all_tasks:
        raise ConfigError(f"{name} is a group of tasks: give the tasks themselves")
    near = difflib.get_close_matches(name, [*SETS, *manager.all_subtasks], n=4)
    hint = f"did you mean {', '.join(near)}?" if near else f"sets: {', '.join(SETS)}; tasks: `lm_eval ls tasks`"
    raise ConfigError(f"unknown task {name!r}: {hint}")


def _require_sentences():
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise ModelError(
            "ifeval needs NLTK's punkt_tab to count sentences: run python -m nltk.downloader punkt_tab"
        ) from None


def _metric_of(name, task, known):
    """(metric, filter, whether it is a perplexity) to use for a task."""
    from lm_eval.api import metrics

    perplexities = (metrics.perplexity, metrics.weighted_perplexity)
    found, filters = task.aggregation(), [part.name for part in task._filters]
    if known is None:
        by_row = [metric for metric, whole in found.items() if whole in (metrics.mean, *perplexities)]
        known = (by_row[0] if by_row else None, filters[0])
    metric, chosen_filter = known[:2]
    if metric not in found or chosen_filter not in filters:
        raise DataError(
            f"{name} of lm-eval {version()} has no metric {metric!r} with filter {chosen_filter!r} that is a mean over "
            f"its rows (it has {', '.join(found)}; {', '.join(filters)}): install the version that peftlib[bench] "
            "pins, or omit the task"
        )
    return metric, chosen_filter, found[metric] in perplexities
