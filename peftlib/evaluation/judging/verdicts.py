"""A judge's verdicts on disk and their summary: win rates with intervals, consistency, malformed replies."""

import hashlib
import itertools
import json
import os
from dataclasses import dataclass, field, replace

from peftlib.core.errors import StudyError, reading, writing
from peftlib.core.files import SCHEMA_VERSION, append_text
from peftlib.core.json_reading import fault, parse
from peftlib.evaluation import stats
from peftlib.evaluation.judging import prompts as sets
from peftlib.evaluation.judging import rates
from peftlib.evaluation.judging.judge import ORDERS, RUBRIC_SHA256, RUBRIC_VERSION, cases_of, in_order
from peftlib.methods import BASE

_TEXTS = dict.fromkeys(("key", "id", "judge", "rubric_sha256", "a", "b"), str)
_CHOICES = {"order": ORDERS, "verdict": ("a", "b", "tie", "malformed")}
_SHAPE = {**_TEXTS, **_CHOICES, "schema_version": int, "reply_tokens": int, "rubric_version?": str, "time?": int}
_SCORE = {"a": 0.0, "tie": 0.5, "b": 1.0}  # of b


class Verdicts:
    """judge/<a>-vs-<b>.jsonl, one verdict per line. `names`: the compared runs, ('base-s0', ...).

    by_key: {Case.key: verdict, a dict}. is_cut: the last line was truncated by a kill and is ignored.
    StudyError: any other line is damaged or has another schema version.
    """

    def __init__(self, path, names):
        self.path, self.names = path, names
        with reading(path):
            whole, end, cut = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        self.is_cut, self._whole_bytes = bool(cut), len(whole + end)
        lines = [_parsed(path, number, line) for number, line in enumerate(whole.split(b"\n"), 1) if line]
        self.by_key = {line["key"]: line for line in lines}

    def is_settled(self, key, reply_tokens):
        """Whether there is a verdict that a limit of `reply_tokens` would not improve."""
        line = self.by_key.get(key)
        return line is not None and (line["verdict"] != "malformed" or line["reply_tokens"] >= reply_tokens)

    def add(self, case, judge, found):
        """Append the verdict from judge._judged and wait until it is on disk. DiskError: it cannot be written.

        Its token counts include reminders; None if the judge gave no count.
        """
        of_case = {"id": case.row["id"], "source": case.row["source"], "order": case.order, "time": case.time, **found}
        of_pair = {"a": self.names[0], "b": self.names[1], "is_identical": case.is_identical}
        line = {"schema_version": SCHEMA_VERSION, "key": case.key(judge), **of_case, **of_pair}
        line |= {"judge": judge, "rubric_version": RUBRIC_VERSION, "rubric_sha256": RUBRIC_SHA256}
        if self.is_cut:
            with writing(self.path):
                os.truncate(self.path, self._whole_bytes)
            self.is_cut = False
        append_text(self.path, json.dumps({**line, "seal": _seal(line)}, ensure_ascii=False) + "\n")
        self.by_key[line["key"]] = line


def _parsed(path, number, text):
    try:
        line = parse(text.decode("utf-8"))
        wrong = fault(line, _SHAPE)
    except ValueError as error:
        wrong = str(error)
    if not wrong and line["schema_version"] != SCHEMA_VERSION:
        wrong = f"its schema_version is {line['schema_version']}, not {SCHEMA_VERSION}"
    if not wrong and line.pop("seal", None) not in (None, _seal(line)):  # older verdicts have none
        wrong = "its SHA-256 differs"
    if wrong:
        raise StudyError(f"{path}: line {number} is damaged ({wrong}): delete that line and keep the rest")
    return line


def _seal(line):
    """16 hex digits over a line's values, to detect changes."""
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]


def path_of(study, methods, prompts=""):
    """The file of the verdicts on two methods, in any order. prompts: a set's name, '' for the test rows."""
    return study.folder / "judge" / prompts / f"{'-vs-'.join(in_order(methods))}.jsonl"


