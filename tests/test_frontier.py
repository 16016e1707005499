"""The work list: workers in processes, memory budgets, and what happens when either fails."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.clocks import expiring, in_worker
from tests.networks import METHODS, random_network
from torchreach.app.arguments import _bytes
from torchreach.core import memory
from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import OptionError
from torchreach.core.results import Reason
from torchreach.engines.vertices import VertexEngine
from torchreach.verbs.reach import reach_within
from torchreach.work import frontier, processes, run

CPU = torch.device("cpu")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def box(dim: int, stars: int = 1) -> tr.StarBatch:
    ones = torch.ones(stars, dim, dtype=torch.float64)
    return tr.StarBatch.from_box(-ones, ones)


NETWORK = random_network(5, [3, 8, 8, 8, 2])


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two threads, small chunks and processes as soon as there is work for two; counts the forks."""
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return processes.run_in_processes(*args)

    monkeypatch.setattr(run, "run_in_processes", counted)
    monkeypatch.setattr(run, "FORK_SECONDS", 0)
    monkeypatch.setitem(frontier.CHUNK, "cpu", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield calls
    torch.set_num_threads(threads)
    assert multiprocessing.active_children() == []


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def alone(stars: int = 1, method: str = "vertices") -> tr.ReachResult:
    """The same on one thread, in one go."""
    threads, chunk = torch.get_num_threads(), frontier.CHUNK["cpu"]
    torch.set_num_threads(1)
    frontier.CHUNK["cpu"] = 1024
    try:
        return tr.reach(NETWORK, box(3, stars), tr.Exact(method))
    finally:
        torch.set_num_threads(threads)
        frontier.CHUNK["cpu"] = chunk


def assert_valid(bounded: tr.ReachResult) -> None:
    full = alone(len(bounded.status))
    assert full.status == (tr.Status.EXACT,) * len(full.status)
    assert (bounded.lower <= full.lower + 1e-9).all()
    assert (bounded.upper >= full.upper - 1e-9).all()
    assert (bounded.attained_upper <= full.upper + 1e-9).all()
    assert torch.isfinite(bounded.upper).all()


@needs_fork
@pytest.mark.parametrize("method", METHODS)
def test_processes_find_what_one_thread_finds(forks: list[Any], method: str) -> None:
    wanted = alone(2, method)
    found = tr.reach(NETWORK, box(3, 2), tr.Exact(method))
    assert len(forks) == 1
    assert torch.get_num_threads() == 2
    assert torch.equal(found.count, wanted.count)
    assert found.status == wanted.status == (tr.Status.EXACT,) * 2
    torch.testing.assert_close(found.lower, wanted.lower, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.upper, wanted.upper, atol=1e-9, rtol=0)
    values = NETWORK(found.argmax.flatten(0, 1)).view(2, 2, 2).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(values, found.attained_upper, atol=1e-12, rtol=0)
    for mine, theirs in zip(found.stats.layers, wanted.stats.layers, strict=True):
        assert mine.stars == theirs.stars
        assert method != "vertices" or mine == theirs


@needs_fork
def test_processes_send_the_stars_that_are_kept(forks: list[Any]) -> None:
    found = tr.reach(NETWORK, box(3, 2), tr.Exact("vertices"), keep_stars=True)
    assert forks
    assert found.stars is not None
    assert len(found.stars) == len(found)
    assert torch.equal(found.stars.origin.bincount(), found.count)
    # each point lies in one of them, which maps it as the network does
    points = box(3).sample(200, seed=2)[0]
    mine = found.stars.select(found.stars.origin == 1)
    inside = (points @ mine.A.transpose(1, 2) <= mine.b[:, None] + 1e-9).all(2)
    assert (inside.sum(0) == 1).all()
    star, point = inside.nonzero(as_tuple=True)
    mapped = mine.basis[star, 0] + (points[point, None] @ mine.basis[star, 1:])[:, 0]
    torch.testing.assert_close(mapped, NETWORK(points[point]), atol=1e-9, rtol=0)


@needs_fork
@pytest.mark.parametrize("spent", ["stars", "seconds", "memory"])
def test_a_budget_spent_in_processes_gives_a_valid_interval(
    forks: list[Any], spent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spent == "memory":
        monkeypatch.setattr(frontier.Frontier, "_room", lambda _: 0.0 if in_worker() else 1e9)
    clock = expiring(20, in_worker) if spent == "seconds" else NO_LIMIT
    budget = tr.Budget(stars=100 if spent == "stars" else None)
    found = reach_within(clock, NETWORK, box(3), tr.Exact("vertices"), budget=budget)
    assert forks
    assert found.status == (tr.Status.BOUNDED,)
    assert found.reasons == (Reason.BUDGET,)
    assert len(found) < len(alone())
    assert_valid(found)


@needs_fork
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_stops_the_processes(forks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REPORT_SECONDS", 0)
    advance = VertexEngine.advance

    def endless(self: VertexEngine, chunk: Any, clock: Clock, room: float) -> list[Any]:
        while in_worker() and not clock.over:
            threading.Event().wait(0.001)
        return advance(self, chunk, clock, room)

    monkeypatch.setattr(VertexEngine, "advance", endless)
    seen: list[tr.Progress] = []

    def stop(progress: tr.Progress) -> None:
        if forks:
            seen.append(progress)
            if len(seen) == 2:
                for child in multiprocessing.active_children():  # a terminal interrupts the whole group
                    assert child.pid is not None
                    os.kill(child.pid, signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    found = tr.reach(NETWORK, box(3), tr.Exact("vertices"), progress=stop)
    assert found.status == (tr.Status.BOUNDED,)
    assert found.reasons == (Reason.INTERRUPTED,)
    assert_valid(found)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@needs_fork
def test_progress_comes_from_the_processes(forks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REPORT_SECONDS", 0)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.001)
    seen: list[tr.Progress] = []

    def note(progress: tr.Progress) -> None:
        if forks:
            seen.append(progress)

    found = tr.reach(NETWORK, box(3), tr.Exact("vertices"), progress=note)
    assert any(0 < p.done < len(found) and p.open > 0 for p in seen)
    assert (seen[-1].done, seen[-1].open) == (len(found), 0)
    for earlier, later in zip(seen, seen[1:], strict=False):
        assert earlier.done <= later.done
        assert (earlier.attained_upper <= later.attained_upper).all()
        assert (later.attained_upper <= found.upper).all()


@needs_fork
@pytest.mark.parametrize("end", ["exit", "raise"])
def test_a_worker_that_dies_is_an_error_and_no_smaller_answer(
    forks: list[Any], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = VertexEngine.advance

    def broken(self: VertexEngine, chunk: Any, clock: Clock, room: float) -> list[Any]:
        if in_worker() and chunk.layer == 2:
            if end == "exit":
                os._exit(3)
            raise MemoryError("of a worker")
        return advance(self, chunk, clock, room)

    monkeypatch.setattr(VertexEngine, "advance", broken)
    message = "ended with exit code 3" if end == "exit" else "MemoryError: of a worker"
    with pytest.raises(RuntimeError, match=message):
        tr.reach(NETWORK, box(3), tr.Exact("vertices"))
    assert forks


@needs_fork
@pytest.mark.parametrize("failure", ["fork", "hang"])
def test_threads_take_over_where_processes_cannot_start(
    forks: list[Any], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BlockingIOError("no more processes")

    if failure == "fork":
        monkeypatch.setattr(os, "fork", refuse)
    else:
        monkeypatch.setattr(processes, "START_SECONDS", 0.2)
        monkeypatch.setattr(processes._Job, "run", lambda *_: threading.Event().wait(60))
    found = tr.reach(NETWORK, box(3), tr.Exact("vertices"))
    assert forks
    assert found.status == (tr.Status.EXACT,)
    assert len(found) == len(alone())


@needs_fork
def test_processes_are_forked_from_the_main_thread_only(forks: list[Any]) -> None:
    results: list[tr.ReachResult] = []
    thread = threading.Thread(target=lambda: results.append(tr.reach(NETWORK, box(3), tr.Exact("vertices"))))
    thread.start()
    thread.join()
    assert not forks
    assert len(results[0]) == len(alone())


def run_frontier(
    budget: tr.Budget, monkeypatch: pytest.MonkeyPatch, network: nn.Module = NETWORK, **options: Any
) -> tuple[tr.ReachResult, frontier.Frontier]:
    """A run and its work list."""
    made: list[frontier.Frontier] = []
    init = frontier.Frontier.__init__

    def note(self: frontier.Frontier, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(frontier.Frontier, "__init__", note)
        result = tr.reach(network, box(3, 3), budget=budget, **options)
    return result, made[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_little_memory_changes_the_order_and_not_the_result(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORK if method == "vertices" else random_network(5, [3, 8, 6, 2])  # programs take longer
    options: dict[str, Any] = {"network": network, "method": tr.Exact(method), "keep_stars": False}
    plenty, high = run_frontier(tr.Budget(memory=1e10), monkeypatch, **options)
    least = high.peak // 3
    little, low = run_frontier(tr.Budget(memory=least), monkeypatch, **options)
    assert low.peak <= least
    assert little.status == plenty.status == (tr.Status.EXACT,) * 3
    assert torch.equal(little.count, plenty.count)
    torch.testing.assert_close(little.lower, plenty.lower, atol=1e-9, rtol=0)
    torch.testing.assert_close(little.upper, plenty.upper, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 100_000])
def test_too_little_memory_is_a_spent_budget(method: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run_frontier(tr.Budget(memory=size), monkeypatch, method=tr.Exact(method))
    assert tr.Status.BOUNDED in found.status
    assert_valid(found)


@pytest.mark.usefixtures("one_thread")
def test_kept_stars_count(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, without = run_frontier(tr.Budget(), monkeypatch, keep_stars=False)
    kept, work = run_frontier(tr.Budget(), monkeypatch, keep_stars=True)
    assert kept.stars is not None
    assert work.peak > work.kept > kept.stars.basis.numel() * 8
    assert without.kept == 0
    short, _ = run_frontier(tr.Budget(memory=0.7 * work.kept), monkeypatch, keep_stars=True)
    assert tr.Status.BOUNDED in short.status
    assert 0 < len(short) < len(streamed)
    assert_valid(short)


def test_the_default_budget_is_part_of_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    assert memory.free_memory(CPU) == memory.UNKNOWN
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     800 kB\n")
    assert memory.free_memory(CPU) == 800 * 1024
    assert memory.default_budget(CPU) == 400 * 1024
    # version 2: a limit somewhere above; version 1: the container's own group lies at the base
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:cpu,memory:/docker/x\n0::/a/b\n")
    group = tmp_path / "cgroup" / "a"
    (group / "b").mkdir(parents=True)
    for name, text in (("memory.max", "500000\n"), ("memory.current", "200000\n")):
        (group / name).write_text(text)
    (group / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    (group / "b" / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) == 301000
    base = tmp_path / "cgroup" / "memory"
    base.mkdir()
    (base / "memory.limit_in_bytes").write_text("90000\n")
    (base / "memory.usage_in_bytes").write_text("50000\n")
    assert memory.free_memory(CPU) == 40000


@pytest.mark.parametrize("value", [0, -5, float("nan"), "2GB"])
def test_bad_memory_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"Budget.memory must be positive or None, got "):
        tr.Budget(memory=value)


def test_sizes_on_the_command_line() -> None:
    wanted = {"2GB": 2e9, "500 mb": 5e8, "1.5GiB": 1.5 * 2**30, "1000000": 1e6, ".5k": 500, "3b": 3}
    for text, number in wanted.items():
        assert _bytes(text) == number
    for text in ("", "0", "0.1", "-1GB", "GB", "2 gigs", "1e9", "inf", "2XB"):
        with pytest.raises(OptionError, match="--memory must be a positive size such as 2GB"):
            _bytes(text)
