"""How a notebook shows a widget, under ipywidgets 7 (Colab) and 8 alike.

Only version 8 gives its widgets `_repr_mimebundle_`; version 7 displays them by itself, without a way to put other text
beside them. The bundle that a front end needs is the same for both.
"""

VIEW = "application/vnd.jupyter.widget-view+json"


def bundle(widget, text):
    """{MIME type: content} that shows a widget, and `text` where no widget can be shown."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {VIEW: view, "text/plain": text}


class Shown:
    """A class whose instances a notebook shows as their `box`, a widget; `instead` is the text beside it."""

    def _repr_mimebundle_(self, **given):
        return bundle(self.box, self.instead)
