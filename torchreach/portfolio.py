"""Exact enumeration and branch and bound on one comparison of two networks, star by star.

Method: Enumeration is fastest where a star has few regions, branch and bound where it has many, and nobody knows
    before. Points of a star show how many regions it has at least: where most of them lie in regions of their own,
    the search goes first, else enumeration. Without a limit they then take turns, each turn `GROWTH` times as
    long as the one before, so that the whole takes at most a fixed multiple of what the better one takes alone;
    a budget of seconds is halved between them. What both certify is intersected.
Property: anytime. A star's interval is valid at any moment and only shrinks.
Requirement: branch and bound needs two networks of one architecture; others are enumerated, and the statistics say so.

Axis letters: S stars, N outputs; rows of [S, 2, N] are y1 - y2 and y2 - y1.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from torchreach.bounds.difference import Pair, difference_bounds
from torchreach.clock import first_interrupt
from torchreach.errors import ShapeError, UnsupportedLayerError
from torchreach.networks.merge import merge
from torchreach.networks.steps import Step, steps
from torchreach.options import Budget, Exact, Search
from torchreach.reach.api import EXACT_GAP, VERTEX_DIM, reach, replay
from torchreach.reach.memory import default_budget
from torchreach.results import Discrepancy, Progress, ProgressCallback, ReachResult, ReachStats, Status
from torchreach.search.result import Question, SearchResult
from torchreach.sets.star import StarBatch
from torchreach.star_search import StarSearch
from torchreach.tolerances import COMPUTE_DTYPE, Tolerances, round_down, round_up

log = logging.getLogger(__name__)

FIRST_SECONDS, GROWTH = 5.0, 4.0  # of a turn, without a budget of seconds
REPORT_SECONDS = 0.2
# Share of this many points of a star that lie in regions of their own, from which it is searched first: it has some
# ten thousand regions at least, or (linear programs are slower) some thousand.
POINTS = 2048
EASY = 0.02
APART = {"vertices": 0.95, "programs": 0.5}
# Batches are looked at by points up to this many stars, and numbers.
MOST_STARS, MOST_NUMBERS = 64, 2**25
ROOT_POINTS = 32


@torch.no_grad()
def compare(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    method: Exact | Search | None,
    question: Question,
    *,
    budget: Budget,
    tolerances: Tolerances,
    progress: ProgressCallback | None,
) -> Discrepancy:
    """The interval around y1 - y2 of every star, until `question` is answered on it or the budget is spent.

    method: None takes turns. Where `question` has a threshold, a star at whose witness it is exceeded is done too.

    Raises: as `merge` and `reach`.
    """
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"two networks are compared on a torchreach.StarBatch, got {type(stars).__name__}")
    with first_interrupt() as interrupted:
        run = _Run(original, compressed, stars, question, budget, tolerances, progress, interrupted)
        if isinstance(method, Exact):
            run.enumerate(method, budget.seconds, run.enumerable)
        elif run.fallback:
            if method is not None:
                log.warning("no branch and bound: %s; the regions are enumerated instead", run.fallback)
            run.enumerate(Exact(), budget.seconds, run.enumerable)
        elif method is not None:
            run.search(method, budget.seconds)
        else:
            run.take_turns()
    return run.result()


@dataclass
class _Run:
    """State of one comparison."""

    original: nn.Module
    compressed: nn.Module
    stars: StarBatch
    question: Question
    budget: Budget
    tolerances: Tolerances
    progress: ProgressCallback | None
    interrupted: list[int]
    pair: Pair | None = None
    fallback: str = ""
    methods: list[str] = field(default_factory=list)
    exact_stats: ReachStats | None = None
    searches: dict[int, StarSearch] = field(default_factory=dict)
    rooted: bool = False

    def __post_init__(self) -> None:
        self.began = self.reported = time.monotonic()
        stars = self.stars
        shape = None if len(stars.shape) == 1 else stars.shape
        self.merged = merge(self.original, self.compressed, shape)
        self.network: tuple[Step, ...] = steps(self.merged, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device)
        original, compressed = (
            steps(network, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device)
            for network in (self.original, self.compressed)
        )
        self.both = original, compressed
        try:
            Pair.check(original, compressed)
        except (ShapeError, UnsupportedLayerError) as error:
            self.fallback = str(error)
            log.info("no difference bounds: %s", error)
        size, n = len(stars), self.network[-1].features
        full = torch.full((size, 2, n), torch.inf, dtype=COMPUTE_DTYPE, device=stars.device)
        self.lower, self.upper = -full, full
        centre = stars.center[:, None, None]
        self.witness = centre.expand(size, 2, n, *stars.shape).clone()
        # what each method can still do something about; `enumerated`: to the end
        self.enumerable, self.searchable = (torch.ones_like(full[:, 0, 0], dtype=torch.bool) for _ in range(2))
        self.enumerated = ~self.enumerable
        self.count = torch.zeros(size, dtype=torch.long, device=stars.device)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def open(self, able: Tensor) -> list[int]:
        """Stars on which the question is not answered, of those in the mask `able` [S]."""
        return [s for s in able.nonzero().flatten().tolist() if not self.answered(s)]

    def answered(self, s: int) -> bool:
        """Whether star s needs no more work."""
        lower, upper = self.lower[s], self.upper[s]
        answered = (upper <= self.question.enough(lower)).all() or self._exceeded(lower)
        return bool(self.enumerated[s]) or bool(answered)

    def _exceeded(self, lower: Tensor) -> bool:
        return self.question.threshold > -torch.inf and float(lower.max()) > self.question.threshold

    # -- the two methods --------------------------------------------------------------------------------

    def take_turns(self) -> None:
        """Both methods in turn, until all stars are done or the budget is spent."""
        seconds, everything = self.budget.seconds, torch.ones_like(self.enumerated)
        # A tolerance or a threshold may be met long before the regions are enumerated.
        first = self._few_regions() if self.question == Question("signed") else []
        if seconds is not None or self.budget.stars is not None:
            for few in first:
                self.enumerate(self._engine(), seconds and (seconds - self.elapsed) / 2, few)
            self.search(Search(), seconds and seconds - self.elapsed)
            self.enumerate(self._engine(), seconds and seconds - self.elapsed, everything)
            return
        share = FIRST_SECONDS
        while not self.interrupted and (self.open(self.enumerable) or self.open(self.searchable)):
            for few in first:
                self.enumerate(self._engine(first=share == FIRST_SECONDS), share, few)
            self.search(Search(), share * len(self.open(self.searchable)))
            first = [everything]
            share *= GROWTH

    def _engine(self, *, first: bool = False) -> Exact:
        # auto_LiRPA costs seconds to load, which a short turn does not have.
        return Exact(root_bounds="zonotope" if first or self.stars.dim <= VERTEX_DIM else "auto")

    def enumerate(self, method: Exact, seconds: float | None, among: Tensor) -> None:
        """Exact reach of all open stars at once, of those in the mask `among` [S]."""
        open_ = self.open(self.enumerable & among)
        if not open_ or self.interrupted or (seconds is not None and seconds <= 0):
            return
        index = torch.tensor(open_, device=self.stars.device)
        found = reach(
            self.merged,
            self.stars.select(index),
            method,
            budget=Budget(seconds, self.budget.stars, self.budget.memory),
            tolerances=self.tolerances,
            keep_stars=False,
            progress=self.progress and (lambda p: self._report_exact(index, p)),
        )
        self._take_exact(index, found)
        # The clock ends no run before a tenth of its time: what is open then stays so.
        if seconds is None or found.stats.seconds < seconds / 10:
            self.enumerable[index] = False

    def search(self, options: Search, seconds: float | None) -> None:
        """Branch and bound on every open star in turn; each gets its share of the seconds."""
        open_ = self.open(self.searchable)
        if not open_ or self.interrupted:
            return
        if not self.rooted:
            self._root(open_)
            open_ = self.open(self.searchable)
        end = None if seconds is None else time.monotonic() + seconds
        for i, s in enumerate(open_):
            now = time.monotonic()
            if self.interrupted or (end is not None and now >= end):
                log.info("budget spent before the search of %d stars", len(open_) - i)
                return
            until = None if end is None else now + (end - now) / (len(open_) - i)
            work = self.searches.get(s) or self._start(s, options, len(open_))
            work.run(lambda state, s=s, until=until: self._enough(s, state, until))
            assert work.state is not None
            self._take_state(s, work.state)
            if work.over:
                self.searchable[s] = False
                # A witness that is rounded to the stars' dtype may attain a little less than was asked for.
                self.enumerable[s] &= not work.state.closed
                log.info("search of star %d ends with %d branches open", s, work.state.open)

    def _start(self, s: int, options: Search, stars: int) -> StarSearch:
        memory = self.budget.memory or default_budget(self.stars.device)
        work = StarSearch(
            self.original,
            self.compressed,
            self.stars.select([s]),
            self.question,
            options,
            memory=memory / stars,
            pair=self.pair,
        )
        self.searches[s] = work
        self._used(work.split)
        return work

    def _enough(self, s: int, state: SearchResult, until: float | None) -> bool:
        """Whether a star's search has to stop; reports progress."""
        now = time.monotonic()
        if self.progress is not None and now - self.reported >= REPORT_SECONDS:
            self._take_state(s, state)
            self._report(sum(work.state.branches for work in self.searches.values() if work.state), state.open)
        return bool(
            state.closed
            or self.interrupted
            or (until is not None and now >= until)
            or (self.budget.stars is not None and state.branches >= self.budget.stars)
            or self._exceeded(state.lower)
            or (state.upper <= self.question.enough(torch.maximum(self.lower[s], state.lower))).all()
        )

    def _root(self, open_: list[int]) -> None:
        """One pass over all open stars together, so that each has a valid interval however short the time."""
        self.rooted = True
        low, high, _ = self.stars.bounding_box()
        self.pair = Pair.of(*self.both, (low.amin(0), high.amax(0)))
        index = torch.tensor(open_, device=self.stars.device)
        stars = self.stars.select(index)
        low, high, _ = stars.bounding_box()
        output = difference_bounds(self.pair, low, high)[-1]
        self.upper[index] = torch.minimum(self.upper[index], torch.stack((output.du, -output.dl), 1))
        points = stars.sample(ROOT_POINTS).flatten(2)
        y, error = self.pair.evaluate(points.flatten(0, 1).to(COMPUTE_DTYPE))
        value = torch.stack((y - error, -y - error), 1).reshape(len(index), ROOT_POINTS, 2, -1)
        best, at = value.max(1)
        rows = torch.arange(len(index), device=index.device)[:, None, None]
        self._take(index, best, self.upper[index], points[rows, at].unflatten(3, self.stars.shape))

    def _few_regions(self) -> list[Tensor]:
        """Masks [S] of stars that may have few enough regions to enumerate, as far as their points show.

        The easiest come in a mask of their own, so that they do not wait for others of their batch.
        """
        size = self.stars.basis[0, 0].numel()
        if len(self.stars) > MOST_STARS or POINTS * size * len(self.stars) > MOST_NUMBERS:
            return [torch.ones_like(self.enumerated)]
        x = self.stars.sample(POINTS).flatten(2).to(COMPUTE_DTYPE)
        g = torch.Generator().manual_seed(0)
        key = torch.zeros_like(x[..., 0])
        for step in self.network[:-1]:
            assert step.relu is not None
            x = step.linear(x) + step.bias
            on = (x > 0) & step.relu
            key = key + on.to(x) @ torch.rand(step.features, generator=g, dtype=x.dtype).to(x.device)
            x = torch.where(on | ~step.relu, x, 0.0)
        key = key.sort(1).values
        apart = (key[:, 1:] != key[:, :-1]).double().mean(1)
        return [apart < EASY, apart < APART["vertices" if self.stars.dim <= VERTEX_DIM else "programs"]]

    # -- results ----------------------------------------------------------------------------------------

    def _take(self, index: Tensor, lower: Tensor, upper: Tensor, witness: Tensor) -> None:
        """Intersects with intervals [B, 2, N] of stars `index` [B]; witness [B, 2, N, *shape]."""
        better = lower > self.lower[index]
        shaped = better.reshape(*better.shape, *[1] * len(self.stars.shape))
        self.witness[index] = torch.where(shaped, witness.to(self.witness.dtype), self.witness[index])
        self.upper[index] = torch.minimum(self.upper[index], upper)
        # Both are certified, but for the rounding of attained values next to each other.
        self.lower[index] = torch.minimum(torch.where(better, lower, self.lower[index]), self.upper[index])

    def _take_exact(self, index: Tensor, found: ReachResult) -> None:
        self._used(found.stats.method)
        self.exact_stats = _together(self.exact_stats, found.stats)
        lower, upper = (found.attained_upper, -found.attained_lower), (found.upper, -found.lower)
        lower, upper = (torch.stack(part, 1).to(COMPUTE_DTYPE) for part in (lower, upper))
        self._take(index, lower, upper, torch.stack((found.argmax, found.argmin), 1))
        self.count[index] = torch.maximum(self.count[index], found.count)
        done = [status is Status.EXACT for status in found.status]
        self.enumerated[index] = torch.tensor(done, device=index.device)

    def _take_state(self, s: int, state: SearchResult) -> None:
        """The witnesses are rounded to the stars' dtype and replayed there."""
        witness = self.searches[s].space.features(state.witness).to(self.witness.dtype)
        value, error = replay(self.network, witness.flatten(0, 1))
        n = value.shape[1]
        value, error = (part.reshape(2, n, n).diagonal(dim1=1, dim2=2) for part in (value, error))
        value = torch.stack((value[0] - error[0], -value[1] - error[1]))
        self._take(torch.tensor([s], device=value.device), value[None], state.upper[None], witness[None])

    def _used(self, method: str) -> None:
        if method not in self.methods:
            self.methods.append(method)

    def _report_exact(self, index: Tensor, progress: Progress) -> None:
        assert self.progress is not None
        lower, upper = self.lower.clone(), self.upper.clone()
        met = torch.stack((progress.attained_upper, -progress.attained_lower), 1)
        lower[index] = torch.maximum(lower[index], met)
        upper[index] = torch.minimum(upper[index], torch.stack((progress.upper, -progress.lower), 1))
        self.progress(self._progress(lower, upper, progress.done, progress.open))

    def _report(self, done: int, open_: int) -> None:
        assert self.progress is not None
        self.reported = time.monotonic()
        self.progress(self._progress(self.lower, self.upper, done, open_))

    def _progress(self, lower: Tensor, upper: Tensor, done: int, open_: int) -> Progress:
        return Progress(done, open_, -upper[:, 1], upper[:, 0], -lower[:, 1], lower[:, 0], self.elapsed)

    def result(self) -> Discrepancy:
        dtype = self.stars.dtype
        upper, lower = round_up(self.upper, dtype), round_down(self.lower, dtype)
        gap = EXACT_GAP[dtype] * (1 + torch.maximum(self.upper.abs(), self.upper.flip(1).abs()))
        exact = self.enumerated | (self.upper - self.lower <= gap).flatten(1).all(1)
        above, below = lower.unbind(1)
        use_above = above >= below
        mask = use_above.reshape(*use_above.shape, *[1] * len(self.stars.shape))
        layers, root, programs = (), "difference", 0
        if self.exact_stats is not None:
            layers, root = self.exact_stats.layers, self.exact_stats.root_bounds
            programs = self.exact_stats.output_programs
        return Discrepancy(
            lower=torch.maximum(above, below).clamp(min=0),
            upper=upper.amax(1).clamp(min=0),
            range_lower=-upper[:, 1],
            range_upper=upper[:, 0],
            witness=torch.where(mask, self.witness[:, 0], self.witness[:, 1]),
            regions=self.count,
            status=tuple(Status.EXACT if ok else Status.BOUNDED for ok in exact.tolist()),
            stats=ReachStats(
                layers=layers,
                method=" + ".join(self.methods) or "difference bounds",
                root_bounds=root,
                seconds=self.elapsed,
                output_programs=programs,
                branches=sum(work.state.branches for work in self.searches.values() if work.state),
                fallback=self.fallback,
            ),
        )


def _together(one: ReachStats | None, other: ReachStats) -> ReachStats:
    """The work of two runs on one network, layer by layer."""
    if one is None:
        return other
    layers = tuple(
        replace(
            b,
            stars=a.stars + b.stars,
            splits=a.splits + b.splits,
            linear_programs=a.linear_programs + b.linear_programs,
            settled={name: a.settled.get(name, 0) + b.settled.get(name, 0) for name in {**a.settled, **b.settled}},
        )
        for a, b in zip(one.layers, other.layers, strict=True)
    )
    return replace(other, layers=layers, output_programs=one.output_programs + other.output_programs)
