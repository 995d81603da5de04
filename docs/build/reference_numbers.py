"""Differences of a reference study, as values of its summary and as words."""

import statistics
import warnings

from peftlib.evaluation import stats

NAMES = stats.METRICS


def interval(found):
    """A stats.Interval as a JSON object."""
    return {"value": found.value, "low": found.low, "high": found.high, "is_noise": found.is_noise}


def bootstrap(systems):
    """stats.bootstrap without its warning of few rows, whose number stands beside the results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.FewRowsWarning)
        return stats.bootstrap(systems)


def mean(values):
    """The mean, None where any is unknown or there are none (or no list of them)."""
    return None if not values or None in values else statistics.fmean(values)


def best_trial(basis):
    """The trial of least validation loss, of the 'from' of an adopted sweep."""
    known = [trial for trial in basis["tried"] if trial["valid_loss"] is not None]
    return min(known, key=lambda trial: trial["valid_loss"])


def signed(gap):
    """A difference with its interval, in words."""
    return f"{gap['value']:+z.{_digits(gap)}f} ({ends(gap)})"


def ends(gap):
    """'low to high' of a difference."""
    digits = _digits(gap)
    return f"{gap['low']:+z.{digits}f} to {gap['high']:+z.{digits}f}"


def _digits(gap):
    """Three, or as many as show on which side of 0 an end of the interval lies."""
    return next((n for n in (3, 4, 5) if all(round(gap[end], n) for end in ("low", "high"))), 3)
