"""Steps of a frontier in processes, one per core: threads of one interpreter wait for each other.

Method: the open stars are cut into shares and the process forks, as torch's data loaders do, so that every worker
has all of them without anything being sent. Workers draw shares until none is left, work alone, each on one
thread, and send ranges, counters and kept stars back once (kept stars as they come). A share is drawn by reading
its number from a pipe, which is atomic and needs no lock that a dying worker could keep. Counters and ranges for
progress lie in shared memory.
Property: every open star is finished or bounded by exactly one worker, or the caller gets an error. The parent
takes nothing until every worker has shown that it can compute after the fork; if one cannot, it works on alone.
"""

from __future__ import annotations

import gc
import io
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.memory import Ledger
from torchreach.engines.record import Kept, Sink
from torchreach.work.frontier import Frontier, Limits

log = logging.getLogger(__name__)

START_SECONDS = 10.0  # for a worker to compute its first numbers
POLL_SECONDS = 0.05
TICKET = struct.Struct("<H")
ALIVE, OPEN, DONE, DRAWN, BYTES, PEAK, KEPT = range(7)


def can_fork(device: torch.device) -> bool:
    """Whether workers may be forked here: on Linux, from the main thread, on the CPU, and not inside a worker."""
    return (
        sys.platform == "linux"
        and device.type == "cpu"
        and threading.current_thread() is threading.main_thread()
        and not multiprocessing.current_process().daemon
        and not torch.cuda.is_initialized()
    )


class _Board:
    """Memory that parent and workers share; every cell has one writer.

    Attributes:
        stop: [1] set by the parent to make the workers end.
        cells: [W, 7] counters of each worker.
        attained: [W, 2, S, N] what each worker has attained.
    """

    def __init__(self, workers: int, attained: Tensor) -> None:
        numbers = 1 + 7 * workers
        self.memory = mmap.mmap(-1, 8 * (numbers + workers * attained.numel()))
        cells = torch.frombuffer(self.memory, dtype=torch.int64, count=numbers)
        self.stop, self.cells = cells[:1], cells[1:].view(workers, 7)
        values = torch.frombuffer(self.memory, dtype=torch.float64, offset=8 * numbers)
        self.attained = values.view(workers, *attained.shape)
        self.attained.copy_(attained)

    def total(self, cell: int) -> int:
        return int(self.cells[:, cell].sum())


def run_in_processes(
    frontier: Frontier,
    sink: Sink,
    limits: Limits,
    report: Callable[[], None] | None,
    every: float,
    until: Clock | None = None,
) -> Tensor | None:
    """Finish the open work of a frontier in `frontier.workers` processes, with a report `every` so many seconds.

    until: when to stop at the latest; what is open then, or for want of time, goes back into the frontier.

    Returns [S_in] bool: input stars with stars that were bounded instead of finished; or None if processes could
    not be started, with the frontier as it was. Raises RuntimeError if a worker fails.
    """
    done, size = frontier.done, frontier.open
    shares = frontier.shares(frontier.workers)
    inherited = Ledger()
    inherited.add(shares)
    board = _Board(frontier.workers, sink.record.attained)
    team = _Team()
    try:
        job = _Job(frontier, sink, limits, board, size, inherited, until)
        if not team.start(frontier.workers, shares, job, limits.clock.part(START_SECONDS)):
            for share in shares:
                frontier.push(share)
            return None
        left = torch.zeros_like(sink.count, dtype=torch.bool)
        reported, back = limits.clock.elapsed, list[Any]()
        while team.pipes:
            for content in team.receive():
                if isinstance(content, list):
                    assert sink.keep is not None
                    sink.keep(Kept(content))
                    continue
                count, ranges, counters, open_left, handed, stepped = content
                back += handed
                frontier.stepped += stepped
                sink.count.add_(count)
                sink.record.take(*ranges)
                frontier.engine.tally.add(*counters)
                left |= open_left
            frontier.done = done + board.total(DONE)
            # Stars in shares that nobody has drawn, and those in the workers.
            frontier.open = size - board.total(DRAWN) + board.total(OPEN)
            if limits.clock.interrupted:
                board.stop[0] = 1
            if report is not None and limits.clock.elapsed - reported >= every:
                _report(sink, board, report)
                reported = limits.clock.elapsed
        frontier.open = 0
        frontier.kept += board.total(KEPT)
        frontier.peak = max(frontier.peak, inherited.bytes + frontier.kept + board.total(PEAK))
        frontier.clear()
        for share in (back, *team.undrawn(shares)):
            frontier.push(share)
        frontier.gather()
        return left
    finally:
        team.end()


