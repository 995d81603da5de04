"""Numbers and claims that a page states together with what they rest on.

Behind a number stands its expression, `0.275<!-- = m.qlora.scores.rougeL.value -->`, and a claim in words may have one
that holds, `lower<!-- is pair("rougeL", "hybrid", "galore").high < 0 -->`. Their names are those of `NAMES`, all from
results/reference. A page that has one such number has one for each number, however small; phrases in test_numbers.KNOWN
are left out, and so is what stands in tables between markers, code, links and names (4-bit, 16 bits, 270M).
"""

import json
import re
import statistics

import pandas as pd
import pytest
from cells import loss_gap, pair_of
from result_tables import RESULTS, Results
from test_numbers import KNOWN, PAGES, prose

FOLDER = RESULTS / "reference"
STATED = re.compile(r"([+−-]?)(\d[\d,]*(?:\.\d+)?)( %)?<!-- = (.*?) -->")
CLAIM = re.compile(r"<!-- is (.*?) -->")
ANY_NUMBER = re.compile(r"(?<![\w.,/-])\d+(?:,\d{3})*(?:\.\d+)?(?![\d.]*[\w/-])")
R = Results()


class View(dict):
    """A dict whose keys are attributes too."""

    __getattr__ = dict.__getitem__


def read(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"), object_hook=View)


SUMMARY = read("summary.json")
NAMES = {
    "ref": SUMMARY,
    "m": SUMMARY.methods,  # m.qlora.eval_loss: a value a seed
    "trained": [method for method in SUMMARY.methods if method != "base"],
    "config": read("config.json").config,
    "rows": pd.read_csv(FOLDER / "results.csv"),
    "record": lambda method, seed: read(f"records/{method}-s{seed}.json"),
    "side_record": lambda label: read(f"records-{label}/galore-s0.json"),
    # value, low, high and is_noise of method - other; metric: rougeL or bleu4, what: eval_loss or general_loss
    "pair": lambda metric, method, other: View(pair_of(R, metric, method, other)),
    "loss": lambda what, method, other: View(loss_gap(R, what, method, other)),
    "task": lambda name, method: SUMMARY.benchmarks.tasks[name].methods[method],
    "at": lambda method, factor: next(point for point in SUMMARY.rewound[method] if point.factor == factor),
    "mean": statistics.fmean,
}


def wrong(text):
    """['number: expression is value', ...] of the stated numbers and claims of a text that do not hold."""
    found = []
    for sign, number, percent, expression in STATED.findall(text):
        value = eval(expression, {**NAMES}) * (100 if percent else 1)
        form = f"{',' if '.' not in number or ',' in number else ''}.{len(number.partition('.')[2])}f"
        signed = f"{abs(value):{form}}" if sign and (value < 0) == (sign != "+") else f"{value:{form}}"
        if signed != number:
            found.append(f"{sign}{number}{percent}: {expression} is {value}")
    return found + [f"not so: {claim}" for claim in CLAIM.findall(text) if not eval(claim, {**NAMES})]


def unstated(text, known=()):
    """The numbers of a text that states numbers, each with the words around it, that have no expression."""
    if not STATED.search(text):
        return []
    text = re.sub(r"<!--.*?-->", "", STATED.sub("", text))
    for words in known:
        text = text.replace(words, "")
    text = re.sub(r"`[^`]*`|\b\d+ bits\b", "", text)
    return [text[max(0, found.start() - 40) : found.end() + 15] for found in ANY_NUMBER.finditer(text)]


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_states_follows_from_the_records(name):
    raw, text = PAGES[name].read_text(encoding="utf-8"), prose(name, has_comments=True)
    assert not re.search(r"^\s*<!-- (=|is) ", raw, re.MULTILINE), "a comment at the start of a line ends the paragraph"
    assert wrong(text) == []
    assert unstated(text, [words for page, words in KNOWN if page == name]) == [], (
        "state it: NUMBER<!-- = EXPRESSION -->"
    )


def test_a_wrong_number_an_unstated_one_and_a_claim_that_does_not_hold_are_found():
    gap = NAMES["pair"]("rougeL", "qlora", "galore")
    right = (
        f"{m_loss():.3f}<!-- = mean(m.qlora.eval_loss) -->, {R.reference['n_test']:,}<!-- = ref.n_test --> rows, "
        f"−{-gap.value:.4f}<!-- = pair('rougeL', 'qlora', 'galore').value -->"
    )
    assert wrong(right) == [] and unstated(f"{right} in 4-bit and 16 bits on the 270M, as `r=8`") == []
    assert len(unstated(f"{right} with 3 seeds")) == 1
    assert unstated(f"{right} with 95 % intervals", ["95 % interval"]) == []
    assert len(wrong(right.replace("−", "+"))) == len(wrong(right.replace("−", ""))) == 1
    assert wrong("7.123<!-- = mean(m.qlora.eval_loss) -->")[0].startswith("7.123: mean(m.qlora.eval_loss) is 1.")
    assert wrong("higher<!-- is m.qlora.over_base.rougeL.low > 0 -->, lower<!-- is 1 > 2 -->") == ["not so: 1 > 2"]


def m_loss():
    return statistics.fmean(SUMMARY.methods.qlora.eval_loss)
