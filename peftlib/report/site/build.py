"""Writes the results page of one or more studies into a folder.

Values reach the page as JSON in script files, for a page of file:// may fetch nothing. The page's policy runs no other
script, and site.js shows every value as text.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from peftlib import __version__
from peftlib.core.errors import ConfigError, writing
from peftlib.core.files import remove_tree, write_text
from peftlib.report.site.data import answer_data, row_data, site_data
from peftlib.report.site.plan import plan_data

PAGE = ("index.html", "site.css", "site.js", "charts.js", "explorer.js", "plan.js")
PAGE_FOLDER = Path(__file__).parent / "page"
_MARK = "vega.js"  # a folder that has it holds a page, which may be written anew
# What would end a script element, and what JavaScript once took for line ends; lone surrogates are no UTF-8.
_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")


def build_site(studies: Iterable[str | Path], to: str | Path) -> Path:
    """Write a static page about studies into a folder; returns the path of its index.html.

    studies: folders, or names under the output root. Answers can be explored where a study's data and predictions are
    there. Equal studies give equal files.

    ConfigError: vl-convert-python is not installed, or `to` holds something else. StudyError: a folder that is no study
    or has no results, the same one twice, or studies of other test rows. DiskError: `to` cannot be written.
    """
    to, library = Path(to), _chart_library()
    if to.exists() and (not to.is_dir() or any(to.iterdir())) and not (to / _MARK).is_file():
        raise ConfigError(f"--to {to} holds something else than a results page: name a new or empty folder")
    data, explored = site_data(studies)
    with writing(to):
        to.mkdir(parents=True, exist_ok=True)
        remove_tree(to / "data")  # of a study that is no longer shown
    write_text(to / _MARK, library)  # first, so that a page cut short can be written anew
    files = []
    for number, (study, answers) in enumerate(explored):
        if not number:  # every study has the same test rows
            _write(to, "rows", row_data(answers))
        for at, name in enumerate(answers.runs):
            files.append(
                {"study": study, "run": name, "method": answers.method_of(name), "file": f"answers-{number}-{at}"}
            )
            _write(to, files[-1]["file"], answer_data(answers, name))
    _write(to, "plan", plan_data())
    _write(to, "runs", {"version": __version__, **data, "answers": files})
    for name in PAGE:
        write_text(to / name, (PAGE_FOLDER / name).read_text(encoding="utf-8"))
    return to / "index.html"


def script_of(name, value):
    """The text of a script file that gives the page a value under a name."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return f"peftlib.take({json.dumps(name)},{text});\n"


def _write(to, name, value):
    write_text(to / "data" / f"{name}.js", script_of(name, value))


def _chart_library():
    """Vega, Vega-Lite and Vega-Embed as one script, which every browser takes from file:// (a module it would not)."""
    try:
        import vl_convert
    except ImportError as error:
        raise ConfigError("the results page needs vl-convert-python: pip install 'peftlib[site]'") from error
    return f"(()=>{{{vl_convert.javascript_bundle()}}})();\n"
