"""Sources that hold fewer rows than asked: what each split gets of them, and what is said."""

from peftlib.core.errors import DataError
from peftlib.data.outcomes import REASONS

_NEED = ("test", "train", "valid")  # in which order splits get their first row
_SHOWN = 3  # reasons of which an error shows a row


def in_proportion(n_rows, asked):
    """{split: rows}: n_rows shared out in the proportions of `asked`, {split: rows}.

    Each split that is asked for gets one row at least; where there are too few for that, test comes first, then train.
    """
    in_need = [split for split in _NEED if asked.get(split)]
    if n_rows <= len(in_need):
        return dict.fromkeys(asked, 0) | dict.fromkeys(in_need[:n_rows], 1)
    total = sum(asked.values())
    shares = {split: n_rows * n // total for split, n in asked.items()}
    by_remainder = sorted(asked, key=lambda split: (-(n_rows * asked[split] % total), -asked[split], split))
    for split in by_remainder[: n_rows - sum(shares.values())]:
        shares[split] += 1
    for split in in_need:
        if not shares[split]:
            shares[max(shares, key=lambda s: (shares[s], s))] -= 1
            shares[split] = 1
    return shares


def short_of(counts, wanted):
    """{source: {split: {"asked", "given"}}} of the sources that lack rows. counts: {split: {source: rows}}."""
    lacking = {source for split in wanted for source, n in counts[split].items() if n < wanted[split]}
    return {
        source: {split: {"asked": wanted[split], "given": counts[split][source]} for split in sorted(wanted)}
        for source in counts["test"]
        if source in lacking
    }


def short_line(source, splits):
    """One line on a source that lacks rows. splits: as in short_of."""
    given = ", ".join(f"{split} {n['given']:,} of {n['asked']:,}" for split, n in splits.items())
    return f"{source} has fewer rows than asked: {given}"


def refuse(short, sources, tallies):
    """DataError: these sources lack rows, which was not allowed. short: as short_of returns it."""
    lines = [
        f"{name}: {n['given']} of {n['asked']} {split} rows"
        for name, splits in short.items()
        for split, n in splits.items()
        if n["given"] < n["asked"]
    ]
    lines += [_found(source, tallies[source.name]) for source in sources if source.name in short]
    raise DataError(f"too few rows. {'; '.join(lines)}. Ask for fewer rows, add data, or set allow_short = True")


def refuse_useless(counts, sources, tallies):
    """DataError: a source gives no row. counts: {split: {source: rows}}."""
    for source in sources:
        if not any(found[source.name] for found in counts.values()):
            found = _found(source, tallies[source.name])
            raise DataError(f"no row can be used. {found}. Give other data, or leave the source out")


def refuse_empty(counts, sources, tallies):
    """DataError: a split has no row. counts: {split: {source: rows}} of the splits that were asked for."""
    empty = sorted(split for split, found in counts.items() if not sum(found.values()))
    if empty:
        n_rows = sum(sum(found.values()) for found in counts.values())
        raise DataError(
            f"too few rows for one in each split: {n_rows} can be used, which leaves none for {' and '.join(empty)}. "
            f"{'; '.join(_found(source, tallies[source.name]) for source in sources)}. "
            "Add data; only validation may do without (valid_rows = 0)"
        )


def _found(source, tally):
    """How many rows a source has, why some were rejected, and where the first of these stands."""
    most = tally.rejected.most_common()
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in most)
    places = [_place(source, reason, tally.examples) for reason, _ in most[:_SHOWN]]
    return f"{source.name} has {tally.read:,} rows, rejected: {reasons or 'none'}{''.join(places)}"


def _place(source, reason, examples):
    example = next((e for e in examples if e["reason"] == reason and "row" in e), None)
    if example is None:
        return ""
    field = f", {example['field']}" if example["field"] else ""
    where = f"row {example['row']} of {source.label(example['stream'])}{field}"
    return f"; {reason} is {REASONS[reason]}, first in {where}: {example['excerpt'][:100]}"
