"""`reach(module, stars)`: choose an engine, run it, return a certified result."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import Clock, OutOfTime, running
from torchreach.core.errors import ShapeError
from torchreach.core.memory import default_budget
from torchreach.core.options import Budget, Exact
from torchreach.core.results import Discrepancy, Progress, ProgressCallback, ReachResult, ReachStats, Reason, Status
from torchreach.core.roundoff import round_down, round_up
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.domains.root import root_bounds
from torchreach.domains.zonotope import Bounds
from torchreach.engines import activation
from torchreach.engines.programs import ProgramEngine
from torchreach.engines.record import Kept, RangeRecord, Sink
from torchreach.engines.tally import Tally
from torchreach.engines.vertices import VertexEngine
from torchreach.graph.reduced import reduce
from torchreach.graph.steps import Step, steps_of
from torchreach.read.load import as_network
from torchreach.read.module import chain, reading_once
from torchreach.sets.star import StarBatch
from torchreach.verbs.certificate import of_output
from torchreach.verbs.questions import opened
from torchreach.work.cluster import Cluster
from torchreach.work.frontier import Frontier
from torchreach.work.remote import Recipe
from torchreach.work.run import run
from torchreach.work.snapshot import ROOT, Snapshots

log = logging.getLogger(__name__)

# Vertices of a polytope grow exponentially with its dimension; beyond this linear programs are cheaper.
VERTEX_DIM = 8
# Open neurons (beyond the first layer) from which auto_LiRPA saves an engine more time than it takes. Vertices
# show a neuron's sign for less than any bound does.
LIRPA_WORTH = {"vertices": math.inf, "programs": 64}
# Numbers in the features of points that are replayed together.
REPLAYED = 1 << 22
# Relative gap between certified and attained up to which an enumeration is called exact.
EXACT_GAP = defaultdict(lambda: 1e-2, {torch.float64: 1e-6, torch.float32: 1e-4})


@reading_once()
def reach(
    module: nn.Module,
    stars: StarBatch,
    method: Exact | None = None,
    *,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
    keep_stars: bool = True,
    progress: ProgressCallback | None = None,
    checkpoint: str | Path | None = None,
    ray: str | None = None,
) -> ReachResult:
    """Reach set of a ReLU network, single or merged: one output star per linear region.

    Runs where the stars' tensors are, in float64; results have the stars' dtype, rounded outward. What is
    certified is the real-valued function of the network's weights, not its floating-point execution.

    Args:
        module: network of supported layers, or `merge(original, compressed)`; it is not changed.
        stars: input stars [S], of the network's input shape.
        method: options of the exact engine.
        budget: when to stop early; the result is then valid but wider, and its status says so.
        keep_stars: False streams the ranges and statistics and stores no output star.
        progress: called a few times a second with a `Progress`.
        checkpoint: a folder from which the run goes on, to the same regions and ranges, if it is interrupted, killed
            or out of memory (docs/scaling.md); `budget.seconds` are those of each call.
        ray: "auto", "local" or the address of a Ray cluster, whose workers then do the work (docs/scaling.md).

    Raises:
        ShapeError: the stars do not fit the network. UnsupportedLayerError, InvalidNetworkError: see `merge`.
        OptionError: a checkpoint of another question, or a folder that cannot be written.

    Examples:
        >>> network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
        >>> _ = nn.init.constant_(network[0].weight, 2.0)
        >>> found = tr.reach(network, tr.StarBatch.from_box(-torch.ones(1), torch.ones(1)))
        >>> len(found), round(float(found.upper), 4)
        (2, 2.0)
    """
    budget = budget or Budget()
    with running(budget.seconds) as clock:
        asked = {"method": method or Exact(), "tolerances": tolerances or Tolerances(), "keep_stars": keep_stars}
        found = reach_within(
            clock,
            module,
            stars,
            method,
            budget=budget,
            tolerances=tolerances,
            keep_stars=keep_stars,
            progress=progress,
            files=opened(checkpoint, "reach", {"network": module}, stars, budget, **asked),
            cluster=Cluster.of(ray),
        )
    return replace(found, prover=of_output(as_network(module), stars))


def reach_within(
    clock: Clock,
    module: nn.Module,
    stars: StarBatch,
    method: Exact | None = None,
    *,
    budget: Budget | None = None,
    tolerances: Tolerances | None = None,
    keep_stars: bool = True,
    progress: ProgressCallback | None = None,
    corners: Callable[[Tensor, Tensor], None] | None = None,
    files: Checkpoint | None = None,
    cluster: Cluster | None = None,
) -> ReachResult:
    """`reach` as a part of another verb, whose clock says when to stop (and not `budget.seconds`).

    corners: with the vertex engine, called with the vertices [S', K, M] of output stars, as points of the predicate
        cube [-1, 1]^M, and the input star [S'] of each; `keep_stars` is then False.
    files: where snapshots of the work go, and from which it goes on. cluster: where most of it is done.
    """
    method, budget, tolerances = method or Exact(), budget or Budget(), tolerances or Tolerances()
    if not isinstance(stars, StarBatch):
        raise ShapeError(f"reach needs a torchreach.StarBatch, got {type(stars).__name__}")
    if budget.memory is None:
        budget = replace(budget, memory=default_budget(stars.device))
    clock = clock.part(None)  # it began now
    module = as_network(module)
    with torch.no_grad():
        known = None if files is None else files.load(ROOT, stars.device)
        work = _Run.prepare(module, stars, method, tolerances, keep_stars, budget, clock, known)
        work.corners, work.files, work.cluster = corners, files, cluster
        if files is not None and known is None and not clock.over:  # else they are those of a spent budget
            files.save(ROOT, {"name": work.root_name, "bounds": [list(ends) for ends in work.root]})
        work.go(budget, progress)
        return work.result()


@dataclass
class _Run:
    """State of one call of `reach`."""

    stars: StarBatch
    steps: tuple[Step, ...]
    root: Bounds
    root_name: str
    engine: VertexEngine | ProgramEngine
    frontier: Frontier
    record: RangeRecord
    tally: Tally
    count: Tensor
    kept: list[StarBatch] | None
    clock: Clock
    left: Tensor | None  # [S] input stars with stars left open; None before the run
    corners: Callable[[Tensor, Tensor], None] | None = None
    files: Checkpoint | None = None
    cluster: Cluster | None = None
    snapshots: Snapshots | None = None

    @staticmethod
    def prepare(
        module: nn.Module,
        stars: StarBatch,
        method: Exact,
        tolerances: Tolerances,
        keep_stars: bool,
        budget: Budget,
        clock: Clock,
        known: dict[str, Any] | None = None,
    ) -> _Run:
        """known: the root bounds of an earlier run, which its regions are cut on."""
        device = stars.device
        chosen = method.method
        if chosen == "auto":
            chosen = "vertices" if stars.dim <= VERTEX_DIM else "programs"
        if stars.dim == 0:  # points: there is nothing to program
            chosen = "vertices"
        layers = chain(module, stars.shape)
        network = steps_of(layers, stars.shape, dtype=COMPUTE_DTYPE, device=device)
        rows, A, b = stars.normalised()
        slack, loose = stars.rounding()
        # auto_LiRPA's time pays where open neurons cost linear programs, or where the run may end early.
        limited = clock.limited or budget.stars is not None
        worth = 1 if limited else LIRPA_WORTH[chosen]
        if known is not None:
            bounds, name = [(low, high) for low, high in known["bounds"]], known["name"]
        else:
            bounds, name = root_bounds(
                network,
                rows,
                slack,
                method.root_bounds,
                tolerances.root_margin,
                worth,
                clock,
                budget.memory or math.inf,
            )
        signs = [(low >= 0).long() - (high <= 0).long() for low, high in bounds]
        smaller = reduce(network, signs, bounds, clock)
        walked, signs, waypoints, left_out = smaller or (network, signs, bounds, [0] * len(network))
        tally = Tally(network, left_out)
        maker = VertexEngine if chosen == "vertices" else ProgramEngine
        engine = maker(walked, signs, tolerances, tally, keep_facets=keep_stars)
        frontier = Frontier(engine, walked, waypoints, stars.dim, device)
        outputs = network[-1].features
        record = RangeRecord(len(stars), outputs, stars.dim, COMPUTE_DTYPE, device)
        # b >= A a as half-spaces b - A a >= 0, thickened by the sign tolerance so that flat stars have depth
        size = A.abs().sum(2).clamp(min=1e-300)
        planes = torch.cat((((b + loose) / size + tolerances.sign)[:, :, None], -A / size[:, :, None]), 2)
        origin, left = torch.arange(len(stars), device=device), None
        try:
            frontier.push(engine.start(rows, slack, planes, origin, clock))
        except OutOfTime:
            log.info("no time for the affine map of the first layer: the bounds of whole input stars stand")
            frontier.leave(record, origin)
            left = torch.ones_like(origin, dtype=torch.bool)
        return _Run(
            stars,
            network,
            bounds,
            name,
            engine,
            frontier,
            record,
            tally,
            torch.zeros(len(stars), dtype=torch.long, device=device),
            [] if keep_stars else None,
            clock,
            left,
        )

    def go(self, budget: Budget, progress: ProgressCallback | None) -> None:
        report = None if progress is None else lambda: progress(self._progress())
        keep, part = None if self.kept is None else self._keep, "stars"
        if self.corners is not None:
            keep, part = self._hand_over, "corners"
        self._attain_somewhere()
        if self.files is not None:
            sink = Sink(self.record, self.count, keep, part)
            self.snapshots = Snapshots(self.files, self.frontier, sink, self.kept)
            if self.snapshots.resume():
                self.left = None
        if self.left is None:
            self.left = run(
                self.frontier,
                self.record,
                self.count,
                budget,
                keep,
                report,
                self.clock,
                part,
                self.snapshots,
                None if self.cluster is None else (self.cluster, self._recipe(None if keep is None else part)),
            )
        if self.snapshots is not None and self.files is not None and self.files.outermost and not self.left.any():
            self.snapshots.save(self.clock)  # so that the next call has the result at once
        if report is not None:
            report()

    def _recipe(self, part: str | None) -> Recipe:
        engine, frontier = self.engine, self.frontier
        return Recipe(
            engine.name,
            self.steps,
            self.tally.left_out,
            engine.steps,
            engine.signs,
            frontier.root,
            engine.tolerances,
            self.kept is not None,
            frontier.dim,
            len(self.stars),
            part,
            frontier.memory,
        )

    def result(self) -> ReachResult:
        assert self.left is not None
        lower, upper = self._certified(self.record.certified)
        dtype = self.stars.dtype
        size, outputs = lower.shape
        points = self.stars.point(self.record.point.transpose(0, 1).flatten(1, 2))  # [S, 2 N, *shape]
        # to nearest: a point between two bounds of this dtype stays between them
        points = points.to(dtype)
        points = points.reshape(size, 2, outputs, *self.stars.shape)
        value, error = self._replayed(points)
        # A witness rounded to the caller's dtype may leave a constrained or mapped star: claim no more than holds.
        met_lower = torch.maximum(value[:, 1] + error[:, 1], lower)
        met_upper = torch.minimum(value[:, 0] - error[:, 0], upper)
        gap = torch.maximum(met_lower - lower, upper - met_upper)
        met = gap <= EXACT_GAP[dtype] * (1 + torch.maximum(lower.abs(), upper.abs()))
        exact = ~self.left & met.all(1)
        return ReachResult(
            lower=round_down(lower, dtype),
            upper=round_up(upper, dtype),
            attained_lower=round_up(met_lower, dtype),
            attained_upper=round_down(met_upper, dtype),
            argmin=points[:, 1],
            argmax=points[:, 0],
            count=self.count,
            stars=self._stars(),
            status=tuple(Status.EXACT if ok else Status.BOUNDED for ok in exact.tolist()),
            stats=ReachStats(
                layers=self.tally.layers(),
                method=self.engine.name,
                root_bounds=self.root_name,
                seconds=self.clock.elapsed + (0.0 if self.snapshots is None else self.snapshots.before),
                output_programs=self.tally.programs[-1],
            ),
            reasons=tuple(map(self._reason, exact.tolist(), self.left.tolist())),
        )

    def _replayed(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Value and certified error [S, 2, N] of each output at the points [S, 2, N, *shape] that are its own."""
        flat, own = points.flatten(0, 2), torch.arange(points.shape[2], device=points.device).repeat(2 * len(points))
        size = max(1, REPLAYED // max(step.features for step in self.steps))
        parts = [
            [each.gather(1, index[:, None])[:, 0] for each in replay(self.steps, part)]
            for part, index in zip(flat.split(size), own.split(size), strict=True)
        ]
        value, error = (torch.cat(each).reshape(points.shape[:3]) for each in zip(*parts, strict=True))
        return value, error

    def _reason(self, exact: bool, left: bool) -> Reason:
        if exact:
            return Reason.CLOSED
        if not left:
            return Reason.NUMERICAL
        return Reason.INTERRUPTED if self.clock.interrupted else Reason.BUDGET

    def _certified(self, certified: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.root[-1]
        return torch.maximum(-certified[1], low), torch.minimum(certified[0], high)

    def _attain_somewhere(self) -> None:
        """Evaluate one point per input star, so that a budget spent at once still has a witness."""
        a = self.engine.somewhere
        rows = self.stars.point(a[:, None]).flatten(0, 1)
        value, _ = replay(self.steps, rows)
        origin = torch.arange(len(self.stars), device=value.device)
        for direction, signed in enumerate((value, -value)):
            self.record.attain(direction, origin, signed, lambda s, _: a[s])

    def _progress(self) -> Progress:
        low, high = self.root[-1]
        return Progress(
            done=self.frontier.done,
            open=self.frontier.open,
            lower=low,
            upper=high,
            attained_lower=-self.record.attained[1],
            attained_upper=self.record.attained[0],
            seconds=self.clock.elapsed,
        )

    def _hand_over(self, kept: Kept) -> None:
        assert self.corners is not None
        for points, origin in kept.groups:
            self.corners(points, origin)

    def _keep(self, kept: Kept) -> None:
        assert self.kept is not None
        for rows, planes, origin in kept.groups:
            void = (planes[:, :, 1:] == 0).all(2)  # unused slots say 0 . a <= 1
            ones = torch.ones_like(rows[:, 1:, 0])
            b = torch.where(void, 1.0, planes[:, :, 0])
            star = StarBatch.trusted(rows, -planes[:, :, 1:], b, -ones, ones, origin)
            self.kept.append(star.to(dtype=self.stars.dtype))

    def _stars(self) -> StarBatch | None:
        return StarBatch.cat(self.kept) if self.kept else None


def with_ends(
    found: Discrepancy, lower: Tensor, range_lower: Tensor, range_upper: Tensor, witness: Tensor
) -> Discrepancy:
    """`found` with other ends [S, N], in float64, rounded outward to the witnesses' dtype, and the status they give."""
    dtype = witness.dtype
    range_lower, range_upper = round_down(range_lower, dtype), round_up(range_upper, dtype)
    upper = torch.maximum(-range_lower, range_upper).clamp(min=0)
    lower = torch.minimum(round_down(lower, dtype), upper)
    exact = (upper - lower <= EXACT_GAP[dtype] * (1 + upper)).all(1).tolist()
    return replace(
        found,
        lower=lower,
        upper=upper,
        range_lower=range_lower,
        range_upper=range_upper,
        witness=witness,
        status=tuple(Status.EXACT if ok else Status.BOUNDED for ok in exact),
    )


def replay(network: tuple[Step, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """The network at points x [B, *shape]: (value, certified error) [B, N], float64."""
    rows = x.flatten(1).to(COMPUTE_DTYPE)[:, None]
    slack = torch.zeros_like(rows[:, 0])
    for step in network:
        rows, slack = activation.affine(step, rows, slack)
        if step.relu is not None:
            rows, slack = activation.relu(rows, slack, rows[:, 0], rows[:, 0], step.relu, 0.0)
        for function, index in step.curves:
            z, error = rows[..., index], slack[:, index]
            rows = rows.index_copy(-1, index, function.value(z))
            error = function.steepest * error * (1 + 1e-12) + function.error(z[:, 0].abs() + error)
            slack = slack.index_copy(-1, index, error)
    return rows[:, 0], slack