@dataclass(frozen=True)
class Judged:
    """One judge's verdicts on two runs. Intervals and shares are None if there are no verdicts to count."""

    judge: str
    a: str  # names of the runs
    b: str
    n_rows: int  # with a verdict in both orders
    wins: int  # rows where b wins in both orders, or wins once and ties once
    ties: int
    losses: int
    win_rate: stats.Interval = field(repr=False)  # of b, ties count half, mean of both orders, by row
    length_controlled: stats.Interval = field(repr=False)  # the same for answers of equal length, see rates
    consistency: stats.Interval = field(repr=False)  # rows with different answers and the same verdict in both orders
    self_agreement: stats.Interval = field(repr=False)  # of verdicts on the same question asked twice
    n_identical: int
    position_bias: float  # rows with different answers whose verdicts both chose the first answer, or both the second
    first_share: float  # share of the verdicts without ties that chose the first answer
    n_malformed: int
    prompts: str = ""  # the set judged on, '' for the test rows


def _known(cases, verdicts, judge):
    """{row: {order: verdict}} of the cases that have one."""
    found = {}
    for case in cases:
        line = verdicts.by_key.get(case.key(judge))
        if line is not None:
            found.setdefault(case.row["id"], {})[case.order] = line["verdict"]
    return found


def _in_both_orders(known):
    """The rows of _known with a well-formed verdict in both orders."""
    return {row: of for row, of in known.items() if len(of) == len(ORDERS) and "malformed" not in of.values()}


def summary(cases, verdicts, judge, names, prompts=""):
    """The Judged of one judge's verdicts on the cases."""
    cases = [case for case in cases if case.time == 1]
    known, again = (_known(of, verdicts, judge) for of in (cases, [replace(case, time=2) for case in cases]))
    both, of_row = _in_both_orders(known), {case.row["id"]: case for case in cases if case.order == ORDERS[0]}
    scores = [sum(map(_SCORE.get, found.values())) / len(ORDERS) for found in both.values()]
    lengths = [[len(text) for text in (of_row[row].first, of_row[row].second)] for row in both]
    asked = {row: found for row, found in both.items() if not of_row[row].is_identical}
    took_first = [verdict == order[0] for of in asked.values() for order, verdict in of.items() if verdict != "tie"]
    same = [len(set(found.values())) == 1 for found in asked.values()]
    twice = [
        [first == of[order] for order, first in known.get(row, {}).items() if {first, of.get(order)} <= {*_SCORE}]
        for row, of in again.items()
        if not of_row[row].is_identical
    ]
    twice = [sum(of) / len(of) for of in twice if of]
    by_place = [set(found.values()) == {"a", "b"} for found in asked.values()]
    return Judged(
        judge,
        *names,
        n_rows=len(both),
        wins=sum(score > 0.5 for score in scores),
        ties=sum(score == 0.5 for score in scores),
        losses=sum(score < 0.5 for score in scores),
        win_rate=stats.mean_interval(scores) if scores else None,
        length_controlled=rates.length_controlled(scores, *zip(*lengths)) if scores else None,
        consistency=stats.mean_interval(same) if same else None,
        self_agreement=stats.mean_interval(twice) if twice else None,
        n_identical=len(both) - len(asked),
        position_bias=sum(by_place) / len(asked) if asked else None,
        first_share=sum(took_first) / len(took_first) if took_first else None,
        n_malformed=sum(verdict == "malformed" for of in known.values() for verdict in of.values()),
        prompts=prompts,
    )


def sentences(judged):
    """Yield sentences on a Judged, the win rate first."""
    of_set = f" on {judged.prompts}" if judged.prompts else ""
    if judged.win_rate is None:
        yield "no row has a verdict in both orders, so there is no win rate"
    else:
        rate = judged.win_rate
        is_noise = rate.low <= 0.5 <= rate.high
        state = "inside the noise" if is_noise else "better" if rate.value > 0.5 else "worse"
        range_ = f"95 % interval {rate.low:.1%} to {rate.high:.1%}, {judged.n_rows} rows, ties count half"
        yield f"{judged.b} wins {rate.value:.1%} against {judged.a}{of_set} ({range_}): {state}"
        if judged.length_controlled is not None:
            yield f"at equal lengths {_percent(judged.length_controlled)}"
        equal = f"{judged.n_identical} with identical answers"
        yield f"rows won {judged.wins}, tied {judged.ties} ({equal}), lost {judged.losses}"
    if judged.position_bias is not None:
        first = "" if judged.first_share is None else f"; first answer chosen in {judged.first_share:.0%} of decisions"
        yield f"position bias: {judged.position_bias:.1%} of rows judged by position alone{first}"
    if judged.consistency is not None:
        yield f"same verdict after swapping the order: {_percent(judged.consistency)}"
    if judged.self_agreement is not None:
        yield f"same verdict when asked again: {_percent(judged.self_agreement)}"
    if judged.n_malformed:
        yield f"malformed verdicts: {judged.n_malformed}, excluded with their rows"


