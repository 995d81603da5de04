"""A judge's verdicts on disk, and their summary: win rates with intervals, position bias, malformed replies."""

import errno
import hashlib
import json
import os
from dataclasses import dataclass, field

from peftlib.core.errors import StudyError, reading, writing
from peftlib.core.files import SCHEMA_VERSION
from peftlib.core.json_reading import fault, parse
from peftlib.evaluation import stats
from peftlib.evaluation.judging.judge import ORDERS, RUBRIC_SHA256, cases_of, in_order
from peftlib.methods import BASE

_TEXTS = ("key", "id", "judge", "rubric_sha256", "a", "b")
_SHAPE = {**dict.fromkeys(_TEXTS, str), "order": str, "verdict": str, "schema_version": int, "reply_tokens": int}
_VALUES = ("a", "b", "tie", "malformed")
_SCORE = {"a": 0.0, "tie": 0.5, "b": 1.0}  # of b


class Verdicts:
    """judge/<a>-vs-<b>.jsonl, one verdict a line. `names`: of the runs whose answers are compared, ('base-s0', ...).

    A last line that a kill cut does not count; then `is_cut` is True.
    StudyError: any other line that is damaged, or of another schema.
    """

    def __init__(self, path, names):
        self.path, self.names = path, names
        with reading(path):
            whole, _, cut = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        self.lines = [_parsed(path, number, line) for number, line in enumerate(whole.split(b"\n"), 1) if line]
        self.is_cut = bool(cut)
        self._n_whole = len(whole) + bool(whole) if cut else None  # bytes; cut off there by the first verdict added
        self._by_key = {line["key"]: line for line in self.lines}

    def __contains__(self, key):
        return key in self._by_key

    def __len__(self):
        return len(self._by_key)

    def is_settled(self, key, reply_tokens):
        """Whether there is a verdict that a limit of `reply_tokens` would not better."""
        line = self._by_key.get(key)
        return line is not None and (line["verdict"] != "malformed" or line["reply_tokens"] >= reply_tokens)

    def get(self, key):
        """The verdict of a key as a dict, or None."""
        return self._by_key.get(key)

    def add(self, case, judge, *, verdict, reply, reply_tokens, tries, usage):
        """Append one verdict and wait until the disk has it, whole or not at all.

        usage: (tokens sent, tokens received), reminders included; None for a number that the judge did not tell.
        """
        line = {
            "schema_version": SCHEMA_VERSION,
            "key": case.key(judge),
            "id": case.row["id"],
            "source": case.row["source"],
            "order": case.order,
            "a": self.names[0],
            "b": self.names[1],
            "verdict": verdict,
            "is_identical": case.is_identical,
            "tries": tries,
            "reply_tokens": reply_tokens,
            "input_tokens": usage[0],
            "output_tokens": usage[1],
            "judge": judge,
            "rubric_sha256": RUBRIC_SHA256,
            "reply": reply,
        }
        self._append((json.dumps({**line, "seal": _seal(line)}, ensure_ascii=False) + "\n").encode("utf-8"))
        self.lines.append(line)
        self._by_key[line["key"]] = line

    def _append(self, line):
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as out:
                if self._n_whole is not None:
                    out.truncate(self._n_whole)
                    self._n_whole = None
                before = os.fstat(out.fileno()).st_size
                try:
                    if out.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                    os.fsync(out.fileno())
                except OSError:
                    out.truncate(before)  # half a line would spoil the next one
                    raise


def _parsed(path, number, text):
    try:
        line = parse(text.decode("utf-8"))
        wrong = fault(line, _SHAPE)
        wrong = wrong and f"is damaged ({wrong})"
    except ValueError as error:
        wrong = f"is damaged ({error})"
    if not wrong and (
        line["schema_version"] != SCHEMA_VERSION or line["verdict"] not in _VALUES or line["order"] not in ORDERS
    ):
        wrong = (
            f"has schema_version {line['schema_version']!r}, order {line['order']!r} and verdict {line['verdict']!r}, "
            "which this peftlib does not read"
        )
    if not wrong:
        seal = line.pop("seal", None)  # older verdicts have none
        wrong = "is damaged (its SHA-256 differs)" if seal not in (None, _seal(line)) else None
    if wrong:
        raise StudyError(f"{path}: line {number} {wrong}: delete that line; the rest is kept")
    return line


def _seal(line):
    """16 hex digits over a line's values, which show whether it is as it was written."""
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]


def path_of(study, methods):
    """The file of the verdicts on two methods, whatever their order."""
    return study.folder / "judge" / f"{'-vs-'.join(in_order(methods))}.jsonl"


