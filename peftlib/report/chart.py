"""A themed matplotlib figure that displays itself in a notebook, with alt text.

No global state (pyplot, rcParams) is changed.
"""

import html
import io

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peftlib.core.files import atomic_path
from peftlib.report.palette import LIGHT
from peftlib.report.render import png_address

_DPI = 150


class Chart(Figure):
    """A figure with `alt`, its alt text, and `is_empty`, whether there was nothing to draw."""

    def __init__(self, width, height, theme=LIGHT):
        super().__init__(figsize=(width, height), layout="constrained", facecolor=theme.paper)
        FigureCanvasAgg(self)
        self.alt = ""
        self.is_empty = False
        self.theme = theme

    def png(self):
        """The figure as the bytes of a PNG file."""
        made = io.BytesIO()
        self.savefig(made, format="png", dpi=_DPI)
        return made.getvalue()

    def _repr_mimebundle_(self, **given):
        # As HTML, because JupyterLab shows an image/png without its alt text.
        return bundle(self.png(), self.alt)


def bundle(png, alt):
    """A notebook's display bundle of a PNG file's bytes: {MIME type: text}."""
    return {"text/html": image(png, alt), "text/plain": f"<figure: {alt}>"}


def image(png, alt, style="max-width:100%"):
    """HTML of a PNG file's bytes with alt text."""
    return f'<img alt="{html.escape(alt)}" src="{png_address(png)}" style="{style}">'


def save(chart, folder, name, formats=("png", "svg")):
    """Write NAME.png and NAME.svg atomically; returns the PNG's path.

    Equal charts give equal bytes: no dates, and ids inside the SVG are derived from its content.
    """
    for kind in formats:
        with atomic_path(folder / f"{name}.{kind}") as beside, rc_context({"svg.hashsalt": "peftlib"}):
            chart.savefig(beside, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
    return folder / f"{name}.png"


def drawing(width, height, x_label, y_label, theme, grid="y"):
    """(Chart, its only axes, styled)."""
    chart = Chart(width, height, theme)
    return chart, dress(chart.add_subplot(), x_label, y_label, grid)


def dress(axes, x_label, y_label, grid="y"):
    """Style axes in their chart's theme, without a box, with a grid in one direction; returns them."""
    theme = axes.figure.theme
    axes.set_facecolor(theme.paper)
    axes.set_xlabel(x_label, color=theme.ink)
    axes.set_ylabel(y_label, color=theme.ink)
    axes.tick_params(colors=theme.ink)
    axes.spines[:].set_color(theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def title(axes, text):
    """Set the axes' title, above them and left-aligned."""
    axes.set_title(text, fontsize=11, color=axes.figure.theme.ink, loc="left")


def finished(chart, axes, heading, alt, place=None):
    """The chart with its heading, its alt text and, at a place of `legend`, its legend."""
    title(axes, heading)
    if place:
        legend(axes, place)
    chart.alt = alt
    return chart


_PLACES = {
    "inside": {"loc": "upper right"},
    "right": {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)},
    "above": {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)},
}


def legend(axes, place="inside", **look):
    """A frameless legend inside the axes, to their right or above them."""
    axes.legend(**{"frameon": False, "fontsize": 9, "labelcolor": axes.figure.theme.ink, **_PLACES[place], **look})


def stacked_bars(axes, labels, parts, looks):
    """Horizontal stacked bars with a legend above. parts: {name: (labels,) widths}. looks: {name: bar style}."""
    left = np.zeros(len(labels))
    for name, widths in parts.items():
        axes.barh(labels, widths, left=left, edgecolor=axes.figure.theme.paper, label=name, **looks[name])
        left += widths
    axes.invert_yaxis()
    legend(axes, "above", ncols=5)


def empty(chart, axes, reason):
    """The chart, with a reason instead of a drawing."""
    axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes, color=chart.theme.ink)
    axes.set_axis_off()
    chart.alt, chart.is_empty = f"Empty chart: {reason}.", True
    return chart
