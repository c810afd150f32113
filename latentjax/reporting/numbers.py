"""Numbers as people read them: as many digits as mean something, and units."""

import math
from collections.abc import Iterable
from typing import Any

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_MINUS = "\N{MINUS SIGN}"
_LARGEST = 1e30  # of what is read: sums and squares of more would overflow, and nothing that is meant is so large
_NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"


def finite(value: Any) -> float:
    """Returns a number that a file holds; NaN for null, for what is no number, and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < _LARGEST else math.nan


def written(value: float, decimals: int) -> str:
    """Returns a number with so many decimals, thousands apart, and a real minus."""
    return f"{value:,.{decimals}f}".replace("-", _MINUS)


def signed(value: float, decimals: int) -> str:
    """The same with its sign, also a plus."""
    return f"{value:+,.{decimals}f}".replace("-", _MINUS)


def decimals_for(spreads: Iterable[float | None], fewest: int = 2, most: int = 4) -> int:
    """Returns the decimals at which the smallest of the spreads has two digits, or 3 if there are none."""
    known = [spread for spread in spreads if spread]
    if not known:
        return 3
    return min(max(1 - math.floor(math.log10(min(known))), fewest), most)


def prefix_of(value: float) -> tuple[float, str]:
    """Returns the power of 1000 at or below a number, and its SI prefix: (1e12, "T") for 2e13."""
    if not math.isfinite(value) or value < 1000:
        return 1.0, ""
    place = min(int(math.log10(value) / 3 + 1e-12), len(_PREFIXES) - 1)
    return 1000.0**place, _PREFIXES[place]


def time_unit(seconds: float) -> tuple[float, str]:
    """Returns a unit in which so many seconds are a number of at least 2, in seconds, and its name."""
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next((unit for unit in units if seconds >= 2 * unit[0]), (1.0, "seconds"))


def digits(value: float, count: int = 3) -> str:
    """Returns a number with about so many digits, never with an exponent: 0.0123, 1.23, 12.3, 123, 1,234."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(count - 1 - math.floor(math.log10(abs(value))), 0)
    return written(value, min(decimals, 12))


def scaled(value: float, count: int = 3) -> str:
    """Returns a number with an SI prefix, ready for a unit behind it: "21.3 T" for 2.13e13, "512 " for 512."""
    power, prefix = prefix_of(value)
    return f"{digits(value / power, count)}{_NARROW_SPACE}{prefix}"


def duration(seconds: float) -> str:
    """Returns seconds as people say them: 41 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{digits(seconds, 2) if seconds < 10 else whole}{_NARROW_SPACE}s"
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            behind = f" {rest}{_NARROW_SPACE}{smaller}" if rest else ""
            return f"{whole // size}{_NARROW_SPACE}{unit}{behind}"
    raise AssertionError(seconds)
