"""LLM as a judge: two methods' answers to the same test rows, compared in both orders under one fixed rubric.

Each verdict is stored immediately in judge/<a>-vs-<b>.jsonl of the study folder, so that an interrupted run resumes
without repeating calls. A verdict is valid only for its texts, rubric and judge.
"""

import hashlib
import json
import re
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftlib import data
from peftlib.core.errors import JudgeError, Stopped, StudyError
from peftlib.core.session import interrupts
from peftlib.evaluation.predictions import read_predictions
from peftlib.methods import BASE, study_order

RUBRIC = (Path(__file__).parent / "rubric.txt").read_text(encoding="utf-8").strip()
_CHOICE = "VERDICT: 1, VERDICT: 2 or VERDICT: TIE"
REMINDER = f"That did not end with one verdict line. Reply with one line and nothing else: {_CHOICE}"
RUBRIC_VERSION = "1"  # of rubric, frame and reminder: raise it with any change, which invalidates all verdicts
RUBRIC_SHA256 = hashlib.sha256(f"{RUBRIC}\n{REMINDER}".encode()).hexdigest()
ORDERS = ("ab", "ba")
REPLY_TOKENS = 300  # enough for a judge that does not reason at length
# The verdict on two identical answers, which are not sent to a judge.
_EQUAL = {"verdict": "tie", "tries": 0, "reply_tokens": 0, "input_tokens": 0, "output_tokens": 0, "reply": ""}
_TRIES_TO_PARSE = 3  # a reply and two reminders
_LOG_EVERY_S = 10.0
_POLL_S = 0.5  # seconds between checks for Ctrl-C
_VERDICT = re.compile(r"VERDICT: (1|2|TIE)")
_VERDICT_LIKE = re.compile(r"(?i)verdict\W*:")


@dataclass(frozen=True)
class Case:
    """One question to the judge. order: 'ab' shows method a's answer first. message: the whole prompt. time: 2 if it is
    asked a second time, to measure self-agreement."""

    row: dict = field(repr=False)
    order: str
    first: str = field(repr=False)
    second: str = field(repr=False)
    time: int = 1

    @property
    def message(self):
        """The rubric, then the conversation and both answers, each between lines with a hash of the texts."""
        turns = "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.row["messages"][:-1])
        texts = {"conversation": turns, "answer 1": self.first, "answer 2": self.second}
        mark = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:10]
        parts = [f"===== {name} ({mark}) =====\n{text}\n===== end ({mark}) =====" for name, text in texts.items()]
        return "\n\n".join([RUBRIC, *parts])

    @property
    def is_identical(self):
        """Whether both answers are the same text, which is a tie without a call."""
        return self.first == self.second

    def key(self, judge):
        """16 hex digits over the judge, the rubric, the order and all texts shown."""
        shown = [judge, RUBRIC_SHA256, self.order, self.message, *([self.time] if self.time > 1 else [])]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def parse_verdict(reply):
    """1, 2 or 0 (tie); None unless the reply's last line is its only verdict line. Never guesses."""
    lines = [line.strip() for line in (reply or "").strip().splitlines()]
    if sum(_VERDICT_LIKE.search(line) is not None for line in lines) != 1:
        return None
    found = _VERDICT.fullmatch(lines[-1])
    return None if found is None else {"1": 1, "2": 2, "TIE": 0}[found[1]]


def in_order(methods):
    """The two methods in the study's order, so that each pair has one file. StudyError: not two different methods."""
    if len(set(methods)) != 2 or len(methods) != 2:
        raise StudyError(f"a judge compares two different methods, not {' and '.join(methods) or 'none'}")
    return tuple(sorted(methods, key=study_order))


def first_rows(rows, n_rows):
    """The rows with the smallest prompt hashes, so that a larger sample contains a smaller one; 0: all, in order."""
    return sorted(rows, key=lambda row: (row["prompt_sha256"], row["id"]))[:n_rows] if n_rows else list(rows)


def cases_of(rows, answers_a, answers_b, *, n_rows=0):
    """[Case, ...]: both orders of each row, or of its `first_rows`. answers: {row's id: text}."""
    shown = {"ab": (answers_a, answers_b), "ba": (answers_b, answers_a)}
    picked = first_rows(rows, n_rows)
    return [Case(row, order, *(answers[row["id"]] for answers in shown[order])) for row in picked for order in ORDERS]


def asked_again(cases, n_rows):
    """The cases of the first `n_rows` rows, to ask a second time."""
    rows = {case.row["id"]: case.row for case in cases}.values()
    again = {row["id"] for row in first_rows(rows, n_rows)} if n_rows else ()
    return [replace(case, time=2) for case in cases if case.row["id"] in again]


def own_seed(method, seed):
    """The seed of a method's run; an untrained model has none."""
    return 0 if method == BASE else seed


