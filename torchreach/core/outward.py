"""Numbers as text, rounded outward: a printed claim is never stronger than the certified one."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def at_most(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, rounded up."""
    return _rounded(value, digits, ROUND_CEILING)


def at_least(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, rounded down."""
    return _rounded(value, digits, ROUND_FLOOR)


def span(lower: float, upper: float, digits: int = 5) -> str:
    """The interval [lower, upper]."""
    return f"{at_least(lower, digits)} .. {at_most(upper, digits)}"


def counted(number: int, word: str) -> str:
    """ "1 box", "12,000 boxes"."""
    ending = "" if number == 1 else "es" if word.endswith(("x", "ch")) else "s"
    return f"{number:,} {word}{ending}"


def _rounded(value: float, digits: int, mode: str) -> str:
    exact = Decimal(value)
    if not exact.is_finite() or not exact:
        return f"{value + 0.0:g}"  # no minus before zero
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=mode)
    return f"{float(rounded):.{digits}g}"
