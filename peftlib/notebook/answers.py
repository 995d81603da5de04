"""The test rows of a study with every run's answer: found, sorted, written as CSV, and shown as HTML cards.

The cards wrap on narrow screens; their colours mix with the page's own text colour, so that they suit light and dark
pages. All texts are escaped.
"""

import csv
import difflib
import html
import unicodedata
from itertools import groupby

import numpy as np
import pandas as pd

from peftlib.evaluation import rouge
from peftlib.evaluation.results import BASE, prompt_text
from peftlib.report.palette import LIGHT

# As a row's own scores are called; BLEU needs smoothing on one row, the table's corpus BLEU-4 does not.
METRICS = {"rougeL": "ROUGE-L", "bleu4": "BLEU-4 of the row"}
_COLUMNS = {"rougeL": "rougeL", "bleu4": "sample_bleu4"}
FILE, HIGHEST, LOWEST, GAIN, LOSS = "file order", "highest score", "lowest score", "largest gain", "largest loss"
ORDERS = (FILE, HIGHEST, LOWEST, GAIN, LOSS)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
SAME, OTHER = "same", "other"
_FOLDED = 300  # characters of a prompt that are shown unfolded at most
# Blue and orange differ with every common colour blindness; the lines below say the same without colour.
STYLE = """<style>
.pl-rows { font-size: 14px; line-height: 1.5; overflow-wrap: anywhere; max-width: 100%; box-sizing: border-box; }
.pl-rows * { box-sizing: border-box; }
.pl-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14.5rem), 1fr)); gap: 10px; }
.pl-cards { margin: 8px 0; }
.pl-card { border: 1px solid rgba(127,127,127,.45); border-top-width: 4px; border-radius: 6px; }
.pl-card { padding: 8px 12px; min-width: 0; }
.pl-rows .pl-card h4 { margin: 0; font-size: 14px; font-weight: 600; line-height: 1.5; }
.pl-text { white-space: pre-wrap; margin: 6px 0 0; }
.pl-note { opacity: .78; font-size: 12.5px; }
.pl-rows summary { cursor: pointer; }
.pl-rows mark { color: inherit; background: rgba(0,114,178,.26); border-bottom: 2px solid #0072b2; }
.pl-rows u { text-decoration: underline dotted 1.5px #d55e00; text-underline-offset: 3px; }
</style>"""
LEGEND = (
    '<div class="pl-note"><mark>A line below</mark>: the reference\'s words, in its order; <u>dots below</u>: other '
    "words. ROUGE-L and BLEU-4 are of this row alone, 0 to 1: ROUGE-L as in the table, BLEU-4 on words by whitespace "
    "with nltk's smoothing (method1), for most rows share no four words with their reference.</div>"
)


