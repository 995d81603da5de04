"""A report in a notebook's cells: its charts, benchmarks and answers, interactive if a user can click."""

import html

from peftlib.core.files import readable_path, size_text, write_text
from peftlib.evaluation.benchmarks.run import bench_study
from peftlib.evaluation.evaluate import trained_methods
from peftlib.evaluation.results import BASE
from peftlib.notebook.answers import LEGEND, StaticRows, page, row_html
from peftlib.notebook.widgets import Shown, can_click, checkboxes, link, look, stacked, ticked
from peftlib.report.answers import FILE, GAIN, LOSS, METRICS, ORDERS, Answers
from peftlib.report.build import build_report
from peftlib.report.chart import bundle, image
from peftlib.report.charts import KINDS, REWIND, chart_of, row_choices
from peftlib.report.palette import THEMES
from peftlib.report.tables import benchmark_table

_STATIC = ("scores", "rougeL_by_source", "rougeL_against_memory", "rewind")  # of a report's figures
ALL = "all sources"
_STATIC_CHARACTERS = 400  # of a text in the static table, which executed notebooks keep
_CSV_NAME, _CSV = "answers.download.csv", "text/csv"
_LINK_LIMIT_BYTES = 2_000_000  # of a file inside a link; larger ones make notebooks slow


def show_charts(report, *, is_interactive=None):
    """Show a report.Report's charts in a cell: a ChartPanel, or its main figures in a headless run."""
    if can_click(is_interactive):
        return ChartPanel(report)
    _display_figures(report, _STATIC)
    print("all figures:", ", ".join(report.figures))
    return None


def show_benchmarks(study, report):
    """Score the benchmarks of the study's setting `benchmarks` and show a table and two figures.

    Returns the Report, rebuilt if anything was scored.
    """
    from IPython.display import display

    if bench_study(study, [BASE, *trained_methods(study)]):
        report = build_report(study)
    if report.benchmarks:
        display(benchmark_table(report.benchmarks).set_index("task"))
    _display_figures(report, ("benchmarks", "gain_against_loss"))
    return report


def _display_figures(report, names):
    from IPython.display import display

    figures = report.dark_figures if report.theme == "dark" else report.figures
    for name in names:
        if name in figures:
            display(bundle(figures[name].read_bytes(), report.alt[name]), raw=True)


def explore(report, *, is_interactive=None):
    """Show a report.Report's answers in a cell: an Explorer, or the most telling rows in a headless run."""
    answers, theme = Answers(report.study), THEMES[report.theme]
    if not answers.runs:
        return StaticRows(["No answers yet: run the cells above."], "no answers yet")
    if can_click(is_interactive):
        return Explorer(answers, report.folder, theme)
    return notable_rows(answers, theme)


class ChartPanel(Shown):
    """Widgets for a Report's charts; `box` contains them all."""

    instead = "charts (run the cell to see them)"

    def __init__(self, report):
        import ipywidgets as w

        self._report, self._is_changing = report, False
        wide = look("19rem")
        kinds = [*KINDS, REWIND] if report.numbers.rewound else KINDS
        self.kind = w.Dropdown(options=kinds, description="show", **wide)
        self.rows = w.Dropdown(options=row_choices(report.numbers, KINDS[0]), description="of", **wide)
        self.theme = w.Dropdown(options=list(THEMES), value=report.theme, description="theme", **wide)
        self.shown, self.download = w.HTML(), w.HTML()
        self.box = stacked([self.kind, self.rows, self.theme], self.shown, self.download)
        self.kind.observe(self._change_kind, "value")
        for widget in (self.rows, self.theme):
            widget.observe(self._show, "value")
        self._show()

    def _change_kind(self, change):
        choices, wanted = row_choices(self._report.numbers, self.kind.value), self.rows.value
        self._is_changing = True  # draw once, not once per widget
        self.rows.options, self.rows.disabled = choices, len(choices) == 1
        self.rows.value = wanted if wanted in choices else choices[0]
        self._is_changing = False
        self._show()

    def _show(self, change=None):
        if self._is_changing:
            return
        chart = chart_of(self._report.numbers, self.kind.value, self.rows.value, THEMES[self.theme.value])
        png = chart.png()
        self.shown.value = image(png, chart.alt, f"max-width:100%;width:{chart.get_figwidth() * 110:.0f}px")
        name = "".join(c if c.isalnum() else "_" for c in f"{self.kind.value} {self.rows.value}")
        results = (self._report.folder / "results.csv").read_bytes()
        self.download.value = f"{link(f'{name}.png', png, 'image/png')} &nbsp; {link('results.csv', results, _CSV)}"


