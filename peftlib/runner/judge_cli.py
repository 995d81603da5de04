"""`python -m peftlib judge`: two methods of a study compared by a judge, with calls and cost said first."""

import argparse
import math

from peftlib.core.errors import ConfigError
from peftlib.evaluation.judging import judge
from peftlib.evaluation.judging import verdicts as judge_verdicts
from peftlib.storage.lock import StudyLock


def main(argv, study_of):
    """Judge, or with --dry-run say what it would take; returns 0. study_of: name -> Study.

    StudyError: no predictions of a method, or of other rows. LockedError: another session judges these methods.
    JudgeError: see judge.run. ConfigError: no judge named.
    """
    args = _parser().parse_args(argv)
    _check(args)
    study = study_of(args.study)
    methods = judge.in_order(args.methods)
    names, cases = judge.cases_of_study(study, methods, args.seed, args.rows)
    if args.dry_run:
        _plan(study, methods, names, cases, args)
        return 0
    # Two that judge at once would ask, and pay, twice.
    what = "-vs-".join(methods)
    with StudyLock(
        study.folder,
        f"judging {methods[0]} against {methods[1]}",
        name=f"judge-{what}-lock.json",
        place=f"the judging of {what} in study {study.folder.name!r}",
    ) as lock:
        _judge(study, methods, names, cases, args, lock.require)
    return 0


def _plan(study, methods, names, cases, args):
    verdicts = judge_verdicts.Verdicts(judge_verdicts.path_of(study, methods), names)
    plan = judge.plan(cases, verdicts, _judge_name(args), reply_tokens=args.reply_tokens)
    print(f"{methods[0]} against {methods[1]}, judged by {_judge_name(args)}")
    print("\n".join(plan.lines(price_in=args.price_in, price_out=args.price_out)))
    return verdicts, plan


def _judge(study, methods, names, cases, args, require):
    verdicts, plan = _plan(study, methods, names, cases, args)
    if plan.to_ask or plan.n_identical:
        backend = _backend(args)
        parallel = 1 if args.local else args.parallel
        how = {"reply_tokens": args.reply_tokens, "parallel": parallel, "log": _say, "require": require}
        counts = judge.run(cases, verdicts, backend, **how)
        print("\n".join(_what_it_took(counts, args)))
    found = judge_verdicts.summary(cases, verdicts, _judge_name(args), names)
    print("\n".join(judge_verdicts.sentences(found)))
    print(f"verdicts: {verdicts.path.parent.name}/{verdicts.path.name}; in the report: python -m peftlib report --study "
          f"{args.study}")  # fmt: skip


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m peftlib judge",
        description="Have a language model compare two methods' answers to the same test rows, in both orders.",
        epilog="An endpoint's key is read from the environment variable OPENAI_API_KEY and stored nowhere.",
    )
    parser.add_argument("--study", required=True, help="name of the study folder")
    parser.add_argument("--methods", required=True, nargs=2, metavar=("A", "B"), help="such as: base qlora")
    parser.add_argument("--seed", type=int, default=0, help="of the runs; default: 0")
    parser.add_argument("--rows", type=_count, default=0, metavar="N", help="so many test rows; default: all")
    parser.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible server; mostly ends in /v1")
    parser.add_argument("--model", metavar="M", help="that the endpoint serves")
    parser.add_argument("--local", metavar="MODEL", help="instead: a folder, 'packaged' or a hub id, by transformers")
    parser.add_argument("--dry-run", action="store_true", help="say calls and cost, and ask nothing")
    for name, what in (("--price-in", "sent"), ("--price-out", "received")):
        parser.add_argument(name, type=_price, metavar="PRICE", help=f"of a million tokens {what}")
    parser.add_argument("--parallel", type=_count, default=4, metavar="N", help="calls at a time; default: 4")
    parser.add_argument(
        "--reply-tokens",
        type=_count,
        default=judge.REPLY_TOKENS,
        metavar="N",
        help=f"of a reply at most; more for a judge that thinks at length; default: {judge.REPLY_TOKENS}",
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="of one call in all; default: 60"
    )
    parser.add_argument(
        "--retries", type=_count_from_0, default=5, metavar="N", help="of a call that failed; default: 5"
    )
    return parser


def _count(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _count_from_0(text):
    return int(text) if int(text) == 0 else _count(text)


def _price(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no price")
    return value


def _seconds(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def _check(args):
    if (args.endpoint is None) == (args.local is None):
        raise ConfigError("name one judge: --endpoint URL --model M, or --local MODEL")
    if args.endpoint is not None and args.model is None:
        raise ConfigError("--endpoint needs --model, the name under which the server knows its model")


def _judge_name(args):
    from peftlib.evaluation.judging.backends import endpoint_name, local_name

    return local_name(args.local) if args.local else endpoint_name(args.endpoint, args.model)


def _backend(args):
    from peftlib.evaluation.judging.backends import Endpoint, Local

    if args.local:
        return Local(args.local)
    return Endpoint(args.endpoint, args.model, timeout_s=args.timeout, retries=args.retries)


def _what_it_took(counts, args):
    yield f"asked {counts['asked']}: {counts['malformed']} malformed, {counts['refused']} refused by the server"
    retried = [f"{n} {what.removeprefix('retried ')}" for what, n in counts.items() if what.startswith("retried ")]
    yield f"retried calls: {', '.join(retried) or 'none'}"
    tokens = counts["input_tokens"], counts["output_tokens"]
    cost, least = "", ""
    if counts["uncounted"]:
        least = f"; of {counts['uncounted']} calls the judge told no number, so it is more"
    if args.price_in is not None or args.price_out is not None:
        cost = f", cost {judge.cost_of(*tokens, args.price_in, args.price_out):.4f}"
    yield f"{tokens[0]:,} tokens sent, {tokens[1]:,} received as the judge counts them{cost}{least}"


def _say(line):
    print(line, flush=True)
