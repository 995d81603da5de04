"""The command line: python -m peftlib run|data|report|compare|judge|plan|chat|sweep|export|reference."""

import argparse
import os
import signal
import stat
import sys

from peftlib.core.config import from_text
from peftlib.core.errors import PeftlibError, disk_error
from peftlib.storage import mirror

ERROR_CODE = 2  # of a command that was refused; argparse uses it too


def main(argv=None):
    """Run one command; its exit code. Errors that peftlib raises on purpose are printed without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _call(argv)
        for told in mirror.flush_all():
            print(told)
        sys.stdout.flush()
        return code
    except PeftlibError as error:
        return _refused(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        _leave_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        said = disk_error(error) or _fault_of_output(error)
        if said is None:  # a bug, or the network: its traceback tells where
            raise
        return _refused(said)


def _fault_of_output(error):
    """The DiskError of a standard output that leads to a file on a full disk; None where the error is another.

    Writes to standard output are the only ones whose errors carry no path.
    """
    try:
        mode = os.fstat(sys.stdout.fileno()).st_mode
    except (OSError, ValueError):  # no file at all, as under a test
        return None
    if error.errno is None or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or sys.stdout.isatty():
        return None
    _leave_output()
    return disk_error(OSError(error.errno, error.strerror, "standard output"))


def _leave_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit


def _refused(error):
    print(f"error: {error}", file=sys.stderr)
    return ERROR_CODE


def _call(argv):
    if argv and argv[0] in _PASSED_ON:
        return _PASSED_ON[argv[0]](argv[1:]) or 0
    args = _parser().parse_args(argv)
    return args.call(args) or 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m peftlib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _command(commands, "run", _run, "execute the notebooks in order, skipping what is finished")
    run.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="numbers or names, such as 01 02_qlora; default: all"
    )
    run.add_argument("--profile", help="demo, t4, gpu or auto (the hardware decides); default: auto")
    run.add_argument("--study", help="name of the study folder; default: the profile's name")
    run.add_argument("--fork", metavar="STUDY", help="start from the weights that this other study's runs reached")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="set one setting")
    run.add_argument(
        "--notebooks",
        dest="folder",
        metavar="DIR",
        help="folder of the notebooks; default: those that came with peftlib",
    )
    report = _command(commands, "report", _report, "write results.csv, report.md and figures of a study again")
    report.add_argument("--study", required=True, help="name of the study folder")
    plan = _command(commands, "plan", _plan, "which method fits a GPU, in which micro-batch, for how many hours")
    plan.add_argument("--gpu", help="t4, l4, a100, h100 and others; default: the one here, else a t4")
    plan.add_argument("--model", help="'packaged', gemma-3-1b, a folder or a hub id; default: the study's or profile's")
    plan.add_argument("--study", help="name of a study folder whose settings and data to plan for")
    plan.add_argument("-p", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help="set one setting")
    chat = _command(commands, "chat", _chat, "talk to a trained model; /new starts over, /quit ends")
    chat.add_argument("--study", required=True, help="name of the study folder")
    chat.add_argument("--method", required=True, help="a trained method, or base")
    chat.add_argument("--seed", type=int, default=0, help="of the run; default: 0")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="of an answer; default: 256")
    sweep = _command(commands, "sweep", _sweep, "try learning rates of a study's methods on its validation rows")
    sweep.add_argument("--study", required=True, help="name of the study folder")
    sweep.add_argument("--method", action="append", help="once for each method; default: all")
    sweep.add_argument("--factor", action="append", type=float, help="of the study's rates; default: 0.3, 1, 3")
    sweep.add_argument("--rows", type=int, default=1500, help="training rows of each trial; default: 1500")
    export = _command(commands, "export", _export, "hand on a trained model with a model card: a folder or the hub")
    export.add_argument("--study", required=True, help="name of the study folder")
    export.add_argument("--method", required=True, help="a trained method")
    export.add_argument("--seed", type=int, default=0, help="of the run; default: 0")
    export.add_argument(
        "--form", default="adapter", help="adapter, merged (one model in bf16) or gguf; default: adapter"
    )
    export.add_argument("--to", required=True, metavar="WHERE", help="a folder, or hf://USER/REPO (made private)")
    export.add_argument("--quant", default="q8_0", help="of a GGUF file: q8_0, f16 or bf16; default: q8_0")
    export.add_argument("--public", action="store_true", help="a repository that is made now may be seen by everyone")
    export.add_argument("--dry-run", action="store_true", help="show files and card, write and send nothing")
    for name, call in _PASSED_ON.items():  # listed here for --help; they read their arguments themselves
        _command(commands, name, call, call.__doc__)
    return parser


def _command(commands, name, call, text):
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(call=call)
    return parser


def _run(args):
    from peftlib.runner import notebooks as runner

    given = {"profile": args.profile, "study": args.study, "fork": args.fork}
    overrides = {name: value for name, value in given.items() if value is not None}
    overrides |= {name: from_text(name, text) for name, text in args.p}
    return runner.run(runner.plan(args.notebooks, overrides, args.folder))


def _report(args):
    study = mirror.open_study(args.study)
    from peftlib.notebook.session import readable_path
    from peftlib.report import build as report

    built = report.build_report(study)
    for path in (
        study.results_path,
        study.report_path,
        study.report_path.with_suffix(".html"),
        *built.figures.values(),
    ):
        print(readable_path(path))


def _plan(args):
    from peftlib.runner import plan_cli

    study = mirror.open_study(args.study) if args.study else None
    overrides = {name: from_text(name, text) for name, text in args.p}
    for line in plan_cli.lines(args.gpu, args.model, overrides, study):
        print(line)


def _chat(args):
    from peftlib.evaluation import chat as talk

    study = mirror.open_study(args.study)
    cfg = study.cfg.replace(max_new_tokens=args.max_new_tokens)
    return talk.main(study, args.method, seed=args.seed, max_new_tokens=cfg.max_new_tokens)


def _sweep(args):
    from peftlib import methods
    from peftlib.train.sweep import FACTORS, sweep

    study = mirror.open_study(args.study)
    for method in args.method or methods.METHODS:
        sweep(study, method, factors=args.factor or FACTORS, rows=args.rows)


def _export(args):
    from peftlib.export.export import export_model, lines_of

    exported = export_model(
        mirror.open_study(args.study),
        args.method,
        seed=args.seed,
        to=args.to,
        form=args.form,
        quant=args.quant,
        private=not args.public,
        dry_run=args.dry_run,
    )
    for line in lines_of(exported, dry_run=args.dry_run):
        print(line)


def _data(argv):
    """build a study's data, or look at it"""
    from peftlib.runner import data_cli as cli

    return cli.main(argv)


def _compare(argv):
    """compare the results of studies"""
    from peftlib.report.compare import compare_studies

    print(compare_studies(argv), end="")
    return 0


def _judge(argv):
    """have a language model compare two methods' answers"""
    from peftlib.runner import judge_cli

    return judge_cli.main(argv, mirror.open_study)


def _reference(argv):
    """run a whole study, side by side on all GPUs, and go on with it after a cut"""
    from peftlib.runner import reference_cli

    return reference_cli.main(argv)


_PASSED_ON = {"reference": _reference, "data": _data, "compare": _compare, "judge": _judge}


if __name__ == "__main__":
    sys.exit(main())
