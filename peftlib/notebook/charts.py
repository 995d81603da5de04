"""A study's charts in a notebook: to pick by what is measured and on which rows, where somebody can click."""

from peftlib.evaluation.benchmarks.run import bench_study
from peftlib.evaluation.evaluate import trained_methods
from peftlib.notebook.widgets import CSV, PNG, Shown, can_click, link, look, stacked
from peftlib.report import benchmarks
from peftlib.report.build import build_report
from peftlib.report.chart import bundle, image
from peftlib.report.charts import KINDS, REWIND, chart_of, row_choices
from peftlib.report.palette import THEMES

_STATIC = ("scores", "rougeL_by_source", "rougeL_against_memory", "rewind")  # of a report's figures


def show_charts(report, *, is_interactive=None):
    """Show a report.Report's charts in a cell: a ChartPanel, or its main figures where nobody can click.

    is_interactive: None finds out.
    """
    if can_click(is_interactive):
        return ChartPanel(report)
    from IPython.display import display

    figures = report.dark_figures if report.theme == "dark" else report.figures
    for name in _STATIC:
        if name in figures:
            display(bundle(figures[name].read_bytes(), report.alt[name]), raw=True)
    print("all figures:", ", ".join(report.figures))
    return None


def show_benchmarks(study, report):
    """Score what the study's setting `benchmarks` names, and show it as a table and two figures; returns the Report,
    built again where anything was scored."""
    from IPython.display import display

    if bench_study(study, ["base", *trained_methods(study)]):
        report = build_report(study)
    if report.benchmarks:
        display(benchmarks.table(report.benchmarks).set_index("task"))
    figures = report.dark_figures if report.theme == "dark" else report.figures
    for name in ("benchmarks", "gain_against_loss"):
        if name in figures:
            display(bundle(figures[name].read_bytes(), report.alt[name]), raw=True)
    return report


class ChartPanel(Shown):
    """Widgets over a Report's numbers; `box` holds them all."""

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
        self._is_changing = True  # one drawing, not one a widget
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
        self.download.value = f"{link(f'{name}.png', png, PNG)} &nbsp; {link('results.csv', results, CSV)}"
