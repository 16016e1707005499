"""Exact enumeration and branch and bound on one comparison of two networks, star by star.

Method: Enumeration is fastest where a star has few regions, branch and bound where it has many, and nobody knows
    before. Points of a star show how many regions it has at least: where most of them lie in regions of their own,
    the search goes first, else enumeration. Without a limit they then take turns, each turn `GROWTH` times as
    long as the one before, so that the whole takes at most a fixed multiple of what the better one takes alone;
    a budget of seconds is halved between them. What both certify is intersected.
Property: anytime. A star's interval is valid at any moment and only shrinks: interval arithmetic and a first look for
    witnesses come before everything else, and one clock, handed down to every loop, ends the rest.
Networks of two architectures have no difference coordinates: they are bounded jointly, and searched by their inputs.

Axis letters: S stars, N outputs; rows of [S, 2, N] are y1 - y2 and y2 - y1.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime, Watch
from torchreach.core.errors import ShapeError
from torchreach.core.evidence import Evidence, reason
from torchreach.core.memory import default_budget
from torchreach.core.options import Budget, Exact, Search
from torchreach.core.results import Discrepancy, Progress, ProgressCallback, ReachResult, ReachStats, Reason, Status
from torchreach.core.roundoff import ball
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.domains.box_difference import FirstBounds, first_bounds
from torchreach.domains.difference import interval_difference
from torchreach.domains.joint import Both
from torchreach.domains.pair import Pair, identical
from torchreach.domains.zonotope import interval_bounds
from torchreach.engines.tally import added
from torchreach.read.steps import steps
from torchreach.search.result import Question, SearchResult
from torchreach.sets.star import StarBatch
from torchreach.verbs.first_look import Places, first_look, regions_apart, undecided
from torchreach.verbs.merge import merge
from torchreach.verbs.reach import EXACT_GAP, VERTEX_DIM, reach_within, replay
from torchreach.verbs.star_search import StarSearch
from torchreach.work.cluster import Cluster

log = logging.getLogger(__name__)

FIRST_SECONDS, GROWTH = 5.0, 4.0  # of a turn, without a budget of seconds
REPORT_SECONDS = 0.2
LOOK = 0.1  # share of the time that the first ascent takes at most
# Share of this many points of a star that lie in regions of their own, from which it is searched first: it has some
# ten thousand regions at least, or (linear programs are slower) some thousand.
POINTS, POINT_NUMBERS = 2048, 2**22  # fewer of large networks
EASY = 0.02
# Gap asked for, as a share of what is attained, up to which it is as good as asking for the exact range.
FINE = 1e-2
APART = {"vertices": 0.95, "programs": 0.5}
# Points of more variables than this lie all near the middle and see few regions; there are about 2^n of n neurons that
# are undecided in either network. 20 in both together were seen to have two thousand, 54 more than can be counted.
WIDE, UNDECIDED = 64, 36
# Batches are looked at by points up to this many stars, and numbers.
MOST_STARS, MOST_NUMBERS = 64, 2**25
# Stars that are bounded at a time at the root, and numbers in all root bounds that are kept for the searches.
ROOT_STARS, ROOT_NUMBERS = 16, 2**22


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
    clock: Clock,
    files: Checkpoint | None = None,
    cluster: Cluster | None = None,
) -> Discrepancy:
    """The interval around y1 - y2 of every star, until `question` is answered on it or the budget is spent.

    method: None takes turns. Where `question` has a threshold, a star at whose witness it is exceeded is done too.
    clock: when to stop (and not `budget.seconds`). files: where snapshots of the work go, and from which it goes on.
    cluster: where regions are enumerated.

    Raises: as `merge` and `reach`.
    """
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"two networks are compared on a torchreach.StarBatch, got {type(stars).__name__}")
    smooth = not isinstance(method, Exact)
    run = _Run(original, compressed, stars, question, budget, tolerances, progress, clock, smooth, files, cluster)
    run.everything = isinstance(method, Exact) and question == Question("signed")
    if isinstance(method, Exact):
        run.enumerate(method, None, run.enumerable)
    elif method is not None:
        run.search(method, None)
    else:
        run.take_turns()
    return run.result()


@torch.no_grad()
def bounded_once(original: nn.Module, compressed: nn.Module, stars: StarBatch, clock: Clock) -> Discrepancy:
    """The interval of one pass, before anything is split or searched, and of a first look. Raises: as `compare`."""
    run = _Run(original, compressed, stars, Question("signed"), Budget(), Tolerances(), None, clock, smooth=True)
    run.bound()
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
    clock: Clock
    smooth: bool  # whether smooth activations will do
    files: Checkpoint | None = None
    cluster: Cluster | None = None
    compared: Both | None = None
    roots: dict[int, FirstBounds] = field(default_factory=dict)
    methods: list[str] = field(default_factory=list)
    exact_stats: ReachStats | None = None
    searches: dict[int, StarSearch] = field(default_factory=dict)
    rooted: bool = False
    everything: bool = False  # whether all regions are asked for, whatever is known without them

    def __post_init__(self) -> None:
        self.reported, stars = -torch.inf, self.stars
        self.merged = merge(self.original, self.compressed, stars.shape)
        self.network, original, compressed = (
            steps(network, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device, smooth=self.smooth)
            for network in (self.merged, self.original, self.compressed)
        )
        self.both = original, compressed
        self.memory = self.budget.memory or default_budget(stars.device)
        curves = any(step.curves for step in self.network)
        size, n = len(stars), self.network[-1].features
        full = torch.full((size, 2, n), torch.inf, dtype=COMPUTE_DTYPE, device=stars.device)
        witness = torch.zeros(size, 2, n, *stars.shape, dtype=stars.dtype, device=stars.device)
        self.evidence = Evidence(full, witness)
        # what each method can still do something about; `enumerated`: to the end
        self.searchable = torch.ones_like(full[:, 0, 0], dtype=torch.bool)
        self.enumerable, self.enumerated = self.searchable & (not curves), ~self.searchable
        self.count = torch.zeros(size, dtype=torch.long, device=stars.device)
        self.spent = torch.zeros_like(self.enumerated)  # stars that a limit of the budget, not the clock, ended
        self.ticking = self.clock.part(None, Watch(self.clock, self._tick))
        self._start()

    def _start(self) -> None:
        """What no budget is too short for: intervals, and inputs that attain something."""
        low, high, plain = self.stars.bounding_box()
        self.box = low, high
        middle, radius = ball(low, high)
        below, above = interval_bounds(self.network, middle[:, None], radius)[-1]
        self.evidence.certify(torch.stack((above, -below), 1))
        self.places = Places.of(self.stars, low, high, plain)
        points = first_look(self.network, self.places, self.clock.share(LOOK))
        everyone = torch.arange(len(low), device=low.device)
        if len(self.network) == 1:  # linear: the root is as cheap, and exact on boxes
            self._root(everyone.tolist(), NO_LIMIT)
        self.evidence.witness[:] = points[:, :1, None]
        for index in everyone.split(max(2**22 // (points[0].numel() + 1), 1)):
            self._attain(index, points[index])
        if identical(*self.both):
            zero = torch.zeros_like(self.evidence.upper)
            self.evidence.certify(zero)
            self.evidence.attain(zero, self.evidence.witness)
        self._report(0, len(self.stars))

    def _attain(self, index: Tensor, points: Tensor) -> None:
        """Replays inputs [B, K, *shape] of stars `index` [B]."""
        size, count = points.shape[:2]
        value, error = (part.reshape(size, count, -1) for part in replay(self.network, points.flatten(0, 1)))
        best, at = torch.stack((value - error, -value - error), 2).max(1)
        rows = torch.arange(size, device=points.device)[:, None, None]
        self._take(index, best, self.evidence.upper[index], points[rows, at])

    def open(self, able: Tensor) -> list[int]:
        """Stars on which the question is not answered, of those in the mask `able` [S]."""
        return [s for s in able.nonzero().flatten().tolist() if not self.answered(s)]

    def answered(self, s: int) -> bool:
        """Whether star s needs no more work."""
        lower, upper = self.evidence.lower[s], self.evidence.upper[s]
        answered = bool((upper <= self.question.enough(lower)).all()) or self.question.exceeded(lower)
        return bool(self.enumerated[s]) or (answered and not self.everything)

    # -- the two methods --------------------------------------------------------------------------------

    def take_turns(self) -> None:
        """Both methods in turn, until all stars are done or the budget is spent."""
        clock, everything = self.clock, torch.ones_like(self.enumerated)
        # A threshold, or a wide gap, may be met long before the regions are enumerated.
        fine = self.question.tolerance <= FINE * float(self.evidence.lower.max())
        exactly = self.question == Question("signed") or (fine and self.question.threshold == -torch.inf)
        fast = exactly and self.open(self.enumerable) and not clock.over
        first = self._few_regions() if fast else []
        if clock.limited or self.budget.stars is not None:
            for few in first:
                self.enumerate(self._engine(), clock.left / 2 if clock.limited else None, few)
            self.search(Search(), None)
            self.enumerate(self._engine(), None, everything)
            return
        share = FIRST_SECONDS
        while not clock.over and (self.open(self.enumerable) or self.open(self.searchable)):
            for few in first:
                self.enumerate(self._engine(first=share == FIRST_SECONDS), share, few)
            self.search(Search(), share * len(self.open(self.searchable)))
            first = [everything]
            share *= GROWTH

    def _engine(self, *, first: bool = False) -> Exact:
        # auto_LiRPA costs seconds to load, which a short turn does not have.
        return Exact(root_bounds="zonotope" if first or self.stars.dim <= VERTEX_DIM else "auto")

    def enumerate(self, method: Exact, seconds: float | None, among: Tensor) -> None:
        """Exact reach of all open stars at once, of those in the mask `among` [S], for so long at most."""
        open_ = self.open(self.enumerable & among)
        if not open_ or self.clock.over:
            return
        index = torch.tensor(open_, device=self.stars.device)
        watch = Watch(self.clock, lambda: None)
        found = reach_within(
            self.clock.part(seconds, watch),
            self.merged,
            self.stars.select(index),
            method,
            budget=Budget(stars=self.budget.stars, memory=self.budget.memory),
            tolerances=self.tolerances,
            keep_stars=False,
            progress=lambda progress: self._during(index, progress, watch),
            files=None if self.files is None else self.files.part("enumeration", repr(open_), repr(method)),
            cluster=self.cluster,
        )
        self._take_exact(index, found)
        # The clock ends no run before a tenth of its time: what is open then stays so.
        if seconds is None or found.stats.seconds < seconds / 10:
            self.enumerable[index] = False

    def _during(self, index: Tensor, progress: Progress, watch: Watch) -> None:
        """Reports an enumeration, and ends it once the threshold is answered on all of its stars."""
        lower, upper = self.evidence.lower.clone(), self.evidence.upper.clone()
        met = torch.stack((progress.attained_upper, -progress.attained_lower), 1)
        lower[index] = torch.maximum(lower[index], met.to(lower.dtype))
        bound = torch.stack((progress.upper, -progress.lower), 1).to(upper.dtype)
        upper[index] = torch.minimum(upper[index], bound)
        if self.question.threshold > -torch.inf:
            above = lower[index].flatten(1).amax(1) > self.question.threshold
            below = upper[index].flatten(1).amax(1) <= self.question.threshold
            watch.ended |= bool((above | below).all())
        self._report(progress.done, progress.open, (lower, upper), "star")

    def search(self, options: Search, seconds: float | None) -> None:
        """Branch and bound on every open star in turn; each gets its share of so many seconds, or of what is left."""
        open_ = self.open(self.searchable)
        if not open_ or self.clock.over:
            return
        if not self.rooted:
            self._root(open_, self.ticking)
            open_ = self.open(self.searchable)
        turn = self.clock.part(seconds)
        for i, s in enumerate(open_):
            if turn.over:
                log.info("budget spent before the search of %d stars", len(open_) - i)
                return
            until = turn.part(turn.left / (len(open_) - i) if turn.limited else None)
            try:
                work = self.searches.get(s) or self._begin(s, options, len(open_))
                work.run(lambda state, s=s, until=until: self._enough(s, state, until))
            except OutOfTime:
                return
            assert work.state is not None
            self._take_state(s, work.state)
            if work.over:
                self.searchable[s] = False
                # A witness that is rounded to the stars' dtype may attain a little less than was asked for.
                self.enumerable[s] &= not work.state.closed
                self.spent[s] |= work.state.open > 0
                log.info("search of star %d ends with %d branches open", s, work.state.open)

    def _begin(self, s: int, options: Search, stars: int) -> StarSearch:
        work = StarSearch(
            self.original,
            self.compressed,
            self.stars.select([s]),
            self.question,
            options,
            memory=self.memory / stars,
            compared=self.compared,
            root=self.roots.pop(s, None),
            clock=self.ticking,
            files=None if self.files is None else self.files.part(f"search-{s}"),
        )
        self.searches[s] = work
        self._used(work.split)
        return work

    def _enough(self, s: int, state: SearchResult, until: Clock) -> bool:
        """Whether a star's search has to stop; reports progress."""
        if self.progress is not None and self.clock.elapsed - self.reported >= REPORT_SECONDS:
            self._take_state(s, state)
            self._tick()
        return bool(
            state.closed
            or until.over
            or (self.budget.stars is not None and state.branches >= self.budget.stars)
            or self.question.exceeded(state.lower)
            or (state.upper <= self.question.enough(torch.maximum(self.evidence.lower[s], state.lower))).all()
        )

    def bound(self) -> None:
        """Takes the bounds that a search begins with."""
        self._root(self.open(self.searchable), self.ticking)
        self.spent |= ~self.enumerated

    def _root(self, open_: list[int], clock: Clock) -> None:
        """Difference bounds of all open stars, so that each has a good interval before one of them is searched."""
        self.rooted = True
        if not open_:
            return
        try:
            pair = None
            if Pair.matches(*self.both):
                everyone = torch.arange(len(self.stars), device=self.stars.device)
                pair = Pair.of(*self.both, (self.box[0].amin(0), self.box[1].amax(0)), clock=clock)
                self._cap(everyone, interval_difference(pair, *self.box).sides)
            self.compared = Both.of(*self.both, pair, clock)
            for index in torch.tensor(open_, device=self.stars.device).split(ROOT_STARS):
                low, high = (end[index] for end in self.box)
                first = first_bounds(
                    self.compared, low, high, partial(self._cap, index), clock=clock, memory=self.memory / 2
                )
                if len(open_) * self.compared.features <= ROOT_NUMBERS:
                    for k, s in enumerate(index.tolist()):
                        self.roots[s] = first.select(torch.tensor([k], device=index.device))
        except OutOfTime:
            log.info("budget spent before all stars are bounded")

    def _cap(self, index: Tensor, upper: Tensor) -> None:
        """Takes certified bounds [B, 2, N] of stars `index`."""
        found = self.evidence
        found.certify(upper, index)
        # A witness that is rounded to the stars' dtype may lie next to its star.
        found.lower[index] = torch.minimum(found.lower[index], found.upper[index])

    def _few_regions(self) -> list[Tensor]:
        """Masks [S] of stars that may have few enough regions to enumerate, as far as their points show.

        The easiest come in a mask of their own, so that they do not wait for others of their batch.
        """
        size = self.stars.basis[0, 0].numel()
        if len(self.stars) > MOST_STARS or POINTS * size * len(self.stars) > MOST_NUMBERS:
            return [torch.ones_like(self.enumerated)]
        points = min(POINTS, POINT_NUMBERS // sum(step.features for step in self.network) + 1)
        apart = regions_apart(self.network, self.places.sample(points))
        few = apart < APART["vertices" if self.stars.dim <= VERTEX_DIM else "programs"]
        if self.stars.dim > WIDE:
            few &= undecided(self.network, *self.box, self.clock, self.memory) <= UNDECIDED
        return [few & (apart < EASY), few & (apart >= EASY)]

    # -- results ----------------------------------------------------------------------------------------

    def _take(self, index: Tensor, lower: Tensor, upper: Tensor, witness: Tensor) -> None:
        """Intersects with intervals [B, 2, N] of stars `index` [B]; witness [B, 2, N, *shape]."""
        self.evidence.attain(lower, witness.to(self.stars.dtype), index)
        self._cap(index, upper)

    def _take_exact(self, index: Tensor, found: ReachResult) -> None:
        self._used(found.stats.method)
        self.exact_stats = added(self.exact_stats, found.stats)
        lower, upper = (found.attained_upper, -found.attained_lower), (found.upper, -found.lower)
        lower, upper = (torch.stack(part, 1).to(COMPUTE_DTYPE) for part in (lower, upper))
        self._take(index, lower, upper, torch.stack((found.argmax, found.argmin), 1))
        self.count[index] = torch.maximum(self.count[index], found.count)
        done = [status is Status.EXACT for status in found.status]
        self.enumerated[index] = torch.tensor(done, device=index.device)
        limited = [reason is Reason.BUDGET for reason in found.reasons]
        self.spent[index] |= torch.tensor(limited, device=index.device)

    def _take_state(self, s: int, state: SearchResult) -> None:
        """The witnesses are rounded to the stars' dtype and replayed there."""
        witness = self.searches[s].space.features(state.witness).to(self.stars.dtype)
        value, error = replay(self.network, witness.flatten(0, 1))
        n = value.shape[1]
        value, error = (part.reshape(2, n, n).diagonal(dim1=1, dim2=2) for part in (value, error))
        value = torch.stack((value[0] - error[0], -value[1] - error[1]))
        self._take(torch.tensor([s], device=value.device), value[None], state.upper[None], witness[None])

    def _used(self, method: str) -> None:
        if method not in self.methods:
            self.methods.append(method)

    def _tick(self) -> None:
        """Reports the state of the searches, a few times a second."""
        if self.progress is None or self.clock.elapsed - self.reported < REPORT_SECONDS:
            return
        states = [work.state for work in self.searches.values() if work.state]
        done, open_ = (sum(getattr(state, name) for state in states) for name in ("branches", "open"))
        self._report(done, open_ or len(self.stars))

    def _report(self, done: int, open_: int, ends: tuple[Tensor, Tensor] | None = None, unit: str = "branch") -> None:
        if self.progress is not None:
            self.reported = self.clock.elapsed
            lower, upper = ends or (self.evidence.lower, self.evidence.upper)
            signed = -upper[:, 1], upper[:, 0], -lower[:, 1], lower[:, 0]
            self.progress(Progress(done, open_, *signed, self.clock.elapsed, unit))

    def _reason(self, s: int, exact: bool) -> Reason:
        """Why the work on star s ended."""
        settled = self.question.settled(self.evidence.lower[s], self.evidence.upper[s])
        spent = self.budget.stars is not None or bool(self.spent[s])
        return reason(settled, exact, self.answered(s), self.clock, spent, Reason.NUMERICAL)

    def result(self) -> Discrepancy:
        dtype, upper = self.stars.dtype, self.evidence.upper
        gap = EXACT_GAP[dtype] * (1 + torch.maximum(upper.abs(), upper.flip(1).abs()))
        exact = self.enumerated | (upper - self.evidence.lower <= gap).flatten(1).all(1)
        reasons = tuple(self._reason(s, ok) for s, ok in enumerate(exact.tolist()))
        layers, root, programs = (), "difference", 0
        if self.exact_stats is not None:
            layers, root = self.exact_stats.layers, self.exact_stats.root_bounds
            programs = self.exact_stats.output_programs
        return self.evidence.discrepancy(
            dtype,
            regions=self.count,
            status=tuple(Status.EXACT if ok else Status.BOUNDED for ok in exact.tolist()),
            stats=ReachStats(
                layers=layers,
                method=" + ".join(self.methods) or "difference bounds",
                root_bounds=root,
                seconds=self.clock.elapsed,
                output_programs=programs,
                branches=sum(work.state.branches for work in self.searches.values() if work.state),
            ),
            reasons=reasons,
        )
