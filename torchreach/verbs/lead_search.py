"""The largest lead that an output of one network has over a label, on one star: the search behind `equivalent`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from torchreach.core.clock import Clock, OutOfTime
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.memory import default_budget
from torchreach.core.options import Budget, Exact, Search
from torchreach.core.roundoff import ball
from torchreach.core.terms import Status
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.domains.zonotope import interval_bounds
from torchreach.read.steps import steps
from torchreach.search.result import Question, SearchResult
from torchreach.sets.star import StarBatch
from torchreach.verbs.reach import reach_within, replay
from torchreach.verbs.star_search import StarSearch

log = logging.getLogger(__name__)

# Closes once a lead is certainly negative.
NEGATIVE = -torch.finfo(COMPUTE_DTYPE).tiny


class LeadSearch:
    """The largest lead over a label in one network on one star: an interval, and an input that attains its lower end.

    margin: no more is asked about a lead than whether it certainly stays below -margin.
    """

    def __init__(self, lead: nn.Module, star: StarBatch, margin: float, budget: Budget, clock: Clock) -> None:
        self.lead, self.star, self.margin, self.budget, self.clock = lead, star, margin, budget, clock
        self.compared = steps(lead, star.shape, dtype=COMPUTE_DTYPE, device=star.device, smooth=True)
        self.lower, self.upper, self.x = -math.inf, math.inf, star.center[0]
        self.work: StarSearch | None = None
        self.open = True  # whether more time may tell more

    @property
    def branches(self) -> int:
        return 0 if self.work is None or self.work.state is None else self.work.state.branches

    def run(self, turn: Clock, report: Callable[[SearchResult], None]) -> None:
        """Goes on until it is answered, or `turn` is over."""
        memory = self.budget.memory or default_budget(self.star.device)
        try:
            if self.work is None:
                question = Question("above", threshold=NEGATIVE - self.margin)
                self.work = StarSearch(self.lead, None, self.star, question, Search(), memory=memory, clock=self.clock)
            self.work.run(lambda state: self._enough(state, turn, report))
        except UnsupportedLayerError as error:
            log.info("no difference bounds: %s", error)
            limits = Budget(stars=self.budget.stars, memory=self.budget.memory)
            found = reach_within(turn, self.lead, self.star, Exact(), budget=limits, keep_stars=False)
            at = int(found.attained_upper[0].argmax())
            self.lower, self.upper = float(found.attained_upper.max()), float(found.upper.max())
            self.x, self.open = found.argmax[0, at], found.status[0] is not Status.EXACT
            return
        except OutOfTime:
            low, high, _ = self.star.bounding_box()
            middle, radius = ball(low, high)
            self.upper = float(interval_bounds(self.compared, middle[:, None], radius)[-1][1].max())
            self.open = False
            return
        state = self.work.state
        assert state is not None
        self.open = not self.work.over and not self._answered(state) and not self._spent(state)
        self.x = self.work.space.features(state.witness[0, state.lower[0].argmax()]).to(self.star.dtype)
        y, error = replay(self.compared, self.x[None])
        self.lower, self.upper = float((y - error).max()), float(state.upper[0].max())

    def _enough(self, state: SearchResult, turn: Clock, report: Callable[[SearchResult], None]) -> bool:
        """Whether the search has to stop; reports progress."""
        report(state)
        return turn.over or self._spent(state) or self._answered(state)

    def _spent(self, state: SearchResult) -> bool:
        return self.budget.stars is not None and state.branches >= self.budget.stars

    def _answered(self, state: SearchResult) -> bool:
        return state.closed or float(state.lower[0].max()) >= -self.margin
