"""Writes the results page of one or more studies into a folder.

The page loads its data as JSON in script files, because a file:// page cannot use fetch. Its security policy allows no
other script, and site.js shows every value as text.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from peftlib import __version__
from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError, writing
from peftlib.core.files import remove_tree, write_text
from peftlib.core.paths import pip_line
from peftlib.methods import METHODS
from peftlib.models.shapes import CARDS, SHAPES
from peftlib.report.site.data import answer_data, row_data, site_data
from peftlib.train import estimate

PAGE = ("index.html", "site.css", "site.js", "charts.js", "explorer.js", "plan.js")
PAGE_FOLDER = Path(__file__).parent / "page"
_MARK = "vega.js"  # marks a folder with a page, which may be overwritten
# What would end a script element, and what JavaScript once treated as line ends; lone surrogates are not valid UTF-8.
_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")

# Counting other methods' parameters needs their adapters, seconds per model: see `peftlib plan --methods`.
COUNTED = tuple(name for name, spec in METHODS.items() if not spec.is_counted)
LENGTHS = (256, 512, 1024, 2048, 4096)
ROWS = resolve("gpu").train_rows  # per source, which the page's user can change; hours are proportional to it


def build_site(studies: Iterable[str | Path], to: str | Path) -> Path:
    """Write a static page about studies into a folder; returns the path of its index.html.

    studies: folders, or names under the output root. Answers can be explored if a study's data and predictions are in
    its folder. Equal studies give equal files.

    ConfigError: vl-convert-python is not installed, or `to` has other content. StudyError: a folder is not a study or
    has no results, the same one twice, or studies with different test rows. DiskError: `to` cannot be written.
    """
    to, library = Path(to), _chart_library()
    if to.exists() and (not to.is_dir() or any(to.iterdir())) and not (to / _MARK).is_file():
        raise ConfigError(f"--to {to} holds something other than a results page: choose a new or empty folder")
    data, explored = site_data(studies)
    with writing(to):
        to.mkdir(parents=True, exist_ok=True)
        remove_tree(to / "data")  # of a study that is no longer shown
    write_text(to / _MARK, library)  # first, so that an incomplete page can be overwritten
    files = []
    for number, (study, answers) in enumerate(explored):
        if not number:  # every study has the same test rows
            _write(to, "rows", row_data(answers))
        for at, name in enumerate(answers.runs):
            file = f"answers-{number}-{at}"
            files.append({"study": study, "run": name, "method": answers.method_of(name), "file": file})
            _write(to, file, answer_data(answers, name))
    _write(to, "plan", plan_data())
    _write(to, "runs", {"version": __version__, **data, "answers": files})
    for name in PAGE:
        write_text(to / name, (PAGE_FOLDER / name).read_text(encoding="utf-8"))
    return to / "index.html"


def script_of(name, value):
    """The text of a script file that defines a named value for the page."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return f"peftlib.take({json.dumps(name)},{text});\n"


def _write(to, name, value):
    write_text(to / "data" / f"{name}.js", script_of(name, value))


def _chart_library():
    """Vega, Vega-Lite and Vega-Embed as one script, which every browser loads from file:// (unlike a module)."""
    try:
        import vl_convert
    except ImportError as error:
        raise ConfigError(f"the results page needs vl-convert-python: {pip_line('site')}") from error
    return f"(()=>{{{vl_convert.javascript_bundle()}}})();\n"


def plan_data():
    """{"cards", "models", "lengths", "methods", "table"}: table[card][model][length] = one list per method.

    The lists are those of `_entry`. The times are for `ROWS` rows per source.
    """
    speeds, table = estimate.measured_rows(), {}
    for name, card in CARDS.items():
        for model, shape in SHAPES.items():
            configs = [resolve("gpu", model=f"google/{model}-it", max_length=length) for length in LENGTHS]
            how = {"shape": shape, "rows": speeds, "names": COUNTED}
            plans = [[_entry(cost) for cost in estimate.forecast(cfg, name, card, **how).costs] for cfg in configs]
            table.setdefault(name, {})[model] = plans
    cards = {name: {"gib": card.gib, "precision": card.precision} for name, card in CARDS.items()}
    default = resolve("gpu")
    return {
        "cards": cards,
        "models": {model: f"google/{model}-it" for model in SHAPES},
        "lengths": LENGTHS,
        "methods": COUNTED,
        "rows": ROWS,
        "sources": len(default.sources.split(";")),
        "max_length": default.max_length,
        "table": table,
    }


def _entry(cost):
    """[memory GiB, why it is impossible] or [memory GiB, "", micro-batch, recomputation, tokens/s from, to, seconds
    from, to, whether the speed was measured]."""
    memory, speed = round(cost.memory_gib, 2), cost.speed
    if not cost.fits:
        return [memory, cost.mark]
    seconds = [round(3600 * hours, 2) for hours in cost.hours]
    speeds = [round(speed.low), round(speed.high)]
    return [memory, "", cost.micro_batch, cost.checkpointing, *speeds, *seconds, int(speed.is_measured)]