def cases_of_study(study, methods, seed, n_rows=0):
    """((name of each run), [Case, ...]) of two methods' answers to a study's test rows, see cases_of.

    seed: the seed of the runs. StudyError: no answers yet, or answers to other rows.
    """
    split_hash = study.manifest()["split_hash"]
    rows = list(data.load_split(study.data_dir, "test"))
    names, answers = [], []
    for method in methods:
        own = own_seed(method, seed)
        path = study.predictions_path(method, own)
        if not path.exists():
            raise StudyError(f"no answers of {method} (seed {own}) in {study.folder}: run 04_eval first")
        answers.append({row["id"]: row["answer"] for row in read_predictions(path, rows, split_hash)})
        names.append(f"{method}-s{own}")
    return tuple(names), cases_of(rows, *answers, n_rows=n_rows)


def open_cases(cases, verdicts, judge, reply_tokens):
    """[Case, ...] without a settled verdict in `verdicts`, a verdicts.Verdicts."""
    return [case for case in cases if not verdicts.is_settled(case.key(judge), reply_tokens)]


def run(cases, verdicts, backend, *, reply_tokens=REPLY_TOKENS, parallel=1, log=print, require=lambda: None):
    """Judge every case that `verdicts` lacks and store each verdict immediately; returns [result of _judged, ...].

    backend: see backends. reply_tokens: the limit of one reply; malformed verdicts under a lower limit are requested
    again. parallel: concurrent calls. require: raises if another session has taken over the verdicts.
    JudgeError: the judge does not answer; earlier verdicts are kept, and the next run resumes there.
    Stopped: Ctrl-C or SIGTERM, after the calls in progress.
    """
    fresh = open_cases(cases, verdicts, backend.name, reply_tokens)
    for case in fresh:
        if case.is_identical:
            verdicts.add(case, backend.name, _EQUAL)
    to_ask, made, failed, said = [case for case in fresh if not case.is_identical], [], None, time.monotonic()
    with interrupts() as interrupted:
        for case, future in _asked(backend, to_ask, parallel, reply_tokens, interrupted):
            try:
                found = future.result()
            except JudgeError as error:
                failed = failed or error
                continue
            require()
            made.append(found)
            if found["verdict"] is not None:  # the next run retries what was refused
                verdicts.add(case, backend.name, found)
            if time.monotonic() - said > _LOG_EVERY_S or len(made) == len(to_ask):
                log(f"judged {len(made)}/{len(to_ask)}")
                said = time.monotonic()
    kept = f"{len(verdicts.by_key)} verdicts are kept in {verdicts.path.name}: run it again to resume"
    if interrupted.is_set():
        raise Stopped(f"judging stopped after {len(made)} of {len(to_ask)} calls. {kept}")
    if failed:
        retried = ", ".join(f"{n} {what}" for what, n in backend.counts.items()) or "none retried"
        raise JudgeError(f"{failed}. Calls so far: {len(made)} done, {retried}. {kept}") from None
    return made


def _asked(backend, cases, parallel, reply_tokens, interrupted):
    """Yield (case, future of _judged) as they finish; start no new one after an error or interrupt."""
    waiting, is_stopped = iter(cases), False
    with ThreadPoolExecutor(parallel) as pool:
        running = {pool.submit(_judged, backend, case, reply_tokens): case for _, case in zip(range(parallel), waiting)}
        try:
            while running:
                for future in wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future
                    is_stopped = is_stopped or interrupted.is_set() or future.exception() is not None
                    following = None if is_stopped else next(waiting, None)
                    if following is not None:
                        running[pool.submit(_judged, backend, following, reply_tokens)] = following
                if interrupted.is_set():
                    backend.stop()
        finally:
            if running:  # the caller has stopped iterating
                backend.stop()


def _judged(backend, case, reply_tokens):
    """A verdict's fields for one case; the verdict is None if the server refuses the request."""
    messages, counted = [{"role": "user", "content": case.message}], []
    while True:
        reply = backend.ask(messages, max_tokens=reply_tokens)
        counted.append((reply.input_tokens, reply.output_tokens))
        chosen = None if reply.is_refused else parse_verdict(reply.text)
        if reply.is_refused or chosen is not None or len(counted) == _TRIES_TO_PARSE:
            break
        # A greedy judge would repeat itself, so tell it what was missing.
        turns = [{"role": "assistant", "content": reply.text or "(nothing)"}, {"role": "user", "content": REMINDER}]
        messages = [*messages[:1], *turns]
    winner = {0: "tie", 1: case.order[0], 2: case.order[1], None: "malformed"}[chosen]
    # A sum is unknown if any reply's count is.
    sent, received = (None if None in numbers else sum(numbers) for numbers in zip(*counted))
    verdict = {"verdict": None if reply.is_refused else winner, "tries": len(counted), "reply_tokens": reply_tokens}
    return {**verdict, "input_tokens": sent, "output_tokens": received, "reply": reply.text}
