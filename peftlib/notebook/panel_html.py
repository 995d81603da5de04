"""What the live panel says about a Snapshot, in words and as HTML that suits a light and a dark page."""

import html
import time

from peftlib.report.palette import LIGHT
from peftlib.train.callbacks import clock

_GIB = 2**30
_NEARLY_FULL = 0.9  # of the memory's limit
_TRACK = "background:rgba(127,127,127,.22);border-radius:4px;overflow:hidden"
_GREY, _WARNING = "#7f7f7f", LIGHT.color_of("galore")
_PRE = (
    "margin:4px 0 0 0;padding:6px 8px;background:rgba(127,127,127,.10);font-size:12px;line-height:1.45;overflow-x:auto;"
    "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere"  # JupyterLab would break in the middle of words
)


def facts(snapshot):
    """{name: value in words} of a Snapshot, in the order to show them."""
    found = {
        "speed": _known(snapshot.tokens_per_second, "{:,.0f} tokens/s"),
        "time left": _known(None if snapshot.is_over else snapshot.seconds_left, "{}", clock),
        "loss": _known(snapshot.history[-1]["loss"] if snapshot.history else None, "{:.4f}"),
        "validation": _known(snapshot.valid_history[-1]["valid_loss"] if snapshot.valid_history else None, "{:.4f}"),
        "memory": memory_words(snapshot),
        "checkpoint": checkpoint_words(snapshot),
        "copy": snapshot.copy or "none, only this disk has it",
        "precision": f"{snapshot.precision} on {snapshot.device}",
    }
    if snapshot.skipped_steps:
        found["skipped steps"] = f"{snapshot.skipped_steps} (fp16 overflow)"
    return {name: value for name, value in found.items() if value is not None}


def memory_words(snapshot):
    """Memory now against its limit, and its peak."""
    now = f"{snapshot.memory_bytes / _GIB:.2f} of {snapshot.memory_limit_bytes / _GIB:.1f} GiB"
    peak = f"{snapshot.peak_memory_bytes / _GIB:.2f}"
    if snapshot.reserved_bytes is None:
        return f"{now}, has grown by up to {peak}"
    return f"{now}, {snapshot.reserved_bytes / _GIB:.2f} reserved, peak {peak}"


def checkpoint_words(snapshot):
    """Where a run would go on from."""
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
    plain = [
        *lines,
        *([summary(snapshot), *(f"{name}: {value}" for name, value in facts(snapshot).items())] if snapshot else []),
    ]
    return {"text/html": shown + told, "text/plain": "\n".join(plain)}


def _bar(share, color, height_px, held=0.0):
    filled, beyond = (f"{100 * min(1.0, max(0.0, part)):.1f}%" for part in (share, max(held, share)))
    inner = f'<div style="width:{filled};height:100%;background:{color}"></div>'
    if held > share:
        light = f"width:{beyond};height:100%;background:{color}55"
        inner = f'<div style="{light}"><div style="width:{100 * share / held:.1f}%;height:100%;background:{color}"></div></div>'
    return f'<div style="{_TRACK};height:{height_px}px;margin:2px 0">{inner}</div>'


def _known(value, form, show=lambda value: value):
    return None if value is None else form.format(show(value))


def _ago(seconds):
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
