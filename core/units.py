"""Counts and times as short texts."""

import time

WEEK_SECONDS = 7 * 86400


def short(count: float) -> str:
    """Format a count with three digits and a unit: 1.8M, 5.8T."""
    for unit in ("", "k", "M", "B", "T"):
        if abs(count) < 999.5 or unit == "T":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


def end_time(seconds: float) -> str:
    """UTC time in `seconds` from now: the date, or within a week month, day and minute."""
    end = time.gmtime(time.time() + min(seconds, 1e9))  # gmtime fails far in the future
    return time.strftime("%m-%d %H:%MZ" if seconds < WEEK_SECONDS else "%Y-%m-%d", end)
