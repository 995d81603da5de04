"""A conversation with a model of a study in a notebook: a box to type in, answers shown while they are made."""

from peftlib.evaluation.chat import Conversation
from peftlib.notebook.answers import answer_card, page, side
from peftlib.notebook.ask import Models
from peftlib.notebook.ends import off
from peftlib.notebook.widgets import Action, can_click, look
from peftlib.report.palette import THEMES


def chat_box(study, method, *, is_interactive=None):
    """Show in a cell a box to talk to a trained method or base; where nobody can type, print a sentence about it."""
    if can_click(is_interactive):
        return ChatBox(study, method)
    return off("nobody is there to type", f"peftlib chat {method} --study {study.cfg.study}")


class ChatBox(Action):
    """Widgets that talk to one model at a time; `box` holds them all. Choosing another model starts over."""

    def __init__(self, study, method):
        import ipywidgets as w

        self._models, self._study, self._theme = Models(study, self.say), study, THEMES[study.cfg.theme]
        names = self._models.names
        # Sent when it is left, as for Send: a click can overtake the letters of a text that is sent while it is typed.
        how = {"placeholder": "Type here, then press Send.", "continuous_update": False}
        self.text = w.Textarea(description="you", **how, **look("40rem"))
        chosen = method if method in names else names[-1]
        self.method = w.Dropdown(options=names, value=chosen, description="model", **look("17rem"))
        self.again = w.Button(description="Start over", layout={"width": "auto"})
        super().__init__("Send", self._send, [self.method, self.again], self.text)
        self.instead = "a box to chat with the result (run the cell to see it)"
        self._start_over()
        self.method.observe(self._change_model, "value")
        self.again.on_click(self._start_over)

    def _start_over(self, change=None):
        self._talk, self.shown.value = None, ""

    def _change_model(self, change):
        self._start_over()
        self._models.close()

    def _send(self, say):
        text, name = self.text.value.strip(), self.method.value
        if not text:
            say("Type something first.")
            return self.shown.value
        model, tokenizer = self._models.load(name, name)
        if self._talk is None:
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
        except BaseException:  # a question without its answer would stand before the next one
            self._talk.messages = before
            raise
        say("Greedy answers: the same words give them again.")
        return self._cards(self._talk.messages)

    def _cards(self, turns):
        name = self.method.value
        heads = {"user": ("you", ""), "assistant": (name, self._theme.color_of(name))}
        return page([side([answer_card(*heads[turn["role"]], "", turn["content"])]) for turn in turns])
