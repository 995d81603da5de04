"""Two methods of a study compared by a judge: calls and cost are said first, then the verdicts and what they add up
to."""

from peftlib.evaluation.judging import judge, verdicts
from peftlib.storage.lock import StudyLock


def judge_study(study, methods, name, open_judge, *, seed=0, n_rows=0, dry_run=False, reply_tokens=judge.REPLY_TOKENS,
                parallel=1, price_in=None, price_out=None, log=print):  # fmt: skip
    """Have a judge compare the answers of two methods, as far as it has not before; with dry_run only say what that
    takes.

    name: what verdicts call the judge. open_judge() -> a backends.Endpoint or Local, called where there is something to
    ask. n_rows: so many test rows, 0 for all. price_in, price_out: of a million tokens.
    StudyError: no predictions of a method, or of other rows. LockedError: another session judges these methods.
    JudgeError: see judge.run.
    """
    methods = judge.in_order(methods)
    names, cases = judge.cases_of_study(study, methods, seed, n_rows)

    def plan(kept):
        found = judge.plan(cases, kept, name, reply_tokens=reply_tokens)
        log(f"{methods[0]} against {methods[1]}, judged by {name}")
        log("\n".join(found.lines(price_in=price_in, price_out=price_out)))
        return found

    path = verdicts.path_of(study, methods)
    if dry_run:
        plan(verdicts.Verdicts(path, names))
        return
    what = "-vs-".join(methods)
    doing, where = f"judging {methods[0]} against {methods[1]}", f"the judging of {what} in study {study.folder.name!r}"
    # Two that judge at once would ask, and pay, twice.
    with StudyLock(study.folder, doing, name=f"judge-{what}-lock.json", place=where) as lock:
        kept = verdicts.Verdicts(path, names)
        planned = plan(kept)
        if planned.to_ask or planned.n_identical:
            how = {"reply_tokens": reply_tokens, "parallel": parallel, "log": log, "require": lock.require}
            log("\n".join(_what_it_took(judge.run(cases, kept, open_judge(), **how), price_in, price_out)))
        log("\n".join(verdicts.sentences(verdicts.summary(cases, kept, name, names))))
    shown = f"{path.parent.name}/{path.name}"
    log(f"verdicts: {shown}; in the report: python -m peftlib report --study {study.folder.name}")


def _what_it_took(counts, price_in, price_out):
    yield f"asked {counts['asked']}: {counts['malformed']} malformed, {counts['refused']} refused by the server"
    retried = [f"{n} {what.removeprefix('retried ')}" for what, n in counts.items() if what.startswith("retried ")]
    yield f"retried calls: {', '.join(retried) or 'none'}"
    tokens = counts["input_tokens"], counts["output_tokens"]
    cost = least = ""
    if counts["uncounted"]:
        least = f"; of {counts['uncounted']} calls the judge told no number, so it is more"
    if price_in is not None or price_out is not None:
        cost = f", cost {judge.cost_of(*tokens, price_in, price_out):.4f}"
    yield f"{tokens[0]:,} tokens sent, {tokens[1]:,} received as the judge counts them{cost}{least}"
