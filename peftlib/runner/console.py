"""Shared code of the commands: settings from the command line, one-line errors, exit codes, old spellings."""

import math
import os
import signal
import stat
import sys
from typing import Annotated

import typer
from typer import Option

from peftlib.core.config import PROFILES, from_text, resolve
from peftlib.core.env import output_root
from peftlib.core.errors import ConfigError, PeftlibError, Stopped, disk_error
from peftlib.core.study import Study
from peftlib.storage import mirror

# Options that several commands share.
Name = Annotated[str, Option("--study", metavar="NAME", help="study folder")]
AnyName = Annotated[str | None, Option("--study", metavar="NAME", help="study folder; default: the profile's name")]
Profile = Annotated[str | None, Option(help="demo, quick, t4, gpu or auto; default: chosen by hardware")]
Settings = Annotated[list[str] | None, Option("-p", "--set", metavar="NAME=VALUE", help="a config field; repeatable")]
Flag = Annotated[bool, Option("--dry-run", help="only print what would be done and how much it would take")]
_WHERE = "WHERE is FILE[,TESTFILE] (JSONL, JSON, CSV, Parquet), hub or sample; repeatable"
Sources = Annotated[list[str] | None, Option("--source", metavar="NAME=WHERE", help=_WHERE)]

ERROR_CODE = 2  # the command was refused
STOPPED_CODE = 3  # the work was stopped and saved: the same command resumes it


def examples_of(*examples):
    """The end of a command's --help."""
    return "\b\nExamples:\n" + "\n".join(f"  peftlib {example}" for example in examples)


def given_settings(settings, *, source=None, **options):
    """{field: value} from the given options and from -p NAME=VALUE."""
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"sources": "; ".join(source)} if source else {}
    for text in settings or []:
        name, has_value, value = text.partition("=")
        if not has_value:
            raise ConfigError(f"-p {text}: give a setting as NAME=VALUE or NAME VALUE")
        given[name] = from_text(name, value)
    return given


def study_of(given, *, is_copied=True):
    """The study that settings name. is_copied: restore it from its remote, if any, and keep copying it there."""
    if is_copied:
        mirror.open_mirror(output_root() / resolve(**given).study)
    return Study.resolve(**given)


def sized_as_full_study(given):
    """Settings completed with the full study's row counts, lengths, batch size and rates.

    Validation rows are in proportion to the training rows, at least one.
    """
    full = resolve("t4")
    names = ("train_rows", "test_rows", "max_length", "max_new_tokens", *PROFILES["demo"])
    names = [name for name in names if name in full.fields_of("data", "math")]
    given = {**{name: getattr(full, name) for name in names if name != "valid_rows"}, **given}
    return {"valid_rows": max(1, round(full.valid_rows / full.train_rows * given["train_rows"])), **given}


def numbers(option, text, kind):
    """The comma-separated numbers of an option, as kind. ConfigError: not numbers, not finite, below 0, or repeated."""
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r}: give numbers separated by commas, such as 0,1,2") from None
    if len(set(found)) < len(found) or not all(0 <= number < math.inf for number in found):
        raise ConfigError(f"{option} {text!r}: give each number once, finite and not negative")
    return found


def say(line):
    """Print a line and flush it, also into a pipe."""
    print(line, flush=True)


def main(app, argv):
    """Run one command; returns its exit code. A PeftlibError is printed as one line, without a traceback."""
    try:
        try:
            code = call(app, argv)
        except Stopped as stopped:
            print(f"stopped: {stopped}", file=sys.stderr)
            code = STOPPED_CODE
        for line in mirror.flush_all():
            print(line, file=sys.stderr)  # `study list` prints commands
        sys.stdout.flush()
        return code
    except PeftlibError as error:
        return _refused(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has exited, as with `| head`
        _leave_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        known = disk_error(error) or _fault_of_output(error)
        if known is None:  # a bug, or the network: show its traceback
            raise
        return _refused(known)


def call(app, argv):
    """Run one command; returns its exit code. ConfigError: invalid arguments. Other errors propagate."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("peftlib", in_todays_words(argv)) as context:
            return command.invoke(context) or 0
    except typer.Exit as done:  # of --help
        return done.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors have it; their class depends on its version
            raise
        hint = "" if argv else " See peftlib --help"
        raise ConfigError(" ".join(error.format_message().split()) + hint) from None


def in_todays_words(argv):
    """A command line of the first edition (`-p NAME VALUE`, `--method M`, `--methods A B C`) in today's form."""
    words, rest = [], list(argv)
    if rest[:1] == ["reference"]:
        print("`peftlib reference` is now called `peftlib study run`", file=sys.stderr)
        rest[:1] = ["study", "run"]
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest]
        if word in ("-p", "--set") and len(rest) > 1 and "=" not in rest[0]:
            rest[:2] = [f"{rest[0]}={rest[1]}"]
        if word == "--method":  # now a positional argument
            continue
        words.append(word)
        if word == "--methods" and words[0] == "study":
            n_values = next((n for n, value in enumerate(rest) if value.startswith("-")), len(rest))
            words.append(",".join(rest[:n_values]))
            del rest[:n_values]
    return words


def _refused(error):
    print(f"error: {error}", file=sys.stderr)
    return ERROR_CODE


def _fault_of_output(error):
    """The DiskError if standard output is a file on a full disk, else None.

    Only errors of writes to standard output have no path.
    """
    try:
        mode = os.fstat(sys.stdout.fileno()).st_mode
    except (OSError, ValueError):  # not a file, as in a test
        return None
    if error.errno is None or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or sys.stdout.isatty():
        return None
    _leave_output()
    return disk_error(OSError(error.errno, error.strerror, "standard output"))


def _leave_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains when it flushes at exit
