"""The one loop over work: batches of stars, until none is open or the budget is spent."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from torchreach.bounds.zonotope import Bounds, relu_band, zonotope_bounds
from torchreach.networks.steps import Step
from torchreach.options import Budget
from torchreach.reach.record import RangeRecord

log = logging.getLogger(__name__)

# Stars per chunk: enough to hide the cost of launching an operation, few enough to stay in cache.
CHUNK = {"cpu": 1024, "cuda": 65536}
REPORT_SECONDS = 0.2
# Numbers in the affine maps of one chunk.
NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}


class Chunk(Protocol):
    """A batch of stars at one layer; see `reach.vertices.Chunk` for the fields."""

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
    """How chunks advance; `reach.vertices` and `reach.programs` are the two engines."""

    name: str

    def advance(self, chunk: Any) -> list[Any]: ...
    def finish(self, chunk: Any, record: RangeRecord) -> None: ...
    def join(self, chunks: list[Any]) -> Any: ...


@dataclass
class _Group:
    chunks: list[Any]
    size: int = 0


class Frontier:
    """Open work of one run.

    Chunks are grouped by layer and kind, and joined to batches of `limit` stars.
    """

    def __init__(self, engine: Engine, steps: tuple[Step, ...], root: Bounds, dim: int, device: torch.device) -> None:
        self.engine = engine
        self.steps = steps
        self.root = root
        largest_map = (1 + dim) * max(step.features for step in steps)
        self.limit = CHUNK.get(device.type, CHUNK["cuda"])
        # Affine maps of many variables are large: fewer stars then fill the same memory.
        self.limit = max(8, min(self.limit, NUMBERS.get(device.type, NUMBERS["cuda"]) // largest_map))
        self.groups: dict[tuple[int, int], _Group] = {}
        self.open = 0
        self.done = 0
        self.workers = torch.get_num_threads() if device.type == "cpu" else 1
        self._results = threading.Lock()

    def push(self, chunks: list[Any]) -> None:
        """Add open chunks."""
        for chunk in chunks:
            group = self.groups.setdefault((chunk.layer, chunk.kind), _Group([]))
            group.chunks.append(chunk)
            group.size += len(chunk)
            self.open += len(chunk)

    def pop(self) -> Any:
        """Up to `limit` stars of one layer and kind.

        A full group goes first, the deepest of them, so that few stars stay open; while no group is full, the
        shallowest layer fills them, so that no work is done in small pieces that could be done in large ones.
        """
        full = [key for key, group in self.groups.items() if group.size >= self.limit]
        key = max(full) if full else min(self.groups, key=lambda k: (k[0], -self.groups[k].size))
        group, taken, total = self.groups[key], [], 0
        while group.chunks and total < self.limit:
            chunk = group.chunks.pop()
            room = self.limit - total
            if len(chunk) > room:
                group.chunks.append(chunk.select(slice(room, None)))
                chunk = chunk.select(slice(0, room))
            taken.append(chunk)
            total += len(chunk)
        group.size -= total
        if not group.chunks:
            del self.groups[key]
        self.open -= total
        return self.engine.join(taken)

    def run(
        self,
        record: RangeRecord,
        count: Tensor,
        budget: Budget,
        keep: Callable[[Any], None] | None,
        report: Callable[[], None] | None,
    ) -> Tensor:
        """Work until done or out of budget. Returns [S_in] bool: input stars with stars left open.

        Args:
            record: takes the ranges; it is certified on return whatever happened.
            count: [S_in] long, output stars per input star, counted here.
            keep: called with every finished chunk.
            report: called now and then.
        """
        start = reported = time.monotonic()
        closing = None  # seconds per open star that `_close` will need
        with _first_interrupt() as interrupted, _Workers(self) as work:
            while (self.open or work.running) and not interrupted:
                now = time.monotonic()
                if report is not None and now - reported >= REPORT_SECONDS:
                    report()
                    reported = now
                if budget.seconds is not None:
                    if closing is None and now - start > budget.seconds / 10:
                        closing = self._cost_of_closing()
                    if now - start + (closing or 0.0) * self.open > budget.seconds:
                        log.info("budget of %g s spent with %d stars open", budget.seconds, self.open)
                        break
                if budget.stars is not None and self.done >= budget.stars:
                    log.info("budget of %d stars spent with %d stars open", budget.stars, self.open)
                    break
                work.start(self._step, record, count, keep)
            work.finish()
            if interrupted:
                log.warning("interrupted with %d stars open: the interval is valid but not exact", self.open)
            return self._close(record)

    def _step(self, chunk: Any, record: RangeRecord, count: Tensor, keep: Callable[[Any], None] | None) -> list[Any]:
        """Advance a chunk, or take it into the results; returns the chunks it leaves open."""
        if chunk.layer < len(self.steps) - 1:
            return self.engine.advance(chunk)
        with self._results:
            self.engine.finish(chunk, record)
            count.index_add_(0, chunk.origin, torch.ones_like(chunk.origin))
            self.done += len(chunk)
            if keep is not None:
                keep(chunk)
        return []

    def _cost_of_closing(self) -> float:
        """Seconds per star to bound open stars, measured on a few of them."""
        chunk = self.pop()
        self.push([chunk])
        sample = chunk.select(slice(0, 64))
        began = time.monotonic()
        self._bound(sample)
        return (time.monotonic() - began) / len(sample)

    def _close(self, record: RangeRecord) -> Tensor:
        """Bound whatever is still open by zonotopes, so that the record covers every input star."""
        left = torch.zeros(record.certified.shape[1], dtype=torch.bool, device=record.certified.device)
        while self.open:
            chunk = self.pop()
            left[chunk.origin] = True
            lower, upper = self._bound(chunk)
            record.certify(0, chunk.origin, -lower)
            record.certify(1, chunk.origin, upper)
        return left

    def _bound(self, chunk: Any) -> tuple[Tensor, Tensor]:
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
        slack = chunk.slack + 1e-15 * chunk.rows.shape[1] * chunk.rows.abs().sum(1)
        step = self.steps[chunk.layer]
        spread = rows[:, 1:].abs().sum(1) + slack
        root_low, root_high = (bound[chunk.origin] for bound in self.root[chunk.layer])
        lower = torch.maximum(rows[:, 0] - spread, root_low)
        upper = torch.minimum(rows[:, 0] + spread, root_high)
        if step.relu is None:
            return lower, upper
        rows, slack = relu_band(rows, slack, lower, upper, step.relu)
        return zonotope_bounds(self.steps, rows, slack, chunk.layer + 1)[-1]


class _Workers:
    """Runs steps of a frontier: on the CPU in as many threads as torch has, one operation per thread.

    Operations here are too small to be worth splitting: torch's own threads would spend their time waiting
    for each other. Chunks are independent, so threads take one each; only this object touches the frontier.
    """

    def __init__(self, frontier: Frontier) -> None:
        self.frontier = frontier
        self.running: set[Future[list[Any]]] = set()
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Workers:
        self.threads = torch.get_num_threads()
        if self.frontier.workers > 1:
            self.pool = ThreadPoolExecutor(self.frontier.workers, initializer=torch.set_num_threads, initargs=(1,))
            torch.set_num_threads(1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)

    def start(self, step: Callable[..., list[Any]], *args: Any) -> None:
        """Give every free thread a chunk, and put back what has been done since."""
        if self.pool is None:
            self.frontier.push(step(self.frontier.pop(), *args))
            return
        while self.frontier.open and len(self.running) < self.frontier.workers:
            self.running.add(self.pool.submit(torch.no_grad()(step), self.frontier.pop(), *args))
        done, self.running = wait(self.running, return_when=FIRST_COMPLETED)
        for future in done:
            self.frontier.push(future.result())

    def finish(self) -> None:
        """Wait for what is running, and put it back."""
        for future in self.running:
            self.frontier.push(future.result())
        self.running = set()


@contextmanager
def _first_interrupt() -> Iterator[list[int]]:
    """Make the first Ctrl-C fill the list this yields instead of raising; the second one raises as usual.

    An exception could come between taking work off the frontier and putting its children back, and lose it.
    """
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
