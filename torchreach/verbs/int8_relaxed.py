"""Relaxations of one star of a deployed comparison: by a single pass, then by branch and bound on signs and codes.

Rounding is noise at first (`domains.rounding.relax`). Where neurons take few codes staircases are tighter
(`domains.stairs`), and each branch dearer: the search is that whose root is the lower.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.evidence import Evidence
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.pair import Pair
from torchreach.domains.relaxed_difference import RelaxedDifference, relaxation_bytes, rounded_bounds
from torchreach.graph.steps import Step
from torchreach.search.result import Question, SearchResult
from torchreach.search.signs import search_signs
from torchreach.verbs.int8_compared import Compared

log = logging.getLogger(__name__)

STATES = 8  # of a search without a budget of seconds
LOWER = 0.99  # the root of staircases must be below this share of the other


class Star(Protocol):
    """What a relaxation needs of a star, and what it tells it: see `int8_star.DeployedStar`."""

    networks: Compared
    points: Tensor | None
    evidence: Evidence
    question: Question
    clock: Clock
    memory: float
    numbers: int
    seed: int
    branches: int
    spent: bool
    looked_at: bool
    fallback: str

    @property
    def varied(self) -> tuple[tuple[Step, ...], tuple[Step, ...], Tensor]: ...
    @property
    def room(self) -> bool: ...
    @property
    def limit(self) -> float: ...
    def offer(self, x: Tensor) -> None: ...
    def ascend(self, *, longer: bool = False) -> None: ...


def relaxed_states(star: Star, low: Tensor, high: Tensor, grid: InputGrid | None, *, search: bool) -> Iterator[Tensor]:
    """Bounds [2, N_out] over a box [M] from the relaxation: of a single pass, then tighter ones of a search.

    None at all where there is no memory for it. Raises OutOfTime where there is no time.
    """
    first, second, _ = star.varied
    if not star.room:
        upper = None if grid is None else rounded_bounds(first, second, low, high, star.clock)
        if upper is not None:
            yield upper
        star.spent = True
        star.fallback = f"a relaxation needs {relaxation_bytes(first, second, star.numbers) / 1e9:.2g} GB of memory"
        return
    try:
        relaxed = RelaxedDifference.of(first, second, low, high, grid, clock=star.clock)
    except UnsupportedLayerError as error:
        star.fallback = str(error)
        log.info("no relaxation: %s", error)
        return
    if not star.looked_at:  # the first box is the whole one
        star.looked_at = True
        for network, names in zip(star.networks.executed, relaxed.saturable, strict=True):
            network.saturable.update(names)
    yield relaxed.upper
    if search and relaxed.pair is not None and relaxed.pair.depth > 1:  # of linear ones a single pass is exact
        for state in _better(star, relaxed, len(low)):
            yield relaxed.clamped(state.upper)


def _better(star: Star, relaxed: RelaxedDifference, inputs: int) -> Iterator[SearchResult]:
    """States of the search by noise or by staircases, and of the other its root."""
    assert relaxed.pair is not None
    pair, root, stairs = relaxed.staircases()
    ends, met = (relaxed.low, relaxed.high, star.clock), _Met(star, inputs)
    noise = sign_states(star, relaxed.pair, *ends, root=relaxed.root, best=met)
    other = sign_states(star, pair, *ends, root=root, stairs=stairs, best=met)
    roots = []
    for states in (noise, other):
        state = next(states, None)
        if state is None:
            return
        roots.append(state.upper.amax())
        yield state
    star.ascend(longer=True)  # what is attained ends branches
    yield from other if bool(roots[1] < LOWER * roots[0]) else noise


def sign_states(star: Star, pair: Pair, low: Tensor, high: Tensor, clock: Clock, **options) -> Iterator[SearchResult]:
    """States of a search until the clock is over, or a few of them."""
    if pair.depth == 1:
        return  # linear: a single pass is exact
    question = replace(star.question, tolerance=max(star.question.tolerance, 1e-6))
    states = search_signs(pair, low, high, question, memory=star.memory / 2, seed=star.seed, clock=clock, **options)
    seen = 0
    for count, state in enumerate(states):
        star.branches += state.branches - seen
        seen = state.branches
        yield state
        full = star.branches >= star.limit
        star.spent |= full
        if clock.over or full or state.closed or (not clock.limited and count + 1 >= STATES):
            return


class _Met:
    """What a star attains, for a search of its relaxation: the inputs of that begin with ours."""

    def __init__(self, star: Star, inputs: int) -> None:
        self.star, self.inputs = star, inputs

    @property
    def met(self) -> Evidence:
        return self.star.evidence

    def offer(self, x: Tensor) -> None:
        if self.star.points is None:  # else the box is more than the star
            self.star.offer(x[:, : self.inputs])
