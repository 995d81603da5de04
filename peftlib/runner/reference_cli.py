"""The arguments of `python -m peftlib reference`, and its dry run."""

import argparse
from dataclasses import replace
from pathlib import Path

from peftlib.core.config import from_text
from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.study import Study
from peftlib.methods import BASE, METHODS
from peftlib.runner.suite import PRECISION_CHECKED, Settings, run

_ABOUT = (
    "A whole study by one command, run again after every cut until it says that all is done: data, a sweep of learning "
    "rates a method, training and evaluation of every method and seed, the report. Runs go side by side on all GPUs."
)


def main(argv):
    """Run a whole study; returns the exit code."""
    args = _parser().parse_args(argv)
    settings = settings_of(args)
    if args.dry_run:
        from peftlib.runner import suite_plan as reference_plan

        study, assumed = Study.resolve(**settings.given), _assumptions(args)
        if not study.manifest_path.exists():
            raise StudyError(
                f"--dry-run counts the rows of study {study.cfg.study!r}, which has no data yet: the command without "
                "--dry-run builds them first, and so does `python -m peftlib data` with the same --study, --source and -p"
            )
        for line in reference_plan.lines(study, settings, assumed):
            print(line)
        if args.keep_plan:
            reference_plan.keep(study, settings, assumed, Path(args.keep_plan))
        return 0
    return run(settings, log=lambda line: print(line, flush=True))


def _parser():
    parser = argparse.ArgumentParser(prog="python -m peftlib reference", description=_ABOUT)
    add = parser.add_argument
    add("--study", default="reference", help="name of the study folder; default: reference")
    add("--profile", default="gpu", help="demo, t4 or gpu; default: gpu")
    add("--source", action="append", metavar="NAME=FILE[,TESTFILE]", help="as `data` has it; once for each source")
    add("-p", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="any setting")
    add("--methods", nargs="+", default=[BASE, *METHODS], help=f"default: {' '.join((BASE, *METHODS))}")
    add("--seeds", default="0,1,2", help="of every method but base; default: 0,1,2")
    add("--factors", default="0.3,1,3", help="of the learning rates that a sweep tries, or none; default: 0.3,1,3")
    add("--sweep-rows", type=int, default=1500, help="training rows of each trial; default: 1500")
    add(
        "--precision-check",
        nargs="*",
        metavar="METHOD",
        help=f"also run once in fp16, in study NAME-fp16; {' '.join(PRECISION_CHECKED)} where none are named, and by default "
        "with the gpu profile on a GPU; none: no run",
    )
    add("--minutes", type=float, default=0.0, help="save and stop before so many are over; default: no limit")
    add("--at-once", type=int, default=1, help="runs side by side on each GPU; default: 1")
    add("--only", default="", metavar="METHOD[-sSEED],...", help="these runs alone, and the sweeps they need")
    add("--again", action="store_true", help="try what failed once more")
    add("--no-report", action="store_true", help="leave the report to `report`, which needs no GPU")
    add("--dry-run", action="store_true", help="print what there is to do and how long it is thought to take")
    add("--tokens-per-second", type=float, help="for --dry-run: of training, one run alone on a GPU")
    add("--keep-plan", metavar="DIR", help="for --dry-run: also write plan.json and plan.md there")
    add("--gpus", type=int, help="for --dry-run: GPUs that the plan is for; default: those here")
    return parser


def settings_of(args):
    """The Settings of parsed arguments. ConfigError: a value that cannot be."""
    given = {"profile": args.profile, "study": args.study}
    given |= {"sources": "; ".join(args.source)} if args.source else {}
    given |= {name: from_text(name, text) for name, text in args.p}
    methods = tuple(name for part in args.methods for name in part.replace(",", " ").split())
    strange = [name for name in methods if name not in (BASE, *METHODS)]
    if strange or not methods:
        raise ConfigError(f"--methods {' '.join(strange) or repr('')}: use {', '.join((BASE, *METHODS))}")
    if args.at_once < 1 or args.minutes < 0:
        raise ConfigError(f"--at-once {args.at_once}, --minutes {args.minutes:g}: use positive numbers")
    settings = Settings(
        given,
        methods,
        seeds=_numbers("--seeds", args.seeds, int),
        factors=() if args.factors == "none" else _numbers("--factors", args.factors, float),
        rows=args.sweep_rows,
        minutes=args.minutes,
        at_once=args.at_once,
        names=tuple(filter(None, args.only.split(","))),
        is_again=args.again,
        has_report=not args.no_report,
    )
    return replace(settings, checked=_checked(args.precision_check, methods, given))


def _assumptions(args):
    """The reference_plan.Assumptions of --dry-run."""
    from peftlib.runner.suite_plan import Assumptions

    given = {"tokens_per_second": args.tokens_per_second, "gpus": args.gpus, "at_once": args.at_once}
    return Assumptions(**{name: value for name, value in given.items() if value is not None})


def _checked(asked, methods, given):
    """Methods to run in OTHER_PRECISION as well."""
    if asked is not None:
        names = tuple(name for name in asked or PRECISION_CHECKED if name != "none" and (asked or name in methods))
        strange = [name for name in names if name not in methods]
        if strange:
            raise ConfigError(f"--precision-check {' '.join(strange)}: not among --methods {' '.join(methods)}")
        return names
    import torch

    # By the profile, not by the card: asking that would take memory of a GPU in this process.
    is_bf16 = given.get("precision", "auto") in ("auto", "bf16") and given["profile"] == "gpu"
    is_gpu = given.get("device", "auto") != "cpu" and torch.cuda.device_count() > 0
    return tuple(name for name in PRECISION_CHECKED if name in methods) if is_bf16 and is_gpu else ()


def _numbers(name, text, kind):
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text!r}: use numbers with commas between, such as 0,1,2") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise ConfigError(f"{name} {text!r}: each number once, none below 0")
    return found