def notable_rows(answers, theme):
    """The StaticRows of each trained run's largest gain, median and largest loss by ROUGE-L."""
    names, against = list(answers.runs), BASE if BASE in answers.runs else None
    parts, lines = [LEGEND], []
    for at, reasons in answers.notable().items():
        why = "; ".join(f"{why} of {', '.join(runs)}" for why, runs in reasons.items())
        how = {"against": against, "theme": theme, "limit": _STATIC_CHARACTERS}
        heading = f"<b>{html.escape(why.capitalize())}</b> by ROUGE-L: "
        parts.append("<hr>" + row_html(answers, at, names, heading=heading, **how))
        scores = ", ".join(f"{name} {answers.scores(name, 'rougeL')[at]:.3f}" for name in names)
        lines.append(f"{why}: row {answers.rows[at]['id']}, ROUGE-L {scores}")
    return StaticRows(parts, "\n".join(lines))


class Explorer(Shown):
    """Widgets to explore an Answers; `box` contains them all. folder: for a CSV that is too large for a link."""

    def __init__(self, answers, folder, theme):
        self.answers, self._folder, self._theme = answers, folder, theme
        self._found = answers.chosen()
        self._is_moving = False
        self.instead = f"{len(answers)} test rows to explore (run the cell to see them)"
        self._make_widgets()
        self._find()

    def _make_widgets(self):
        import ipywidgets as w

        names, wide, button = list(self.answers.runs), look("17rem"), {"layout": {"width": "7rem"}}
        hint = {"placeholder": "rows that contain these words", "continuous_update": False}
        labels = [(label, name) for name, label in METRICS.items()]
        self.source = w.Dropdown(options=[ALL, *self.answers.sources], description="source", **wide)
        self.text = w.Text(description="text", **hint, **wide)
        self.order = w.Dropdown(options=ORDERS, description="sort by", **wide)
        self.metric = w.Dropdown(options=labels, description="score", **wide)
        self.name = w.Dropdown(options=names, value=(self.answers.trained or names)[0], description="of", **wide)
        self.other = w.Dropdown(options=names, value=names[0], description="over", **wide)
        self.methods = checkboxes(names)
        self.is_marked = checkboxes(["mark words"])["mark words"]
        self.previous = w.Button(description="Previous", icon="arrow-left", **button)
        self.next = w.Button(description="Next", icon="arrow-right", **button)
        self.number = w.BoundedIntText(value=1, min=1, description="row", **look("8rem", "2.2rem"))
        self.count, self.shown, self.download = w.HTML(), w.HTML(), w.HTML()
        self.csv = w.Button(description="Make CSV", icon="table", tooltip="the matching rows, in this order")
        choices = [self.source, self.text, self.order, self.metric, self.name, self.other]
        shows = [*self.methods.values(), self.is_marked]
        steps = [self.previous, self.number, self.count, self.next]
        self.box = stacked(choices, [w.Label("show"), *shows], steps, self.shown, [self.csv, self.download])
        for widget in choices:
            widget.observe(self._find, "value")
        for widget in (self.number, *shows):
            widget.observe(self._show, "value")
        self.previous.on_click(lambda _: self._step(-1))
        self.next.on_click(lambda _: self._step(1))
        self.csv.on_click(self._make_csv)

    def place(self):
        """Index of the row shown, or None if no row was found."""
        return int(self._found[self.number.value - 1]) if len(self._found) else None

    def _find(self, change=None):
        source = None if self.source.value == ALL else self.source.value
        scores = {"metric": self.metric.value, "name": self.name.value, "other": self.other.value}
        self._found = self.answers.chosen(source=source, text=self.text.value, order=self.order.value, **scores)
        self.name.disabled = self.metric.disabled = self.order.value == FILE
        self.other.disabled = self.order.value not in (GAIN, LOSS)
        self.download.value = ""  # it linked another selection of rows
        self._is_moving = True  # the number may change twice; the row is shown once
        self.number.max = max(1, len(self._found))
        self.number.value = 1
        self._is_moving = False
        self._show()

    def _step(self, by):
        self.number.value = min(max(self.number.value + by, 1), self.number.max)

    def _show(self, change=None):
        if self._is_moving:
            return
        n, at = len(self._found), self.place()
        self.count.value = f"of {n:,}"
        self.previous.disabled, self.next.disabled = self.number.value <= 1, self.number.value >= n
        if at is None:
            self.shown.value = page(["<p>No row contains this text: shorten it, or choose all sources.</p>"])
            return
        against = self.other.value if self.order.value in (GAIN, LOSS) else BASE if BASE in self.methods else None
        how = {"against": against, "theme": self._theme, "is_marked": self.is_marked.value}
        row = row_html(self.answers, at, ticked(self.methods), **how)
        note = f'<p class="pl-note">In brackets: change from {html.escape(against)}.</p>' if against else ""
        self.shown.value = page([row, note, LEGEND])

    def _make_csv(self, button):
        content = self.answers.to_csv(self._found, ticked(self.methods)).encode()
        if len(content) <= _LINK_LIMIT_BYTES:
            self.download.value = link(_CSV_NAME, content, _CSV)
            return
        path = self._folder / _CSV_NAME
        write_text(path, content.decode())
        where = f"Saved to {html.escape(readable_path(path))}"
        self.download.value = f"{_CSV_NAME} has {size_text(len(content))}, too large for a link. {where}"