def _percent(interval):
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def findings(judged):
    """One sentence for each Judged with a win rate."""
    for found in judged:
        if found.win_rate is not None:
            told = itertools.islice(sentences(found), 1 if found.length_controlled is None else 2)
            yield f"Judged by {found.judge}: {'; '.join(told)}."


def uncounted(study):
    """Yield one sentence for each incomplete verdict file: its last line is truncated, or it is empty."""
    for path in _paths(study):
        found = Verdicts(path, ())
        why = "the last line is truncated" if found.is_cut else "" if found.by_key else "the file is empty"
        if why:
            asked = "run `judge` with the same methods to complete it"
            yield f"{path.relative_to(study.folder).as_posix()}: {why} and is ignored; {asked}."


def _paths(study):
    """The verdict files of the test rows, then those of prompt sets."""
    folder = study.folder / "judge"
    return [path for name in ("", *sets.SETS) for path in sorted((folder / name).glob("*-vs-*.jsonl"))]


def load(study, found):
    """([Judged, ...], [rates.Agreement, ...], number of excluded verdicts) of the study's verdict files, for the
    current answers.

    found: results.ScoredStudy. Verdicts on other answers or under another rubric are excluded.
    StudyError: a damaged line.
    """
    made, agreed, n_unused = [], [], 0
    for path in _paths(study):
        methods, prompts = tuple(path.stem.split("-vs-")), path.parent.name if path.parent.name in sets.SETS else ""
        verdicts = Verdicts(path, methods)
        unused = set(verdicts.by_key)
        for runs in _pairs(found, methods):
            names = tuple(f"{run.record['method']}-s{run.record['seed']}" for run in runs)
            cases, known = _cases(study, found, runs, prompts), {}
            asked = [case for case in cases if not case.is_identical]
            for judge in dict.fromkeys(line["judge"] for line in verdicts.by_key.values()):
                unused -= {replace(case, time=time).key(judge) for case in cases for time in (1, 2)}
                made.append(summary(cases, verdicts, judge, names, prompts))
                known[judge] = _in_both_orders(_known(asked, verdicts, judge))
            agreed += rates.agreements(known, names, prompts)
        n_unused += len(unused)
    return [judged for judged in made if judged.n_rows or judged.n_malformed], agreed, n_unused


def _cases(study, found, runs, prompts):
    """The Cases of two runs' current answers to the test rows or to a prompt set."""
    if not prompts:
        texts = [dict(zip((row["id"] for row in found.test_rows), run.answers)) for run in runs]
        return cases_of(found.test_rows, *texts)
    if not sets.path_of(study, prompts).exists():  # a report does not use the network
        raise StudyError(f"{sets.path_of(study, prompts)} is missing: run `judge --prompts {prompts}` again")
    rows = sets.rows_of(study, prompts)
    keys = [(run.record["method"], run.record["seed"]) for run in runs]
    texts = [sets.answers(study, *key, prompts, rows, is_asked=False) for key in keys]
    return cases_of([row for row in rows if all(row["id"] in of for of in texts)], *texts)


def _pairs(found, methods):
    """[(run of a, run of b), ...] of scored runs: equal seeds, or every seed if one side has a single run (base)."""
    pairs = itertools.product(*(found.scored.get(method, []) for method in methods))
    return [(a, b) for a, b in pairs if BASE in methods or a.record["seed"] == b.record["seed"]]
