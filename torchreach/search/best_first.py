"""The one best-first loop of branch and bound: over boxes, signs of neurons, and parts of a network's input grid.

Property: anytime. Whatever is dropped keeps its bound, so that at every state the largest bound of all sub-problems
that were made and not divided holds for the whole.

Axis letters: B open sub-problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from torchreach.core.clock import OutOfTime
from torchreach.core.evidence import Evidence
from torchreach.search.result import Question, SearchResult


class Open(Protocol):
    """Sub-problems [B], each with upper bounds of one objective or of all [2, N_out]."""

    @property
    def more(self) -> Tensor:
        """[B] whether it can be divided further."""
        ...

    def __len__(self) -> int: ...

    def excess(self, level: Tensor) -> Tensor:
        """[B] by how much the largest of its bounds exceeds level [2, N_out]; not positive where none does."""
        ...

    def top(self, like: Tensor) -> Tensor:
        """[2, N_out] largest bound of each objective; -inf where there is none. like: [2, N_out]."""
        ...

    def select(self, index: Tensor) -> Self: ...
    def join(self, other: Any) -> Self: ...


Work = TypeVar("Work", bound=Open)


@dataclass
class Tree:
    """What a search has open and has learned, written before each of its states: another search can go on from it.

    left: the open sub-problems; None before there are any. finished: [2, N_out] largest bounds of those that are done.
    branches: as of a `SearchResult`. lower, witness: what is attained, and where. learned: plain data, of whoever
    divides. root: bounds that the sub-problems are parts of.
    """

    left: Any = None
    finished: Tensor | None = None
    branches: int = 0
    lower: Tensor | None = None
    witness: Tensor | None = None
    learned: Any = None
    root: Any = None

    def attained(self, met: Evidence) -> None:
        """Puts what was attained into `met`."""
        assert self.lower is not None
        assert self.witness is not None
        met.lower, met.witness = self.lower, self.witness


def best_first(
    left: Work,
    divide: Callable[[Work], Work],
    question: Question,
    evidence: Evidence,
    *,
    full: Callable[[Work], bool],
    batch: Callable[[Work, Tensor], int] = lambda *_: 1,
    tree: Tree | None = None,
    learned: Callable[[], Any] = lambda: None,
) -> Iterator[SearchResult]:
    """States of a search, one per batch; it ends with nothing open, when `full`, or when `divide` raises OutOfTime.

    left: the root, bounded. divide: bounded parts that cover what it is given. evidence: what is attained [2, N_out],
    which `divide` may add to. full: whether the open sub-problems are as many as there may be, or the time is over.
    batch: how many of the open ones to divide at a time, given by how much each exceeds what is asked first.
    tree: kept up to date, with what `learned` gives; where it has open sub-problems, `left` are these.
    """
    finished, branches = torch.full_like(evidence.lower, -torch.inf), len(left)
    if tree is not None and tree.finished is not None:
        finished, branches = tree.finished, tree.branches
    while True:
        met = evidence.lower
        enough = question.enough(met)
        alive = left.more & (left.excess(enough) > 0)
        finished = torch.maximum(finished, left.select(~alive).top(met))
        left = left.select(alive)
        upper = torch.maximum(torch.maximum(finished, left.top(met)), met)
        if tree is not None:
            tree.left, tree.finished, tree.branches, tree.learned = left, finished, branches, learned()
            tree.lower, tree.witness = met, evidence.witness
        yield SearchResult(met, upper, evidence.witness, branches, len(left), bool((upper <= enough).all()))
        if not len(left) or full(left):
            return
        # All that are left exceed the last level.
        excess = next(part for part in map(left.excess, question.levels(met)) if bool((part > 0).any()))
        chosen = excess.topk(min(batch(left, excess), len(left))).indices
        rest = torch.ones(len(left), dtype=torch.bool, device=excess.device)
        rest[chosen] = False
        try:
            new = divide(left.select(chosen))
        except OutOfTime:
            return  # the state before this round holds
        left = left.select(rest).join(new)
        branches += len(new)


def largest_excess(value: Tensor, level: Tensor) -> Tensor:
    """`Open.excess` of bounds [B, 2, N_out]."""
    return torch.where(value > level, value - level, -torch.inf).amax((1, 2))


def largest(value: Tensor, like: Tensor) -> Tensor:
    """`Open.top` of bounds [B, 2, N_out]."""
    return torch.cat((value, torch.full_like(like, -torch.inf)[None])).amax(0)
