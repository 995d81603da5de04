"""Charts: colours, what stands for missing data, axes, the text for those who cannot see them."""

import html

import fake_study
import pytest
from matplotlib.markers import MarkerStyle

from peftlib.evaluation import stats
from peftlib.methods import METHODS
from peftlib.report import figures, palette


def test_each_method_has_its_own_colour_and_marker():
    methods = ("base", *METHODS)
    assert len({palette.marker_of(m) for m in methods}) == len(methods)
    assert all(MarkerStyle(palette.marker_of(m)).is_filled() for m in methods)
    for theme in palette.THEMES.values():
        assert len({theme.color_of(m) for m in methods}) == len(methods)
        assert theme.color_of("a new one") == theme.other and theme.other not in map(theme.color_of, methods)


def test_charts_without_data_say_so():
    for chart in (
        figures.loss_curves([fake_study.record_of("base")]),
        figures.score_bars({}),
        figures.source_bars({}),
        figures.quality_against_memory({}, {}),
        figures.value_bars({"qlora": None}, "Peak memory of training", "GiB", ".2f"),
    ):
        assert chart.is_empty and "Empty chart" in chart.alt
        shown = chart._repr_mimebundle_()
        assert f'<img alt="{html.escape(chart.alt)}" src="data:image/png;base64,iVBORw0KGgo' in shown["text/html"]


def _at(value, half=0.01):
    return {"rougeL": stats.Interval(value, value - half, value + half)}


@pytest.mark.parametrize("base, shown", [(0.05, "base: 0.050, below"), (0.44, " base "), (0.6, " base ")])
def test_quality_against_memory_shows_the_methods_apart_and_names_base(base, shown):
    intervals = {"base": _at(base), "qlora": _at(0.46), "galore": _at(0.47)}
    chart = figures.quality_against_memory(intervals, {"qlora": 3.7, "galore": 4.2})
    axes = chart.axes[0]
    assert shown in [text.get_text() for text in axes.texts] and f"base {base:.3f}" in chart.alt
    low, high = axes.get_ylim()
    assert low < 0.45 and high > 0.48 and (low < base < high) == (shown == " base ")
    left, right = axes.get_xlim()
    assert 3 < left < 3.7 and right > 4.2


def test_a_mark_at_0_and_a_base_close_by_are_shown_as_they_are():
    chart = figures.quality_against_memory({"base": _at(0.449), "qlora": _at(0.45, 0.0)}, {"qlora": 0.0})
    assert " base " in [text.get_text() for text in chart.axes[0].texts] and chart.axes[0].get_xlim()[0] == 0
    both = {"qlora": _at(0.1, 0.1), "galore": _at(0.9, 0.1)}
    chart = figures.quality_against_memory(both, {"qlora": 0.5, "galore": 5.0})
    assert chart.axes[0].get_xlabel() == "peak memory of training (GiB)"


def test_charts_leave_pyplot_alone():
    import matplotlib.pyplot as plt

    figures.loss_curves([fake_study.record_of("qlora")])
    assert plt.get_fignums() == []


def test_smoothing_starts_at_the_first_value_and_follows_the_level():
    made = figures.smoothed([4.0] + [2.0] * 99)
    assert made[0] == 4.0 and made[-1] == pytest.approx(2.0, abs=0.01)
    assert figures.smoothed([1.0, 5.0]) == [1.0, 5.0]  # too short to smooth
