"""Greedy answers to test rows and questions. Each is saved immediately, so an interrupted session repeats little."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftlib.core.errors import Stopped
from peftlib.evaluation.inference.engines import block_rows, generate_batch, generate_rows
from peftlib.models.chat_template import STOP_IDS, encode_prompt

_LOG_SECONDS = 2.0
_ETA_FROM = 0.1  # share of answered rows from which the remaining time is logged


@dataclass(frozen=True)
class Answer:
    """text: decoded, without control tokens. n_tokens: its tokens, without the stop token. finish_reason: 'stop', or
    'length' at the token limit."""

    text: str
    n_tokens: int
    finish_reason: str


def answer_batch(model, tokenizer, prompts, *, max_new_tokens):
    """[Answer, ...] to a batch of token-id lists, greedy, with transformers' generate."""
    made = generate_batch(model, prompts, [max_new_tokens] * len(prompts))
    return [_answer(tokenizer, ids) for ids in made]


def _answer(tokenizer, ids):
    has_stop = bool(ids) and ids[-1] in STOP_IDS
    kept = ids[:-1] if has_stop else ids
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Answer(text, len(kept), "stop" if has_stop else "length")


def ask(model: Any, tokenizer: Any, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """[text, ...]: the model's answer to each question, asked as a first user turn."""
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    was_training = model.training
    model.eval()
    answers = answer_batch(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    model.train(was_training)
    return [answer.text for answer in answers]


def answer_rows(
    model, tokenizer, rows, predictions, *, max_new_tokens, batch=0, engine="auto", deadline=None, log=print
):
    """Answer every test row that `predictions` lacks, longest prompts first; then sort its file in the rows' order.

    rows: test rows of peftlib.data; the last turn is the reference, the turns before it the prompt. predictions: a
    predictions.Predictions. engine, batch: see engines.generate_rows. deadline: a session.Deadline.
    On a CPU the file of an interrupted run is identical to an uninterrupted one's; on a GPU answers may differ if two
    tokens were within rounding of each other.
    Returns (seconds of generation, tokens generated) of this call. Stopped: the deadline has passed.
    """
    prompts = {row["id"]: encode_prompt(tokenizer, row["messages"][:-1]) for row in rows}
    ordered = sorted(rows, key=lambda row: (-len(prompts[row["id"]]), row["id"]))
    size = block_rows(model, engine=engine, batch=batch)
    if size is None:  # a row's answer may then depend on its batch anyway
        ordered = [row for row in ordered if row["id"] not in predictions.rows]
    progress = _Progress(len(rows), len(predictions.rows), log)
    for block in (ordered[at : at + (size or len(rows))] for at in range(0, len(ordered), size or len(rows))):
        if all(row["id"] in predictions.rows for row in block):
            continue
        asked, limits = [prompts[row["id"]] for row in block], [max_new_tokens] * len(block)
        for number, ids in generate_rows(model, asked, limits, engine=engine, batch=batch, log=log):
            row = block[number]
            if row["id"] in predictions.rows:
                continue
            answer = _answer(tokenizer, ids)
            predictions.add(row, answer)
            progress.count(answer)
            why = deadline and deadline.passed()
            if why and len(predictions.rows) < len(rows):
                raise Stopped(f"{why}: {len(predictions.rows)} of {len(rows)} rows are answered and kept; run again")
    predictions.complete(rows)
    return progress.spent(), progress.tokens


class _Progress:
    """Logs answered rows, tokens per second and remaining time, every few seconds and at the end."""

    def __init__(self, rows, before, log):
        self.rows, self.answered, self.before, self.log = rows, before, before, log
        self.tokens, self.started = 0, time.monotonic()
        self.logged = self.started

    def spent(self):
        return time.monotonic() - self.started

    def count(self, answer):
        self.answered += 1
        self.tokens += answer.n_tokens
        if time.monotonic() - self.logged < _LOG_SECONDS and self.answered < self.rows:
            return
        self.logged = time.monotonic()
        spent, share = max(self.spent(), 1e-9), (self.answered - self.before) / max(self.rows - self.before, 1)
        # Rows are answered in parallel, so the first finished ones do not show how long all take.
        left = int(spent / share - spent)
        eta = f"  ETA {left // 60}:{left % 60:02d}" if share >= _ETA_FROM else ""
        self.log(f"answered {self.answered}/{self.rows}  {self.tokens / spent:,.0f} tok/s{eta}")
