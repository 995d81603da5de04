"""The verbs that only look: what can be trained on a card, what there is to train, and what studies have found."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from peftlib.runner.console import AnyName, Profile, Settings, given_settings
from peftlib.storage.mirror import open_study


def plan(
    gpu: Annotated[str | None, Option(help="t4, l4, a100, h100 ...; default: the one here, else a t4")] = None,
    model: Annotated[str | None, Option(help="'packaged', gemma-3-1b, a folder or a hub id")] = None,
    study: AnyName = None,
    profile: Profile = None,
    settings: Settings = None,
    methods: Annotated[str | None, Option(metavar="A,B,...", help="default: a study's; see `peftlib methods`")] = None,
):
    """Say which method fits a GPU, in which micro-batch, and for how many hours."""
    given = given_settings(settings, profile=profile, model=model)
    found = open_study(study) if study else None
    from peftlib.runner.suite_plan import plan_lines

    for line in plan_lines(gpu, given, found, methods and methods.replace(",", " ").split()):
        print(line)


def methods(
    names: Annotated[list[str] | None, Argument(metavar="METHOD", help="default: all, but for peft:FILE.json")] = None,
):
    """List the methods: what trains, how the base is held, the memory that the 1B takes on a T4, the paper."""
    from peftlib.runner.suite_plan import method_lines

    for line in method_lines(names or ()):
        print(line)


def compare(studies: Annotated[list[str], Argument(metavar="STUDY", help="names or folders, two or more")]):
    """Compare studies that were evaluated on the same test rows."""
    from peftlib import compare_studies

    print(compare_studies(studies), end="")


def site(
    studies: Annotated[list[str], Argument(metavar="STUDY", help="names or folders, with equal test rows")],
    to: Annotated[Path, Option(metavar="DIR", help="a new or empty folder, or one that holds a page already")],
):
    """Write a page about studies that opens from a disk: runs, charts, answers, and what fits which GPU."""
    from peftlib.report.site.build import build_site

    print(build_site(studies, to))
