"""Compare two methods of a study with a judge: estimate calls and cost, make the calls, and summarize."""

import contextlib

from peftlib.evaluation.judging import judge, verdicts
from peftlib.evaluation.judging import prompts as sets
from peftlib.storage.lock import StudyLock

_CHARACTERS_PER_TOKEN = 4  # an estimate; English prose has 4 to 4.5


def judge_study(study, methods, backend, *, reply_tokens, seed=0, n_rows=0, again=0, prompts="", folder=None,
                prices=(None, None), parallel=1, dry_run=False, log=print):  # fmt: skip
    """Have a judge compare the answers of two methods; existing verdicts are reused.

    backend: a backends.Endpoint or Local. n_rows: number of rows to judge, 0 for all. again: number of rows to judge
    twice, which measures the judge's self-agreement. prompts: one of prompts.SETS to use instead of the test rows,
    which both methods answer first; folder: see prompts.rows_of. prices: per million tokens sent and received, None if
    unknown. dry_run: only print the estimate. The rest: see judge.run.
    StudyError: no predictions of a method, or for other rows. LockedError: another session is judging these methods.
    JudgeError: see judge.run. ConfigError, DataError: see prompts.rows_of.
    """
    methods = judge.in_order(methods)
    if prompts:
        names, cases = _cases_of_prompts(study, methods, seed, prompts, n_rows, folder, dry_run=dry_run, log=log)
    else:
        names, cases = judge.cases_of_study(study, methods, seed, n_rows)
    cases += judge.asked_again(cases, again)
    doing, what = f"judging {methods[0]} against {methods[1]}", "-vs-".join(methods)
    place = f"the judging of {what} in study {study.folder.name!r}"
    # Two sessions that judge at the same time would pay twice.
    lock = StudyLock(study.folder, doing, name=f"judge-{what}-lock.json", place=place)
    with contextlib.nullcontext() if dry_run else lock:
        kept = verdicts.Verdicts(verdicts.path_of(study, methods, prompts), names)
        found = judge.open_cases(cases, kept, backend.name, reply_tokens)
        log(f"{methods[0]} against {methods[1]}{prompts and f' on {prompts}'}, judged by {backend.name}")
        log("\n".join(_plan(len(cases), found, reply_tokens, prices)))
        if dry_run:
            return
        if found:
            how = {"reply_tokens": reply_tokens, "parallel": parallel, "log": log, "require": lock.require}
            log("\n".join(_what_it_took(judge.run(cases, kept, backend, **how), backend.counts, prices)))
        log("\n".join(verdicts.sentences(verdicts.summary(cases, kept, backend.name, names))))
    shown = kept.path.relative_to(study.folder).as_posix()
    log(f"verdicts: {shown}; to report them: python -m peftlib report --study {study.folder.name}")


def _cases_of_prompts(study, methods, seed, prompts, n_rows, folder, *, dry_run, log):
    """Like judge.cases_of_study, for a prompt set, which the methods answer first unless it is a dry run."""
    rows = judge.first_rows(sets.rows_of(study, prompts, folder, is_kept=not dry_run), n_rows)
    runs = [(method, judge.own_seed(method, seed)) for method in methods]
    found = [sets.answers(study, *run, prompts, rows, is_asked=not dry_run, log=log) for run in runs]
    for method, known in zip(methods, found):
        if len(known) < len(rows):
            log(f"{method} has to answer {len(rows) - len(known)} of {len(rows)} prompts first")
    answered = [row for row in rows if all(row["id"] in known for known in found)]
    if len(answered) < len(rows):
        log(f"calls and cost below exclude {len(rows) - len(answered)} rows that are not answered yet")
    return tuple(f"{method}-s{own}" for method, own in runs), judge.cases_of(answered, *found)


def _plan(n_cases, found, reply_tokens, prices):
    """Lines with the calls and estimated tokens for the open cases, without retries."""
    to_ask = [case for case in found if not case.is_identical]
    sent = sum(len(case.message) for case in to_ask) // _CHARACTERS_PER_TOKEN
    received = len(to_ask) * reply_tokens
    known, equal = n_cases - len(found), f"{len(found) - len(to_ask)} with identical answers (ties without a call)"
    yield f"{n_cases} comparisons: {known} already judged, {equal}, {len(to_ask)} calls to make"
    how = f"({_CHARACTERS_PER_TOKEN} characters per token; without retries)"
    yield f"about {sent:,} tokens to send and at most {received:,} to receive {how}"
    if prices == (None, None):
        yield "cost: unknown, give --price-in and --price-out per million tokens"
    else:
        per_million = "at {:g} in and {:g} out per million tokens".format(*(price or 0 for price in prices))
        yield f"cost: up to about {_cost((sent, received), prices):.4f}, without retries, {per_million}"


def _cost(tokens, prices):
    """Cost of tokens sent and received, at prices per million; a price of None counts as 0."""
    return sum(n * (price or 0) for n, price in zip(tokens, prices)) / 1e6


def _what_it_took(made, counts, prices):
    found = [verdict["verdict"] for verdict in made]
    yield f"asked {len(made)}: {found.count('malformed')} malformed, {found.count(None)} refused by the server"
    retried = ", ".join(f"{n} {what.removeprefix('retried ')}" for what, n in counts.items())
    yield f"retried calls: {retried or 'none'}"
    tokens = [[verdict[name] for verdict in made] for name in ("input_tokens", "output_tokens")]
    sent, received = (sum(filter(None, numbers)) for numbers in tokens)
    cost = "" if prices == (None, None) else f", cost {_cost((sent, received), prices):.4f}"
    n_uncounted = sum(None in pair for pair in zip(*tokens))
    least = f"; the judge gave no count for {n_uncounted} of {len(made)} calls, so it is higher" if n_uncounted else ""
    yield f"{sent:,} tokens sent, {received:,} received as the judge counts them{cost}{least}"
