"""What the searches share: their answer, the best witnesses so far, and when a question is closed.

A search maximises 2 N_out objectives over one box: y1 - y2 per output (row 0) and y2 - y1 (row 1).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.bounds.difference import Pair
from torchreach.errors import OptionError

GOALS = ("signed", "outputs", "largest")


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

    goal: "signed" (every objective on its own), "outputs" (max |y1 - y2| per output: of its two signs only the
        larger), "largest" (max over outputs of |y1 - y2|).
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
        return (lower + self.tolerance).clamp(min=self.threshold)


class Best:
    """Largest values met so far in one box [1, N_in], [2, N_out], and where [2, N_out, N_in]; grows by `offer`."""

    def __init__(self, pair: Pair, low: Tensor, high: Tensor, x: Tensor) -> None:
        """x: [B, N_in] first candidates, at least one."""
        self.pair, self.low, self.high = pair, low, high
        self.lower = torch.full((2, pair.outputs), -torch.inf, dtype=x.dtype, device=x.device)
        self.witness = low.expand(2, pair.outputs, -1).clone()
        self.offer(x)

    def offer(self, x: Tensor) -> None:
        """Replays candidates x [B, N_in]; what counts is the value less the replay's rounding."""
        if not len(x):
            return
        x = torch.minimum(torch.maximum(x, self.low), self.high)
        y, error = self.pair.evaluate(x)
        value, at = torch.stack((y - error, -y - error), 1).max(0)
        better = value > self.lower
        self.lower = torch.where(better, value, self.lower)
        self.witness = torch.where(better[..., None], x[at], self.witness)


def latest(states: Iterator[SearchResult], seconds: float | None = None) -> SearchResult:
    """Last state of a search that is closed, or whose wall-clock time is up; Ctrl-C also ends it with its answer.

    seconds: limit; it is looked at after every batch, of which at least one is finished.
    """
    start = time.monotonic()
    state = next(states)
    try:
        while not state.closed and (seconds is None or time.monotonic() - start < seconds):
            state = next(states, state)
    except KeyboardInterrupt:
        pass
    return state
