"""The one loop over work, in this thread, in several, or in processes: until nothing is open or the budget is spent."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.options import Budget
from torchreach.engines.record import RangeRecord, Sink
from torchreach.work.cluster import Cluster
from torchreach.work.frontier import SMALLEST_SHARE, Frontier, Limits
from torchreach.work.processes import can_fork, run_in_processes
from torchreach.work.remote import Recipe, run_on_cluster, until_wide
from torchreach.work.snapshot import Snapshots
from torchreach.work.threads import Threads

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.2
# Processes pay once a run has lasted so long, and a chunk is open for each (or it has lasted longer still,
# and the next step of what is open takes so long).
FORK_SECONDS = 0.1
FORK_CHUNKS = 1
LATER_SECONDS, LATER_STEP_SECONDS = 0.5, 0.01
# Part of the memory that open stars may fill in order to be shared out.
SPREAD = 0.1


def run(
    frontier: Frontier,
    record: RangeRecord,
    count: Tensor,
    budget: Budget,
    keep: Callable[[Any], None] | None,
    report: Callable[[], None] | None,
    clock: Clock,
    part: str = "stars",
    snapshots: Snapshots | None = None,
    cluster: tuple[Cluster, Recipe] | None = None,
) -> Tensor:
    """Work until done, out of budget or interrupted. Returns [S_in] bool: input stars with stars left open.

    Args:
        record: takes the ranges; it is certified on return whatever happened.
        count: [S_in] long, output stars per input star, counted here.
        keep: called with what is to be kept of every finished chunk: its "stars", or the `part` named.
        report: called now and then.
        cluster: where most of the work is to be done, and what its workers need.
        snapshots: of this frontier, taken now and then, and of what is left open.
    """
    frontier.clock = clock = clock.part(None)
    limits, sink = Limits(budget, clock), Sink(record, count, keep, part)
    frontier.memory = math.inf if budget.memory is None else budget.memory
    reported = 0.0
    frontier.spread = cluster is not None or (frontier.workers > 1 and can_fork(frontier.device))
    left = torch.zeros_like(count, dtype=torch.bool)
    with Threads(frontier) as work:
        while (frontier.open or work.running) and not limits.spent(frontier, frontier.done):
            if report is not None and clock.elapsed - reported >= REPORT_SECONDS:
                report()
                reported = clock.elapsed
            frontier.spread = frontier.spread and frontier.used.bytes < SPREAD * frontier.memory
            if cluster is None and frontier.spread and _worth_forking(frontier):
                work.stop()
                frontier.spread = False
                shared = _in_processes(frontier, sink, limits, report, snapshots)
                if shared is not None:
                    left |= shared
                    break
            if cluster is not None and frontier.open >= until_wide(cluster[0]):
                work.stop()
                run_on_cluster(frontier, sink, limits, report, *cluster, snapshots)
                if not frontier.open or limits.spent(frontier, frontier.done):
                    break
            if snapshots is not None and snapshots.due(clock):
                work.finish()
                snapshots.save(clock)
            if not work.start(frontier.step, sink):
                log.info("budget of %g bytes spent with %d stars open", frontier.memory, frontier.open)
                break
        work.finish()
        if snapshots is not None and frontier.open:
            snapshots.save(clock)
        return left | frontier.close(record)


def _in_processes(
    frontier: Frontier,
    sink: Sink,
    limits: Limits,
    report: Callable[[], None] | None,
    snapshots: Snapshots | None,
) -> Tensor | None:
    """`run_in_processes` to the end; with snapshots in rounds, between which they are taken."""
    while True:
        until = None if snapshots is None else snapshots.until(limits.clock)
        shared = run_in_processes(frontier, sink, limits, report, REPORT_SECONDS, until)
        if shared is None or snapshots is None or not frontier.open:
            return shared
        snapshots.save(limits.clock)
        if limits.spent(frontier, frontier.done) or frontier.open < SMALLEST_SHARE * frontier.workers:
            frontier.spread = True  # until there is enough to share out again
            return None


def _worth_forking(frontier: Frontier) -> bool:
    passed = frontier.clock.elapsed
    if passed < FORK_SECONDS or frontier.open < SMALLEST_SHARE * frontier.workers:
        return False
    if frontier.open >= FORK_CHUNKS * frontier.limit * frontier.workers:
        return True
    return passed > LATER_SECONDS and frontier.open * passed / max(1, frontier.stepped) > LATER_STEP_SECONDS
