"""The queue of open work: batches of stars by layer, and what becomes of those that are left when a run ends.

Memory: the tensors of open chunks, of kept stars and of the step at work stay within `Budget.memory`, as far as
can be told before a step: what a star needs is learned per layer from the steps before it. Work goes depth
first, so that few stars are open; as memory fills, in ever smaller pieces of the deepest layer.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.memory import Ledger, batch_size, size_of
from torchreach.core.options import Budget
from torchreach.core.roundoff import gamma
from torchreach.domains.zonotope import Bounds, relu_band, zonotope_bounds
from torchreach.engines.record import RangeRecord, Sink
from torchreach.engines.tally import Tally
from torchreach.graph.steps import Step

log = logging.getLogger(__name__)

# Stars per chunk: enough to hide the cost of launching an operation, few enough to stay in cache.
CHUNK = {"cpu": 1024, "cuda": 1 << 18}
# Numbers in the affine maps of one chunk.
NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}
# What a step takes while it runs, in multiples of the tensors it is given and returns, and what the allocator keeps.
WORKING = 16
# Seconds that bounding what is open may take when the time is up, or Ctrl-C pressed.
GRACE = 0.5
# Numbers in the zonotopes that are bounded at once.
CLOSING = {"cpu": 1 << 22, "cuda": 1 << 27}
# Bytes of the budget for each of them.
CLOSING_BYTES = 64
# Numbers in the rows of one star from which on a pass would take seconds: its whole input star's bounds stand.
WIDEST = 1 << 26
SMALLEST_SHARE = 16
BLOCKS, STRIDE = 64, 8


class Chunk(Protocol):
    """A batch of stars at one layer; see `reach.vertex_pieces.Chunk` for the fields."""

    layer: int
    rows: Tensor
    slack: Tensor
    origin: Tensor

    @property
    def kind(self) -> int: ...
    def __len__(self) -> int: ...
    def select(self, index: Any) -> Any: ...
    def box(self) -> tuple[Tensor, Tensor]: ...
    def stars(self) -> list[tuple[Tensor, Tensor, Tensor]]: ...


class Engine(Protocol):
    """How chunks advance; `engines.vertices` and `engines.programs` are the two engines."""

    name: str
    load: int  # how many times as many stars a chunk should have as it has for vertices
    tally: Tally

    @property
    def state(self) -> list[Any]:
        """What it knows beside the chunks, as plain data."""
        ...

    @state.setter
    def state(self, state: list[Any]) -> None: ...

    def advance(self, chunk: Any, clock: Clock, room: float) -> list[Any]:
        """Chunks after a step of a chunk, in about `room` bytes.

        When the clock is over, those that are there are handed back, or OutOfTime is raised and nothing is lost.
        """
        ...

    def finish(self, chunk: Any, record: RangeRecord, clock: Clock, room: float) -> None: ...
    def join(self, chunks: list[Any]) -> Any: ...


@dataclass
class _Group:
    chunks: list[Any] = field(default_factory=list)
    size: int = 0
    bytes: int = 0


@dataclass
class Limits:
    """When a run is to end early."""

    budget: Budget
    clock: Clock
    closing: float | None = None  # seconds per open star that `Frontier.close` will need

    def spent(self, frontier: Frontier, done: int, waiting: int = 0) -> bool:
        """Whether to stop, given stars done in all, and stars `waiting` that the frontier may get."""
        budget, clock, stars = self.budget, self.clock, frontier.open + waiting
        if clock.limited:
            left, passed = clock.left, clock.elapsed
            if self.closing is None and 10 * passed > passed + left:
                self.closing = frontier.cost_of_closing()
            if left <= (self.closing or 0.0) * stars:
                log.info("seconds spent with %d stars open", stars)
                return True
        if clock.interrupted:
            log.warning("interrupted with %d stars open: the interval is valid but not exact", stars)
            return True
        if budget.stars is not None and done >= budget.stars:
            log.info("budget of %d stars spent with %d stars open", budget.stars, stars)
            return True
        return False


class Frontier:
    """Open work of one run.

    Chunks are grouped by layer and kind, and joined to batches of `limit` stars.

    Attributes:
        open, done: stars waiting, and stars finished.
        peak: most bytes that open chunks, kept stars and the chunks of running steps have taken together.
    """

    def __init__(self, engine: Engine, steps: tuple[Step, ...], root: Bounds, dim: int, device: torch.device) -> None:
        self.engine = engine
        self.steps = steps
        self.root = root
        self.device = device
        self.dim = dim
        largest_map = (1 + dim) * max(step.features for step in steps)
        self.limit = engine.load * batch_size(CHUNK, device)
        # Affine maps of many variables are large: fewer stars then fill the same memory.
        self.limit = max(8, min(self.limit, batch_size(NUMBERS, device) // largest_map))
        self.groups: dict[tuple[int, int], _Group] = {}
        self.open = 0
        self.done = 0
        self.stepped = 0
        self.workers = torch.get_num_threads() if device.type == "cpu" else 1
        self.clock = NO_LIMIT
        self.spread = False  # whether many open stars are wanted, to share them out
        self.memory = float("inf")
        self.used = Ledger()  # open chunks, and those at work
        self.kept = 0  # bytes of kept stars
        self.peak = 0
        # By layer, how many times the bytes of a star are those of the stars it becomes in a step.
        self.growth: dict[int, float] = defaultdict(lambda: 2.0)
        # By layer, most bytes that a step was given and returned.
        self.largest: dict[int, float] = defaultdict(lambda: math.inf)
        self._results = Lock()

    def clear(self) -> None:
        """Lets go of all open chunks."""
        self.groups.clear()
        self.open, self.used = 0, Ledger()

    def gather(self) -> None:
        """Joins what lies in small pieces, each group into chunks of `limit` stars."""
        groups, self.groups, self.open, self.used = self.groups, {}, 0, Ledger()
        for group in groups.values():
            rest, size = list[Any](), 0
            for chunk in group.chunks:
                rest.append(chunk)
                size += len(chunk)
                if size >= self.limit:
                    self.push([self.engine.join(rest)])
                    rest, size = [], 0
            if rest:
                self.push([self.engine.join(rest)])

    def push(self, chunks: list[Any]) -> None:
        """Add open chunks."""
        for chunk in chunks:
            group = self.groups.setdefault((chunk.layer, chunk.kind), _Group())
            group.chunks.append(chunk)
            group.size += len(chunk)
            self.open += len(chunk)
            group.bytes += size_of(chunk)
            self.used.add(chunk)
        self.peak = max(self.peak, self.used.bytes + self.kept)

    def pop(self, *, share: int = 1) -> Any:
        """Up to `limit` stars of one layer and kind, or None if there is no memory for the step of one.

        A full group goes first, the deepest of them, so that few stars stay open; while no group is full, the
        shallowest layer fills them, so that no work is done in small pieces that could be done in large ones.
        When the stars it would take do not fit in memory, the deepest group goes, in as many as do.

        While `spread` is set, the shallowest group goes first, so that many stars are open soon.

        Args:
            share: this many steps run at once and share what memory is left.
        """
        room = self._room() / share
        fits = {key: self._fitting(key, room) for key in self.groups}
        full = [] if self.spread else [key for key, group in self.groups.items() if group.size >= self.limit]
        key = max(full) if full else min(self.groups, key=lambda k: (k[0], -self.groups[k].size))
        if fits[key] < min(self.limit, self.groups[key].size):
            key = max(self.groups)
        return self._take(key, fits[key]) if fits[key] else None

    def _room(self) -> float:
        """Bytes left."""
        return max(0.0, self.memory - self.used.bytes - self.kept)

    def _fitting(self, key: tuple[int, int], room: float) -> int:
        """How many stars of a group can be stepped at once in so many bytes, beside the stars themselves."""
        group, layer = self.groups[key], key[0]
        own = group.bytes / group.size
        number = int(min(self.limit, room / max(1.0, own * (WORKING * (1 + self.growth[layer]) - 1))))
        # One star needs no more than the largest step of its layer did: it is a piece of what that step was given.
        return number or int(WORKING * self.largest[layer] <= room)

    def _take(self, key: tuple[int, int], most: int) -> Any:
        group, taken, total = self.groups[key], [], 0
        while group.chunks and total < most:
            chunk = group.chunks.pop()
            group.bytes -= size_of(chunk)
            self.used.remove(chunk)
            room = most - total
            if len(chunk) > room:
                rest = chunk.select(slice(room, None))
                group.chunks.append(rest)
                group.bytes += size_of(rest)
                self.used.add(rest)
                chunk = chunk.select(slice(0, room))
            taken.append(chunk)
            total += len(chunk)
        group.size -= total
        if not group.chunks:
            del self.groups[key]
        self.open -= total
        return self.engine.join(taken)

    def hand_out(self, key: tuple[int, int], most: int) -> Any:
        """So many stars of a group at most, for a worker elsewhere."""
        return self._take(key, most)

    def begin(self, share: int = 1) -> Any:
        """`pop` for a step, which `settle` ends."""
        chunk = self.pop(share=share)
        if chunk is not None:
            self.used.add(chunk)
        return chunk

    def settle(self, chunk: Any, children: list[Any]) -> None:
        """Put back what the step of a chunk left open, and learn from it what such a step needs."""
        before, after = size_of(chunk), size_of(children)
        self.growth[chunk.layer] = max(after / max(1, before), 0.5 * self.growth[chunk.layer])
        self.largest[chunk.layer] = max(self.largest.get(chunk.layer, 0.0), before + after)
        self.stepped += len(chunk)
        self.push(children)
        self.used.remove(chunk)

    def shares(self, workers: int) -> list[list[Any]]:
        """All open chunks, in shares that each hold a part of every group; the frontier is empty then.

        Each share is a part 1 / (3 workers) of what is left, so that the last ones are small: workers that draw
        them in turn end at nearly the same time, and still get most of their stars in few large pieces.
        """
        for group in self.groups.values():
            # Neighbours cost alike, and some a hundred times what others do: each share is taken from all over.
            size = math.ceil(group.size / BLOCKS)
            blocks = [c.select(slice(i, i + size)) for c in group.chunks for i in range(0, len(c), size)]
            group.bytes = sum(map(size_of, blocks))
            for old in group.chunks:
                self.used.remove(old)
            for new in blocks:
                self.used.add(new)
            group.chunks = [block for first in range(STRIDE) for block in blocks[first::STRIDE]]
        parts: list[list[Any]] = []
        while self.open:
            part = max(1 / (3 * workers), min(1.0, SMALLEST_SHARE / self.open))
            parts.append([self._take(key, math.ceil(part * self.groups[key].size)) for key in list(self.groups)])
        return parts

    def step(self, chunk: Any, sink: Sink) -> list[Any]:
        """Advance a chunk, or take it into the results; returns the chunks it leaves open."""
        room = self._room() / self.workers / WORKING
        try:
            if chunk.layer < len(self.steps) - 1:
                return self.engine.advance(chunk, self.clock, room)
            with self._results:
                self.engine.finish(chunk, sink.record, self.clock, room)
                sink.count.index_add_(0, chunk.origin, torch.ones_like(chunk.origin))
                self.done += len(chunk)
                kept = sink.take(chunk)
                if sink.keep is not None and kept is not None:
                    self.kept += size_of(kept)
                    sink.keep(kept)
        except OutOfTime:
            return [chunk]
        return []

    def cost_of_closing(self) -> float:
        """Seconds per star to bound open stars, measured on a few of them."""
        if not self.open:
            return 0.0
        chunk = self.groups[max(self.groups)].chunks[-1]
        size = self._closing(chunk.layer)
        if not size:
            return 0.0
        sample = chunk.select(slice(0, size))
        clock = self.clock.part(None)
        self._bound(sample, clock)
        return clock.elapsed / len(sample)

    def close(self, record: RangeRecord) -> Tensor:
        """Bound whatever is still open, so that the record covers every input star: by zonotopes of each open star.

        Where there is no time for them, by the root bounds of the whole input star.
        """
        left = torch.zeros(record.certified.shape[1], dtype=torch.bool, device=record.certified.device)
        clock = self.clock
        if clock.limited or clock.interrupted:
            clock = clock.grace(GRACE if clock.interrupted else max(GRACE, clock.left))
        while self.open and not clock.over and self._closing(max(self.groups)[0]):
            key = max(self.groups)
            chunk = self._take(key, len(self.groups[key].chunks[-1]))
            left[chunk.origin] = True
            size = self._closing(chunk.layer)
            for part in (chunk.select(slice(i, i + size)) for i in range(0, len(chunk), size)):
                if clock.over:
                    self.push([part])
                    continue
                record.certify(part.origin, *self._bound(part, clock))
        if self.open:
            log.info("no time to bound %d open stars: the bounds of whole input stars stand", self.open)
            rest = torch.cat([c.origin.unique() for group in self.groups.values() for c in group.chunks]).unique()
            left[rest] = True
            self.leave(record, rest)
            self.groups.clear()
            self.open = 0
        return left

    def leave(self, record: RangeRecord, origin: Tensor) -> None:
        """Certify the root bounds of whole input stars [S], of which parts or all are left open."""
        low, high = self.root[-1]
        record.certify(origin, low[origin], high[origin])

    def _closing(self, layer: int) -> int:
        """How many stars at a layer are bounded at once; 0: none can be."""
        wide = [step.features for step in self.steps[layer:]]
        if (1 + self.dim) * max(wide) > WIDEST:
            return 0
        generators = 1 + self.dim + sum(wide[:-1])
        numbers = min(batch_size(CLOSING, self.device), self.memory / CLOSING_BYTES)
        return int(max(1, numbers // (generators * max(wide))))

    def _bound(self, chunk: Any, clock: Clock) -> tuple[Tensor, Tensor]:
        """Certified output range [S, N] of open stars, from their predicate boxes."""
        low, high = chunk.box()
        middle, radius = (low + high) / 2, (high - low) / 2
        rows = torch.cat(
            (
                chunk.rows[:, :1] + middle[:, None, :] @ chunk.rows[:, 1:],
                radius[:, :, None] * chunk.rows[:, 1:],
            ),
            1,
        )
        slack = chunk.slack + 10 * gamma(chunk.rows.shape[1]) * chunk.rows.abs().sum(1)
        step = self.steps[chunk.layer]
        spread = rows[:, 1:].abs().sum(1) + slack
        root_low, root_high = (bound[chunk.origin] for bound in self.root[chunk.layer])
        lower = torch.maximum(rows[:, 0] - spread, root_low)
        upper = torch.minimum(rows[:, 0] + spread, root_high)
        if step.relu is None:
            return lower, upper
        rows, slack = relu_band(rows, slack, lower, upper, step.relu)
        return zonotope_bounds(self.steps, rows, slack, chunk.layer + 1, clock)[-1]
