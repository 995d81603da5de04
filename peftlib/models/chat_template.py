"""Conversations as token ids and a loss mask, identical to Gemma's own chat template.

Ids are concatenated turn by turn instead of tokenizing rendered text, so that a control token typed by a user is plain
text and <bos> appears once. Turn layout: the bundled template, https://ai.google.dev/gemma/docs/core/prompt-structure
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from peftlib.core.errors import DataError, ModelError

PAD, BOS, START_OF_TURN, END_OF_TURN = 0, 2, 105, 106
STOP_IDS = (1, END_OF_TURN)  # <eos>, <end_of_turn>

TEMPLATE_PATH = Path(__file__).with_name("gemma3_chat_template.jinja")
# `_CHAT_TEMPLATE` as Google's conversion script writes it to every Gemma 3 repository (Apache-2.0), "\n" evaluated.
TEMPLATE_SOURCE = (
    "https://github.com/huggingface/transformers/blob/0d7e95d96b4e187c651e2b2406ed98ed40d74963/"
    "src/transformers/models/gemma3/convert_gemma3_weights.py"
)
TEMPLATE_SHA256 = "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4"

_ROLE = {"user": "user", "assistant": "model"}


@dataclass(frozen=True)
class Encoded:
    """One conversation. input_ids: T token ids; is_scored: T flags, True on assistant tokens and their end of turn.

    turn_ends: for each message, the number of ids up to and including it, so truncating after a turn is a slice.
    """

    input_ids: list
    is_scored: list
    turn_ends: list


def template_text():
    """Gemma 3's chat template. ModelError: the bundled file has an unexpected checksum."""
    text = TEMPLATE_PATH.read_bytes()
    found = hashlib.sha256(text).hexdigest()
    if found != TEMPLATE_SHA256:
        raise ModelError(f"{TEMPLATE_PATH.name} has SHA-256 {found}, not {TEMPLATE_SHA256}: reinstall peftlib")
    return text.decode()


def set_template(tokenizer):
    """Set a tokenizer's template to the bundled one (pretrained models have none); returns the tokenizer."""
    tokenizer.chat_template = template_text()
    return tokenizer


def check_tokenizer(tokenizer):
    """ModelError if Gemma's turn tokens are not the single ids 105 and 106, as in some conversions."""
    for text, wanted in (("<start_of_turn>", START_OF_TURN), ("<end_of_turn>", END_OF_TURN)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != [wanted]:
            raise ModelError(f"the tokenizer encodes {text} as {ids}, not [{wanted}]: use a Gemma 3 tokenizer.json")
    if tokenizer.bos_token_id != BOS:
        raise ModelError(f"the tokenizer's <bos> is {tokenizer.bos_token_id}, not {BOS}: use a Gemma 3 tokenizer.json")


def stop_at(model):
    """Set a model's generation config to Gemma's stop ids and greedy decoding; returns the model."""
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id = list(STOP_IDS), BOS, PAD
    settings.do_sample, settings.top_k, settings.top_p, settings.temperature = False, None, None, None
    return model


def encode(tokenizer, messages):
    """Encode one conversation, with one <bos>.

    messages: alternating user/assistant dicts with role and content, user first; a system turn before them is merged
    into the first user turn. DataError: roles in any other order.
    """
    return encode_many(tokenizer, [messages])[0]


def encode_many(tokenizer, conversations):
    """[Encoded, ...], as by `encode`, but all turns of all conversations are tokenized in one batch."""
    turns = [_turns(messages) for messages in conversations]
    bodies = iter(_plain_ids(tokenizer, [head + text for conversation in turns for head, text in conversation]))
    heads = [f"{role}\n" for role in _ROLE.values()]
    newline, *head_ids = _plain_ids(tokenizer, ["\n", *heads])
    lead = dict(zip(heads, map(len, head_ids), strict=True))
    return [_joined(conversation, bodies, lead, newline) for conversation in turns]


def encode_prompt(tokenizer, messages):
    """Token ids of a history that ends with a user turn, followed by the start of the model's turn."""
    return [*encode(tokenizer, messages).input_ids, START_OF_TURN, *_plain_ids(tokenizer, ["model\n"])[0]]


def _turns(messages):
    """[(role line, text), ...] in the template's order, stripped."""
    prefix = ""
    if messages and messages[0]["role"] == "system":
        prefix, messages = messages[0]["content"] + "\n\n", messages[1:]
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise DataError(f"message {i} has role {message['role']!r}: roles must alternate, user first")
        turns.append((_ROLE[message["role"]] + "\n", (prefix if i == 0 else "") + message["content"].strip()))
    return turns


def _joined(turns, bodies, lead, newline):
    ids, scored, ends = [BOS], [False], []
    for (head, _), body in zip(turns, bodies):  # `bodies` continues with the next conversation
        # The template tokenizes role line and text together. The role line's tokens are the first `lead` ones, as a
        # stripped text cannot begin with a newline that would merge with the line's own.
        own = lead[head]
        ids += [START_OF_TURN, *body, END_OF_TURN, *newline]
        scored += [False] * (1 + own) + [head == "model\n"] * (len(body) - own + 1) + [False] * len(newline)
        ends.append(len(ids))
    return Encoded(ids, scored, ends)


def _plain_ids(tokenizer, texts):
    """[ids, ...] of texts, with typed control tokens encoded as plain text."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]
