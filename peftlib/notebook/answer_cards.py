"""A test row, its reference and its answers as HTML cards that wrap on narrow screens, on light and on dark pages.

Colours mix with the page's own text colour, so that no theme needs to be known. All texts are escaped.
"""

import difflib
import html
import re
import unicodedata
from itertools import groupby

from peftlib.evaluation import rouge
from peftlib.notebook.answers import METRICS
from peftlib.report.palette import LIGHT

SAME, OTHER = "same", "other"
_WORD = re.compile("um*|l[lm]*")  # on first letters of rouge.kind_of: unspaced, mark, letter
_EMPTY = '<span class="pl-note">(empty)</span>'
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


def row_html(answers, at, names, *, against=None, theme=LIGHT, heading="", limit=None, is_marked=True):
    """HTML of row `at` of an answers.Answers: what was asked, the reference and the answers of some runs.

    against: the run whose scores the others' are compared with. limit: characters of a text to show, None for all.
    """
    row = answers.rows[at]
    head = f"{heading}<b>{html.escape(row['source'])}</b>, row {html.escape(str(row['id']))}"
    reference = answers.references[at]
    cards = [_card("reference", "", "what the data hold", _cut(reference, limit))]
    for name in names:
        body = _answer(answers.runs[name].answers[at], reference, limit, is_marked)
        cards.append(_card(name, theme.color_of(answers.method_of(name)), _facts(answers, at, name, against), body))
    return f'{head}{_prompt(answers.prompts[at], limit)}<div class="pl-cards">{"".join(cards)}</div>'


def page(parts):
    """The parts as one piece of HTML with its style."""
    return f'{STYLE}<div class="pl-rows">{"".join(parts)}</div>'


def answer_card(name, color, facts, text):
    """One card of any answer; the texts are escaped."""
    return _card(name, color, facts, _cut(text, None) or _EMPTY)


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
        cards = [_card(name, "", "", _cut(texts[at], None) or _EMPTY) for name, texts in answers.items()]
        parts.append(f'<b>{html.escape(question)}</b><div class="pl-cards">{"".join(cards)}</div>')
        said.append("\n".join([f"> {question}", *(f"{name}: {texts[at]}" for name, texts in answers.items())]))
    return StaticRows(parts, "\n\n".join(said))


def _card(name, color, facts, body):
    line = f' style="border-top-color:{color}"' if color else ""
    note = f'<div class="pl-note">{html.escape(facts)}</div>' if facts else ""
    return f'<div class="pl-card"{line}><h4>{html.escape(name)}</h4>{note}<div class="pl-text">{body}</div></div>'


def _prompt(text, limit):
    body = f'<div class="pl-text">{_cut(text, limit)}</div>'
    if len(text) <= _FOLDED and "\n" not in text.strip():
        return body
    first = html.escape(text.strip().split("\n")[0][:90])
    note = f'<span class="pl-note">(all {len(text):,} characters)</span>'
    return f"<details><summary>{first} ... {note}</summary>{body}</details>"


def _facts(answers, at, name, against):
    run, parts = answers.runs[name], []
    for metric, label in METRICS.items():
        value = answers.scores(name, metric)[at]
        change = ""
        if against not in (None, name):
            change = f" ({value - answers.scores(against, metric)[at]:+z.3f})"
        parts.append(f"{label.removesuffix(' of the row')} {value:.3f}{change}")
    end = "ended by itself" if run.finish_reasons[at] == "stop" else "cut at the limit"
    return f"{', '.join(parts)}; {run.n_tokens[at]} tokens, {end}"


def _answer(text, reference, limit, is_marked):
    if not text.strip():
        return _EMPTY
    if not is_marked:
        return _cut(text, limit)
    made, left = [], len(text) if limit is None else limit
    for kind, part in marked(text, reference):
        tag = "mark" if kind == SAME else "u"
        shown = part[:left]
        words = shown.rstrip()
        made.append(f"<{tag}>{html.escape(words)}</{tag}>{html.escape(shown[len(words) :])}" if words else shown)
        left -= len(shown)
        if left <= 0:
            break
    return "".join(made) + _rest(text, limit)


def _cut(text, limit):
    return html.escape(text[:limit]) + _rest(text, limit)


def _rest(text, limit):
    rest = 0 if limit is None else len(text) - limit
    return f' <span class="pl-note">... ({rest:,} more characters)</span>' if rest > 0 else ""


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
    kinds = "".join(rouge.kind_of(character)[0] for character in text)
    return [found.span() for found in _WORD.finditer(kinds)]
