"""One question to every model of a study, answered from its saved weights, side by side."""

import gc
import time
from dataclasses import dataclass

import psutil
import torch

from peftlib.core.env import resolve_device
from peftlib.evaluation.evaluate import evaluation_dtype, load_model, trained_methods
from peftlib.evaluation.generate import answer_batch
from peftlib.evaluation.results import BASE
from peftlib.models.chat_template import encode_prompt
from peftlib.models.load import load_tokenizer
from peftlib.notebook.answers import answer_card, ended, page, side
from peftlib.notebook.widgets import Action, can_click, checkboxes, look, ticked
from peftlib.report.palette import THEMES

# A model stays loaded while so many times its size is free: the next one and what merging it takes.
_FREE_TIMES = 3.0
_MOST_TOKENS = 2048
_QUESTION = "Give me one tip for learning a new language."


@dataclass(frozen=True)
class Reply:
    """answer: a generate.Answer, or None where `error` says why there is none. seconds: of answering alone."""

    method: str
    answer: object
    error: str
    seconds: float


class Models:
    """The saved models of a study, loaded one by one; several stay loaded where memory allows.

    log: called with a sentence on what is being done.
    """

    def __init__(self, study, log=print):
        self._study, self.log = study, log
        self._device = resolve_device(study.cfg.device)
        self._loaded = {}  # {(method, when its weights were written): model}
        self._tokenizer = None

    @property
    def names(self):
        """base, and the methods with a finished run of this session's seed."""
        return [BASE, *trained_methods(self._study)]

    def ask(self, question, methods, max_new_tokens):
        """Yield a Reply of each method. What goes wrong with one model is its reply, and the others go on."""
        for number, method in enumerate(methods, start=1):
            at = f"{method} ({number} of {len(methods)})"
            try:
                model = self.load(method, at)[0]
                self.log(f"answering with {at}")
                started = time.monotonic()
                prompt = encode_prompt(self._tokenizer, [{"role": "user", "content": question}])
                [answer] = answer_batch(model, self._tokenizer, [prompt], max_new_tokens=max_new_tokens)
                yield Reply(method, answer, None, time.monotonic() - started)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other answers are worth having
                yield Reply(method, None, f"{type(error).__name__}: {error}", None)
            model = None
            largest = max((sum(p.nbytes for p in model.parameters()) for model in self._loaded.values()), default=0)
            if self._free_bytes() < _FREE_TIMES * largest:
                self.close()

    def close(self):
        """Free the memory of all models."""
        self._loaded.clear()
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def load(self, method, at):
        """(model, tokenizer) of a method. at: how to call it in the log. Errors: see evaluate.load_model."""
        facts = self._study.weights_dir(method, self._study.cfg.seed) / "peftlib.json"
        key = method, facts.stat().st_mtime_ns if facts.exists() else None
        if key not in self._loaded:
            self._loaded = {k: model for k, model in self._loaded.items() if k[0] != method}  # older weights
            self.log(f"loading {at}")
            self._tokenizer = self._tokenizer or load_tokenizer(self._study.cfg.model)
            how = {"device": self._device, "dtype": evaluation_dtype(self._device)[0], "log": self.log}
            self._loaded[key] = load_model(self._study, method, self._study.cfg.seed, **how)
        return self._loaded[key], self._tokenizer

    def _free_bytes(self):
        return torch.cuda.mem_get_info()[0] if self._device == "cuda" else psutil.virtual_memory().available


def ask_box(study, *, is_interactive=None):
    """Show in a cell a box to ask all models of a study; where nobody can click, print a sentence about it."""
    if can_click(is_interactive):
        return AskBox(study)
    print(f"In Jupyter or Colab this cell asks {', '.join([BASE, *trained_methods(study)])} what you type.")
    return None


class AskBox(Action):
    """Widgets that ask; `box` holds them all. The kernel answers between cells, when it has nothing else to do."""

    def __init__(self, study):
        import ipywidgets as w

        self._models = Models(study, self.say)
        self._theme = THEMES[study.cfg.theme]
        limit = {"value": study.cfg.max_new_tokens, "min": 1, "max": _MOST_TOKENS}
        how = {"continuous_update": False, **look("40rem")}  # else a click can overtake what was typed last
        self.question = w.Textarea(value=_QUESTION, description="question", **how)
        self.tokens = w.BoundedIntText(description="at most", **limit, **look("10rem"))
        self.methods = checkboxes(self._models.names)
        settings = [self.tokens, w.Label("tokens"), *self.methods.values()]
        super().__init__("Ask all models", self._ask, self.question, settings)
        self.instead = "a box to ask all models (run the cell to see it)"

    def _ask(self, say):
        question, methods, cards = self.question.value.strip(), ticked(self.methods), []
        if not question or not methods:
            say("Type a question first." if not question else "Tick a model first.")
            return self.shown.value
        for reply in self._models.ask(question, methods, self.tokens.value):
            cards.append(self._card(reply))
            self.shown.value = page([side(cards)])
        say("Greedy answers: the same question gives them again.")
        return self.shown.value

    def _card(self, reply):
        color = self._theme.color_of(reply.method)
        if reply.answer is None:
            return answer_card(reply.method, color, "could not answer", reply.error)
        facts = f"{reply.answer.n_tokens} tokens in {reply.seconds:.1f} s, {ended(reply.answer.finish_reason)}"
        return answer_card(reply.method, color, facts, reply.answer.text)
