"""What changed in a run between two of its sessions (precision, device, plan, rates), in its record and its log."""

from collections import Counter
from datetime import UTC, datetime

from peftlib.core.errors import CheckpointError

RATE_FACTOR = "rate_factor"


def note(run, what, before, now):
    """Add one change to the run's record: at which step, what, from what, to what, and when."""
    run.record["changes"].append(
        {
            "step": run.progress.step,
            "what": what,
            "from": before,
            "to": now,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def note_session(run, state):
    """Compare this session with the one that wrote a checkpoint; differences are noted and logged.

    state: of the checkpoint. Those of older versions do not tell their precision.
    """
    ours = {"precision": run.precision, "device": run.record["device"], "plan": run.placement.description}
    for what, now in ours.items():
        before = state.get(what, now)
        if before != now:
            note(run, what, before, now)
            run.log(f"the checkpoint was made with {what} {before}, here it is {now}: going on, not bit for bit")
    if state.get("precision", run.precision) != run.precision:
        four_bit = "; 4-bit weights are quantized from that, alike where the model's files hold 16 bits"
        run.log(
            f"frozen weights are read in {run.precision}{four_bit if run.method.four_bit else ''}; trained weights and "
            "optimizer state stay as they were"
        )


def set_rate_factor(run, before):
    """Put the factor on the learning rates in force: cfg.resume_rate_factor, or `before` where that is 1.

    It multiplies the study's rates, not those of the session before, so giving it twice changes nothing.
    """
    asked = run.cfg.resume_rate_factor
    run.rate_factor = before if asked == 1.0 else asked
    if run.rate_factor != before:
        note(run, RATE_FACTOR, before, run.rate_factor)
        run.log(
            f"learning rates are {run.rate_factor:g} times the study's from step {run.progress.step} on "
            f"(resume_rate_factor); before {before:g}"
        )


def require_same_architecture(kept, ours, where):
    """CheckpointError unless two tables of models.layer_table tell of the same layers: names, classes, numbers of
    weights, what is held in 4 bits and what trains. The dtypes of the rest may differ, as two cards do.
    """
    before, now = _architecture(kept), _architecture(ours)
    if before != now:
        raise CheckpointError(
            f"the model's layers are {_unlike(now, before)}, those of the checkpoint in {where} "
            f"{_unlike(before, now)}: take the model and versions it was made with"
        )


def _architecture(layers):
    found = Counter()
    for row in layers:
        key = (
            row.get("layer"),
            row.get("class"),
            "in 4 bits" if row.get("dtype") == "nf4" else "plain",
            row.get("trains"),
        )
        found[key] += 1j * row.get("weights", 0) + row.get("count", 0)
    return found


def _unlike(table, other):
    """What of a table the other lacks, in words."""
    rows = [
        f"{layer} ({kind!r}, {form}, {'trains' if trains else 'frozen'}, {n.real:g} with {n.imag:g} weights)"
        for (layer, kind, form, trains), n in table.items()
        if other.get((layer, kind, form, trains)) != n
    ]
    return ", ".join(rows) or "fewer"


def sentences(record):
    """What a report has to say about a run that did not go the same way from its first to its last step."""
    run = f"{record['method']} (seed {record['seed']})"
    for change in record.get("changes") or ():
        if change["what"] == RATE_FACTOR:
            yield (
                f"{run} was not treated as the others: from step {change['step']} on its learning rates were "
                f"{change['to']:g} times the study's (before: {change['from']:g} times)."
            )
        elif change["what"] == "precision":
            yield (
                f"{run} went on in {change['to']} from step {change['step']} on (before: {change['from']}), so its "
                "memory and speed are of both."
            )
