"""Branch and bound by input splitting, for boxes of few dimensions.

Method: best first, in batches; a box is bounded by `quick_bounds`, which renews the bounds of every layer on it,
    and halved along the input that matters most: its width times the sum of its shares in the first layer's
    undecided neurons and in the objectives' coefficients on the input. A box with few undecided neurons is given to
    `finish`, if there is one (exact enumeration: a small box has fewer regions than bounding its halves costs).
Property: anytime; every state is certified, and its interval lies in the one before.
Requirement: effort grows exponentially in the number of inputs whose width matters (up to about 8).
Reference: ReluDiff and NeuroDiff (Paulsen et al. 2020) split inputs in the same question.

Axis letters: B boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.errors import ShapeError
from torchreach.domains.difference import CHUNK, checked_boxes, difference_bounds, quick_bounds
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.pair import Pair
from torchreach.search.best_first import best_first, largest, largest_excess
from torchreach.search.result import Best, Constraints, Finish, Question, SearchResult
from torchreach.search.witness import ascend

# Undecided neurons of a box that `finish` takes. Measured on pairs of 300 neurons each with 5 inputs: up to a thousand
# regions, which are enumerated in the time that bounding the two halves takes. Fewer where a threshold is asked for:
# a bound of a half is then often enough, and exact values are rarely needed.
FEW, FEW_AT_THRESHOLD = 40, 12
# Copies of the open boxes that one round holds at most.
COPIES = 3
WORKING = 96  # copies of one layer's coefficients that bounding boxes holds at most, and that the allocator keeps


@torch.no_grad()
def search_boxes(
    pair: Pair,
    lower: Tensor,
    upper: Tensor,
    question: Question | None = None,
    *,
    constraints: Constraints | None = None,
    finish: Finish | None = None,
    memory: float = torch.inf,
    batch: int = 64,
    starts: int = 8,
    seed: int = 0,
    root: tuple[Hexagon, ...] | None = None,
    clock: Clock = NO_LIMIT,
) -> Iterator[SearchResult]:
    """States of a search over one box lower <= x <= upper [N_in], one per batch; it ends with a closed one.

    Args:
        constraints: the part of the box that counts; witnesses lie in it.
        finish: bounds boxes of few undecided neurons (`FEW`), instead of halving them.
        memory: bytes of open boxes beyond which it ends, open, instead of halving more.
        batch: boxes halved at a time. starts, seed: of the witness search that comes first (`ascend`).
        root: `difference_bounds` of the box, where they are at hand.
        clock: looked at in every chunk of boxes; when it is over, the state so far is the last one. OutOfTime only at
            the first state, and only without `root`.

    Raises: as `difference_bounds`, at the first state.
    """
    question = question or Question()
    low, high = one_box(pair, lower, upper)
    output = (difference_bounds(pair, low, high, clock=clock, memory=memory / 2) if root is None else root)[-1]
    best = ascend(pair, low, high, constraints, starts=starts, seed=seed, clock=clock)
    caps = torch.stack((output.du, -output.dl), 1)
    work = _Work(pair, best, question, constraints, finish, clock, memory)
    try:
        left = work.bounded(low, high, caps)
    except OutOfTime:
        yield SearchResult(best.lower, torch.maximum(caps[0], best.lower), best.witness, 1, 1, False)
        return

    def divide(old: Boxes) -> Boxes:
        return work.bounded(*_halves(old.low, old.high, old.split), old.value.repeat(2, 1, 1))

    def full(left: Boxes) -> bool:
        return left.bytes * COPIES > memory or clock.over

    for state in best_first(left, divide, question, lambda: best.lower, batch=batch, full=full):
        yield SearchResult(best.lower, state.upper, best.witness, state.branches, state.open, state.closed)


@dataclass(frozen=True)
class Boxes:
    """Open boxes [B, N_in], their bounds [B, 2, N_out], and the input [B] to halve."""

    low: Tensor
    high: Tensor
    value: Tensor
    split: Tensor

    def __len__(self) -> int:
        return len(self.value)

    @property
    def more(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.bool, device=self.value.device)

    def excess(self, level: Tensor) -> Tensor:
        return largest_excess(self.value, level)

    def top(self, like: Tensor) -> Tensor:
        return largest(self.value, like)

    def parts(self) -> tuple[Tensor, ...]:
        return self.low, self.high, self.value, self.split

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts())

    def select(self, index: Tensor) -> Boxes:
        return Boxes(*(part[index] for part in self.parts()))

    def join(self, other: Boxes) -> Boxes:
        return Boxes(*map(torch.cat, zip(self.parts(), other.parts(), strict=True)))


@dataclass(frozen=True)
class _Work:
    """What bounding a batch of boxes needs."""

    pair: Pair
    best: Best
    question: Question
    constraints: Constraints | None
    finish: Finish | None
    clock: Clock
    memory: float

    def bounded(self, low: Tensor, high: Tensor, caps: Tensor) -> Boxes:
        """Boxes with bounds, at most `caps`; offers corners and centres to `best`. OutOfTime with the clock."""
        width = self.pair.widest
        limit = max(int(min(CHUNK, self.memory / (8 * WORKING)) // (4 * width * width)), 1)
        parts = [self._chunk(*part) for part in zip(*(x.split(limit) for x in (low, high, caps)), strict=True)]
        return Boxes(*map(torch.cat, zip(*(part.parts() for part in parts), strict=True)))

    def _chunk(self, low: Tensor, high: Tensor, caps: Tensor) -> Boxes:
        self.clock.check()
        best = self.best
        hexagons, value, x = quick_bounds(self.pair, low, high, clock=self.clock)
        value = torch.minimum(value, caps)
        if self.constraints is not None:
            value[self.constraints.miss(low, high)] = -torch.inf
        rows = (value - self.question.enough(best.lower)).flatten(1).argmax(1)
        x = x.flatten(1, 2)
        corner = torch.where(x[torch.arange(len(x), device=x.device), rows] > 0, high, low)
        best.offer(torch.cat((corner, low + (high - low) / 2)))
        open_, undecided = torch.zeros_like(low), torch.zeros_like(rows)
        if hexagons:
            first = hexagons[0]
            open_ = self.pair.maps[0].influence(torch.where(self.pair.open(0, first), first.u1 - first.l1, 0.0))
            undecided = torch.stack([self.pair.open(k, h).sum(1) for k, h in enumerate(hexagons)]).sum(0)
        if self.finish is not None:
            alive = (value > self.question.enough(best.lower)).flatten(1).any(1)
            most = FEW if self.question.threshold == -torch.inf else FEW_AT_THRESHOLD
            few = (alive & (undecided <= most)).nonzero().flatten()
            if len(few):
                found, points = self.finish(low[few], high[few])
                best.offer(points.flatten(0, 2))
                value[few] = torch.minimum(value[few], found)
        shares = [part / part.sum(1, keepdim=True).clamp(min=1e-300) for part in (open_, x.abs().amax(1))]
        return Boxes(low, high, value, ((shares[0] + shares[1]) * (high - low)).argmax(1))


def one_box(pair: Pair, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """One box [N_in] as a checked batch [1, N_in]."""
    if lower.ndim != 1 or upper.ndim != 1:
        raise ShapeError(
            f"a search takes one box, lower and upper of shape [{pair.inputs}]; "
            f"got {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    return checked_boxes(pair, lower[None], upper[None])


def _halves(low: Tensor, high: Tensor, split: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of boxes [B, N_in]: [2 B, N_in], the lower ones first. They share the middle, so nothing is lost."""
    at = split[:, None]
    middle = low.gather(1, at) + (high.gather(1, at) - low.gather(1, at)) / 2
    return torch.cat((low, low.scatter(1, at, middle))), torch.cat((high.scatter(1, at, middle), high))