def _report(sink: Sink, board: _Board, report: Callable[[], None]) -> None:
    """Progress with what the workers have attained so far; where they did comes only at their end."""
    own = sink.record.attained
    sink.record.attained = torch.maximum(own, board.attained.amax(0).to(own.dtype))
    try:
        report()
    finally:
        sink.record.attained = own


class _Stop:
    """What Ctrl-C fills, as a worker sees it."""

    def __init__(self, board: _Board) -> None:
        self.memory = board.memory

    def __len__(self) -> int:
        return int(any(self.memory[:8]))


class _Team:
    """Workers, and the pipes they answer through."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("fork") if sys.platform == "linux" else None
        self.workers: list[Any] = []
        self.pipes: dict[Connection, Any] = {}
        self.tickets = -1

    def start(self, number: int, shares: list[list[Any]], job: _Job, clock: Clock) -> bool:
        """Fork the workers; False if one of them cannot compute before the clock is over."""
        assert self.context is not None
        tickets, fill = os.pipe()
        self.tickets = tickets
        os.write(fill, b"".join(TICKET.pack(i) for i in range(len(shares))))
        os.close(fill)  # a pipe that is read empty then says so
        try:
            for slot in range(number):
                reader, writer = self.context.Pipe(duplex=False)
                worker = self.context.Process(
                    target=job.run, args=(slot, shares, tickets, writer, os.getpid()), daemon=True
                )
                with warnings.catch_warnings():  # it computes on one thread: torch's others are not needed there
                    warnings.simplefilter("ignore", DeprecationWarning)
                    worker.start()
                self.workers.append(worker)
                self.pipes[reader] = worker
                writer.close()  # so that the pipe ends when the worker does
        except OSError as error:
            log.warning("no processes, threads instead: %s", error)
            return False
        while job.board.total(ALIVE) < number:
            ended = [slot for slot, worker in enumerate(self.workers) if worker.exitcode is not None]
            if clock.over or not job.board.cells[ended, ALIVE].all():
                log.warning("forked processes cannot compute here; threads instead")
                return False
            time.sleep(0.001)
        return True

    def receive(self) -> list[Any]:
        """What workers have sent. Raises RuntimeError if one failed."""
        answers = []
        for pipe in wait(list(self.pipes), POLL_SECONDS):
            assert isinstance(pipe, Connection)
            try:
                kind, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                worker = self.pipes[pipe]
                worker.join()
                raise RuntimeError(
                    f"a worker process of this run needed to finish its stars, but ended with exit code "
                    f"{worker.exitcode} (-9: killed, often for lack of memory); its share is lost. Less memory is "
                    "used with a smaller Budget(memory=...), no processes with torch.set_num_threads(1)"
                ) from None
            if kind == "error":
                raise RuntimeError(f"a worker process of this run failed:\n{content}")
            answers.append(content)
            if kind == "end":
                del self.pipes[pipe]
                pipe.close()
        return answers

    def undrawn(self, shares: list[list[Any]]) -> list[list[Any]]:
        """Shares that no worker has drawn, once all have ended."""
        rest = []
        while ticket := os.read(self.tickets, TICKET.size):
            rest.append(shares[TICKET.unpack(ticket)[0]])
        return rest

    def end(self) -> None:
        """Leave no process behind."""
        if self.tickets >= 0:
            os.close(self.tickets)
        for pipe in self.pipes:
            pipe.close()
        for worker in self.workers:
            if worker.exitcode is None and self.pipes:
                worker.kill()
        for worker in self.workers:
            worker.join()
            worker.close()


class _Job:
    """What a worker does."""

    def __init__(
        self,
        frontier: Frontier,
        sink: Sink,
        limits: Limits,
        board: _Board,
        size: int,
        inherited: Ledger,
        until: Clock | None,
    ) -> None:
        self.frontier, self.sink, self.limits, self.board = frontier, sink, limits, board
        self.size, self.inherited, self.until = size, inherited, until
        self.done = frontier.done

    def run(self, slot: int, shares: list[list[Any]], tickets: int, pipe: Connection, parent: int) -> None:
        """Body of a worker process; sends ("end", results) or ("error", traceback) last."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and says when to stop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        gc.freeze()  # the parent's objects are not ours to finalise
        try:
            torch.set_num_threads(1)
            trial = torch.full((2, 65, 65), 0.01, dtype=torch.float64) + torch.eye(65, dtype=torch.float64)
            torch.linalg.cholesky_ex(trial @ trial)
            mine = self.board.cells[slot]
            mine[ALIVE] = 1
            _send(pipe, "end", self._work(slot, shares, tickets, pipe, parent))
        except BrokenPipeError:  # the parent has given up
            pass
        except BaseException:
            _send(pipe, "error", traceback.format_exc())

    def _work(self, slot: int, shares: list[list[Any]], tickets: int, pipe: Connection, parent: int) -> Any:
        frontier, sink, board = self.frontier, self.sink, self.board
        mine = board.cells[slot]
        # Ctrl-C does not reach a worker: the parent says when to stop.
        frontier.clock = clock = self.limits.clock.part(None, _Stop(board))
        limits = replace(self.limits, clock=clock)
        sink.count.zero_()
        frontier.engine.tally.take()
        kept_before = frontier.kept
        frontier.done = frontier.peak = frontier.kept = frontier.stepped = 0
        frontier.workers = 1
        # The shares are in memory once, for all workers; what is left is for each a part.
        frontier.used, held = self.inherited, self.inherited.bytes
        memory = max(0.0, frontier.memory - held - kept_before)
        if sink.keep is not None:
            sink = replace(sink, keep=lambda kept: _send(pipe, "keep", kept.groups))

        def draw() -> bool:
            ticket = os.read(tickets, TICKET.size)
            if ticket:
                chunks = shares[TICKET.unpack(ticket)[0]]
                frontier.push(chunks)
                mine[DRAWN] += sum(map(len, chunks))
            return bool(ticket)

        def publish() -> None:
            values = {OPEN: frontier.open, DONE: frontier.done, PEAK: max(0, frontier.peak - frontier.kept - held)}
            for cell, value in values.items():
                mine[cell] = value
            mine[KEPT] = frontier.kept
            board.attained[slot] = sink.record.attained

        while True:
            # Large batches to the end: the next share is drawn before the last one has dwindled.
            while frontier.open <= min(frontier.limit, self._waiting() // len(board.cells)) // 4 and draw():
                pass
            publish()
            # One step at least, so that rounds of any length end.
            if not frontier.open or (frontier.stepped and self.until is not None and self.until.over):
                break
            if os.getppid() != parent:
                os._exit(1)
            if limits.spent(frontier, self.done + board.total(DONE), self._waiting()):
                break
            frontier.memory = (memory - board.total(KEPT)) / len(board.cells) + frontier.kept + held
            chunk = frontier.begin()
            if chunk is None:
                log.info("budget of %g bytes spent with %d stars open", memory, frontier.open)
                break
            frontier.settle(chunk, frontier.step(chunk, sink))
        record, handed = sink.record, list[Any]()
        if self.until is None:
            while frontier.open and draw():  # stopped early: what nobody has begun is bounded here
                pass
            left = frontier.close(record)
        else:
            handed = [chunk for group in frontier.groups.values() for chunk in group.chunks]
            left = torch.zeros_like(sink.count, dtype=torch.bool)
        publish()
        ranges = (record.certified, record.attained, record.point)
        return sink.count, ranges, frontier.engine.tally.take(), left, handed, frontier.stepped

    def _waiting(self) -> int:
        """Stars in shares that nobody has drawn."""
        return self.size - self.board.total(DRAWN)


class _Pickler(pickle.Pickler):
    """Tensors by value: neither through files that torch would share, nor more of a view than what it shows."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return _tensor, (obj.numpy(),)
        return NotImplemented


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def _send(pipe: Connection, kind: str, content: Any) -> None:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump((kind, content))
    pipe.send_bytes(buffer.getbuffer())
