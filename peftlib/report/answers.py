"""The test rows of a study with every run's answer: search, sorting, CSV export, and word-level comparison."""

import csv
import difflib
import unicodedata
from itertools import groupby

import numpy as np
import pandas as pd

from peftlib.evaluation import rouge
from peftlib.evaluation.results import BASE, prompt_text

# Names of a row's own scores; BLEU needs smoothing on one row, unlike the table's corpus BLEU-4.
METRICS = {"rougeL": "ROUGE-L", "bleu4": "BLEU-4 of the row"}
_COLUMNS = {"rougeL": "rougeL", "bleu4": "sample_bleu4"}
FILE, HIGHEST, LOWEST, GAIN, LOSS = "file order", "highest score", "lowest score", "largest gain", "largest loss"
ORDERS = (FILE, HIGHEST, LOWEST, GAIN, LOSS)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
SAME, OTHER = "same", "other"


class Answers:
    """n test rows and their answers. runs: {name: results.Run}; a name is the method's, plus the seed if it has
    several."""

    def __init__(self, found):
        self.rows, self.references, self.sources = found.test_rows, found.references, found.sources
        self.runs = {
            method if len(runs) == 1 else f"{method}, seed {run.record['seed']}": run
            for method, runs in found.scored.items()
            for run in runs
        }
        self.prompts = [prompt_text(row) for row in self.rows]
        self._source_of = np.array([row["source"] for row in self.rows])

    def __len__(self):
        return len(self.rows)

    @property
    def trained(self):
        """Names of the runs of trained methods."""
        return [name for name, run in self.runs.items() if run.record["method"] != BASE]

    def method_of(self, name):
        """The method of a run's name."""
        return self.runs[name].record["method"]

    def scores(self, name, metric):
        """(n,) scores of a run's answers, 0-1."""
        return getattr(self.runs[name].rows, _COLUMNS[metric])

    def chosen(self, *, source=None, text="", order=FILE, metric="rougeL", name=None, other=None):
        """Indices of the rows of one source, or all (None), that contain a text, in one of ORDERS.

        text: searched in prompt, reference and answers, ignoring case. name, other: runs; scores are of `name`, gains
        and losses of `name` over `other`. Ties stay in file order.
        """
        found = np.flatnonzero(self._source_of == source) if source is not None else np.arange(len(self))
        if wanted := text.strip().casefold():
            found = np.array([at for at in found if self._contains(at, wanted)], dtype=int)
        if order == FILE:
            return found
        values = self.scores(name, metric)
        if order in (GAIN, LOSS):
            values = values - self.scores(other, metric)
        values = values[found]
        return found[np.argsort(-values if order in (HIGHEST, GAIN) else values, kind="stable")]

    def _contains(self, at, wanted):
        texts = (self.prompts[at], self.references[at], *(run.answers[at] for run in self.runs.values()))
        return any(wanted in text.casefold() for text in texts)

    def notable(self):
        """{index: {why: [run, ...]}} by ROUGE-L: each trained run's largest gain over base, its median and its largest
        loss, or the smallest if no row lost or none gained.

        Without the untrained model: each run's highest, median and lowest score.
        """
        base = next((name for name in self.runs if name not in self.trained), None)
        notable = {}
        for name in self.trained or list(self.runs):
            scores, whys = self.scores(name, "rougeL"), (HIGHEST, "typical score", LOWEST)
            if base not in (None, name):
                scores = scores - self.scores(base, "rougeL")
                best, worst = scores.max() > 0, scores.min() < 0
                whys = (GAIN if best else "smallest loss", "typical gain", LOSS if worst else "smallest gain")
            ranked = np.argsort(-scores, kind="stable")
            for at, why in zip((0, len(ranked) // 2, -1), whys):
                notable.setdefault(int(ranked[at]), {}).setdefault(why, []).append(name)
        return notable

    def to_csv(self, found, names):
        """CSV text of the rows with these indices, in that order, with the answers and scores of some runs.

        Spreadsheets do not read cells as formulas.
        """
        columns = {name: [_as_text(self.rows[at][name]) for at in found] for name in ("source", "id")}
        columns["prompt"] = [_as_text(self.prompts[at]) for at in found]
        columns["reference"] = [_as_text(self.references[at]) for at in found]
        for name in names:
            run = self.runs[name]
            columns[f"{name} answer"] = [_as_text(run.answers[at]) for at in found]
            for label, metric in (("rougeL", "rougeL"), ("row_bleu4", "bleu4")):
                columns[f"{name} {label}"] = [f"{score:.6f}" for score in self.scores(name, metric)[list(found)]]
            columns[f"{name} n_tokens"] = [run.n_tokens[at] for at in found]
            columns[f"{name} finish_reason"] = [run.finish_reasons[at] for at in found]
        # Quote all cells: otherwise a lone carriage return would start a new row, possibly with a formula.
        return pd.DataFrame(columns).to_csv(index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")


def _as_text(cell):
    """A cell that spreadsheets do not read as a formula: OWASP advises the apostrophe against CSV injection."""
    return f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell


def marked(answer, reference):
    """[(SAME or OTHER, text), ...] whose texts join to the answer.

    Words are ROUGE's (any script; case and punctuation are ignored); text between two words belongs to the first one.
    The longest common runs are matched first (difflib), so that phrases stay together.
    """
    spans, wanted = _spans(answer), [_key(reference[a:b]) for a, b in _spans(reference)]
    own = [_key(answer[a:b]) for a, b in spans]
    blocks = difflib.SequenceMatcher(None, wanted, own, autojunk=False).get_matching_blocks()
    shared = {at for block in blocks for at in range(block.b, block.b + block.size)}
    starts = [0, *(a for a, _ in spans[1:])] if spans else []
    ends = [*starts[1:], len(answer)]
    words = [(SAME if at in shared else OTHER, answer[a:b]) for at, (a, b) in enumerate(zip(starts, ends))]
    if not words and answer:
        return [(OTHER, answer)]
    return [(kind, "".join(text for _, text in run)) for kind, run in groupby(words, key=lambda word: word[0])]


def _key(word):
    return unicodedata.normalize("NFC", word).lower()


def _spans(text):
    """[(start, end), ...] of the words in a text, as rouge.words finds them."""
    return [found.span() for found in rouge.WORD.finditer(text)]
