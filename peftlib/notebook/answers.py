"""Test rows with the answers of several runs as HTML cards.

The cards wrap on narrow screens; their colours blend with the page's text colour, so that they suit light and dark
pages. All texts are escaped.
"""

import html

from peftlib.report.answers import METRICS, SAME, marked
from peftlib.report.palette import LIGHT

_FOLDED = 300  # longer prompts are folded, in characters
# Blue and orange are distinct for all common colour blindness; underlines show the same without colour.
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
    '<div class="pl-note"><mark>Underlined</mark>: the reference\'s words, in its order; <u>dotted</u>: other '
    "words. ROUGE-L and BLEU-4 are for this row only, 0 to 1: ROUGE-L as in the table, BLEU-4 on whitespace words "
    "with nltk's smoothing (method1), because most rows share no four words with their reference.</div>"
)


def row_html(answers, at, names, *, against=None, theme=LIGHT, heading="", limit=None, is_marked=True):
    """HTML of row `at` of an Answers: the prompt, the reference and the answers of some runs.

    against: the run to compare scores with. limit: characters of a text to show, None for all.
    """
    row, prompt, reference = answers.rows[at], answers.prompts[at], answers.references[at]
    head = f"{heading}<b>{html.escape(row['source'])}</b>, row {html.escape(str(row['id']))}"
    asked = f'<div class="pl-text">{_cut(prompt, limit)}</div>'
    if len(prompt) > _FOLDED or "\n" in prompt.strip():
        first = html.escape(prompt.strip().split("\n")[0][:90])
        note = f'<span class="pl-note">(all {len(prompt):,} characters)</span>'
        asked = f"<details><summary>{first} ... {note}</summary>{asked}</details>"
    cards = [_card("reference", "", "from the data", _cut(reference, limit))]
    for name in names:
        text = answers.runs[name].answers[at]
        body = _cut(text, limit, reference if is_marked else None)
        cards.append(_card(name, theme.color_of(answers.method_of(name)), _facts(answers, at, name, against), body))
    return f"{head}{asked}{side(cards)}"


def side(cards):
    """HTML of cards side by side."""
    return f'<div class="pl-cards">{"".join(cards)}</div>'


def page(parts):
    """The parts as one HTML block with its style."""
    return f'{STYLE}<div class="pl-rows">{"".join(parts)}</div>'


def answer_card(name, color, facts, text):
    """A card of one answer; the texts are escaped."""
    return _card(name, color, facts, _cut(text))


class StaticRows:
    """HTML for a notebook, with a short plain text for readers without HTML."""

    def __init__(self, parts, text):
        self._parts, self._text = parts, text

    def _repr_html_(self):
        return page(self._parts)

    def __repr__(self):
        return self._text


def side_by_side(questions, answers):
    """The StaticRows of questions with their answers, with line breaks. answers: {name: [one text per question]}."""
    parts, said = [], []
    for at, question in enumerate(questions):
        cards = [answer_card(name, "", "", texts[at]) for name, texts in answers.items()]
        parts.append(f"<b>{html.escape(question)}</b>{side(cards)}")
        said.append("\n".join([f"> {question}", *(f"{name}: {texts[at]}" for name, texts in answers.items())]))
    return StaticRows(parts, "\n\n".join(said))


def ended(finish_reason):
    """How an answer ended, as text."""
    return "finished" if finish_reason == "stop" else "cut at the token limit"


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
    """HTML of a text, truncated at a limit, with the words that it shares with a reference marked."""
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
