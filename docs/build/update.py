"""Writes the tables of README and docs from results/: `make readme`.

A table stands between the markers `<!-- NAME -->` and `<!-- /NAME -->`; result_tables.py says what its rows are. The
prose around it is written by hand, and tests/docs/test_numbers.py checks the numbers in it. `--take STUDY` first
copies a finished study's results into results/demo, `--take-reference STUDY` those of a reference study into
results/reference, and `--take-sides STUDY` only those of the studies beside it.
"""

import argparse
import re
import sys
from pathlib import Path

import take_results
from result_tables import RESULTS, Results, make_all
from update_badges import MARKERS

from peftlib.core.errors import PeftlibError, StudyError
from peftlib.core.files import write_text
from peftlib.storage.mirror import open_study

CHECKOUT = Path(__file__).resolve().parents[2]
ELSEWHERE = set(MARKERS)  # update_badges.py fills these


def pages(checkout=CHECKOUT):
    """README and the pages of docs, as paths."""
    return [checkout / "README.md", *sorted((checkout / "docs").glob("*.md"))]


def with_tables(text, tables):
    """A page with the tables between its markers written anew.

    StudyError: a marker that names no table, or has no end.
    """
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        if name in ELSEWHERE:
            continue
        if name not in tables:
            raise StudyError(f"<!-- {name} --> names no table: use {', '.join(tables)}")
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise StudyError(f"<!-- {name} --> has no <!-- /{name} -->: put it where the table ends")
        text = pattern.sub(lambda found, name=name: f"{found[1]}{tables[name]}\n{found[2]}", text)
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python docs/build/update.py", description=__doc__)
    parser.add_argument("--take", metavar="STUDY", help="a finished study whose results become results/demo first")
    parser.add_argument("--take-reference", metavar="STUDY", help="the same for results/reference")
    parser.add_argument("--take-sides", metavar="STUDY", help="compare the studies beside this one with its runs")
    args = parser.parse_args(argv)
    try:
        if args.take:
            take_results.take_demo(open_study(args.take), RESULTS / "demo")
        if args.take_reference:
            take_results.take_reference(open_study(args.take_reference), RESULTS / "reference")
        if args.take_sides:
            take_results.take_sides(open_study(args.take_sides), RESULTS / "reference")
        tables = make_all(Results())
        for page in pages():
            text = page.read_text(encoding="utf-8")
            made = with_tables(text, tables)
            if made != text:
                write_text(page, made)
                print(f"{page.relative_to(CHECKOUT)}: tables written anew")
    except (PeftlibError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
