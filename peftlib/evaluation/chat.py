"""Chat with a trained model, in a terminal or from a pipe."""

import sys

import torch

from peftlib import data, methods
from peftlib.core.env import resolve_device
from peftlib.core.files import allow_odd, visible
from peftlib.evaluation.evaluate import evaluation_dtype, load_model
from peftlib.evaluation.inference.engines import greedy
from peftlib.methods import BASE
from peftlib.models.chat_template import encode_prompt

QUIT, NEW = "/quit", "/new"


class Conversation:
    """Turns with one model, [{role, content}, ...] in `messages`.

    limit: tokens of history plus answer; beyond it the oldest exchanges are dropped.
    """

    def __init__(self, model, tokenizer, *, max_new_tokens, limit=None):
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        self._limit = limit or model.config.get_text_config().max_position_embeddings
        self.messages = []

    def say(self, text, show=None):
        """Stream the model's answer to one more user turn, and return it.

        show: receives the pieces of the answer instead of the terminal.
        """
        self.messages.append({"role": "user", "content": text})
        ids = encode_prompt(self._tokenizer, self.messages)
        while len(ids) + self._max_new_tokens > self._limit and len(self.messages) > 1:
            self.messages = self.messages[2:]
            ids = encode_prompt(self._tokenizer, self.messages)
        kept = ids[-max(1, self._limit - self._max_new_tokens) :]  # keep the end of a turn that is too long
        prompt = torch.tensor([kept], device=self._model.device)
        shown = _shown(self._tokenizer, show)
        made = greedy(self._model, prompt, torch.ones_like(prompt), self._max_new_tokens, streamer=shown)
        answer = self._tokenizer.decode(made[0], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def main(study, method, *, seed, max_new_tokens):
    """Chat until /quit or the end of the input; returns 0. ConfigError, ModelError: no such method, or not trained."""
    if method != BASE:
        methods.find(method)
    device = resolve_device(study.cfg.device)
    dtype = evaluation_dtype(device)[0]
    model = load_model(study, method, seed, device=device, dtype=dtype)
    seed = 0 if method == BASE else seed
    print(f"{method} of study {study.cfg.study} (seed {seed}). {NEW} starts over, {QUIT} ends.")
    conversation = Conversation(model, data.load_tokenizer(study.cfg.model), max_new_tokens=max_new_tokens)
    allow_odd(sys.stdin, "replace")
    allow_odd(sys.stdout, "backslashreplace")
    for text in _typed():
        if text == QUIT:
            break
        if text == NEW:
            conversation.messages = []
            print("(a new conversation)", flush=True)
        elif text:
            conversation.say(text)
    return 0


def _shown(tokenizer, show):
    """A streamer for an answer; on a terminal without control characters."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            if show:
                show(text)
            else:
                print(visible(text), flush=True, end="\n" if stream_end else "")

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _typed():
    """Lines of the input, stripped. Lines from a pipe are echoed, because they are not visible otherwise."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    while sys.stdin is not None:  # it is None when closed, as by `<&-`
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            print(end="\n" if is_terminal else "")
            return
        # Some terminals pass incomplete characters, which a tokenizer rejects.
        text = line.encode("utf-8", "replace").decode("utf-8").strip()
        if not is_terminal:
            print(f"> {visible(text)}", flush=True)
        yield text
