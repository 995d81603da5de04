"""Training with a live panel in a notebook, where somebody looks on; plain log lines elsewhere.

Training stays in the cell's own thread; between two steps the panel looks whether its button was pressed, see
kernel_events. What it shows is replaced by plain HTML at the end, so that a saved notebook holds no widgets.
"""

import html
import threading
import time

from peftlib.core.files import gib
from peftlib.core.session import running_kernel
from peftlib.notebook.kernel_events import KernelEvents
from peftlib.notebook.widgets import bundle, can_click
from peftlib.report import figures
from peftlib.report.chart import image
from peftlib.report.palette import LIGHT, THEMES
from peftlib.train.callbacks import Callback, clock

_SHOW_EVERY_S, _DRAW_EVERY_S = 1.0, 2.0  # at most so often
_SHOW_SHARE, _DRAW_SHARE = 0.005, 0.01  # of the time, at most
_LAST_LINES = 6  # of the log, that the panel shows
BUTTON, _ASKED = "Save and stop", "Stops after this step"
_NEARLY_FULL = 0.9  # of the memory's limit
_TRACK = "background:rgba(127,127,127,.22);border-radius:4px;overflow:hidden"
_GREY, _WARNING = "#7f7f7f", LIGHT.color_of("galore")
_PRE = (
    "margin:4px 0 0 0;padding:6px 8px;background:rgba(127,127,127,.10);font-size:12px;line-height:1.45;overflow-x:auto;"
    "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere"  # JupyterLab would break in the middle of words
)
_INSTEAD = "(a live panel; where you read this instead of one, set PEFTLIB_HEADLESS=1 for plain lines)"


def train_live(run):
    """Train as run.train() does, with a live panel if one can be shown; returns the record. run: a TrainingRun.

    The panel's button saves and stops, as the interrupt button does. Errors as in TrainingRun.train.
    """
    if not can_click():
        return run.train()
    with Panel(run, running_kernel()) as panel:
        return run.train([panel])


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
            self._handle.update(ending(self._last, self._lines), raw=True)
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
            self._facts.value = state(snapshot)
            self._log.value = log(self._lines[-_LAST_LINES:]) if self._lines else ""
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
        shown = bundle(self._box, f"{self._run.name}, seed {self._run.cfg.seed} {_INSTEAD}")
        self._handle = display(shown, raw=True, display_id=True)
        figures.loss_curves([]).png()  # the first one takes several times as long

    def _on_click(self, button):
        self._asked.set()
        button.disabled, button.description = True, _ASKED

    def _draw_losses(self, snapshot):
        chart = figures.loss_curves([vars(snapshot)], THEMES[self._run.cfg.theme])
        self._picture.value = image(chart.png(), chart.alt, "max-width:min(100%,630px)")


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


