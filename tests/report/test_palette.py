"""Colours that can be told from the paper and from each other, in both themes and with every colour blindness."""

import itertools

import fake_study
import numpy as np
import pytest
from matplotlib.colors import to_hex

from peftlib.methods import METHODS
from peftlib.report import figures
from peftlib.report.palette import DARK, LIGHT, THEMES

# From linear RGB to what is seen without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
SEEN = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
WHITE = np.array([0.9505, 1.0, 1.0890])


def linear(color):
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """WCAG 2.2's contrast ratio of two colours."""
    low, high = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(color, cones):
    """CIELAB of a colour as somebody sees it."""
    xyz = TO_XYZ @ np.clip(np.array(SEEN[cones]) @ linear(color), 0, 1) / WHITE
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture(params=THEMES)
def theme(request):
    return THEMES[request.param]


def colors(theme):
    return {name: theme.color_of(name) for name in ("base", "base (cut)", *METHODS)}


def test_the_ratio_is_wcags():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the textbook grey that just fails


def test_every_colour_has_a_contrast_of_three_with_the_paper_and_text_one_of_seven(theme):
    for method, color in {**colors(theme), "other": theme.other}.items():
        assert contrast(color, theme.paper) >= 3, (theme.name, method)
    assert contrast(theme.ink, theme.paper) >= 7


@pytest.mark.parametrize("cones", SEEN)
def test_every_two_methods_can_be_told_apart_with_every_colour_blindness(theme, cones):
    for one, other in itertools.combinations(colors(theme), 2):
        apart = np.linalg.norm(lab(colors(theme)[one], cones) - lab(colors(theme)[other], cones))
        assert apart > 15, (theme.name, one, other, apart)


def test_a_method_keeps_its_colour_or_at_least_its_hue_and_both_themes_name_the_same_methods():
    assert all(theme.other not in colors(theme).values() for theme in (LIGHT, DARK))
    for method in ("qlora", "galore", "hybrid"):
        assert LIGHT.color_of(method) == DARK.color_of(method)


def test_a_chart_is_drawn_in_its_theme(theme):
    chart = figures.loss_curves([fake_study.record_of("qlora"), fake_study.record_of("base")], theme)
    [axes] = chart.axes
    for paper in (chart.get_facecolor(), axes.get_facecolor()):
        assert to_hex(paper) == theme.paper
    assert {line.get_color() for line in axes.lines} == {theme.color_of("qlora")}
    texts = [
        axes.xaxis.label,
        axes.yaxis.label,
        axes._left_title,
        *axes.get_xticklabels(),
        *axes.get_legend().get_texts(),
    ]
    assert {to_hex(text.get_color()) for text in texts} == {theme.ink}
