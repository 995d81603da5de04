"""Shared code of the notebooks' widgets, for ipywidgets 7 (Colab) and 8: display, and links that save a file.

Only version 8 gives widgets `_repr_mimebundle_`; with version 7 no other text can be added to them. The bundle that
a front end needs is the same for both.
"""

import base64
import html
import importlib.util

from peftlib.core.errors import PeftlibError
from peftlib.core.session import is_watched

VIEW = "application/vnd.jupyter.widget-view+json"
LINE = {"flex_flow": "row wrap", "grid_gap": "4px 10px", "align_items": "center"}  # layout of a row of controls


def can_click(is_interactive=None):
    """Whether a user can click widgets in this notebook; False outside notebooks and in headless runs.

    is_interactive: the answer, if the caller knows it.
    """
    if is_interactive is not None:
        return is_interactive
    return importlib.util.find_spec("ipywidgets") is not None and is_watched()


def of_run(study):
    """The options of a command for this study and its seed."""
    return f"--study {study.cfg.study}" + (f" --seed {study.cfg.seed}" if study.cfg.seed else "")


def off(why, command):
    """Print why a cell does nothing in a headless run, and the command to use instead; returns None."""
    print(f"off in a headless run, because {why}: use `{command}`")


class Shown:
    """Base class: a notebook shows instances as their `box`, a widget, with the fallback text `instead`."""

    def _repr_mimebundle_(self, **given):
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return {VIEW: view, "text/plain": self.instead}


class Action(Shown):
    """A button that runs `work(say)` between cells and shows the HTML that it returns; errors go to the status line.

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
        """Show a status line next to the button."""
        self.status.value = html.escape(str(text))

    def do(self, work):
        """Run some work as the button does."""
        self.button.disabled = True
        try:
            self.shown.value = work(self.say) or ""
        except Exception as error:  # noqa: BLE001 - Colab does not show the traceback of a click
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
    """A VBox of widgets; a list of widgets becomes a row of controls that wraps."""
    import ipywidgets

    lines = (ipywidgets.Box(part, layout=LINE) if isinstance(part, list) else part for part in parts)
    return ipywidgets.VBox(list(lines), layout={"max_width": "100%"})


def bar(share, color="currentColor", *, held=0.0, height_px=6):
    """HTML of a grey bar with a share of it coloured. held: a larger share in a light tone; needs a hex colour."""

    def part(width, tone, inside=""):
        return f'<div style="width:{min(1.0, max(0.0, width)):.1%};height:100%;background:{tone}">{inside}</div>'

    filled = part(held, f"{color}55", part(share / held, color)) if held > share else part(share, color)
    track = "background:rgba(127,127,127,.22);border-radius:4px;overflow:hidden"
    return f'<div style="{track};height:{height_px}px;margin:2px 0">{filled}</div>'


def link(name, content, kind):
    """HTML of a link that saves `content` (bytes of MIME type `kind`) as `name`.

    The file is in the link itself, as a data: URL: the browser needs no access to a path, JupyterLab does not change
    such links, VS Code opens a save dialog, and it works without a kernel on Colab and Kaggle.
    """
    name, address = html.escape(name), f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f'<a style="text-decoration:underline" download="{name}" href="{address}">Download {name}</a>'