@dataclass(frozen=True)
class Judged:
    """One judge's verdicts on two runs. a, b: their names. n_rows: rows with a verdict in both orders.

    wins, ties, losses: rows where b wins in both orders or wins once and ties once, neither, or the other way round.
    win_rate: of b, a tie as a half, mean of both orders, by row; None without rows. position_bias: share of the rows of
    different answers whose two verdicts both took the first answer, or both the second. first_share: of the verdicts
    that chose one, those that chose the first.
    """

    judge: str
    a: str
    b: str
    n_rows: int
    wins: int
    ties: int
    losses: int
    win_rate: stats.Interval = field(repr=False)
    n_identical: int
    position_bias: float
    first_share: float
    n_malformed: int


def summary(cases, verdicts, judge, names):
    """The Judged of one judge's verdicts on the cases, or None where there are none."""
    by_row, n_malformed = {}, 0
    for case in cases:
        line = verdicts.get(case.key(judge))
        if line is None:
            continue
        if line["verdict"] == "malformed":
            n_malformed += 1
            continue
        by_row.setdefault(case.row["id"], {})[case.order] = (line["verdict"], case.is_identical)
    if not by_row and not n_malformed:
        return None
    both = [found for found in by_row.values() if len(found) == len(ORDERS)]
    scores = [sum(_SCORE[verdict] for verdict, _ in found.values()) / len(ORDERS) for found in both]
    asked = [found for found in both if not found["ab"][1]]
    chosen = [verdict == order[0] for found in asked for order, (verdict, _) in found.items() if verdict != "tie"]
    one_place = [{found["ab"][0], found["ba"][0]} == {"a", "b"} for found in asked]
    return Judged(
        judge,
        *names,
        len(both),
        sum(score > 0.5 for score in scores),
        sum(score == 0.5 for score in scores),
        sum(score < 0.5 for score in scores),
        stats.mean_interval(scores) if scores else None,
        len(both) - len(asked),
        sum(one_place) / len(asked) if asked else None,
        sum(chosen) / len(chosen) if chosen else None,
        n_malformed,
    )


def sentences(judged):
    """Yield sentences on a Judged; None means that nothing was judged."""
    if judged is None or judged.win_rate is None:
        yield "no row has a verdict in both orders, so there is no win rate"
    else:
        rate = judged.win_rate
        is_noise = rate.low <= 0.5 <= rate.high
        yield (
            f"{judged.b} wins {rate.value:.1%} against {judged.a} (95 % interval {rate.low:.1%} to {rate.high:.1%}, "
            f"{judged.n_rows} rows, a tie counts half): "
            + ("inside the noise" if is_noise else "better" if rate.value > 0.5 else "worse")
        )
        yield (
            f"rows won {judged.wins}, tied {judged.ties} ({judged.n_identical} of equal answers), lost {judged.losses}"
        )
    if judged is not None and judged.position_bias is not None:
        first = "" if judged.first_share is None else f"; of its choices {judged.first_share:.0%} were the first answer"
        yield f"position bias: {judged.position_bias:.1%} of rows judged by place alone{first}"
    if judged is not None and judged.n_malformed:
        yield f"malformed verdicts: {judged.n_malformed}, left out with their rows"


def findings(judged):
    """One sentence for each Judged with a win rate."""
    return [f"Judged by {found.judge}: {next(sentences(found))}." for found in judged if found.win_rate is not None]


def uncounted(study):
    """Yield one sentence for each verdict file that is incomplete: its last line is cut, or it is empty."""
    for path in _paths(study):
        verdicts = Verdicts(path, ())
        if verdicts.is_cut or not len(verdicts):
            what = "the last line is cut" if verdicts.is_cut else "the file is empty"
            yield (
                f"judge/{path.name}: {what} and does not count; `judge` with the same methods asks again for "
                f"what is missing."
            )


def _paths(study):
    return sorted((study.folder / "judge").glob("*-vs-*.jsonl"))


def load(study, found):
    """([Judged, ...], number of verdicts left out) of the study's verdict files, against the answers of today.

    found: results.ScoredStudy. Left out are verdicts on other answers or under another rubric.
    StudyError: a damaged line.
    """
    made, n_used, n_lines = [], 0, 0
    for path in _paths(study):
        methods = tuple(path.stem.split("-vs-"))
        verdicts = Verdicts(path, methods)
        n_lines += len(verdicts)
        used = set()
        for run_a, run_b in _pairs(found, methods):
            names = tuple(f"{run.record['method']}-s{run.record['seed']}" for run in (run_a, run_b))
            cases = cases_of(found.test_rows, run_a.answers, run_b.answers)
            for judge in dict.fromkeys(line["judge"] for line in verdicts.lines):
                used |= {key for case in cases if (key := case.key(judge)) in verdicts}
                judged = summary(cases, verdicts, judge, names)
                made += [judged] if judged else []
        n_used += len(used)
    return made, n_lines - n_used


def _pairs(found, methods):
    """[(run of a, run of b), ...] of scored runs: equal seeds, or every seed where one side has a single run (base)."""
    runs_a, runs_b = (found.scored.get(method, []) for method in methods)
    if BASE in methods:
        return [(a, b) for a in runs_a for b in runs_b]
    return [(a, b) for a in runs_a for b in runs_b if a.record["seed"] == b.record["seed"]]
