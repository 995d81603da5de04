"""Test rows with the answers of all methods side by side: to pick, sort and filter where somebody can click."""

import html

from peftlib.evaluation.results import BASE
from peftlib.notebook.answer_cards import LEGEND, StaticRows, page, row_html
from peftlib.notebook.answers import FILE, GAIN, LOSS, METRICS, ORDERS, Answers
from peftlib.notebook.downloads import offer_csv
from peftlib.notebook.session import can_click
from peftlib.notebook.widget_display import Shown
from peftlib.report.palette import THEMES

ALL = "all sources"
_STATIC_CHARACTERS = 400  # of a text in the static table, which stays in executed notebooks
_CSV_NAME = "answers.download.csv"


def explore(report, *, is_interactive=None):
    """What a notebook cell shows of a report.Report: an Explorer, or the most telling rows where nobody can click.

    is_interactive: None finds out.
    """
    answers = Answers(report.study)
    theme = THEMES[report.theme]
    if not answers.runs:
        return StaticRows(["No answers yet: run the cells above."], "no answers yet")
    if can_click() if is_interactive is None else is_interactive:
        return Explorer(answers, report.folder, theme)
    return notable_rows(answers, theme)


def notable_rows(answers, theme):
    """The StaticRows of each trained run's largest gain, median and largest loss by ROUGE-L."""
    names, against = list(answers.runs), BASE if BASE in answers.runs else None
    parts, said = [LEGEND], []
    for at, reasons in answers.notable().items():
        words = [f"{why} of {', '.join(runs)}" for why, runs in reasons.items()]
        heading = f"<b>{html.escape('; '.join(words).capitalize())}</b> by ROUGE-L: "
        parts.append(
            "<hr>"
            + row_html(answers, at, names, against=against, theme=theme, heading=heading, limit=_STATIC_CHARACTERS)
        )
        scores = ", ".join(f"{name} {answers.scores(name, 'rougeL')[at]:.3f}" for name in names)
        said.append(f"{'; '.join(words)}: row {answers.rows[at]['id']}, ROUGE-L {scores}")
    return StaticRows(parts, "\n".join(said))


class Explorer(Shown):
    """Widgets over an Answers; `box` holds them all. folder: where a CSV goes that is too large for a link."""

    def __init__(self, answers, folder, theme):
        self.answers, self._folder, self._theme = answers, folder, theme
        self._places = answers.chosen()
        self._is_moving = False
        self.instead = f"{len(answers)} test rows to explore (run the cell to see them)"
        self._make_widgets()
        self._find()

    def _make_widgets(self):
        import ipywidgets as w

        names = list(self.answers.runs)
        wide = {
            "style": {"description_width": "4.5rem"},
            "layout": w.Layout(width="17rem", max_width="calc(100% - 4px)"),
        }
        self.source = w.Dropdown(options=[ALL, *self.answers.sources], description="source", **wide)
        self.text = w.Text(
            description="text", placeholder="rows that hold these words", continuous_update=False, **wide
        )
        self.order = w.Dropdown(options=ORDERS, description="sort by", **wide)
        self.metric = w.Dropdown(
            options=[(label, name) for name, label in METRICS.items()], description="score", **wide
        )
        self.name = w.Dropdown(options=names, value=(self.answers.trained or names)[0], description="of", **wide)
        self.other = w.Dropdown(options=names, value=names[0], description="over", **wide)
        small = w.Layout(width="auto")
        self.methods = {name: w.Checkbox(value=True, description=name, indent=False, layout=small) for name in names}
        self.is_marked = w.Checkbox(value=True, description="mark words", indent=False, layout=small)
        self.previous = w.Button(description="Previous", icon="arrow-left", layout=w.Layout(width="7rem"))
        self.next = w.Button(description="Next", icon="arrow-right", layout=w.Layout(width="7rem"))
        self.number = w.BoundedIntText(value=1, min=1, description="row", style={"description_width": "2.2rem"})
        self.number.layout.width = "8rem"
        self.count, self.shown, self.download = w.HTML(), w.HTML(), w.HTML()
        self.csv = w.Button(description="Make CSV", icon="table", tooltip="the rows found, in this order")
        line = w.Layout(flex_flow="row wrap", grid_gap="4px 10px", align_items="center")
        self.box = w.VBox(
            [
                w.Box([self.source, self.text, self.order, self.metric, self.name, self.other], layout=line),
                w.Box([w.Label("show"), *self.methods.values(), self.is_marked], layout=line),
                w.Box([self.previous, self.number, self.count, self.next], layout=line),
                self.shown,
                w.Box([self.csv, self.download], layout=line),
            ],
            layout=w.Layout(max_width="100%"),
        )
        for widget in (self.source, self.text, self.order, self.metric, self.name, self.other):
            widget.observe(self._find, "value")
        for widget in (self.number, self.is_marked, *self.methods.values()):
            widget.observe(self._show, "value")
        self.previous.on_click(lambda _: self._step(-1))
        self.next.on_click(lambda _: self._step(1))
        self.csv.on_click(self._make_csv)

    def chosen_names(self):
        """Names of the runs whose boxes are ticked."""
        return [name for name, box in self.methods.items() if box.value]

    def place(self):
        """Position of the row shown, or None where no row was found."""
        return int(self._places[self.number.value - 1]) if len(self._places) else None

    def _find(self, change=None):
        self._places = self.answers.chosen(
            source=None if self.source.value == ALL else self.source.value,
            text=self.text.value,
            order=self.order.value,
            metric=self.metric.value,
            name=self.name.value,
            other=self.other.value,
        )
        self.name.disabled = self.metric.disabled = self.order.value == FILE
        self.other.disabled = self.order.value not in (GAIN, LOSS)
        self.download.value = ""  # what it offered was another choice of rows
        self._is_moving = True  # the number may change twice; the row is shown once
        self.number.max = max(1, len(self._places))
        self.number.value = 1
        self._is_moving = False
        self._show()

    def _step(self, by):
        self.number.value = min(max(self.number.value + by, 1), self.number.max)

    def _show(self, change=None):
        if self._is_moving:
            return
        n = len(self._places)
        self.count.value = f"of {n:,}"
        self.previous.disabled, self.next.disabled = self.number.value <= 1, self.number.value >= n
        if self.place() is None:
            self.shown.value = page(["<p>No row holds this text: shorten it, or take all sources.</p>"])
            return
        against = self.other.value if self.order.value in (GAIN, LOSS) else BASE if BASE in self.methods else None
        compared = (
            f'<p class="pl-note">In brackets: against {html.escape(against)}, on this row.</p>' if against else ""
        )
        row = row_html(
            self.answers,
            self.place(),
            self.chosen_names(),
            against=against,
            theme=self._theme,
            is_marked=self.is_marked.value,
        )
        self.shown.value = page([row, compared, LEGEND])

    def _make_csv(self, button):
        text = self.answers.to_csv(self._places, self.chosen_names())
        self.download.value = offer_csv(self._folder, _CSV_NAME, text)
