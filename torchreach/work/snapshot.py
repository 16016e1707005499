"""The state of an enumeration in a checkpoint: open chunks, what is found so far, and what it was found on.

A snapshot is taken between two steps, of everything that the next one depends on, so that a run goes on from it as it
would have gone on without it: on one thread bit for bit, in processes with the same regions in another order. Kept
stars, which are many, are written once each, in files of their own that the snapshot names.

Guarantee: open chunks are affine maps into one layer of the reduced network. They are gone on with only if that network
is, bit for bit, the one they were cut on; else the enumeration begins anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torchreach.core.checkpoint import Checkpoint
from torchreach.core.clock import Clock
from torchreach.core.plain import builders, decode, digest, encode
from torchreach.engines import pieces, vertex_pieces
from torchreach.engines.record import Sink
from torchreach.lp.halfspaces import Halfspaces, Rows, SharedHalfspaces
from torchreach.sets.polytope import PolytopeBatch
from torchreach.sets.star import StarBatch
from torchreach.work.frontier import Frontier

log = logging.getLogger(__name__)

CHUNKS = {
    "vertices": builders([vertex_pieces.Chunk, vertex_pieces.Pieces, PolytopeBatch]),
    "programs": builders([pieces.Chunk, pieces.Arrivals, Halfspaces, SharedHalfspaces, Rows]),
}
STARS: dict[str, Callable[..., Any]] = {"StarBatch": StarBatch.trusted}
ROOT, STATE = "root", "regions"


class Snapshots:
    """Those of one enumeration. waiting: what a step in flight elsewhere was given, which counts as open."""

    def __init__(self, files: Checkpoint, frontier: Frontier, sink: Sink, kept: list[StarBatch] | None) -> None:
        """frontier: as it begins. kept: where output stars are collected."""
        self.files, self.frontier, self.sink, self.kept = files, frontier, sink, kept
        self.known = CHUNKS[frontier.engine.name]
        self.network = digest(frontier.steps, frontier.root)
        self.before, self.parts, self.written = 0.0, 0, 0

    def due(self, clock: Clock) -> bool:
        return self.files.due(STATE, clock)

    def until(self, clock: Clock) -> Clock:
        """A clock that ends when the next one is due."""
        return clock.part(self.files.wait(STATE, clock))

    def save(self, clock: Clock, waiting: list[Any] | None = None) -> None:
        """Takes a snapshot; no step of the frontier's own may be running."""
        frontier, record = self.frontier, self.sink.record
        if self.kept is not None and self.written < len(self.kept):
            part = StarBatch.cat(self.kept[self.written :])
            self.files.save(f"stars-{self.parts:06d}", encode(part, STARS))
            self.parts, self.written = self.parts + 1, len(self.kept)
        work, settled = frontier.engine.tally.take()
        frontier.engine.tally.add(work, settled)

        def tree() -> dict[str, Any]:
            return {
                "network": self.network,
                "open": encode([*(group.chunks for group in frontier.groups.values()), *((c,) for c in waiting or ())],
                               self.known, shared=True),
                "engine": frontier.engine.state,
                "record": [record.certified, record.attained, record.point],
                "count": self.sink.count,
                "tally": [work, settled],
                "numbers": [frontier.done, frontier.stepped, frontier.kept],
                "growth": [[k, v] for k, v in frontier.growth.items()],
                "largest": [[k, v] for k, v in frontier.largest.items()],
                "parts": self.parts,
                "seconds": self.before + clock.elapsed,
            }  # fmt: skip

        self.files.snapshot(STATE, tree, clock)
        log.info("snapshot with %d stars done and %d open", frontier.done, frontier.open)

    def resume(self) -> bool:
        """Puts the frontier, the sink and the kept stars where the last snapshot was; False where there is none."""
        frontier, record, device = self.frontier, self.sink.record, self.frontier.device
        tree = self.files.load(STATE, device)
        if tree is None:
            return False
        if tree["network"] != self.network:
            log.warning("a checkpoint's regions were cut on other bounds or weights: the enumeration begins anew")
            return False
        parts = range(0 if self.kept is None else tree["parts"])
        stars = [self.files.load(f"stars-{k:06d}", device) for k in parts]
        if any(part is None for part in stars):
            log.warning("a checkpoint misses output stars: the enumeration begins anew")
            return False
        frontier.clear()
        for chunks in decode(tree["open"], self.known):
            frontier.push(list(chunks))
        frontier.engine.state = tree["engine"]
        record.certified, record.attained, record.point = tree["record"]
        self.sink.count.copy_(tree["count"])
        frontier.engine.tally.take()
        frontier.engine.tally.add(*tree["tally"])
        frontier.done, frontier.stepped, frontier.kept = tree["numbers"]
        frontier.growth.update(dict(tree["growth"]))
        frontier.largest.update(dict(tree["largest"]))
        if self.kept is not None:
            self.kept[:] = [decode(part, STARS) for part in stars]
            self.parts, self.written = len(stars), len(stars)
        self.before = tree["seconds"]
        log.info("going on with %d stars done and %d open", frontier.done, frontier.open)
        return True
