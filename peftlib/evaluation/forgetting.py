"""Loss on general text, whose rise measures forgetting: bundled prose that no method trains on.

The text, its source and its licence are in peftlib/evaluation/general. A passage is plain text after one <bos>, not a
conversation, so that learning the turn format has no effect.
"""

import hashlib
import json
import statistics
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from peftlib.data import dedup
from peftlib.train.batching import Rows, mean_loss

TEXT_NAME = "CIA World Factbook, country backgrounds"
ROUNDED_FIELD = (
    "general_loss_nf4"  # loss of the untrained model with a method's 4-bit matrices, a field of its evaluation
)
_RECORD_FIELDS = ("general_loss", "general_tokens", "general_text_sha256")
_SHORTEST = 64  # minimum tokens read of a passage, if it has that many
_PATH = Path(__file__).parent / "general" / "factbook.jsonl"


@dataclass(frozen=True)
class GeneralLoss:
    """loss: nats per token, without the first token of each passage. n_tokens: number of scored tokens. text_sha256: 12
    hex digits over the token ids, so that losses on different texts are never compared."""

    loss: float
    n_tokens: int
    text_sha256: str


def passages():
    """[text, ...] of the bundled prose, in random order."""
    return [json.loads(line)["text"] for line in _PATH.read_text(encoding="utf-8").splitlines()]


def apart_from(texts, rows):
    """The texts that are not near-duplicates of any of the rows (with 'messages'), see data.dedup."""
    grams, index = dedup.Grams(), dedup.NearIndex()
    for text in texts:
        index.add(grams([text]))
    too_near = {n for row in rows for n in index.near(grams([turn["content"] for turn in row["messages"]]))}
    return [text for n, text in enumerate(texts) if n not in too_near]


def tokenized(tokenizer, texts, *, n_tokens, max_length):
    """Rows for batching.Rows: each a <bos> and the start of a passage, up to n_tokens scored tokens in total.

    Few tokens are spread over several passages, because a single subject says little.
    """
    made, left = [], n_tokens
    longest = min(max_length - 1, max(_SHORTEST, -(-n_tokens // max(len(texts), 1))))
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        ids = ids[: min(longest, left) + 1]
        if len(ids) < 2:
            break
        made.append({"input_ids": ids, "is_scored": [False, *[True] * (len(ids) - 1)]})
        left -= len(ids) - 1
    return made


def general_loss(model, tokenizer, cfg, train_rows, *, device, precision="fp32"):
    """The GeneralLoss of a model, or None if cfg.general_tokens is 0 or all passages overlap with training rows.

    precision: of autocast, as in batching.mean_loss.
    """
    texts = apart_from(passages(), train_rows) if cfg.general_tokens else []
    made = tokenized(tokenizer, texts, n_tokens=cfg.general_tokens, max_length=cfg.max_length)
    if not made:
        return None
    rows = Rows(made)
    loss = mean_loss(model, rows, device=device, precision=precision)
    ids = json.dumps([row["input_ids"] for row in made])
    return GeneralLoss(loss, int(rows.scored.sum()), hashlib.sha256(ids.encode()).hexdigest()[:12])


def record_fields(found):
    """A GeneralLoss or None as fields of a record's evaluation."""
    return dict(zip(_RECORD_FIELDS, (None, None, None) if found is None else astuple(found)))


def of_record(record):
    """The GeneralLoss in a record, None if it was not measured."""
    values = [(record["evaluation"] or {}).get(name) for name in _RECORD_FIELDS]
    return None if None in values else GeneralLoss(*values)


def rounded_of(record):
    """The GeneralLoss of the untrained model, rounded to 4 bits as in the record's method; None if unknown."""
    found, loss = of_record(record), (record["evaluation"] or {}).get(ROUNDED_FIELD)
    return None if found is None or loss is None else replace(found, loss=loss)


def in_words(base, record):
    """A line on how a run changed the loss on general text, and how 4-bit rounding alone does; '' if unknown."""
    before, after, rounded = of_record(base), of_record(record), rounded_of(record)
    moved, by_rounding = change(before, after), change(before, rounded)
    if moved is None:
        return ""
    line = f"{record['method']}: loss on general text {after.loss:.4f}, base {before.loss:.4f} ({moved:+.1%})"
    same_bits = f"base in the same 4 bits {rounded.loss:.4f} ({by_rounding:+.1%})" if rounded else ""
    return "; ".join(filter(None, (line, same_bits)))


def mean_over(losses):
    """The mean GeneralLoss of several seeds, None if any is unknown or their texts differ."""
    if not losses or None in losses or len({found.text_sha256 for found in losses}) > 1:
        return None
    return replace(losses[0], loss=statistics.fmean(found.loss for found in losses))


def change(before, after):
    """Relative change of the loss, None if one is unknown or their texts differ."""
    if before is None or after is None or before.text_sha256 != after.text_sha256 or not before.loss:
        return None
    return (after.loss - before.loss) / before.loss
