"""The answer in one line: what a result certifies, and how it stands to a tolerance.

Numbers are printed rounded outward, so that the printed claim is never stronger than the certified one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from torchreach.results import Discrepancy, RepairResult, Status


class State(enum.Enum):
    """How a certified interval around max |y1 - y2| stands to what was asked."""

    CERTIFIED = "certified"  # no tolerance was asked for: the interval is the answer
    WITHIN = "within"  # certified: no input exceeds the tolerance
    EXCEEDED = "exceeded"  # a witness exceeds the tolerance
    UNDECIDED = "undecided"  # the tolerance lies inside the interval
    REPAIRED = "repaired"  # the repaired network's certificate meets the target
    NOT_REPAIRED = "not repaired"


@dataclass(frozen=True)
class Verdict:
    """One run's answer.

    Attributes:
        lower, upper: certified interval around the largest |y1 - y2| over all input stars and outputs.
        tolerance: what was asked for (a repair's target), or None.
        witness: (star, output) whose witness attains `lower`.
        text: the answer in one line.
    """

    state: State
    lower: float
    upper: float
    tolerance: float | None
    witness: tuple[int, int]
    text: str

    @property
    def ok(self) -> bool:
        """Whether the command line exits with status 0."""
        return self.state in (State.CERTIFIED, State.WITHIN, State.REPAIRED)


def compare_verdict(found: Discrepancy, tolerance: float | None = None) -> Verdict:
    """Verdict on a comparison, with or without a tolerance on max |y1 - y2|."""
    lower, upper = float(found.lower.max()), float(found.upper.max())
    star, output = divmod(int(found.lower.argmax()), found.lower.shape[1])
    how = effort(found)
    certified = f"|y1 - y2| <= {at_most(upper)} for every input"
    if tolerance is None:
        state = State.CERTIFIED
        text = f"certified: {certified}, and {at_least(lower)} is attained ({how})"
    elif upper <= tolerance:
        state = State.WITHIN
        text = f"within tolerance {tolerance:g}: certified {certified} ({how})"
    elif lower > tolerance:
        state = State.EXCEEDED
        text = (
            f"exceeds tolerance {tolerance:g}: |y1 - y2| >= {at_least(lower)} at an input of star {star}, "
            f"output {output} ({how})"
        )
    else:
        state = State.UNDECIDED
        text = (
            f"undecided: max |y1 - y2| lies in [{at_least(lower)}, {at_most(upper)}], and so does the "
            f"tolerance {tolerance:g}; a larger budget narrows it ({how})"
        )
    return Verdict(state, lower, upper, tolerance, (star, output), text)


def repair_verdict(result: RepairResult, target: float) -> Verdict:
    """Verdict on a repair: the kept network's certificate, beside the bound that was asked for."""
    after = compare_verdict(result.after)
    rounds = result.history[-1].iteration
    before = at_most(float(result.before.upper.max()))
    text = (
        f"certified |y1 - y2| <= {at_most(after.upper)} for every input, target {target:.5g}, {before} before "
        f"({rounds} iteration{'s' * (rounds != 1)}; {effort(result.after)})"
    )
    state, start = State.REPAIRED, "repaired"
    if not result.satisfied:
        state, start = State.NOT_REPAIRED, "target missed, closest network kept"
    return Verdict(state, after.lower, after.upper, target, after.witness, f"{start}: {text}")


def effort(found: Discrepancy) -> str:
    """How the interval was obtained: semantics, status, regions where all were enumerated, seconds."""
    what = "" if found.semantics == "float" else f"{found.semantics}, "
    seconds = f"{found.stats.seconds:.1f} s"
    exact = all(status is Status.EXACT for status in found.status)
    if found.stats.method == "cells":
        number = f"{int(found.regions.sum()):,} cell{'s' * (int(found.regions.sum()) != 1)}"
        return f"{what}{'EXACT' if exact else 'BOUNDED: rounding left open'}, {number}, {seconds}"
    if not exact:
        return f"{what}BOUNDED: stopped early, {seconds}"
    count = regions(found)
    if count is None:
        return f"{what}EXACT, {found.stats.branches:,} branches, {seconds}"
    return f"{what}EXACT, {count:,} region{'s' * (count != 1)}, {seconds}"


def regions(found: Discrepancy) -> int | None:
    """Linear regions enumerated, or None where not all were."""
    searched = found.stats.branches or found.stats.method in ("difference bounds", "cells", "relaxation")
    if searched or any(status is not Status.EXACT for status in found.status):
        return None
    return int(found.regions.sum())


def at_most(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, rounded up."""
    return _rounded(value, digits, ROUND_CEILING)


def at_least(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, rounded down."""
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, mode: str) -> str:
    exact = Decimal(value)
    if not exact.is_finite() or not exact:
        return f"{value:g}"
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=mode)
    return f"{float(rounded):.{digits}g}"
