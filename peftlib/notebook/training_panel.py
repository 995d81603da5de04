"""Training with a live panel in a notebook, where somebody looks on; plain log lines elsewhere.

Training stays in the cell's own thread; between two steps the panel looks whether its button was pressed, see
kernel_events. What it shows is replaced by plain HTML at the end, so that a saved notebook holds no widgets.
"""

import io
import threading
import time

from peftlib.core.session import is_watched, running_kernel
from peftlib.notebook import panel_html, widget_display
from peftlib.notebook.kernel_events import KernelEvents
from peftlib.report import figures
from peftlib.report.chart import image
from peftlib.report.palette import THEMES
from peftlib.train.callbacks import Callback

_SHOW_EVERY_S, _DRAW_EVERY_S = 1.0, 2.0  # at most so often
_SHOW_SHARE, _DRAW_SHARE = 0.005, 0.01  # of the time, at most
_DPI = 90
_LAST_LINES = 6  # of the log, that the panel shows
BUTTON, _ASKED = "Save and stop", "Stops after this step"
_INSTEAD = "(a live panel; where you read this instead of one, set PEFTLIB_HEADLESS=1 for plain lines)"


def train_live(run):
    """Train as run.train() does, with a live panel if one can be shown; returns the record. run: a TrainingRun.

    The panel's button saves and stops, as the interrupt button does. Errors as in TrainingRun.train.
    """
    kernel = _kernel_with_widgets()
    if kernel is None:
        return run.train()
    with Panel(run, kernel) as panel:
        return run.train([panel])


def _kernel_with_widgets():
    """The kernel of the notebook that somebody looks at, or None."""
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        return None
    return running_kernel() if is_watched() else None


class Panel(Callback):
    """The state of a run, its losses, a button and the last log lines. As a context manager it takes the run's log."""

    def __init__(self, run, kernel):
        self._run, self._kernel = run, kernel
        self._lines, self._last, self._handle = [], None, None
        self._asked = threading.Event()
        self._show, self._draw = _Pace(_SHOW_EVERY_S, _SHOW_SHARE), _Pace(_DRAW_EVERY_S, _DRAW_SHARE)

    def __enter__(self):
        self._print, self._run.log = self._run.log, self._say
        return self

    def __exit__(self, *error):
        self._run.log = self._print
        if self._handle is not None:
            self._button.disabled = True
            self._handle.update(panel_html.ending(self._last, self._lines), raw=True)
            for widget in (*self._box.children, self._box):
                for part in (getattr(widget, "style", None), widget.layout, widget):
                    if part is not None:
                        part.close()

    def wants_numbers(self):
        """About once a second, less often where showing takes long."""
        return self._show.is_due()

    def show(self, snapshot):
        """Show a Snapshot, unless the last one was shown a moment ago."""
        self._last = snapshot
        if self._handle is None:
            self._display()
        elif not (snapshot.is_over or self._show.is_due()):
            return
        with self._show:
            self._facts.value = panel_html.state(snapshot)
            self._log.value = panel_html.log(self._lines[-_LAST_LINES:]) if self._lines else ""
        if snapshot.history and not snapshot.is_over and self._draw.is_due():  # in the end the picture goes
            with self._draw:
                self._draw_losses(snapshot)

    def stop_asked(self):
        """Whether the button was pressed."""
        if self._handle is not None:
            self._events.poll()
        return self._asked.is_set()

    def _say(self, line):
        # Until the panel stands, and if it breaks, lines are printed as ever.
        if self._handle is None or self.is_dropped:
            self._print(line)
        else:
            self._lines.append(line)

    def _display(self):
        import ipywidgets
        from IPython.display import display

        self._facts, self._picture, self._log = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._button = ipywidgets.Button(
            description=BUTTON, icon="stop", tooltip="Writes a checkpoint, then ends this cell"
        )
        self._button.on_click(self._on_click)
        self._box = ipywidgets.VBox([self._facts, self._picture, self._button, self._log])
        self._events = KernelEvents(self._kernel, [self._button.comm.comm_id])
        shown = widget_display.bundle(self._box, f"{self._run.name}, seed {self._run.cfg.seed} {_INSTEAD}")
        self._handle = display(shown, raw=True, display_id=True)
        _png(figures.loss_curves([]))  # the first one takes several times as long

    def _on_click(self, button):
        self._asked.set()
        button.disabled, button.description = True, _ASKED

    def _draw_losses(self, snapshot):
        chart = figures.loss_curves([vars(snapshot)], THEMES[self._run.cfg.theme])
        self._picture.value = image(_png(chart), chart.alt, "max-width:min(100%,630px)")


def _png(chart):
    png = io.BytesIO()
    chart.savefig(png, format="png", dpi=_DPI)
    return png.getvalue()


class _Pace:
    """When a piece of work is due again: at most every so many seconds, and within its share of the time."""

    def __init__(self, every_s, share):
        self._every_s, self._share, self._next_at = every_s, share, 0.0

    def is_due(self):
        """Whether it may be done now."""
        return time.monotonic() >= self._next_at

    def __enter__(self):
        self._started = time.monotonic()

    def __exit__(self, *error):
        now = time.monotonic()
        self._next_at = now + max(self._every_s, (now - self._started) / self._share)
