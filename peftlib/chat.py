"""Conversations as token ids and a loss mask, equal to Gemma's own chat template (see sources in each docstring)."""

from dataclasses import dataclass

from peftlib.errors import ModelError

BOS, START_OF_TURN, END_OF_TURN = 2, 105, 106
STOP_IDS = (1, END_OF_TURN)  # <eos>, <end_of_turn>
_ROLE = {"user": "user", "assistant": "model"}


@dataclass(frozen=True)
class Encoded:
    """One conversation. input_ids: T token ids; is_scored: T flags, True on assistant tokens and their end of turn."""

    input_ids: list
    is_scored: list


def check_tokenizer(tokenizer):
    """ModelError where Gemma's turn tokens are not the single ids 105 and 106, as some conversions were seen to do."""
    for text, wanted in (("<start_of_turn>", START_OF_TURN), ("<end_of_turn>", END_OF_TURN)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != [wanted]:
            raise ModelError(f"the tokenizer reads {text} as {ids}, not [{wanted}]: use a Gemma 3 tokenizer.json")


def encode(tokenizer, messages):
    """messages: alternating user/assistant dicts of role and content, user first. Returns Encoded with one <bos>.

    Turn layout as in Gemma's documentation, https://ai.google.dev/gemma/docs/core/prompt-structure
    """
    ids, scored = [BOS], [False]
    newline = _plain(tokenizer, "\n")
    for message in messages:
        is_answer = message["role"] == "assistant"
        head = _ROLE[message["role"]] + "\n"
        # The template tokenizes role and content as one text, so a leading newline may merge with the role's.
        body = _plain(tokenizer, head + message["content"].strip())
        lead = len(_plain(tokenizer, head))
        ids += [START_OF_TURN, *body, END_OF_TURN, *newline]
        scored += [False, *([False] * lead), *([is_answer] * (len(body) - lead + 1)), *([False] * len(newline))]
    return Encoded(ids, scored)


def encode_prompt(tokenizer, messages):
    """Token ids of a history that ends on a user turn, with the opening of the model's turn."""
    return [*encode(tokenizer, messages).input_ids, START_OF_TURN, *_plain(tokenizer, "model\n")]


def _plain(tokenizer, text):
    """Ids of a text in which typed control tokens are letters and nothing more."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
