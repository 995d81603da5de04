"""Texts of a model are shown in a report, never obeyed."""

import html.parser

import fake_study
import pytest

from peftlib.core.markdown import escape, table
from peftlib.report import build as report
from peftlib.report.render import render

NASTY = "a | b `code` <script>alert(1)</script> *x* _y_ [l](u) $1$ ~~z~~ \\| &amp;\r\n    # indent\n| --- |\u2028end"


def test_answers_with_markup_stay_in_their_cell(small):
    rows = fake_study.made_rows(6)
    fake_study.write_predictions(small, "qlora", 0, rows, [NASTY] * 6)
    report.build_report(small)
    text = small.report_path.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.startswith("| qlora |") and "code" in line]
    assert len(lines) == 6 and len(text.splitlines()) == len(text.split("\n")) - 1
    for line in lines:
        assert line.count("|") == 3
        assert "<script" not in line and r"\`code\`" in line
        assert "<br>&nbsp;&nbsp;&nbsp;&nbsp;# indent<br>&#124; --- &#124;" in line
    page = (small.folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page


def test_escaped_markdown_shows_any_text_as_it_is():
    markdown_it = pytest.importorskip("markdown_it")  # comes with what the project installs
    shown = markdown_it.MarkdownIt("commonmark").enable("table").render(table([("a",), (NASTY,)]))
    cells = []

    class Cells(html.parser.HTMLParser):
        def handle_data(self, text):
            cells.append(text)

        def handle_starttag(self, tag, attributes):
            assert tag in ("table", "thead", "tbody", "tr", "th", "td", "br"), tag
            cells.append("\n" if tag == "br" else "")

    Cells().feed(shown.replace("<br>", "<br/>") if "<br>" in shown else shown.replace("&lt;br&gt;", "<br/>"))
    text = "".join(cells).replace("\xa0", " ")
    assert NASTY.replace("\r\n", "\n").replace("\u2028", "\ufffd") in text
    assert escape("max_length of __init__") == r"max_length of \_\_init\_\_"


BLOCKS = """{% import macros as doc %}{{ doc.heading("H", 2) }}{% call doc.paragraph() %}p |
q{% endcall %}{% call doc.list() %}{% call doc.item() %}one{% endcall %}{% endcall %}
{% call doc.table(["a", "b"]) %}{{ doc.row("<", "2") }}{% endcall %}"""


def test_both_formats_write_every_block_and_escape_it(tmp_path):
    (tmp_path / "blocks").write_text(BLOCKS)
    made = {name: render("blocks", tmp_path, macros=f"{name}.jinja") for name in ("markdown", "page")}
    assert made["markdown"] == "## H\n\np &#124; q\n\n- one\n\n| a | b |\n|---|---:|\n| &lt; | 2 |\n"
    for part in (
        "<h2>H</h2>",
        "<p>p | q</p>",
        "<li>one</li>",
        '<table class="text1">',
        "<tr><td>&lt;</td><td>2</td></tr>",
    ):
        assert part in made["page"]
