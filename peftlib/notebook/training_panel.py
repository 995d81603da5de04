"""Training with a live panel in a watched notebook; plain log lines elsewhere.

The panel is HTML that is updated during training. It has no button: the kernel's interrupt button saves and stops,
and a widget's click would only arrive after the cell ends.
"""

import html
import time

from peftlib.core.files import gib
from peftlib.core.session import is_watched
from peftlib.notebook.widgets import bar
from peftlib.report import figures
from peftlib.report.chart import image
from peftlib.report.palette import LIGHT, THEMES
from peftlib.report.render import folded, plain
from peftlib.train.callbacks import Callback, clock
from peftlib.train.parallel.helpers import helping

_SHOW_EVERY_S, _DRAW_EVERY_S = 1.0, 2.0  # minimum seconds between updates
_SHOW_SHARE, _DRAW_SHARE = 0.005, 0.01  # maximum share of the time
_LAST_LINES = 6  # of the log that the panel shows
_NEARLY_FULL = 0.9  # share of the memory limit
_GREY, _WARNING = "#7f7f7f", LIGHT.color_of("galore")
_STOP = "To stop, interrupt the kernel: it saves a checkpoint first, and this cell resumes from there when run again."


def train_live(run):
    """Train as run.train() does, with a live panel in a watched notebook; returns the record. run: a TrainingRun.

    It trains on all GPUs of the first one's kind, or on run.cfg.processes of them. Errors: as in TrainingRun.train, and
    ParallelError: a process on another GPU could not start.
    """
    with helping(run):
        if not is_watched():
            return run.train()
        with Panel(run) as panel:
            return run.train([panel])


class Panel(Callback):
    """The state of a run, its losses and the last log lines. As a context manager it captures the run's log."""

    def __init__(self, run):
        self._run = run
        self._lines, self._last, self._handle, self._picture = [], None, None, ""
        self._show, self._draw = _Pace(_SHOW_EVERY_S, _SHOW_SHARE), _Pace(_DRAW_EVERY_S, _DRAW_SHARE)

    def __enter__(self):
        self._print, self._run.log = self._run.log, self._say
        return self

    def __exit__(self, *error):
        self._run.log = self._print
        if self._handle is not None:
            self._handle.update(ending(self._last, self._lines), raw=True)

    def wants_numbers(self):
        """About once a second, less often if showing takes long."""
        return self._show.is_due()

    def show(self, snapshot):
        """Show a Snapshot, unless one was shown a moment ago."""
        self._last = snapshot
        if self._handle is None:
            self._display()
        elif not (snapshot.is_over or self._show.is_due()):
            return
        if snapshot.history and not snapshot.is_over and self._draw.is_due():  # the final state has no picture
            with self._draw:
                chart = figures.loss_curves([vars(snapshot)], THEMES[self._run.cfg.theme])
                self._picture = image(chart.png(), chart.alt, "max-width:min(100%,630px)")
        with self._show:
            lines = plain("\n".join(self._lines[-_LAST_LINES:])) if self._lines else ""
            shown = f'{state(snapshot)}{self._picture}<p style="font-size:12px">{_STOP}</p>{lines}'
            self._handle.update({"text/html": shown, "text/plain": summary(snapshot)}, raw=True)

    def _say(self, line):
        # Until the panel is shown, and if it fails, lines are printed as usual.
        if self._handle is None or self.is_dropped:
            self._print(line)
        else:
            self._lines.append(line)

    def _display(self):
        from IPython.display import display

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)
        figures.loss_curves([]).png()  # the first drawing takes several times as long


class _Pace:
    """When an update is due again: at least `every_s` seconds apart, and within its share of the time."""

    def __init__(self, every_s, share):
        self._every_s, self._share, self._next_at = every_s, share, 0.0

    def is_due(self):
        """Whether an update is due now."""
        return time.monotonic() >= self._next_at

    def __enter__(self):
        self._started = time.monotonic()

    def __exit__(self, *error):
        now = time.monotonic()
        self._next_at = now + max(self._every_s, (now - self._started) / self._share)


