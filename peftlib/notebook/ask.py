"""Ask a study's models in a notebook: one question to all of them, or a chat with one."""

import gc
import time
from dataclasses import dataclass

import psutil
import torch

from peftlib.core.env import resolve_device
from peftlib.evaluation.chat import Conversation
from peftlib.evaluation.evaluate import evaluation_dtype, load_model, trained_methods
from peftlib.evaluation.generate import answer_batch
from peftlib.evaluation.results import BASE
from peftlib.models.chat_template import encode_prompt
from peftlib.models.load import load_tokenizer
from peftlib.notebook.answers import answer_card, ended, page, side
from peftlib.notebook.widgets import Action, can_click, checkboxes, look, of_run, off, ticked
from peftlib.report.palette import THEMES

# A model stays loaded while this many times its size is free: space to load and merge the next one.
_FREE_TIMES = 3.0
_MOST_TOKENS = 2048
_QUESTION = "Give me one tip for learning a new language."
# A text is sent when its box loses focus: if it were sent while typing, a click could arrive before its last letters.
_TEXT = {"continuous_update": False, **look("40rem")}


@dataclass(frozen=True)
class Reply:
    """answer: a generate.Answer, or None if `error` says why there is none. seconds: generation time only."""

    method: str
    answer: object
    error: str
    seconds: float


class Models:
    """The saved models of a study, loaded one by one; several stay loaded if memory allows.

    log: receives progress messages.
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
        """Yield the Reply of each method. An error of one model becomes its reply, and the others still answer."""
        for number, method in enumerate(methods, start=1):
            at = f"{method} ({number} of {len(methods)})"
            try:
                model = self.load(method, at)[0]
                self.log(f"answering with {at}")
                started = time.monotonic()
                prompt = encode_prompt(self._tokenizer, [{"role": "user", "content": question}])
                [answer] = answer_batch(model, self._tokenizer, [prompt], max_new_tokens=max_new_tokens)
                yield Reply(method, answer, None, time.monotonic() - started)
            except Exception as error:  # noqa: BLE001 - the other models can still answer
                yield Reply(method, None, f"{type(error).__name__}: {error}", None)
            model = None
            largest = max((sum(p.nbytes for p in model.parameters()) for model in self._loaded.values()), default=0)
            if self._free_bytes() < _FREE_TIMES * largest:
                self.close()

    def close(self):
        """Free all models' memory."""
        self._loaded.clear()
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def load(self, method, at):
        """(model, tokenizer) of a method; `at` names it in the log. Errors: see evaluate.load_model."""
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
    """Show a box to ask all models of a study; print a sentence about it in a headless run."""
    if can_click(is_interactive):
        return AskBox(study)
    print(f"In Jupyter or Colab this cell asks your question to {', '.join([BASE, *trained_methods(study)])}.")
    return None


class AskBox(Action):
    """Widgets to ask models; `box` contains them all. The kernel answers between cells, when it is idle."""

    def __init__(self, study):
        import ipywidgets as w

        self._models = Models(study, self.say)
        self._theme = THEMES[study.cfg.theme]
        limit = {"value": study.cfg.max_new_tokens, "min": 1, "max": _MOST_TOKENS}
        self.question = w.Textarea(value=_QUESTION, description="question", **_TEXT)
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
        say("Greedy decoding: the same question gives the same answers.")
        return self.shown.value

    def _card(self, reply):
        color = self._theme.color_of(reply.method)
        if reply.answer is None:
            return answer_card(reply.method, color, "no answer", reply.error)
        facts = f"{reply.answer.n_tokens} tokens in {reply.seconds:.1f} s, {ended(reply.answer.finish_reason)}"
        return answer_card(reply.method, color, facts, reply.answer.text)


def chat_box(study, method, *, is_interactive=None):
    """Show a box to chat with a trained method or base; print the command in a headless run."""
    if can_click(is_interactive):
        return ChatBox(study, method)
    return off("chatting needs input", f"peftlib chat {method} {of_run(study)}")


class ChatBox(Action):
    """Widgets to chat with one model at a time; another model, or new weights, start a new conversation."""

    def __init__(self, study, method):
        import ipywidgets as w

        self._models, self._study, self._theme = Models(study, self.say), study, THEMES[study.cfg.theme]
        names = self._models.names
        self.text = w.Textarea(description="you", placeholder="Type here, then press Send.", **_TEXT)
        chosen = method if method in names else names[-1]
        self.method = w.Dropdown(options=names, value=chosen, description="model", **look("17rem"))
        self.again = w.Button(description="Start over", layout={"width": "auto"})
        super().__init__("Send", self._send, [self.method, self.again], self.text)
        self.instead = "a box to chat with the model (run the cell to see it)"
        self._start_over()
        self.method.observe(self._change_model, "value")
        self.again.on_click(self._start_over)

    def _start_over(self, change=None):
        self._talk, self._model, self.shown.value = None, None, ""

    def _change_model(self, change):
        self._start_over()
        self._models.close()

    def _send(self, say):
        text, name = self.text.value.strip(), self.method.value
        if not text:
            say("Type something first.")
            return self.shown.value
        model, tokenizer = self._models.load(name, name)
        if self._model is not model:
            self._model = model
            self._talk = Conversation(model, tokenizer, max_new_tokens=self._study.cfg.max_new_tokens)
        pieces, before = [], list(self._talk.messages)

        def show(piece):
            pieces.append(piece)
            answer = {"role": "assistant", "content": "".join(pieces) or "..."}
            self.shown.value = self._cards([*before, {"role": "user", "content": text}, answer])

        show("")
        self.text.value = ""
        say(f"{name} is answering")
        try:
            self._talk.say(text, show)
        except BaseException:  # an unanswered question would stay in the history
            self._talk.messages = before
            raise
        say("Greedy decoding: the same words give the same answers.")
        return self._cards(self._talk.messages)

    def _cards(self, turns):
        name = self.method.value
        heads = {"user": ("you", ""), "assistant": (name, self._theme.color_of(name))}
        return page([side([answer_card(*heads[turn["role"]], "", turn["content"])]) for turn in turns])
