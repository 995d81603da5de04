"""Benchmark scores of a study's runs: intervals, paired differences, tasks at their floor, and what was lost."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from peftlib.core.errors import StudyError
from peftlib.core.files import read_text, sha256
from peftlib.core.json_reading import fault
from peftlib.evaluation import stats
from peftlib.evaluation.benchmarks.tasks import RETENTION, SETS
from peftlib.evaluation.comparison import Pair
from peftlib.methods import BASE

_ROW = {"id": int, "doc": str, "value": float, "weight": float, "label?": str}
BALANCED = "_balanced"  # suffix of a task's name: each correct answer has equal weight, whatever its number of rows


@dataclass(frozen=True)
class TaskScores:
    """One task on the rows that all runs share. facts: from a record. runs: {method: {seed: (n, 2)}}."""

    task: str
    facts: dict
    boot: stats.Bootstrap = field(repr=False)
    runs: dict = field(repr=False)

    @property
    def chance(self):
        return self.facts["chance"]

    def interval(self, method):
        return self.boot.interval(method, stats.RATIO)

    def is_at_floor(self, method):
        """Whether guessing could have reached this score. A score below guessing is not at floor: something was lost,
        if only how often the model says yes."""
        found = self.interval(method)
        return self.chance is not None and found.low <= self.chance <= found.high

    def pairs(self):
        """[Pair, ...] of every two methods of which at least one is above the floor, the later one first."""
        names = list(self.boot.value)
        both = [(method, other) for at, method in enumerate(names) for other in names[:at]]
        return [
            Pair(self.task, method, other, self.boot.difference(method, other, stats.RATIO), None)
            for method, other in both
            if not (self.is_at_floor(method) and self.is_at_floor(other))
        ]


def load(runs, *, leaves_out=False):
    """[TaskScores, ...] of all tasks that any run was scored on, with the balanced accuracy after a task with labels.

    If a model says yes more or less often without knowing more or less, its accuracy changes, but not the balanced one.

    runs: [(name of the method, its Study, record), ...] in the study's order. leaves_out: skip tasks without shared
    rows instead of raising a StudyError. StudyError: damaged rows, or a task's runs share no rows.
    """
    tasks = dict.fromkeys(task for _, _, record in runs for task in record.get("benchmarks") or {})
    order = [task for names in SETS.values() for task in names if task in tasks]
    order += [task for task in tasks if task not in order]
    return [scores for task in order for scores in _task_scores(task, runs, leaves_out)]


def _task_scores(task, runs, leaves_out):
    facts, rows = {}, {}
    for method, study, record in runs:
        if task in (record.get("benchmarks") or {}):
            run = (method, record["seed"])
            facts[run] = record["benchmarks"][task]
            found = read_rows(study.benchmark_path(record["method"], record["seed"], task), facts[run])
            rows[run] = {(row["id"], row["doc"]): row for row in found}
    fewest = min(rows, key=lambda run: len(rows[run]))
    shared = [key for key in rows[fewest] if all(key in found for found in rows.values())]
    if not shared or len({(of["metric"], of["filter"]) for of in facts.values()}) > 1:
        if leaves_out:
            return
        named = ", ".join(f"{method} (seed {seed})" for method, seed in rows)
        raise StudyError(f"the scores of {task} for {named} are not on the same rows and metric: score them again")
    by_method = {}
    for (method, seed), found in rows.items():
        by_method.setdefault(method, {})[seed] = np.array(
            [[found[key]["value"], found[key]["weight"]] for key in shared]
        )
    yield _bootstrapped(task, facts[fewest], by_method)
    labels = [next((found[key]["label"] for found in rows.values() if "label" in found[key]), None) for key in shared]
    counts = Counter(labels)
    if None not in counts and len(counts) > 1:
        weights = np.array([[1 / counts[label]] for label in labels])
        balanced = {name: {seed: of * weights for seed, of in by_seed.items()} for name, by_seed in by_method.items()}
        known = {"metric": f"balanced {facts[fewest]['metric']}", "chance": 1 / len(counts)}
        yield _bootstrapped(task + BALANCED, facts[fewest] | known, balanced)


def _bootstrapped(task, facts, by_method):
    seeds = {method: list(by_seed.values()) for method, by_seed in by_method.items()}
    return TaskScores(task, facts, stats.ratio_bootstrap([seeds], is_perplexity=facts["is_perplexity"]), by_method)


def lost(found):
    """({method: Interval of its mean change of accuracy against base}, [task, ...]) over the retention tasks.

    Excluded are tasks where base is at floor, because no knowledge can be lost there, perplexity, which is not an
    accuracy, and methods or seeds that lack one of the tasks. ({}, []) if nothing remains.
    """
    of = above_guessing(found)
    if not of:
        return {}, []
    every = [{(method, seed) for method in scores.runs for seed in scores.runs[method]} for scores in of]
    kept = set.intersection(*every)
    strata = []
    for scores in of:
        runs = {
            method: [rows for seed, rows in by_seed.items() if (method, seed) in kept]
            for method, by_seed in scores.runs.items()
        }
        strata.append({method: seeds for method, seeds in runs.items() if seeds})
    boot = stats.ratio_bootstrap(strata)
    changes = {method: boot.difference(method, BASE, stats.RATIO) for method in boot.value if method != BASE}
    return changes, [scores.task for scores in of]


def above_guessing(found):
    """[TaskScores, ...] of the retention tasks that `lost` uses: scored by accuracy, and base is not at floor."""
    of = [scores for scores in found if scores.task in SETS[RETENTION] and BASE in scores.runs]
    return [scores for scores in of if not (scores.facts["is_perplexity"] or scores.is_at_floor(BASE))]


def read_rows(path, facts):
    """[row, ...] of a task's file. StudyError: it does not match the record."""
    if not path.exists():
        raise StudyError(
            f"{path} is missing, but its record has a score: restore it, or score it again with `peftlib bench`"
        )
    if sha256(path) != facts["rows_sha256"]:
        raise StudyError(f"{path} is not what scoring wrote (its SHA-256 differs): restore it from a copy")
    rows = [json.loads(line) for line in read_text(path).splitlines()]
    wrong = next(filter(None, (fault(row, _ROW) for row in rows)), None)
    if wrong:
        raise StudyError(f"{path} is damaged ({wrong}): restore it from a copy")
    return rows


def score_of(rows, is_perplexity):
    """The harness's score for rows."""
    ratio = sum(row["value"] for row in rows) / sum(row["weight"] for row in rows)
    return math.exp(ratio) if is_perplexity else ratio
