"""Exact reach: both engines, pruning, budgets, batches, kept stars, refusals."""

from __future__ import annotations

import copy
import importlib
import os
import signal
import sys

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import DEVICES, DEVICES_SIM_SLOW, METHODS, random_network
from torchreach.core.errors import OptionError, ShapeError, UnsupportedLayerError

ROOT_BOUNDS = ["lirpa", "zonotope", "interval", "none"]


def unit_box(dim: int, stars: int = 1, **kwargs: object) -> tr.StarBatch:
    ones = torch.ones(stars, dim, **{"dtype": torch.float64, **kwargs})  # type: ignore[arg-type]
    return tr.StarBatch.from_box(-ones, ones)


def activation_patterns(network: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    patterns = []
    for layer in network:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            patterns.append(x > 0)
    return torch.cat(patterns, 1)


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
@pytest.mark.parametrize("method", METHODS)
def test_regions_in_the_plane_are_those_a_fine_grid_meets(device: str, method: str) -> None:
    network = random_network(3, [2, 4, 3, 1])
    side = torch.linspace(-1, 1, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    met = activation_patterns(network, grid).unique(dim=0)
    reached = tr.reach(network.to(device), unit_box(2, device=device), tr.Exact(method))
    assert len(reached) == len(met)
    values = network(grid.to(device))
    assert (reached.upper - values.max()).abs().max() < 1e-2
    assert reached.upper.device.type == device


@pytest.mark.parametrize("method", METHODS)
def test_one_neuron_cuts_the_box_in_two(method: str) -> None:
    network = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
        network[0].bias.zero_()
        network[2].weight.copy_(torch.tensor([[3.0]]))
        network[2].bias.copy_(torch.tensor([-1.0]))
    reached = tr.reach(network, unit_box(2), tr.Exact(method))
    assert len(reached) == 2
    torch.testing.assert_close(reached.lower, torch.tensor([[-1.0]], dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(reached.upper, torch.tensor([[5.0]], dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bounds", ROOT_BOUNDS)
def test_pruning_changes_the_work_and_not_the_result(method: str, bounds: str) -> None:
    network = random_network(5, [3, 8, 8, 2])
    stars = tr.StarBatch.from_box(torch.full((3,), -0.3).double(), torch.full((3,), 0.4).double())
    plain = tr.reach(network, stars, tr.Exact("vertices", "none"))
    pruned = tr.reach(network, stars, tr.Exact(method, bounds))
    assert len(pruned) == len(plain)
    torch.testing.assert_close(pruned.lower, plain.lower, atol=1e-8, rtol=0)
    torch.testing.assert_close(pruned.upper, plain.upper, atol=1e-8, rtol=0)
    settled = sum(layer.settled.get("root", 0) for layer in pruned.stats.layers)
    assert (settled > 0) == (bounds != "none")
    if bounds != "none":
        bare = tr.reach(network, stars, tr.Exact(method, "none"))
        rest = ("vertices", "box", "dual", "program")
        work = [sum(layer.settled.get(k, 0) for layer in r.stats.layers for k in rest) for r in (pruned, bare)]
        assert work[0] < work[1]


def test_counts_add_up() -> None:
    network = random_network(5, [3, 8, 8, 2])
    reached = tr.reach(network, unit_box(3), tr.Exact("vertices", "zonotope"))
    first, second = reached.stats.layers
    assert (first.neurons, second.neurons) == (8, 8)
    # every split adds one star, and every star that passes a layer has all its neurons settled
    assert first.stars == 1 + first.splits
    assert second.stars == first.stars + second.splits == len(reached)
    assert sum(second.settled.values()) == 8 * second.stars
    assert reached.stats.linear_programs == 0
    assert reached.stats.splits == len(reached) - 1


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_its_stars_give_alone(method: str) -> None:
    network = random_network(7, [3, 8, 6, 2])
    g = torch.Generator().manual_seed(0)
    lower = torch.rand(5, 3, generator=g, dtype=torch.float64) - 0.7
    stars = tr.StarBatch.from_box(lower, lower + torch.rand(5, 3, generator=g, dtype=torch.float64))
    together = tr.reach(network, stars, tr.Exact(method))
    for s in range(5):
        alone = tr.reach(network, stars.select([s]), tr.Exact(method))
        assert together.count[s] == len(alone)
        torch.testing.assert_close(together.lower[s], alone.lower[0], atol=1e-8, rtol=0)
        torch.testing.assert_close(together.upper[s], alone.upper[0], atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_output_stars_are_the_network_on_a_partition_of_the_input(method: str) -> None:
    network = random_network(3, [2, 4, 3, 2])
    stars = unit_box(2, 2)
    reached = tr.reach(network, stars, tr.Exact(method))
    assert reached.stars is not None
    assert reached.stars.origin.bincount().tolist() == reached.count.tolist()
    # predicate points are input points here; each lies in one star (or on a border), which maps it exactly
    points = stars.sample(300, seed=2)[0]
    mine = reached.stars.select(reached.stars.origin == 0)
    inside = (points @ mine.A.transpose(1, 2) <= mine.b[:, None] + 1e-9).all(2)
    assert (inside.sum(0) == 1).all()
    flat = mine.basis
    values = flat[:, :1] + points @ flat[:, 1:]
    wanted = network(points).detach()
    torch.testing.assert_close(values[inside.nonzero().T.unbind()], wanted[inside.nonzero()[:, 1]], atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_streaming_gives_the_same_ranges_without_stars(method: str) -> None:
    network = random_network(3, [2, 4, 3, 2])
    kept, streamed = (tr.reach(network, unit_box(2), tr.Exact(method), keep_stars=keep) for keep in (True, False))
    assert streamed.stars is None
    assert torch.equal(kept.upper, streamed.upper)
    assert torch.equal(kept.count, streamed.count)


@pytest.mark.parametrize("method", METHODS)
def test_constraints_restrict_the_range(method: str) -> None:
    network = random_network(11, [3, 8, 8, 2])
    box = unit_box(3)
    normal = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])
    stars = box.intersect(normal, torch.tensor([0.5, 0.2]))
    reached = tr.reach(network, stars, tr.Exact(method))
    samples = stars.sample(5000)[0]
    values = network(samples).detach()
    assert (values >= reached.lower).all()
    assert (values <= reached.upper).all()
    whole = tr.reach(network, box, tr.Exact(method))
    assert (reached.upper <= whole.upper + 1e-8).all()
    assert (whole.upper - reached.upper).max() > 1e-3
    assert ((reached.argmax[0] @ normal.double().T) <= torch.tensor([0.5, 0.2]) + 1e-8).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [tr.Budget(stars=1), tr.Budget(stars=40), tr.Budget(seconds=1e-9)])
def test_a_spent_budget_gives_a_valid_interval(method: str, budget: tr.Budget) -> None:
    network = random_network(5, [4, 12, 10, 2])
    stars = unit_box(4)
    full = tr.reach(network, stars, tr.Exact("vertices"))
    bounded = tr.reach(network, stars, tr.Exact(method), budget=budget)
    assert full.status == (tr.Status.EXACT,)
    assert bounded.status == (tr.Status.BOUNDED,)
    assert len(bounded) < len(full)
    assert (bounded.lower <= full.lower + 1e-9).all()
    assert (bounded.upper >= full.upper - 1e-9).all()
    assert (bounded.attained_upper <= full.upper + 1e-9).all()
    assert torch.isfinite(bounded.upper).all()
    replayed = network(bounded.argmax[0]).diagonal()
    torch.testing.assert_close(replayed, bounded.attained_upper[0], atol=1e-9, rtol=0)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_leaves_a_valid_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torchreach.work.run"], "REPORT_SECONDS", 0)
    network = random_network(5, [4, 16, 16, 16, 2])
    full = tr.reach(network, unit_box(4))

    calls = []

    def stop(progress: tr.Progress) -> None:
        calls.append(progress)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    slow = tr.reach(network, unit_box(4), progress=stop)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert slow.status == (tr.Status.BOUNDED,)
    assert (slow.upper >= full.upper - 1e-9).all()


def test_progress_reports_shrinking_work_and_a_valid_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torchreach.work.run"], "REPORT_SECONDS", 0)
    seen: list[tr.Progress] = []
    reached = tr.reach(random_network(5, [4, 16, 16, 16, 2]), unit_box(4), progress=seen.append)
    assert len(seen) > 5
    assert seen[-1].open == 0
    assert seen[-1].done == len(reached)
    for progress in seen:
        assert (progress.upper >= reached.upper - 1e-9).all()
        assert (progress.attained_upper <= reached.upper + 1e-9).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_point_is_a_star_of_no_variables(method: str) -> None:
    network = random_network(5, [3, 8, 2])
    x = torch.rand(4, 3, dtype=torch.float64)
    reached = tr.reach(network, tr.StarBatch.from_box(x, x), tr.Exact(method))
    assert reached.count.tolist() == [1] * 4
    torch.testing.assert_close(reached.upper, network(x).detach(), atol=1e-12, rtol=0)
    assert (reached.upper - reached.lower).max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_begin_or_end_with_relu(method: str) -> None:
    inner = random_network(5, [3, 8, 2])
    network = nn.Sequential(nn.ReLU(), *inner, nn.ReLU())
    stars = unit_box(3)
    reached = tr.reach(network, stars, tr.Exact(method))
    values = network(stars.sample(5000)[0])
    assert (reached.lower >= -1e-9).all()
    assert (values <= reached.upper).all()
    assert (reached.upper - reached.attained_upper).max() < 1e-8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_whole_number_weights_put_vertices_on_hyperplanes(method: str, seed: int) -> None:
    network = random_network(seed, [3, 6, 5, 2], whole=True)
    stars = unit_box(3)
    reached = tr.reach(network, stars, tr.Exact(method))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 3)
    values = network(torch.cat((corners, stars.sample(4000, seed=seed)[0]))).detach()
    assert (values <= reached.upper).all()
    assert (values >= reached.lower).all()
    assert (reached.upper - reached.attained_upper).max() < 1e-6
    other = tr.reach(network, stars, tr.Exact("vertices" if method == "programs" else "programs"))
    assert len(other) == len(reached)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_contains_float64(device: str) -> None:
    network = random_network(9, [3, 10, 10, 2], dtype=torch.float32)
    double = tr.reach(copy.deepcopy(network).double(), unit_box(3))
    single = tr.reach(network.to(device), unit_box(3, dtype=torch.float32, device=device))
    assert single.upper.dtype == torch.float32
    assert (single.lower.cpu().double() <= double.lower).all()
    assert (single.upper.cpu().double() >= double.upper).all()
    assert len(single) == len(double)


def test_the_module_is_left_as_it_was() -> None:
    network = random_network(9, [3, 10, 2], dtype=torch.float32).train()
    before = copy.deepcopy(network.state_dict())
    tr.reach(network, unit_box(3, dtype=torch.float32))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert next(network.parameters()).requires_grad


def test_bad_input_is_refused_before_any_work() -> None:
    network = random_network(9, [3, 10, 2])
    with pytest.raises(ShapeError, match="needs a torchreach.StarBatch, got Tensor"):
        tr.reach(network, torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"does not accept inputs of shape \(4,\)"):
        tr.reach(network, unit_box(4))
    with pytest.raises(UnsupportedLayerError, match="Tanh"):
        tr.reach(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), unit_box(3))
    with pytest.raises(OptionError, match="method must be one of auto, vertices, programs, got 'simplex'"):
        tr.Exact("simplex")
    with pytest.raises(OptionError, match="root_bounds must be one of .*, got 'crown'"):
        tr.Exact(root_bounds="crown")
    with pytest.raises(OptionError, match=r"Budget.seconds must be positive or None, got -1"):
        tr.Budget(seconds=-1)
    with pytest.raises(OptionError, match=r"Tolerances.sign must lie in \(0, 1\), got 0"):
        tr.Tolerances(sign=0)


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
def test_pieces_that_share_rows_give_the_regions_of_pieces_that_do_not(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = random_network(11, [9, 12, 8, 3]).to(device)
    middle = torch.full((9,), 0.1, dtype=torch.float64, device=device)
    stars = tr.StarBatch.from_box(middle - 0.2, middle + 0.2).intersect(torch.ones(9), 1.1)
    found = []
    for rows in (64, 0):
        monkeypatch.setattr(importlib.import_module("torchreach.engines.programs"), "SHARED_ROWS", rows)
        found.append(tr.reach(network, stars, tr.Exact("programs")))
    shared, own = found
    assert len(shared) == len(own) > 50
    torch.testing.assert_close(shared.lower, own.lower, atol=1e-8, rtol=0)
    torch.testing.assert_close(shared.upper, own.upper, atol=1e-8, rtol=0)
    x = stars.sample(500, seed=3)[0]
    y = network(x)
    assert ((y >= shared.lower) & (y <= shared.upper)).all()
