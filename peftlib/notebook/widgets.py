"""What the notebooks' widgets share, under ipywidgets 7 (Colab) and 8: how they are shown, and links that save a file.

Only version 8 gives widgets `_repr_mimebundle_`; version 7 offers no way to put other text beside them. The bundle that
a front end needs is the same for both.
"""

import base64
import html
import importlib.util

from peftlib.core.errors import PeftlibError
from peftlib.core.session import is_watched

VIEW = "application/vnd.jupyter.widget-view+json"
LINE = {"flex_flow": "row wrap", "grid_gap": "4px 10px", "align_items": "center"}  # layout of a line of controls


def can_click(is_interactive=None):
    """Whether somebody looks at this notebook and it can show widgets; False outside notebooks and in headless runs.

    is_interactive: the answer of a caller who knows it.
    """
    if is_interactive is not None:
        return is_interactive
    return importlib.util.find_spec("ipywidgets") is not None and is_watched()


def off(why, command):
    """Print in a headless run why a cell does nothing, and the command that does its work; returns None."""
    print(f"off in a headless run, because {why}: use `{command}`")


class Shown:
    """A class whose instances a notebook shows as their `box`, a widget; `instead` is the text beside it."""

    def _repr_mimebundle_(self, **given):
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {VIEW: view, "text/plain": self.instead}


class Action(Shown):
    """A button that does `work(say)` between cells and shows the HTML that it returns; errors go to the status line.

    controls: as for stacked, above the button.
    """

    def __init__(self, title, work, *controls):
        import ipywidgets as w

        self.instead = f"a button: {title} (run the cell to see it)"
        self.button = w.Button(description=title, button_style="primary", layout={"width": "auto"})
        self.status, self.shown, self._work = w.HTML(), w.HTML(), work
        self.box = stacked(*controls, [self.button, self.status], self.shown)
        self.button.on_click(lambda _: self.do(self._work))

    def say(self, text):
        """Show a line of text beside the button."""
        self.status.value = html.escape(str(text))

    def do(self, work):
        """Do some work as the button does."""
        self.button.disabled = True
        try:
            self.shown.value = work(self.say) or ""
        except Exception as error:  # noqa: BLE001 - on Colab nobody sees the traceback of a click
            self.say(error if isinstance(error, PeftlibError) else f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            self.say("Interrupted.")
        finally:
            self.button.disabled = False


def look(width, label_width="4.5rem"):
    """Style and layout of a labelled control, as keyword arguments."""
    layout = {"width": width, "max_width": "calc(100% - 4px)"}
    return {"style": {"description_width": label_width}, "layout": layout}


def checkboxes(labels):
    """{label: a ticked Checkbox}."""
    import ipywidgets

    small = {"value": True, "indent": False, "layout": {"width": "auto"}}
    return {label: ipywidgets.Checkbox(description=label, **small) for label in labels}


def ticked(boxes):
    """Labels of the `checkboxes` that are ticked."""
    return [label for label, box in boxes.items() if box.value]


def stacked(*parts):
    """A VBox of widgets, and of lists of them, each of which is a line of controls that wraps."""
    import ipywidgets

    lines = (ipywidgets.Box(part, layout=LINE) if isinstance(part, list) else part for part in parts)
    return ipywidgets.VBox(list(lines), layout={"max_width": "100%"})


def bar(share, color="currentColor", *, held=0.0, height_px=6):
    """HTML of a grey bar, a share of it in a colour. held: a larger share in a light tone; the colour is hex then."""

    def part(width, tone, inside=""):
        return f'<div style="width:{min(1.0, max(0.0, width)):.1%};height:100%;background:{tone}">{inside}</div>'

    filled = part(held, f"{color}55", part(share / held, color)) if held > share else part(share, color)
    track = "background:rgba(127,127,127,.22);border-radius:4px;overflow:hidden"
    return f'<div style="{track};height:{height_px}px;margin:2px 0">{filled}</div>'


def link(name, content, kind):
    """HTML of a link that saves `content` (bytes of MIME type `kind`) as `name`.

    The file is in the link itself, as a data: address: no path has to be within the browser's reach, JupyterLab leaves
    such links alone, VS Code opens a save dialog, and no kernel on Colab or Kaggle is asked.
    """
    name, address = html.escape(name), f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f'<a style="text-decoration:underline" download="{name}" href="{address}">Download {name}</a>'
