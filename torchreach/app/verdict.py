"""The answer in one line: what a result shows, and how it stands to a tolerance.

Numbers are rounded outward, and every sentence comes from a typed field of the result (`torchreach.core.terms`).
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.outward import at_least, at_most, counted
from torchreach.core.repaired import RepairResult
from torchreach.core.results import Discrepancy, ended
from torchreach.core.terms import Reason, Status

# Relative gap of two ends that no reader can tell apart, as in a deployed network's EXACT.
MET = 1e-4


class State(enum.Enum):
    """How the interval around max |y1 - y2| stands to what was asked."""

    CERTIFIED = "certified"  # no tolerance was asked for: the interval is the answer
    WITHIN = "within"  # certified: no input exceeds the tolerance
    EXCEEDED = "exceeded"  # a witness exceeds the tolerance
    UNDECIDED = "undecided"  # the tolerance lies inside the interval
    UNCOVERED = "uncovered"  # kernels of some layers may leave the interval, and nothing else was decided
    REPAIRED = "repaired"  # the repaired network's certificate meets the target
    NOT_REPAIRED = "not repaired"


@dataclass(frozen=True)
class Verdict:
    """One run's answer.

    Attributes:
        lower, upper: interval around the largest |y1 - y2| over all input stars and outputs.
        tolerance: what was asked for (a repair's target), or None.
        witness: (star, output) whose witness attains `lower`.
        claim: the answer; how: by what effort, in time as well.
    """

    state: State
    lower: float
    upper: float
    tolerance: float | None
    witness: tuple[int, int]
    claim: str
    how: str

    @property
    def text(self) -> str:
        """The answer in one line."""
        return f"{self.claim} ({self.how})"

    @property
    def ok(self) -> bool:
        """Whether the command line exits with status 0."""
        return self.state in (State.CERTIFIED, State.WITHIN, State.REPAIRED)

    @property
    def open(self) -> bool:
        """Whether neither yes nor no was shown."""
        return self.state in (State.UNDECIDED, State.UNCOVERED)


def compare_verdict(found: Discrepancy, tolerance: float | None = None) -> Verdict:
    """Verdict on a comparison, with or without a tolerance on max |y1 - y2|."""
    lower, upper = float(found.lower.max()), float(found.upper.max())
    star, output = divmod(int(found.lower.argmax()), found.lower.shape[1])
    bound = f"|y1 - y2| <= {at_most(upper)} for every input"
    if tolerance is not None and lower > tolerance:  # a witness counts whatever else is not covered
        state = State.EXCEEDED
        text = (
            f"exceeds tolerance {tolerance:g}: |y1 - y2| >= {at_least(lower)} at an input of star {star}, "
            f"output {output}"
        )
    elif found.uncovered:
        state = State.UNCOVERED
        text = f"not covered: {bound} holds for {found.kernels} alone; {uncovered(found)}"
    elif tolerance is None:
        state = State.CERTIFIED
        text = f"certified: {bound}, and {at_least(lower)} is attained"
    elif upper <= tolerance:
        state = State.WITHIN
        text = f"within tolerance {tolerance:g}: certified {bound}"
    else:
        state = State.UNDECIDED
        text = (
            f"undecided: max |y1 - y2| lies in [{at_least(lower)}, {at_most(upper)}], and so does the "
            f"tolerance {tolerance:g}{cures(found, tolerance)}"
        )
    return Verdict(state, lower, upper, tolerance, (star, output), text, effort(found))


def repair_verdict(result: RepairResult, target: float) -> Verdict:
    """Verdict on a repair: the kept network's certificate, beside the bound that was asked for."""
    kept = result.after
    after = compare_verdict(kept)
    before = at_most(float(result.before.upper.max()))
    text = f"{kept.claim} |y1 - y2| <= {at_most(after.upper)} for every input, target {target:.5g}, {before} before"
    how = f"{counted(result.history[-1].iteration, 'iteration')}, {result.method}; {effort(kept)}"
    if kept.uncovered:
        state, start, text = State.UNCOVERED, "not covered", f"{uncovered(kept)}; {text}"
    elif result.satisfied:
        state, start = State.REPAIRED, "repaired"
    else:
        state, start = State.NOT_REPAIRED, "target missed, closest network kept"
        least = 0.0 if result.least is None else float(result.least.max())
        text += f"; no last layer with these zeros gets below {at_least(least)}" if least > 0 else ""
    return Verdict(state, after.lower, after.upper, target, after.witness, f"{start}: {text}", how)


def uncovered(found: Discrepancy) -> str:
    """Which layers are not covered, and why; empty where all are."""
    if not found.uncovered:
        return ""
    names = ", ".join(found.uncovered)
    return f"kernels of {names} may compute other sums than {found.kernels}, and then give other codes"


def cures(found: Discrepancy, tolerance: float) -> str:
    """What may decide about `tolerance` on the stars whose interval contains it, "; "-led; empty if unknown."""
    reach = found.max_upper.double() > tolerance
    why = [reason for reason, above in zip(found.reasons, reach.tolist(), strict=False) if above]
    return "".join(f"; {cure}" for cure in dict.fromkeys(reason.cure for reason in why))


def effort(found: Discrepancy) -> str:
    """How the interval was obtained: semantics, kernels, status and why, pieces of work, seconds."""
    stats = found.stats
    parts = [_whole_status(found)]
    pieces = regions(found)
    if pieces is not None:
        parts.append(counted(pieces, found.semantics.piece))
    if stats.branches:
        parts.append(counted(stats.branches, "branch"))
    return f"{found.covers}: {', '.join(parts)}, {stats.seconds:.1f} s"


def work(found: Discrepancy) -> str:
    """Engine and counts of what was computed, in one line."""
    stats, pieces = found.stats, regions(found)
    parts = [stats.method, f"root bounds {stats.root_bounds}"]
    if pieces is not None:
        parts.append(counted(pieces, found.semantics.piece))
    for number, word in ((stats.splits, "split"), (stats.branches, "branch")):
        if number:
            parts.append(counted(number, word))
    if stats.linear_programs:
        parts.append(f"{counted(stats.linear_programs, 'linear program')} ({stats.output_programs:,} for outputs)")
    return f"{', '.join(parts)}, {stats.seconds:.1f} s"


def open_reasons(found: Discrepancy) -> dict[Reason, int]:
    """Why work ended on stars that are not EXACT, and on how many."""
    ends = zip(found.status, found.reasons, strict=False)
    return dict(Counter(reason for status, reason in ends if status is not Status.EXACT))


def _whole_status(found: Discrepancy) -> str:
    """The status where all stars have the same, with the reasons of those that are BOUNDED."""
    kinds = set(found.status)
    if kinds == {Status.EXACT}:
        return Status.EXACT.name
    if kinds == {Status.BOUNDED}:
        return _bounded(
            ", ".join(dict.fromkeys(found.reasons)), _met(float(found.lower.max()), float(found.upper.max()))
        )
    return ended(found.status, found.reasons)


def star_status(found: Discrepancy, s: int) -> str:
    """Status of star s with its reason, as every table shows it."""
    if found.status[s] is Status.EXACT:
        return Status.EXACT.name
    met = _met(float(found.max_lower[s]), float(found.max_upper[s]))
    return _bounded(found.reasons[s] if found.reasons else "", met)


def _bounded(why: str, met: bool) -> str:
    # the largest difference may be known although other outputs, or the other end of its range, are not
    return Status.BOUNDED.name + (f" ({why})" if why else "") + (", largest known" if met else "")


def _met(lower: float, upper: float) -> bool:
    return upper - lower <= MET * upper


def regions(found: Discrepancy) -> int | None:
    """Pieces of the set that were enumerated; None where those of a float network are not all of them."""
    count = int(found.regions.sum())
    if found.semantics.piece == "cell":
        return count or None
    whole = not found.stats.branches and bool((found.regions > 0).all())
    return count if whole and all(status is Status.EXACT for status in found.status) else None


def worst_first(lower: Tensor, upper: Tensor, tolerance: float | None) -> list[int]:
    """Order of intervals [K]: witnesses beyond the tolerance by what they attain, then the rest by its upper end."""
    beyond = torch.zeros_like(lower, dtype=torch.bool) if tolerance is None else lower > tolerance
    keys = zip(beyond.tolist(), torch.where(beyond, lower, upper).tolist(), strict=True)
    return [k for k, _ in sorted(enumerate(keys), key=lambda item: item[1], reverse=True)]