def facts(snapshot):
    """{name: text} of the known facts of a callbacks.Snapshot, in the panel's order."""
    found = {
        "speed": snapshot.tokens_per_second and f"{snapshot.tokens_per_second:,.0f} tokens/s",
        "time left": None if snapshot.is_over or snapshot.seconds_left is None else clock(snapshot.seconds_left),
        "loss": _last(snapshot.history, "loss"),
        "validation": _last(snapshot.valid_history, "valid_loss"),
        "memory": _memory(snapshot),
        "checkpoint": _checkpoint(snapshot),
        "copy": snapshot.copy or "none, only on this disk",
        "precision": f"{snapshot.precision} on {snapshot.device}",
        "skipped steps": f"{snapshot.skipped_steps} (fp16 overflow)" if snapshot.skipped_steps else None,
    }
    return {name: value for name, value in found.items() if value}


def _last(history, name):
    value = history[-1][name] if history else None
    return None if value is None else f"{value:.4f}"  # None: it was not finite


def _memory(snapshot):
    """Current memory, its limit, and its peak."""
    now = f"{gib(snapshot.memory_bytes):.2f} of {gib(snapshot.memory_limit_bytes):.1f} GiB"
    peak = f"{gib(snapshot.peak_memory_bytes):.2f}"
    if snapshot.reserved_bytes is None:
        return f"{now}, peak growth {peak}"
    return f"{now}, {gib(snapshot.reserved_bytes):.2f} reserved, peak {peak}"


def _checkpoint(snapshot):
    """The step from which a run would resume."""
    if snapshot.status == "ok":
        return "no longer needed, the weights are saved"
    if snapshot.saved_step is None:
        return "being written" if snapshot.is_saving else "none yet"
    if snapshot.is_over:
        return f"step {snapshot.saved_step}"
    age = "from an earlier session"
    if snapshot.saved_at is not None:
        seconds = time.time() - snapshot.saved_at
        age = f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
    return f"step {snapshot.saved_step}, {age}{' (a new one is being written)' * snapshot.is_saving}"


def summary(snapshot):
    """A run's progress, in one line."""
    of_all = f"step {snapshot.step:,} of {snapshot.planned_steps:,}"
    told = {
        "running": of_all,
        "ok": f"finished, {snapshot.step:,} steps",
        "stopped": f"stopped at {of_all}; run this cell again to resume from step {snapshot.saved_step or 0:,}",
        "failed": f"failed after {of_all}; the checkpoint of step {snapshot.saved_step or 0:,} is kept",
    }
    return f"{snapshot.method}, seed {snapshot.seed}: {told[snapshot.status]}"


def state(snapshot):
    """The state as HTML: the summary, a progress bar, the facts, a memory bar."""
    limit = max(1, snapshot.memory_limit_bytes)
    used, held = snapshot.memory_bytes / limit, (snapshot.reserved_bytes or 0) / limit
    bars = {"memory": bar(used, _WARNING if max(used, held) > _NEARLY_FULL else _GREY, held=held)}
    rows = (
        f'<div><span style="opacity:.65">{name}</span><br>{html.escape(value)}{bars.get(name, "")}</div>'
        for name, value in facts(snapshot).items()
    )
    done = bar(snapshot.step / max(1, snapshot.planned_steps), LIGHT.color_of(snapshot.method), height_px=10)
    return (
        f'<div style="font-size:13px;line-height:1.45;max-width:820px"><div style="margin-bottom:4px"><b>'
        f"{html.escape(summary(snapshot))}</b></div>{done}"
        '<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:6px 18px;margin:8px 0">'
        f"{''.join(rows)}</div></div>"
    )


def ending(snapshot, lines):
    """The notebook's final output: {MIME type: text} of the last state and all log lines."""
    shown = state(snapshot) if snapshot else ""
    told = folded(f"log, {len(lines)} lines", "\n".join(lines)) if lines else ""
    words = list(lines)
    if snapshot:
        words += [summary(snapshot), *(f"{name}: {value}" for name, value in facts(snapshot).items())]
    return {"text/html": shown + told, "text/plain": "\n".join(words)}
