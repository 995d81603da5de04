"""Greedy answers: left-padded batches by length, kept row by row so that a cut session loses one batch at most."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from peftlib.chat import STOP_IDS, encode_prompt
from peftlib.files import write_text

_PAD = 0


@dataclass(frozen=True)
class Answer:
    """text: decoded, without control tokens. n_tokens: its tokens, the stop token not counted. finish_reason: 'stop' or
    'length'."""

    text: str
    n_tokens: int
    finish_reason: str


def answer_batch(model, tokenizer, prompts, *, max_new_tokens):
    """[Answer, ...] to a batch of token-id lists, greedy, by transformers' generate."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), _PAD)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    with torch.no_grad():
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            eos_token_id=list(STOP_IDS),
            pad_token_id=_PAD,
            use_cache=True,
        )
    return [_answer(tokenizer, row) for row in made[:, width:].tolist()]


def _answer(tokenizer, ids):
    ends = [i for i, token in enumerate(ids) if token in STOP_IDS]
    kept = ids[: ends[0]] if ends else ids
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Answer(text, len(kept), "stop" if ends else "length")


def ask(model, tokenizer, questions, *, max_new_tokens):
    """[text, ...]: the model's answer to each question, asked as a first user turn."""
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    was_training = model.training
    model.eval()
    answers = answer_batch(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    model.train(was_training)
    return [answer.text for answer in answers]


class Predictions:
    """predictions/<method>-s<seed>.jsonl, one row a line; what another split or a cut line left is dropped on opening."""

    def __init__(self, path, split_hash):
        self.path = Path(path)
        self.split_hash = split_hash
        self.rows = {}
        # not splitlines(), which would also cut at separators inside an answer
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else [""]
        for line in lines[:-1]:
            row = _parsed(line)
            if row and row["split_hash"] == split_hash:
                self.rows[row["id"]] = row
        if len(self.rows) != len(lines) - 1 or lines[-1]:
            write_text(self.path, "".join(_line(row) for row in self.rows.values()))

    def add(self, test_rows, answers):
        """Append the answers to test rows and have the disk keep them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as out:
            for row, answer in zip(test_rows, answers, strict=True):
                made = {
                    "id": row["id"],
                    "source": row["source"],
                    "prompt_sha256": row["prompt_sha256"],
                    "answer": answer.text,
                    "n_tokens": answer.n_tokens,
                    "finish_reason": answer.finish_reason,
                    "split_hash": self.split_hash,
                }
                self.rows[row["id"]] = made
                out.write(_line(made))
            out.flush()
            os.fsync(out.fileno())


def _line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parsed(line):
    try:
        row = json.loads(line)
    except ValueError:
        return None  # the line that a kill cut
    return row if isinstance(row, dict) and "id" in row and "split_hash" in row else None


def answer_rows(model, tokenizer, rows, predictions, *, max_new_tokens, batch, log=print):
    """Answer every test row that `predictions` lacks, longest prompt first.

    rows: test rows of peftlib.data; the last turn is the reference, the turns before it the prompt.
    Returns (seconds of generation, tokens generated) of this call.
    """
    prompts = {row["id"]: encode_prompt(tokenizer, row["messages"][:-1]) for row in rows}
    missing = [row for row in rows if row["id"] not in predictions.rows]
    missing.sort(key=lambda row: (-len(prompts[row["id"]]), row["id"]))
    started, tokens = time.monotonic(), 0
    for at in range(0, len(missing), batch):
        part = missing[at : at + batch]
        answers = answer_batch(model, tokenizer, [prompts[row["id"]] for row in part], max_new_tokens=max_new_tokens)
        predictions.add(part, answers)
        tokens += sum(answer.n_tokens for answer in answers)
        spent = time.monotonic() - started
        left = int(spent / (at + len(part)) * (len(missing) - at - len(part)))
        log(
            f"answered {len(predictions.rows)}/{len(rows)}  {tokens / spent:,.0f} tok/s  ETA {left // 60}:{left % 60:02d}"
        )
    return time.monotonic() - started, tokens
