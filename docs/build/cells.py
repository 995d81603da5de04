"""Figures of the reference study looked up, and numbers as the cells of tables."""

import statistics


def pair_of(results, metric, method, other):
    """{'value', 'low', 'high', 'is_noise'} of score(method) - score(other) in the reference study."""
    for pair in results.reference["pairs"]:
        if pair["metric"] == metric and {pair["method"], pair["other"]} == {method, other}:
            gap = {"value": pair["difference"], "low": pair["low"], "high": pair["high"]}
            gap = gap if pair["method"] == method else _turned(gap)
            return {**gap, "is_noise": gap["low"] <= 0.0 <= gap["high"]}
    raise KeyError(f"no {metric} of {method} against {other}")


def loss_gap(results, what, method, other):
    """The same of 'eval_loss' or 'general_loss', an interval over seeds."""
    for gap in results.reference["losses"]:
        if gap["what"] == what and {gap["method"], gap["other"]} == {method, other}:
            return gap if gap["method"] == method else {**gap, **_turned(gap)}
    raise KeyError(f"no {what} of {method} against {other}")


def _turned(gap):
    return {"value": -gap["value"], "low": -gap["high"], "high": -gap["low"]}


def signed(gap):
    """'value (low to high)' of a difference."""
    return f"{gap['value']:+z.{_digits(gap)}f} ({ends(gap)})"


def ends(gap):
    """'low to high' of a difference."""
    return f"{gap['low']:+z.{_digits(gap)}f} to {gap['high']:+z.{_digits(gap)}f}"


def told(gap):
    """`ends`, in bold where it does not hold 0."""
    return ends(gap) if gap["is_noise"] else f"**{ends(gap)}**"


def _digits(gap):
    """Three, or as many as show on which side of 0 each end of the interval lies."""
    return next((n for n in (3, 4, 5) if all(round(gap[end], n) for end in ("low", "high"))), 3)


def spread(values, form, has_spread=True):
    """'mean ± standard deviation' over seeds; '' where no value is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    deviation = f" ± {form.format(statistics.stdev(known))}" if has_spread and len(known) > 1 else ""
    return form.format(statistics.fmean(known)) + deviation


def number(value, form, unknown=""):
    return unknown if value is None else form.format(value)
