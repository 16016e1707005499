"""Deployed comparisons within budgets: what they say is true whenever the clock ends them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.checks import assert_attained, assert_valid
from tests.clocks import expiring, pressed
from tests.networks import random_network
from tests.test_deployed import case, differences, int8_network
from torchreach.core.clock import NO_LIMIT
from torchreach.core.errors import OptionError
from torchreach.core.results import Reason
from torchreach.graph.quantizer import Quantizer
from torchreach.search.result import Question
from torchreach.verbs import int8_relaxed
from torchreach.verbs import int8_star as deployed_star
from torchreach.verbs.first_look import Places
from torchreach.verbs.int8_pair import deployed_discrepancy

SIGNED = Question("signed", 1e-9)
LOOKS = (0, 1, 2, 5, 15, 60)


def pooled(seed: int = 0) -> tuple[nn.Module, nn.Module, tr.StarBatch]:
    """A convolution whose average pooling meets exact ties of codes."""
    g = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.4)
    data = torch.rand(200, 1, 4, 4, generator=g)
    small = int8_network(nn.Sequential(*copy.deepcopy(network)), data)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    return network.double(), small, tr.StarBatch.from_image(data[:1].double(), 0.01, mask)


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("inputs", [3, 10])
def test_an_interval_is_valid_whenever_the_clock_ends_it(looks, inputs):
    original, small, x = case(3, inputs=inputs)
    stars = tr.StarBatch.from_image(torch.stack((x, -x)), 0.05)
    found = deployed_discrepancy(original, small, stars, SIGNED, clock=expiring(looks))
    assert_valid(found, partial(differences, original, small), stars)
    if looks == 0:
        assert found.reasons == (Reason.BUDGET,) * 2
        assert bool((found.lower.amax(1) > 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_the_witness_of_a_convolution_is_no_worse_than_random_inputs(seed):
    g = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    data = torch.rand(64, 1, 8, 8, generator=g)
    small = int8_network(copy.deepcopy(network), data)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3:5, 2:5] = True
    stars = tr.StarBatch.from_image(data[:1], 0.1, mask)
    found = tr.discrepancy(network, small, stars, budget=tr.Budget(stars=1))
    x = stars.sample(1000, seed)[0]
    with torch.no_grad():
        sampled = (network(x).double() - small(x).double()).abs().amax(0)
    assert bool((found.lower[0].double() >= sampled - 1e-6).all())


@pytest.mark.parametrize("looks", [0, 3, 30, None])
def test_pooling_attains_what_the_module_computes(looks):
    original, small, stars = pooled()
    clock = expiring(looks) if looks is not None else NO_LIMIT
    found = deployed_discrepancy(original, small, stars, SIGNED, clock=clock)
    assert_valid(found, partial(differences, original, small), stars)


def test_ctrl_c_is_said_to_have_interrupted():
    original, small, x = case(3, inputs=10)
    stars = tr.StarBatch.from_image(x[None], 0.1)
    found = deployed_discrepancy(original, small, stars, SIGNED, clock=pressed(20))
    assert found.reasons == (Reason.INTERRUPTED,)
    assert_valid(found, partial(differences, original, small), stars)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_witnesses_are_numbers_of_the_stars_dtype(dtype):
    original, small, x = case(3)
    stars = tr.StarBatch.from_box((x[None] - 0.05).to(dtype), (x[None] + 0.05).to(dtype))
    found = tr.discrepancy(original, small, stars)
    assert_attained(found, lambda x: differences(original, small, x.float()), stars)
    low, high, _ = stars.bounding_box()
    assert bool((found.witness.double() >= low).all() and (found.witness.double() <= high).all())


def test_a_tolerance_ends_at_the_first_witness_beyond_it_and_the_first_certificate_below_it():
    original, small, x = case(3, inputs=10)
    stars = tr.StarBatch.from_image(x[None], 0.05)
    beyond = tr.discrepancy(original, small, stars, tolerance=1e-4)
    assert beyond.reasons == (Reason.EXCEEDED,)
    assert beyond.stats.method == "intervals"
    assert float(beyond.max_lower) > 1e-4
    below = tr.discrepancy(original, small, stars, tolerance=100.0)
    assert below.reasons == (Reason.WITHIN,)
    assert below.within(100.0)
    assert below.stats.method == "intervals"


def test_a_gap_is_enough_where_it_was_asked_for():
    original, small, x = case(3)
    stars = tr.StarBatch.from_image(x[None], 0.1)
    found = tr.discrepancy(original, small, stars, gap=50.0)
    assert found.reasons in ((Reason.GAP,), (Reason.CLOSED,))
    assert float((found.upper - found.lower).max()) <= 50.0


def test_later_stars_get_an_ascent_before_the_first_one_is_finished():
    original, small, x = case(3, inputs=6)
    stars = tr.StarBatch.from_image(x.repeat(4, 1), 0.1)
    order = []
    start, run = deployed_star.DeployedStar.start, deployed_star.DeployedStar.run

    def begun(self, clock):
        order.append("start")
        start(self, clock)

    def finished(self, **options):
        order.append("run")
        run(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployed_star.DeployedStar, "start", begun)
        patch.setattr(deployed_star.DeployedStar, "run", finished)
        tr.discrepancy(original, small, stars, gap=0.6)
    assert order == ["start"] * 4 + ["run"] * 4


def test_methods_of_deployed_networks():
    original, small, x = case(3)
    stars = tr.StarBatch.from_image(x[None], 0.03)
    exact = tr.discrepancy(original, small, stars, "exact")
    search = tr.discrepancy(original, small, stars, "search")
    assert exact.stats.method == "cells"
    assert int(exact.regions) > 0
    assert search.stats.method == "relaxation"
    assert search.stats.branches > 0
    assert bool((exact.lower <= search.upper + 1e-9).all() and (search.lower <= exact.upper + 1e-9).all())
    with pytest.raises(OptionError, match=r"method 'exact' enumerates at most .* cells .* ask for method 'search'"):
        tr.discrepancy(original, small, tr.StarBatch.from_image(x[None], 3.0), "exact")
    with pytest.raises(OptionError, match=r"Exact\(method='programs'.* does not apply to networks that round"):
        tr.discrepancy(original, small, stars, tr.Exact("programs"))


def test_stars_of_a_budget_limit_cells_and_branches():
    original, small, x = case(3)
    stars = tr.StarBatch.from_image(x[None], 0.05)
    found = tr.discrepancy(original, small, stars, "exact", budget=tr.Budget(stars=5))
    assert int(found.regions) == 5
    assert found.reasons == (Reason.BUDGET,)
    assert_valid(found, partial(differences, original, small), stars)
    searched = tr.discrepancy(original, small, stars, "search", budget=tr.Budget(stars=3))
    assert searched.stats.branches + int(searched.regions) <= 4
    assert searched.reasons == (Reason.BUDGET,)


def test_little_memory_keeps_relaxations_away_and_says_so():
    original, small, x = case(3, inputs=10)
    stars = tr.StarBatch.from_image(x[None], 0.05)
    found = tr.discrepancy(original, small, stars, budget=tr.Budget(memory=20_000))
    assert found.reasons == (Reason.BUDGET,)
    assert "memory" in found.stats.fallback
    assert_valid(found, partial(differences, original, small), stars)


def test_memory_of_a_relaxation_has_no_matrices_of_convolutions():
    g = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2)),
    )
    data = torch.rand(64, 1, 8, 8, generator=g)
    small = int8_network(copy.deepcopy(network), data)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3:5, 2:5] = True
    network, stars = network.double(), tr.StarBatch.from_image(data[:1].double(), 0.1, mask)
    # Matrices of 512 x 512 numbers for the convolutions in the middle would not fit in besides.
    found = tr.discrepancy(network, small, stars, "search", budget=tr.Budget(seconds=1, memory=7.5e7))
    assert found.stats.fallback == ""
    assert_valid(found, partial(differences, network, small), stars)


def test_progress_is_reported(monkeypatch):
    monkeypatch.setattr(int8_relaxed, "STATES", 1)
    original, small, x = case(3, inputs=10)
    stars = tr.StarBatch.from_image(torch.stack((x, -x)), 0.05)
    seen = []
    found = tr.discrepancy(original, small, stars, progress=seen.append)
    last = seen[-1]
    assert last.done + last.open == 2
    assert last.lower.shape == found.range_lower.shape
    assert torch.allclose(last.upper, found.range_upper)
    assert torch.allclose(last.lower, found.range_lower)
    assert bool((last.attained_upper <= last.upper + 1e-9).all())


def test_copies_of_a_deployed_network_are_that_network():
    _, small, x = case(3)
    stars = tr.StarBatch.from_image(x[None], 0.05)
    for tolerance, reason in ((None, Reason.CLOSED), (0.0, Reason.WITHIN)):
        for other in (small, copy.deepcopy(small)):
            found = tr.discrepancy(small, other, stars, tolerance=tolerance)
            assert bool((found.upper == 0).all())
            assert found.status == (tr.Status.EXACT,)
            assert found.reasons == (reason,)


def test_networks_whose_grids_differ_are_not_one(monkeypatch):
    monkeypatch.setattr(deployed_star, "BOXES", 1)
    layers = random_network(1, [2, 4, 2])
    one, two = (nn.Sequential(Quantizer(0.1, z, 0, 255), *copy.deepcopy(layers)) for z in (3, 4))
    stars = tr.StarBatch.from_box(torch.full((1, 2), -0.5).double(), torch.full((1, 2), -0.2).double())
    assert float(tr.discrepancy(one, two, stars).max_upper) > 0
    assert float(tr.discrepancy(one, copy.deepcopy(one), stars).max_upper) == 0


def test_running_a_module_leaves_its_observers_alone():
    from torch.ao import quantization as q

    fake = q.FakeQuantize(q.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
    fake(torch.linspace(-1, 1, 9))
    small = nn.Sequential(fake, nn.Linear(2, 2))
    before = copy.deepcopy(small.state_dict())
    original = copy.deepcopy(small[1]).double()
    tr.discrepancy(original, small, tr.StarBatch.from_box(torch.zeros(1, 2).double(), torch.ones(1, 2).double()))
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


def cut_or_mapped(inputs: int, kind: str, x: torch.Tensor) -> tr.StarBatch:
    """A star around x that is no box: a box cut by three half-spaces, a rotated one, or both."""
    g = torch.Generator().manual_seed(0)
    star = tr.StarBatch.from_image(x[None] if kind == "cut" else torch.zeros_like(x[None]), 0.2)
    if kind != "cut":
        star = star.affine_map(torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5, x)
    for _ in range(0 if kind == "mapped" else 3):
        normal = torch.randn(inputs, generator=g, dtype=torch.float64)
        star = star.intersect(normal, float(normal @ x) + 0.1)
    return star


@pytest.mark.parametrize("kind", ["cut", "mapped", "both"])
def test_stars_that_are_no_boxes_get_an_ascent_that_ends_inside(kind, monkeypatch):
    monkeypatch.setattr(deployed_star, "FEW", 2**14)
    original, small, x = case(5, inputs=12)
    star = cut_or_mapped(12, kind, x)
    found = tr.discrepancy(original, small, star, "search", budget=tr.Budget(stars=1))
    many = differences(original, small, star.sample(3000)[0].float())
    assert bool((found.lower[0] > many.abs().amax(0)).all())
    assert bool((found.lower <= found.upper).all())
    assert bool(star.contains(found.witness.reshape(1, -1, 12), 1e-9).all())
    replayed = differences(original, small, found.witness[0].float()).diagonal().abs()
    torch.testing.assert_close(found.lower[0], replayed, atol=1e-6, rtol=1e-5)


def test_coordinates_outside_a_star_do_not_count():
    star = cut_or_mapped(3, "both", torch.zeros(3, dtype=torch.float64))
    low, high, box = star.bounding_box()
    places = Places.of(star, low, high, box)
    t = 3 * torch.randn(1, 500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inside = places.holds(t)[0]
    assert 0 < int(inside.sum()) < 500
    torch.testing.assert_close(inside, star.contains(places.stars.point(t), 1e-9)[0] & (t[0].abs() <= 1).all(1))
    assert bool(places.holds(places.pull(t)).all())
