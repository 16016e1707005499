"""What the searches share: their question and answer, the set they search, and the best witnesses so far.

A search maximises 2 N_out objectives over one box: y1 - y2 per output (row 0) and y2 - y1 (row 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import OptionError
from torchreach.core.evidence import Evidence
from torchreach.core.memory import batch_size
from torchreach.core.roundoff import gamma
from torchreach.core.terms import Reason
from torchreach.domains.pair import Activate

NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 25}  # in the layers of points replayed between two looks at the clock
GOALS = ("signed", "outputs", "largest", "above")
# Certified upper bounds [B, 2, N_out] over boxes [B, N_in] (inf where it gave up, -inf where there is no such
# input), inputs [B, 2, N_out, N_in] that nearly attain them, and how many regions there were.
Finish = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]


@dataclass(frozen=True)
class SearchResult:
    """Certified intervals around the largest y1 - y2 (row 0) and y2 - y1 (row 1) over one box.

    Attributes:
        lower: [2, N_out] attained at `witness`, less the rounding of its replay; can be negative.
        upper: [2, N_out] certified; allowance for rounding included.
        witness: [2, N_out, N_in] in float64.
        branches: number of bounds of sub-problems taken so far.
        open: sub-problems that are left.
        closed: whether the goal is reached, to the tolerance or below the threshold.
    """

    lower: Tensor
    upper: Tensor
    witness: Tensor
    branches: int
    open: int
    closed: bool

    @property
    def max_lower(self) -> Tensor:
        """[N_out] largest |y1 - y2| attained, at least."""
        return self.lower.amax(0).clamp(min=0)

    @property
    def max_upper(self) -> Tensor:
        """[N_out] certified upper bound of |y1 - y2|."""
        return self.upper.amax(0).clamp(min=0)

    @property
    def max_witness(self) -> Tensor:
        """[N_out, N_in] inputs that attain `max_lower`."""
        rows = self.lower.argmax(0)
        return self.witness[rows, torch.arange(len(rows), device=rows.device)]


@dataclass(frozen=True)
class Question:
    """What a search must close.

    goal: "signed" (every objective on its own, but the larger sign of each output first), "outputs" (max |y1 - y2|
        per output: of its two signs only the larger), "largest" (max over outputs of |y1 - y2|), "above" (max over
        outputs of y1 - y2).
    tolerance: an objective is closed when its upper bound is this close to what is attained (absolute).
    threshold: it is also closed when its upper bound is at most this.
    """

    goal: str = "outputs"
    tolerance: float = 1e-6
    threshold: float = -torch.inf

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise OptionError(f"goal must be one of {', '.join(GOALS)}, got {self.goal!r}")
        if not self.tolerance > 0:
            raise OptionError(f"tolerance must be positive, got {self.tolerance!r}")

    def enough(self, lower: Tensor) -> Tensor:
        """[2, N_out] upper bounds that close the objectives, given what is attained [2, N_out]."""
        if self.goal == "outputs":
            lower = lower.amax(0).expand_as(lower)
        elif self.goal == "largest":
            lower = lower.amax().expand_as(lower)
        elif self.goal == "above":
            lower = lower[:1].amax().expand_as(lower)
        enough = (lower + self.tolerance).clamp(min=self.threshold)
        if self.goal == "above":
            enough[1] = torch.inf
        return enough

    def settled(self, lower: Tensor, upper: Tensor) -> Reason | None:
        """How the ends of |y1 - y2|, or of both signs, answer for the threshold; None where they do not."""
        if self.threshold > -torch.inf and float(upper.max()) <= self.threshold:
            return Reason.WITHIN
        return Reason.EXCEEDED if self.exceeded(lower) else None

    def exceeded(self, lower: Tensor) -> bool:
        """Whether what is attained exceeds the threshold."""
        return self.threshold > -torch.inf and float(lower.max()) > self.threshold

    def levels(self, lower: Tensor) -> list[Tensor]:
        """[2, N_out] upper bounds to get below first, second and so on, the last of them `enough`.

        What is largest over all outputs comes before the largest of each output, and that before what is left.
        """
        goals = ("largest", "outputs")
        first = {"signed": goals, "outputs": goals[:1]}.get(self.goal, ())
        return [*(replace(self, goal=goal).enough(lower) for goal in first), self.enough(lower)]


@dataclass(frozen=True)
class Constraints:
    """Half-spaces A x <= b that cut a box: A [P, N_in], b [P]; `inside` [N_in] is a point of the set.

    They are taken as they are, so that what shall hold on a set whose data are rounded needs b to be a little larger.
    """

    A: Tensor
    b: Tensor
    inside: Tensor

    def pull(self, x: Tensor) -> Tensor:
        """Points [B, N_in] moved towards `inside` until they satisfy the constraints."""
        pace = (x - self.inside) @ self.A.T
        room = (self.b - self.A @ self.inside).clamp(min=0)
        share = torch.where(pace > room, room / pace, 1.0).amin(1, keepdim=True)
        return self.inside + share * (x - self.inside)

    def miss(self, low: Tensor, high: Tensor) -> Tensor:
        """[B] whether a box [B, N_in] certainly holds no point of the set."""
        size = torch.maximum(low.abs(), high.abs()) @ self.A.abs().T
        least = (low @ self.A.clamp(min=0).T) + (high @ self.A.clamp(max=0).T)
        return (least - 4 * gamma(low.shape[1]) * (size + self.b.abs()) > self.b).any(1)


class Compared(Protocol):
    """Two networks whose difference is searched: a `Pair`, or `Both`."""

    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def features(self) -> int: ...
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def values(self, x: Tensor, activate: Activate) -> Tensor: ...


class Attained(Protocol):
    """What is attained so far, and who takes candidates for more: a `Best`."""

    @property
    def met(self) -> Evidence: ...
    def offer(self, x: Tensor) -> None:
        """Takes inputs [B, N_in] of the box that may attain more."""
        ...


class Best:
    """What is attained so far in one box [1, N_in]: evidence [2, N_out] at points [N_in]; grows by `offer`."""

    def __init__(
        self,
        compared: Compared,
        low: Tensor,
        high: Tensor,
        x: Tensor,
        constraints: Constraints | None = None,
        clock: Clock = NO_LIMIT,
    ) -> None:
        """x: [B, N_in] first candidates, at least one, the best first. clock: once it is over, few are replayed."""
        self.compared, self.low, self.high, self.constraints = compared, low, high, constraints
        self.met = Evidence(x.new_full((2, compared.outputs), torch.inf), low.expand(2, compared.outputs, -1))
        self.clock, self.size = clock, max(batch_size(NUMBERS, x.device) // compared.features, 1)
        self.offer(x)

    def offer(self, x: Tensor) -> None:
        """Replays candidates x [B, N_in]; what counts is the value less the replay's rounding."""
        if not len(x):
            return
        if self.constraints is not None:
            x = self.constraints.pull(x)
        x = torch.minimum(torch.maximum(x, self.low), self.high)
        for part in x.split(self.size):
            y, error = self.compared.evaluate(part)
            value, at = torch.stack((y - error, -y - error), 1).max(0)
            self.met.attain(value, part[at])
            if self.clock.over:
                break