class Answers:
    """n test rows and, by run name, their answers. runs: {name: scored.Run}; a name is the method's, with the seed
    where it has several."""

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
        """Indices of rows: of one source or all (None), which hold a text, in one of ORDERS.

        text: looked for in prompt, reference and answers, whatever its case. name, other: runs; scores are name's,
        gains and losses those of name over other. Equal ones stay in file order.
        """
        found = np.flatnonzero(self._source_of == source) if source is not None else np.arange(len(self))
        wanted = text.strip().casefold()
        if wanted:
            found = np.array([at for at in found if self._holds(at, wanted)], dtype=int)
        if order == FILE:
            return found
        values = self.scores(name, metric)
        if order in (GAIN, LOSS):
            values = values - self.scores(other, metric)
        values = values[found]
        return found[np.argsort(-values if order in (HIGHEST, GAIN) else values, kind="stable")]

    def _holds(self, at, wanted):
        texts = (self.prompts[at], self.references[at], *(run.answers[at] for run in self.runs.values()))
        return any(wanted in text.casefold() for text in texts)

    def notable(self):
        """{index: {why: [run, ...]}} by ROUGE-L: each trained run's largest gain over base, its median and its largest
        loss, or the smallest where no row lost or none gained.

        Without the untrained model: its highest, its median and its lowest score.
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

        No cell is a formula to a spreadsheet.
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
        # All quoted: a lone carriage return would else begin a new row, and with it a formula.
        return pd.DataFrame(columns).to_csv(index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")


def _as_text(cell):
    """A cell that no spreadsheet takes for a formula: the apostrophe is what OWASP advises against CSV injection."""
    return f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell


def row_html(answers, at, names, *, against=None, theme=LIGHT, heading="", limit=None, is_marked=True):
    """HTML of row `at` of an Answers: what was asked, the reference and the answers of some runs.

    against: the run whose scores the others' are compared with. limit: characters of a text to show, None for all.
    """
    row, prompt, reference = answers.rows[at], answers.prompts[at], answers.references[at]
    head = f"{heading}<b>{html.escape(row['source'])}</b>, row {html.escape(str(row['id']))}"
    asked = f'<div class="pl-text">{_cut(prompt, limit)}</div>'
    if len(prompt) > _FOLDED or "\n" in prompt.strip():
        first = html.escape(prompt.strip().split("\n")[0][:90])
        note = f'<span class="pl-note">(all {len(prompt):,} characters)</span>'
        asked = f"<details><summary>{first} ... {note}</summary>{asked}</details>"
    cards = [_card("reference", "", "what the data hold", _cut(reference, limit))]
    for name in names:
        text = answers.runs[name].answers[at]
        body = _cut(text, limit, reference if is_marked else None)
        cards.append(_card(name, theme.color_of(answers.method_of(name)), _facts(answers, at, name, against), body))
    return f"{head}{asked}{side(cards)}"


def side(cards):
    """HTML of cards side by side."""
    return f'<div class="pl-cards">{"".join(cards)}</div>'


def page(parts):
    """The parts as one piece of HTML with its style."""
    return f'{STYLE}<div class="pl-rows">{"".join(parts)}</div>'


def answer_card(name, color, facts, text):
    """One card of any answer; the texts are escaped."""
    return _card(name, color, facts, _cut(text))


class StaticRows:
    """HTML for a notebook, and the same in short for readers of plain text."""

    def __init__(self, parts, text):
        self._parts, self._text = parts, text

    def _repr_html_(self):
        return page(self._parts)

    def __repr__(self):
        return self._text


def side_by_side(questions, answers):
    """The StaticRows of questions with their answers, line breaks kept. answers: {name: [one text a question]}."""
    parts, said = [], []
    for at, question in enumerate(questions):
        cards = [answer_card(name, "", "", texts[at]) for name, texts in answers.items()]
        parts.append(f"<b>{html.escape(question)}</b>{side(cards)}")
        said.append("\n".join([f"> {question}", *(f"{name}: {texts[at]}" for name, texts in answers.items())]))
    return StaticRows(parts, "\n\n".join(said))


def ended(finish_reason):
    """How an answer ended, in words."""
    return "ended by itself" if finish_reason == "stop" else "cut at the limit"


def _card(name, color, facts, body):
    line = f' style="border-top-color:{color}"' if color else ""
    note = f'<div class="pl-note">{html.escape(facts)}</div>' if facts else ""
    return f'<div class="pl-card"{line}><h4>{html.escape(name)}</h4>{note}<div class="pl-text">{body}</div></div>'


def _facts(answers, at, name, against):
    run, parts = answers.runs[name], []
    for metric, label in METRICS.items():
        value, change = answers.scores(name, metric)[at], ""
        if against not in (None, name):
            change = f" ({value - answers.scores(against, metric)[at]:+z.3f})"
        parts.append(f"{label.removesuffix(' of the row')} {value:.3f}{change}")
    return f"{', '.join(parts)}; {run.n_tokens[at]} tokens, {ended(run.finish_reasons[at])}"


def _cut(text, limit=None, reference=None):
    """HTML of a text, cut at a limit; the words that it shares with a reference are marked."""
    if not text.strip():
        return '<span class="pl-note">(empty)</span>'
    shown = text if limit is None else text[:limit]
    made = html.escape(shown)
    if reference is not None:
        made = ""
        for kind, part in marked(shown, reference):
            words, tag = part.rstrip(), "mark" if kind == SAME else "u"
            made += f"<{tag}>{html.escape(words)}</{tag}>" * bool(words) + html.escape(part[len(words) :])
    rest = len(text) - len(shown)
    return made + (f' <span class="pl-note">... ({rest:,} more characters)</span>' if rest else "")


def marked(answer, reference):
    """[(SAME or OTHER, text), ...] whose texts join to the answer.

    Words are ROUGE's (any script, case and punctuation do not count); what stands between two words belongs to the
    one before it. Longest common runs first (difflib), so that a phrase stays in one piece.
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