def facts(snapshot):
    """{name: value in words} of a callbacks.Snapshot, in the order to show them."""
    speed, left = snapshot.tokens_per_second, None if snapshot.is_over else snapshot.seconds_left
    loss = snapshot.history[-1]["loss"] if snapshot.history else None
    valid_loss = snapshot.valid_history[-1]["valid_loss"] if snapshot.valid_history else None
    found = {
        "speed": None if speed is None else f"{speed:,.0f} tokens/s",
        "time left": None if left is None else clock(left),
        "loss": None if loss is None else f"{loss:.4f}",
        "validation": None if valid_loss is None else f"{valid_loss:.4f}",  # None: it was not finite
        "memory": memory_words(snapshot),
        "checkpoint": checkpoint_words(snapshot),
        "copy": snapshot.copy or "none, only this disk has it",
        "precision": f"{snapshot.precision} on {snapshot.device}",
        "skipped steps": f"{snapshot.skipped_steps} (fp16 overflow)" if snapshot.skipped_steps else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def memory_words(snapshot):
    """Memory now against its limit, and its peak."""
    now = f"{gib(snapshot.memory_bytes):.2f} of {gib(snapshot.memory_limit_bytes):.1f} GiB"
    peak = f"{gib(snapshot.peak_memory_bytes):.2f}"
    if snapshot.reserved_bytes is None:
        return f"{now}, has grown by up to {peak}"
    return f"{now}, {gib(snapshot.reserved_bytes):.2f} reserved, peak {peak}"


def checkpoint_words(snapshot):
    """The step from which a run would resume."""
    if snapshot.status == "ok":
        return "not needed any more, the weights are saved"
    writing = " (a new one is being written)" if snapshot.is_saving else ""
    if snapshot.saved_step is None:
        return "being written" if writing else "none yet"
    if snapshot.is_over:
        return f"step {snapshot.saved_step}"
    if snapshot.saved_at is None:
        return f"step {snapshot.saved_step}, of an earlier session{writing}"
    return f"step {snapshot.saved_step}, {_ago(time.time() - snapshot.saved_at)}{writing}"


def summary(snapshot):
    """How far a run is, in one line."""
    of_all = f"step {snapshot.step:,} of {snapshot.planned_steps:,}"
    told = {
        "running": of_all,
        "ok": f"finished, {snapshot.step:,} steps",
        "stopped": f"stopped at {of_all}; run this cell again to go on from step {snapshot.saved_step or 0:,}",
        "failed": f"failed after {of_all}; the checkpoint of step {snapshot.saved_step or 0:,} is kept",
    }
    return f"{snapshot.method}, seed {snapshot.seed}: {told[snapshot.status]}"


def state(snapshot):
    """The state as HTML: the line, how far it is, the facts, memory as a bar."""
    color = LIGHT.color_of(snapshot.method)
    done = snapshot.step / max(1, snapshot.planned_steps)
    used = snapshot.memory_bytes / max(1, snapshot.memory_limit_bytes)
    held = (snapshot.reserved_bytes or 0) / max(1, snapshot.memory_limit_bytes)
    memory_color = _WARNING if max(used, held) > _NEARLY_FULL else _GREY
    rows = []
    for name, value in facts(snapshot).items():
        bar = _bar(used, memory_color, 6, held=held) if name == "memory" else ""
        rows.append(f'<div><span style="opacity:.65">{name}</span><br>{html.escape(value)}{bar}</div>')
    return (
        f'<div style="font-size:13px;line-height:1.45;max-width:820px"><div style="margin-bottom:4px"><b>'
        f"{html.escape(summary(snapshot))}</b></div>{_bar(done, color, 10)}"
        '<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:6px 18px;margin:8px 0">'
        f"{''.join(rows)}</div></div>"
    )


def log(lines):
    """Lines of a log as HTML."""
    return f'<pre style="{_PRE}">{html.escape(chr(10).join(lines))}</pre>'


def ending(snapshot, lines):
    """What stays in the notebook: {MIME type: text} of the last state and all lines of the log, without any widget."""
    shown = state(snapshot) if snapshot else ""
    told = f"<details><summary>log, {len(lines)} lines</summary>{log(lines)}</details>" if lines else ""
    plain = list(lines)
    if snapshot:
        plain += [summary(snapshot), *(f"{name}: {value}" for name, value in facts(snapshot).items())]
    return {"text/html": shown + told, "text/plain": "\n".join(plain)}


def _bar(share, color, height_px, held=0.0):
    filled, beyond = (f"{100 * min(1.0, max(0.0, part)):.1f}%" for part in (share, max(held, share)))
    inner = f'<div style="width:{filled};height:100%;background:{color}"></div>'
    if held > share:
        light = f"width:{beyond};height:100%;background:{color}55"
        dark = f"width:{100 * share / held:.1f}%;height:100%;background:{color}"
        inner = f'<div style="{light}"><div style="{dark}"></div></div>'
    return f'<div style="{_TRACK};height:{height_px}px;margin:2px 0">{inner}</div>'


def _ago(seconds):
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
