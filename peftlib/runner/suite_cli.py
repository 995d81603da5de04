"""The subcommands of `peftlib study`: run a whole study, list its runs, or do one run."""

from typing import Annotated

import typer
from typer import Argument, Option

from peftlib.core.errors import ConfigError
from peftlib.runner.console import Flag, Name, Settings, Sources, examples_of, given_settings, numbers, say

_EXAMPLES = (
    "study run --study big --at-once 3",
    "study list --study big --pending",
    "study work galore-s1 --study big",
)
app = typer.Typer(help="Run a whole study on one or many machines.", epilog=examples_of(*_EXAMPLES))

Profile = Annotated[str, Option(help="demo, quick, t4 or gpu")]
Methods = Annotated[str | None, Option(metavar="A,B,...", help="default: base and the first six; or peft:FILE.json")]
Seeds = Annotated[str, Option(help="seeds of every method except base")]
Factors = Annotated[str, Option(help="learning rate factors of a sweep; auto: until the best is bracketed; or none")]
SweepRows = Annotated[int, Option(min=1, help="training rows of each trial")]
Only = Annotated[str, Option(metavar="METHOD[-sSEED],...", help="only these runs and their sweeps")]
Again = Annotated[bool, Option("--again", help="retry failed runs")]
AtOnce = Annotated[int, Option(min=1, help="concurrent runs per GPU")]


def _settings(given, methods="", seeds="0", factors="none", only="", **others):
    """suite_jobs.Settings from command-line arguments with comma-separated lists. ConfigError: invalid arguments."""
    from peftlib.methods import BASE, METHODS, default_methods, find, known
    from peftlib.runner.suite_jobs import Settings as SuiteSettings

    if "seed" in given:
        raise ConfigError("-p seed: the runs of a study have their seeds in their names; use --seeds instead")
    names = (BASE, *default_methods()) if methods is None else tuple(methods.replace(",", " ").split())
    strange = [name for name in names if name != BASE and ":" not in name and not known(name)]
    if strange or methods == ",":
        raise ConfigError(f"--methods {' '.join(strange) or repr('')}: use {', '.join((BASE, *METHODS))}")
    names = tuple(name if name == BASE else find(name).name for name in names)
    tried = None if factors == "auto" else () if factors == "none" else numbers("--factors", factors, float)
    chosen = tuple(filter(None, only.split(",")))
    return SuiteSettings(given, names, numbers("--seeds", seeds, int), tried, names=chosen, **others)


def _command(*examples, name=None):
    return app.command(name, epilog=examples_of(*examples))


@_command(
    "study run --study big --at-once 3", "study run --study big --executor ray", "study run --dry-run --study big"
)
def run(
    study: Name = "reference",
    profile: Profile = "gpu",
    source: Sources = None,
    settings: Settings = None,
    methods: Methods = None,
    seeds: Seeds = "0,1,2",
    factors: Factors = "auto",
    sweep_rows: SweepRows = 1500,
    only: Only = "",
    again: Again = False,
    at_once: AtOnce = 1,
    minutes: Annotated[float, Option(min=0, help="time limit: save and stop before it; 0: no limit")] = 0.0,
    executor: Annotated[str, Option(help="local (all GPUs of this machine) or ray")] = "local",
    address: Annotated[str, Option(help="address of the Ray cluster")] = "auto",
    no_report: Annotated[bool, Option("--no-report", help="do not build the report; `peftlib report` can")] = False,
    dry_run: Flag = False,
):
    """Run a whole study: data, sweeps, every method and seed, the report. Run it again to resume.

    Runs use all GPUs in parallel. On several machines with one store, run the same command on each to share the runs.
    """
    from peftlib.runner import suite, suite_plan

    if executor not in ("local", "ray"):
        raise ConfigError(f"--executor {executor}: use local or ray")
    given = given_settings(settings, source=source, profile=profile, study=study)
    others: dict = {"rows": sweep_rows, "is_again": again, "at_once": at_once, "minutes": minutes}
    others |= {"has_report": not no_report, "address": address if executor == "ray" else ""}
    chosen = _settings(given, methods, seeds, factors, only, **others)
    if dry_run:
        print("\n".join(suite_plan.lines(chosen)))
        return 0
    return suite.run(chosen, log=say)


@_command("study list --study big", "study list --study big --pending > runs.txt", name="list")
def list_runs(
    study: Name = "reference",
    pending: Annotated[bool, Option("--pending", help="print the commands that can start now, one per line")] = False,
    profile: Profile = "gpu",
    settings: Settings = None,
    methods: Methods = None,
    seeds: Seeds = "0,1,2",
    factors: Factors = "auto",
    sweep_rows: SweepRows = 1500,
    only: Only = "",
    again: Again = False,
    at_once: AtOnce = 1,
):
    """Show the state of a study's runs, or print the commands of those that can start now.

    The runs of a method can start once its sweep is done: list them again then. Build the study's data first.
    """
    from peftlib.runner import suite

    given = given_settings(settings, profile=profile, study=study)
    others = {"rows": sweep_rows, "is_again": again, "at_once": at_once}
    for line in suite.listing(_settings(given, methods, seeds, factors, only, **others), is_pending=pending):
        print(line)


@_command("study work sweep-galore --study big", "study work galore-s1 --study big -p device=cpu")
def work(
    run: Annotated[str, Argument(metavar="RUN", help="sweep-METHOD or METHOD-sSEED; `peftlib study list` shows them")],
    study: Name,
    settings: Settings = None,
    factors: Factors = "auto",
    sweep_rows: SweepRows = 1500,
    at_once: Annotated[int, Option(min=1, help="number of runs that share this GPU")] = 1,
    code: Annotated[str, Option(metavar="ID", help="refuse another version of peftlib")] = "",
    data: Annotated[str, Option(metavar="HASH", help="refuse other rows")] = "",
    attended: Annotated[bool, Option("--attended", hidden=True)] = False,
):
    """Do or resume one run of a study. If it is started twice, it is done once.

    Exit codes: 0 done, 1 failed (its record says why), 2 refused, 3 stopped and saved, 69 this machine cannot do it,
    75 not now: another worker does it, or its sweep is not done.
    """
    from peftlib.runner.suite_work import main

    chosen = _settings(given_settings(settings, study=study), factors=factors, rows=sweep_rows, at_once=at_once)
    return main(chosen, run, code=code, data=data, is_attended=attended)
