"""Steps of a frontier on a Ray cluster: chunks of open stars as units, of which each ends soon.

Method: the shallowest open stars are sent out, a share of them to each worker. A unit works on its stars for `SECONDS`,
depth first, and hands back what it found and what it leaves open, which goes back into the queue: so units are of
bounded size however unequal the trees below their stars are, and the last ones find all workers busy.
Property: every star is finished, open in the queue, or in a unit under way; what a lost unit was given is open again.
So the bounds of what is open cover the rest at any time, and a snapshot of queue and units is one of the whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchreach.core.clock import running
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.domains.zonotope import Bounds
from torchreach.engines.programs import ProgramEngine
from torchreach.engines.record import Kept, RangeRecord, Sink
from torchreach.engines.tally import Tally
from torchreach.engines.vertices import VertexEngine
from torchreach.graph.steps import Step
from torchreach.work.cluster import Cluster
from torchreach.work.frontier import Frontier, Limits
from torchreach.work.snapshot import Snapshots

log = logging.getLogger(__name__)

SECONDS = 5.0  # of a unit
SHARES = 4  # parts for each worker that the shallowest open stars are cut into
FEW = 16  # open stars for each worker from which on they are sent out
LARGEST = 1024  # stars in a unit
ENGINES = {"vertices": VertexEngine, "programs": ProgramEngine}


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to work on chunks, the same for all units of a run."""

    engine: str
    network: tuple[Step, ...]
    left_out: list[int]
    steps: tuple[Step, ...]
    signs: list[Tensor]
    bounds: Bounds
    tolerances: Tolerances
    keep_facets: bool
    dim: int
    stars: int
    part: str | None  # what is kept of finished chunks
    memory: float

    def frontier(self) -> Frontier:
        tally = Tally(self.network, self.left_out)
        engine = ENGINES[self.engine](self.steps, self.signs, self.tolerances, tally, keep_facets=self.keep_facets)
        frontier = Frontier(engine, self.steps, self.bounds, self.dim, torch.device("cpu"))
        frontier.memory = self.memory
        return frontier


def unit(recipe: Recipe, chunks: list[Any], state: list[Any], seconds: float) -> tuple[Any, ...]:
    """Works on chunks for so long at most: count, ranges, counters, what is kept, what is left open."""
    with torch.no_grad(), running(seconds) as clock:
        frontier = recipe.frontier()
        frontier.engine.state = state
        frontier.workers, frontier.clock = 1, clock
        record = RangeRecord(recipe.stars, recipe.network[-1].features, recipe.dim, COMPUTE_DTYPE, frontier.device)
        count, kept = torch.zeros(recipe.stars, dtype=torch.long), list[Any]()
        keep = None if recipe.part is None else lambda own: kept.extend(own.groups)
        sink = Sink(record, count, keep, recipe.part or "stars")
        frontier.push(chunks)
        while frontier.open and not (frontier.stepped and clock.over):
            chunk = frontier.begin()
            if chunk is None:
                break  # no memory for a step: others may have some
            frontier.settle(chunk, frontier.step(chunk, sink))
        frontier.gather()
        rest = [chunk for group in frontier.groups.values() for chunk in group.chunks]
        ranges = record.certified, record.attained, record.point
        return count, ranges, frontier.engine.tally.take(), kept, rest, frontier.stepped, frontier.done


def run_on_cluster(
    frontier: Frontier,
    sink: Sink,
    limits: Limits,
    report: Callable[[], None] | None,
    cluster: Cluster,
    recipe: Recipe,
    snapshots: Snapshots | None,
) -> None:
    """Works until nothing is open or a limit is reached; what is left open then is in the frontier."""
    clock, shared = limits.clock, cluster.shared(replace(recipe, memory=frontier.memory))
    flying: dict[int, list[Any]] = {}
    sent = 0

    def take() -> tuple[int, tuple[Any, ...]] | None:
        nonlocal sent
        if not frontier.open or limits.spent(frontier, frontier.done):
            return None
        key = min(frontier.groups)
        group = frontier.groups[key]
        most = min(LARGEST, math.ceil(group.size / (SHARES * cluster.workers)))
        flying[sent] = [frontier.hand_out(key, most)]
        sent += 1
        return sent - 1, (shared, flying[sent - 1], frontier.engine.state, min(SECONDS, max(clock.left, 0.01)))

    for key, result in cluster.done(unit, take, clock):
        given = flying.pop(key)
        if result is None:
            frontier.push(given)
        else:
            count, ranges, counters, kept, rest, stepped, done = result
            sink.count.add_(count)
            sink.record.take(*ranges)
            frontier.engine.tally.add(*counters)
            frontier.stepped, frontier.done = frontier.stepped + stepped, frontier.done + done
            if kept and sink.keep is not None:
                sink.keep(Kept(kept))
            frontier.push(rest)
        if snapshots is not None and snapshots.due(clock):
            snapshots.save(clock, [chunk for chunks in flying.values() for chunk in chunks])
        if report is not None:
            report()
    log.info("%d units on %d workers", sent, cluster.workers)


def until_wide(cluster: Cluster) -> int:
    """Open stars from which on a cluster has work for all of its workers."""
    return FEW * cluster.workers
