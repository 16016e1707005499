"""Budgets of time and Ctrl-C, by looks at a clock of the tests' own: a run stops anywhere, with a valid interval."""

from __future__ import annotations

import functools
import os
import signal
from typing import Any

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.clocks import PAST, creeping, expiring, pressed
from tests.networks import METHODS, random_network
from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime, first_interrupt, running
from torchreach.core.results import ReachResult, Reason
from torchreach.domains.lirpa import preactivation_bounds
from torchreach.domains.root import root_bounds
from torchreach.domains.zonotope import BUFFERS, box_rows, interval_bounds, zonotope_bounds
from torchreach.engines import vertices
from torchreach.read.steps import steps
from torchreach.verbs.reach import reach_within
from torchreach.work import frontier

NETWORK = random_network(5, [3, 8, 8, 2])
LOOKS = [0, 1, 2, 5, 20, 60]


def box(stars: int = 2) -> tr.StarBatch:
    ones = torch.ones(stars, 3, dtype=torch.float64)
    return tr.StarBatch.from_box(-ones, ones)


@functools.cache
def exact() -> ReachResult:
    return tr.reach(NETWORK, box(1), tr.Exact("vertices"))


def assert_valid(found: ReachResult) -> None:
    samples = NETWORK(box(1).sample(2000)[0])
    assert (found.lower <= torch.minimum(exact().lower + 1e-9, samples.amin(0))).all()
    assert (found.upper >= torch.maximum(exact().upper - 1e-9, samples.amax(0))).all()
    assert torch.isfinite(found.upper - found.lower).all()
    for points, value in ((found.argmin, found.attained_lower), (found.argmax, found.attained_upper)):
        assert (points.abs() <= 1).all()
        replayed = NETWORK(points.flatten(0, 1)).unflatten(0, points.shape[:2]).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(replayed, value, atol=1e-12, rtol=0)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many looks in a small run."""
    monkeypatch.setitem(frontier.CHUNK, "cpu", 8)
    monkeypatch.setitem(vertices.NUMBERS, "cpu", 1 << 10)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("end", [expiring, creeping, pressed])
def test_a_run_stops_at_any_look_with_a_valid_interval(end: Any, looks: int, method: str) -> None:
    found = reach_within(end(looks), NETWORK, box(), tr.Exact(method, "zonotope"))
    assert found.status == (tr.Status.BOUNDED,) * 2
    assert found.reasons == (Reason.INTERRUPTED if end is pressed else Reason.BUDGET,) * 2
    assert len(found) < 2 * len(exact())
    assert_valid(found)


@pytest.mark.parametrize("method", METHODS)
def test_stars_that_are_done_in_time_are_exact(method: str) -> None:
    # The first star is a point of one region, the second has all of them.
    lower = torch.tensor([[0.5, 0.5, 0.5], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    upper = torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]], dtype=torch.float64)
    found = reach_within(expiring(400), NETWORK, tr.StarBatch.from_box(lower, upper), tr.Exact(method, "zonotope"))
    full = reach_within(NO_LIMIT, NETWORK, tr.StarBatch.from_box(lower, upper), tr.Exact("vertices", "zonotope"))
    assert full.reasons == (Reason.CLOSED,) * 2
    assert (found.lower <= full.lower + 1e-9).all()
    assert (found.upper >= full.upper - 1e-9).all()


@pytest.mark.parametrize("looks", [3, 6, 9])
def test_one_step_stops_in_the_middle_and_hands_back_what_there_is(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = []
    init = frontier.Frontier.__init__

    def note(self: frontier.Frontier, engine: Any, *args: Any) -> None:
        init(self, engine, *args)
        engines.append((engine, self))

    monkeypatch.setattr(frontier.Frontier, "__init__", note)
    monkeypatch.setitem(vertices.NUMBERS, "cpu", 1 << 10)
    reach_within(expiring(0), NETWORK, box(1), tr.Exact("vertices", "none"))
    engine = engines[0][0]
    cube = torch.zeros(1, 4, 3, dtype=torch.float64)
    cube[0, 1:] = torch.eye(3)
    planes, origin = torch.empty(1, 0, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    (chunk,) = engine.start(cube, cube.new_zeros(1, 3), planes, origin)
    whole = engine.advance(chunk)
    assert {part.layer for part in whole} == {1}
    parts = engine.advance(chunk, expiring(looks))
    assert sum(map(len, parts)) > 1
    assert 0 in {part.layer for part in parts}
    # what is handed back still covers the cube: every point of it lies in the box of a part
    points = box(1).sample(500)[0]
    inside = torch.zeros(500, dtype=torch.bool)
    for part in parts:
        low, high = part.box()
        inside |= ((points[:, None] >= low) & (points[:, None] <= high)).all(2).any(1)
    assert inside.all()
    # and becomes the same stars in the end
    rest = [piece for part in parts if part.layer == 0 for piece in engine.advance(part)]
    assert sum(len(part) for part in [*parts, *rest] if part.layer == 1) == sum(map(len, whole))


def test_a_step_has_little_room() -> None:
    found = tr.reach(NETWORK, box(1), tr.Exact("vertices", "none"), budget=tr.Budget(memory=2e5))
    assert_valid(found)


@pytest.mark.usefixtures("small_steps")
def test_open_stars_get_root_bounds_where_there_is_no_time_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "GRACE", 0.0)
    found = reach_within(expiring(25), NETWORK, box(), tr.Exact("vertices", "zonotope"))
    rows, slack = box_rows(-torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    network = steps(NETWORK, (3,), dtype=torch.float64, device=torch.device("cpu"))
    low, high = zonotope_bounds(network, rows, slack)[-1]
    assert_valid(found)
    torch.testing.assert_close(found.lower, low, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.upper, high, atol=1e-9, rtol=0)


@pytest.mark.parametrize("looks", range(6))
def test_zonotopes_go_on_as_intervals_when_the_time_is_up(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreach.graph.steps.WORK", 64)
    network = steps(NETWORK, (3,), dtype=torch.float64, device=torch.device("cpu"))
    rows, slack = box_rows(-torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64))
    found = zonotope_bounds(network, rows, slack, clock=expiring(looks))
    whole, loose = zonotope_bounds(network, rows, slack), interval_bounds(network, rows, slack)
    x = box(1).sample(2000)[0]
    for step, (low, high), best, worst in zip(network, found, whole, loose, strict=True):
        x = step.linear(x) + step.bias
        assert ((x >= low) & (x <= high)).all()
        if looks == 0:
            torch.testing.assert_close((low, high), worst)
        x = x.clamp(min=0) if step.relu is not None else x
        assert low.shape == best[0].shape
    for k, (low, high) in enumerate(zonotope_bounds(network, rows, slack, memory=1.0)):
        torch.testing.assert_close((low, high), loose[k])
    first = BUFFERS * 8 * rows.shape[1] * network[0].features  # bytes of the first map alone
    kept = zonotope_bounds(network, rows, slack, memory=first)
    torch.testing.assert_close(kept[0], whole[0])
    assert (kept[-1][1] > whole[-1][1]).any()
    assert (kept[-1][1] >= x.amax(0)).all()


def test_auto_lirpa_is_stopped_between_two_of_its_operations() -> None:
    pytest.importorskip("auto_LiRPA")
    lower = -torch.ones(1, 3, dtype=torch.float64)
    network = steps(NETWORK, (3,), dtype=torch.float64, device=torch.device("cpu"))
    rows, slack = box_rows(lower, -lower)
    known = interval_bounds(network, rows, slack)
    preactivation_bounds(network, rows, slack, known)
    for looks in (0, 5, 50):
        with pytest.raises(OutOfTime):
            preactivation_bounds(network, rows, slack, known, pressed(looks))
    assert root_bounds(network, rows, slack, "lirpa", 1e-9, 1, pressed(30))[1] == "zonotope"
    assert root_bounds(network, rows, slack, "lirpa", 1e-9, 1, memory=100.0)[1] == "zonotope"


def test_parts_of_a_clock() -> None:
    time = [0.0]
    clock = Clock(10, [], now=lambda: time[0])
    part, longer = clock.part(4), clock.part(40)
    time[0] = 5.0
    assert (part.over, longer.over, clock.over) == (True, False, False)
    time[0] = PAST
    assert longer.over
    grace = clock.grace(2)
    assert not grace.over
    time[0] += 3
    assert grace.over


@pytest.mark.usefixtures("ctrl_c")
def test_grace_ends_at_the_first_interrupt_after_it() -> None:
    with running(None) as clock:
        grace = clock.grace(10)
        os.kill(os.getpid(), signal.SIGINT)
        assert clock.interrupted
        assert grace.over
        assert not clock.grace(10).over


@pytest.mark.usefixtures("ctrl_c")
def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with first_interrupt() as pressed_:
        os.kill(os.getpid(), signal.SIGINT)
        assert not pressed_
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert tr.reach(nn.Sequential(nn.Linear(3, 1).double()), box(1)).status == (tr.Status.EXACT,)
