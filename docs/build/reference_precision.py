"""A reference study's methods in fp16 beside bf16: one run of each, compared, as a table and in sentences."""

from peftlib.evaluation import results as scored
from peftlib.evaluation import stats
from peftlib.report.markdown import number, table
from peftlib.export.redact import without_folders
from reference_numbers import bootstrap, ends, interval, signed
from peftlib.report.results import gib

_HEAD = ("ROUGE-L", "difference", "test loss", "validation loss", "general text loss", "peak GiB", "skipped steps")
_PAIRS = {
    "rougeL": "{:.3f}",
    "eval_loss": "{:.4f}",
    "valid_loss": "{:.4f}",
    "general_loss": "{:.4f}",
    "peak_memory_gib": "{:.2f}",
}


def compared(built, sibling, *, lacking=""):
    """{method: figures of one seed in both precisions}; {} without a study of the other.

    A run that was trained and not scored has no 'difference'; 'unscored_because' holds its error and `lacking`.
    """
    if sibling is None:
        return {}
    others = {(run.record["method"], run.record["seed"]): run for run in scored.load(sibling).runs}
    made = {}
    for run in built.study.runs:
        other = others.get((run.record["method"], run.record["seed"]))
        if other is None or not other.record["status"] == run.record["status"] == "ok":
            continue
        difference, reasons = None, [without_folders(one.record.get("evaluation_error")) for one in (other, run)]
        reasons += [] if other.is_scored else [lacking]
        if other.is_scored and run.is_scored:
            boot = bootstrap({"fp16": [other.rows], "bf16": [run.rows]})
            difference = {metric: interval(boot.difference("fp16", "bf16", metric)) for metric in stats.METRICS}
        made[run.record["method"]] = {
            "seed": run.record["seed"],
            "difference": difference,
            "unscored_because": "" if difference else "; ".join(dict.fromkeys(filter(None, reasons))),
            **{one.record["precision"]: _facts(one) for one in (other, run)},
        }
    return made


def _facts(run):
    record, scores = run.record, run.rows.scores() if run.is_scored else {}
    return {
        **{metric: scores.get(metric) for metric in stats.METRICS},
        "valid_loss": record["valid_history"][-1]["valid_loss"] if record["valid_history"] else None,
        "eval_loss": run.eval_loss,
        "general_loss": run.general.loss if run.general else None,
        "peak_memory_gib": gib(record["peak_memory_bytes"]),
        "tokens_per_second": record["tokens_per_second"],
        "skipped_steps": record["skipped_steps"],
    }


def tables(found):
    """Paragraphs of Markdown from a summary: the table, and why cells of it are empty."""
    known = {method: both for method, both in found["precision"].items() if {"fp16", "bf16"} <= set(both)}
    if not known:
        return
    rows, lacking = [["fp16 / bf16", *_HEAD]], {}
    for method, both in known.items():
        pairs = [f"{number(both['fp16'][n], form)} / {number(both['bf16'][n], form)}" for n, form in _PAIRS.items()]
        gap = ends(both["difference"]["rougeL"]) if both["difference"] else ""
        rows.append([method, pairs[0], gap, *pairs[1:], number(both["fp16"]["skipped_steps"], "{}")])
        if not both["difference"]:
            lacking.setdefault(both["unscored_because"] or "not evaluated", []).append(method)
    yield "One seed of each, trained in fp16 / in bf16, both evaluated alike:"
    yield table(rows)
    if lacking:
        told = "; ".join(f"{', '.join(methods)}: {reason}" for reason, methods in lacking.items())
        yield f"Empty cells are runs that were trained and not evaluated ({told})."


def sentences(found):
    """What fp16 costs each method, in words."""
    for method, both in found["precision"].items():
        if not {"fp16", "bf16"} <= set(both):
            continue
        told, cost = [], "was trained, not scored"
        if both["difference"]:
            gap = both["difference"]["rougeL"]
            cost = (
                "costs no quality that shows" if gap["is_noise"] else "costs quality" if gap["value"] < 0 else "gains"
            )
            told.append(f"ROUGE-L {signed(gap)}")
        told += [
            f"{name} {both['fp16'][field] - both['bf16'][field]:+z.4f}"
            for field, name in (("eval_loss", "test loss"), ("valid_loss", "validation loss"))
            if None not in (both["fp16"][field], both["bf16"][field])
        ]
        yield (
            f"{method} in fp16 instead of bf16 (seed {both['seed']}) {cost}: {', '.join(told)}, "
            f"{number(both['fp16']['skipped_steps'], '{}', 'unknown')} steps skipped for an overflow, peak memory "
            f"{' against '.join(number(both[name]['peak_memory_gib'], '{:.2f}', 'unknown') for name in ('fp16', 'bf16'))} GiB."
        )
