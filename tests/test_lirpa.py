"""auto_LiRPA's bounds: of the right values, never missing one, never looser than intervals."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchreach as tr
from tests.data import require_data
from tests.networks import random_network
from torchreach.core.errors import ShapeError
from torchreach.domains import lirpa
from torchreach.domains._lirpa_compat import load_auto_lirpa
from torchreach.domains.lirpa import LirpaUnavailableError, merged_bounds, preactivation_bounds
from torchreach.graph.layers import linear, magnitude
from torchreach.read.load import load
from torchreach.read.module import chain

try:
    load_auto_lirpa()
    REASON = ""
except ImportError as error:
    REASON = str(error)

needs_lirpa = pytest.mark.skipif(bool(REASON), reason=REASON or "auto_LiRPA works")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


class _RunningSum(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


class _Arithmetic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.factor = nn.Parameter(torch.randn(6))
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        x = (2 - self.first((x - 0.1307) / 0.3)) * self.factor
        return self.last(x.view(-1, 2, 3).relu().flatten(1)).relu()


def _picture():
    network = nn.Sequential(
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Conv2d(3, 2, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 6)),
        *(nn.Unflatten(1, (2, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4)),
        nn.ReLU(inplace=True),
    )
    network[0].running_mean += 0.3
    network[2].running_var += 1
    return network


def _dense(*sizes):
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


NETWORKS = {
    "dense": (lambda: _dense(5, 12, 9, 7, 3), (5,)),
    "affine": (lambda: nn.Sequential(nn.Linear(5, 3)), (5,)),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), (5,)),
    "arithmetic": (_Arithmetic, (5,)),
    "picture": (_picture, (1, 8, 8)),
}


def _boxes(shape, device="cpu", width=0.4):
    lower = torch.rand(3, *shape, device=device) - 0.5
    return lower, lower + width * torch.rand(3, *shape, device=device)


def _received(network, x):
    """What each ReLU receives, and the output: the definition the bounds are held against."""
    values = []
    for layer in copy.deepcopy(network).double():
        if isinstance(layer, nn.ReLU):
            values.append(x)
            x = x.relu()
        else:
            x = layer(x)
    return [*values, x]


def _samples(lower, upper, count):
    """[count, S, *shape] points of the boxes, corners among them."""
    share = torch.rand(count, *lower.shape, dtype=torch.float64, device=lower.device)
    share[: count // 4] = share[: count // 4].round()
    return lower.double() + (upper - lower).double() * share


def _interval(network, lower, upper):
    """Interval bounds, by centre and radius."""
    centre, radius = (lower.double() + upper.double()) / 2, (upper.double() - lower.double()) / 2
    result = []
    for layer in copy.deepcopy(network).double():
        if isinstance(layer, nn.ReLU):
            result.append((centre - radius, centre + radius))
            low, high = (centre - radius).relu(), (centre + radius).relu()
            centre, radius = (low + high) / 2, (high - low) / 2
        else:
            centre, radius = linear(layer, centre) + layer(torch.zeros_like(centre)), magnitude(layer, radius)
    return [*result, (centre - radius, centre + radius)]


def _assert_contains(bounds, values, count, boxes):
    assert len(bounds) == len(values)
    for (low, high), value in zip(bounds, values, strict=True):
        value = value.reshape(count, boxes, *value.shape[1:])
        assert low.shape == high.shape == value.shape[1:]
        assert low.dtype == torch.float64
        assert not low.requires_grad
        assert low.device == value.device
        slack = 1e-12 * (1 + value.abs())
        assert bool(((low <= value + slack) & (value <= high + slack)).all())


@needs_lirpa
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bounds_contain_what_each_relu_receives(name, device):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = chain(make().to(device).eval(), shape)
    lower, upper = _boxes(shape, device)
    bounds = preactivation_bounds(network, lower, upper)
    x = _samples(lower, upper, 2000)
    _assert_contains(bounds, _received(network, x.flatten(0, 1)), 2000, 3)


@needs_lirpa
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bounds_are_never_looser_than_intervals_and_tighter_in_depth(name):
    torch.manual_seed(1)
    make, shape = NETWORKS[name]
    network = chain(make().eval(), shape)
    lower, upper = _boxes(shape)
    bounds = preactivation_bounds(network, lower, upper)
    intervals = _interval(network, lower, upper)
    for (low, high), (low2, high2) in zip(bounds, intervals, strict=True):
        assert bool((low >= low2 - 1e-9).all())
        assert bool((high <= high2 + 1e-9).all())
    if name == "dense":
        widths = [(b[-1][1] - b[-1][0]).mean() for b in (bounds, intervals)]
        assert widths[0] < 0.7 * widths[1]


@needs_lirpa
@torch.no_grad()
def test_affine_bounds_are_exact():
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    lower, upper = _boxes((4,))
    matrix = network[1].weight.double() @ network[0].weight.double()
    centre = copy.deepcopy(network).double()((lower.double() + upper.double()) / 2)
    radius = (upper.double() - lower.double()) / 2 @ matrix.abs().T
    ((low, high),) = preactivation_bounds(network, lower, upper)
    torch.testing.assert_close(low, centre - radius, rtol=0, atol=1e-12)
    torch.testing.assert_close(high, centre + radius, rtol=0, atol=1e-12)


@needs_lirpa
@torch.no_grad()
def test_acasxu_bounds_are_sound_and_close_to_samples_on_a_small_box():
    network = load(require_data("acasxu", "ACASXU_run2a_1_1_batch_2000.onnx"))
    centre = torch.tensor([[-0.29, 0.01, 0.495, 0.35, 0.4]])
    lower, upper = centre - 0.002, centre + 0.002
    bounds = preactivation_bounds(network, lower, upper)
    values = _received(network, _samples(lower, upper, 4000).flatten(0, 1))
    _assert_contains(bounds, values, 4000, 1)
    for (low, high), value in list(zip(bounds, values, strict=True))[:3]:
        assert ((high - low).mean() / (value.amax(0) - value.amin(0)).mean()) < 1.5


@needs_lirpa
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_merged_bounds_contain_both_networks_and_their_difference(device):
    torch.manual_seed(3)
    first, second = _dense(5, 9, 7, 3).to(device), _dense(5, 6, 3).to(device)
    lower, upper = _boxes((5,), device)
    bounds1, bounds2 = merged_bounds(first, second, lower, upper)
    x = _samples(lower, upper, 2000).flatten(0, 1)
    values1, values2 = _received(first, x), _received(second, x)
    difference = values1[-1] - values2[-1]
    _assert_contains(bounds1, [*values1[:-1], difference], 2000, 3)
    _assert_contains(bounds2, [*values2[:-1], difference], 2000, 3)


@needs_lirpa
@torch.no_grad()
def test_linear_parts_that_both_networks_share_cancel():
    torch.manual_seed(4)
    first = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(5, 2))
    lower, upper = _boxes((5,))
    affine = nn.Sequential(nn.Linear(5, 2))
    for network in (first, affine):
        bounds1, bounds2 = merged_bounds(network, network, lower, upper)
        assert torch.equal(bounds1[-1][0], bounds2[-1][0])
        assert bool((bounds1[-1][0] <= 0).all())
        assert bool((bounds1[-1][1] >= 0).all())
    assert bounds1[-1][1].abs().max() < 1e-12


@needs_lirpa
def test_pruned_and_parametrized_weights_are_read_as_they_are_now():
    torch.manual_seed(9)
    network = _dense(4, 6, 2)
    prune.l1_unstructured(network[0], "weight", amount=0.5)
    network[2] = parametrizations.weight_norm(network[2])
    network(torch.rand(1, 4))
    with torch.no_grad():
        network[0].weight_orig += 1
        lower = torch.rand(2, 4)
        bounds = preactivation_bounds(network, lower, lower + 0.1)
        plain = _dense(4, 6, 2)
        plain[0].weight.copy_(network[0].weight_orig * network[0].weight_mask)
        plain[2].weight.copy_(network[2].weight)
        for layer in (0, 2):
            plain[layer].bias.copy_(network[layer].bias)
        expected = preactivation_bounds(plain, lower, lower + 0.1)
    torch.testing.assert_close(bounds, expected)


@needs_lirpa
@torch.no_grad()
def test_equal_networks_keep_their_relus_apart():
    torch.manual_seed(5)
    network = _dense(4, 6, 6, 2)
    lower, upper = _boxes((4,))
    alone = preactivation_bounds(network, lower, upper)
    bounds1, bounds2 = merged_bounds(network, copy.deepcopy(network), lower, upper)
    for bounds in (bounds1, bounds2):
        for (low, high), (low2, high2) in zip(bounds[:-1], alone[:-1], strict=True):
            torch.testing.assert_close(low, low2)
            torch.testing.assert_close(high, high2)


@needs_lirpa
def test_a_point_is_a_box():
    torch.manual_seed(6)
    network = _dense(4, 6, 2)
    point = torch.rand(2, 4)
    for low, high in preactivation_bounds(network, point, point):
        assert bool((low <= high).all())
        torch.testing.assert_close(low, high)


@needs_lirpa
def test_nothing_global_changes_and_nothing_is_printed(capfd):
    torch.manual_seed(7)
    network = _dense(4, 6, 2).train()
    weight = network[0].weight.clone()
    state = torch.get_rng_state()
    subscript = hasattr(torch._C.Node, "__getitem__")
    handlers, filters = list(logging.getLogger().handlers), list(warnings.filters)
    preactivation_bounds(network, torch.zeros(2, 4), torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET
    assert warnings.filters == filters
    assert network.training
    assert network[0].weight.dtype == torch.float32
    assert network[0].weight.requires_grad
    assert torch.equal(network[0].weight, weight)
    assert hasattr(torch._C.Node, "__getitem__") == subscript
    assert "numpy.lib.arraysetops" not in sys.modules
    assert "".join(capfd.readouterr()) == ""


@needs_lirpa
def test_a_layer_it_does_not_know_is_reported_for_fallback(capfd):
    network = nn.Sequential(nn.Linear(4, 4), _RunningSum())
    with pytest.raises(LirpaUnavailableError, match="cannot bound this network"):
        preactivation_bounds(network, torch.zeros(2, 4), torch.ones(2, 4))
    assert "".join(capfd.readouterr()) == ""


def test_a_missing_library_is_reported_for_fallback(monkeypatch):
    def missing():
        raise ImportError("auto_LiRPA is not installed")

    monkeypatch.setattr(lirpa, "load_auto_lirpa", missing)
    with pytest.raises(LirpaUnavailableError, match="auto_LiRPA is not installed"):
        preactivation_bounds(_dense(4, 3, 2), torch.zeros(1, 4), torch.ones(1, 4))


@needs_lirpa
def test_bounds_of_the_wrong_layer_are_refused(monkeypatch):
    torch.manual_seed(8)
    nodes = lirpa._nodes
    monkeypatch.setattr(lirpa, "_nodes", lambda *arguments: nodes(*arguments)[::-1])
    lower = torch.rand(1, 4)
    with pytest.raises(LirpaUnavailableError, match="miss a value the network takes"):
        preactivation_bounds(_dense(4, 5, 5, 2), lower, lower + 0.01)


def test_boxes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"must both be \[S, \*shape\], got \(4,\) and \(4,\)"):
        preactivation_bounds(_dense(4, 2), torch.zeros(4), torch.ones(4))
    with pytest.raises(ShapeError, match=r"does not accept inputs of shape \(3,\)"):
        preactivation_bounds(_dense(4, 2), torch.zeros(1, 3), torch.ones(1, 3))


@needs_lirpa
def test_auto_lirpa_is_used_where_it_can_pay() -> None:
    network = random_network(5, [3, 10, 10, 2])
    ones = torch.ones(3, dtype=torch.float64)
    stars = tr.StarBatch.from_box(-ones, ones)
    assert tr.reach(network, stars).stats.root_bounds == "zonotope"
    for used in (
        tr.reach(network, stars, tr.Exact(root_bounds="lirpa")),
        tr.reach(network, stars, budget=tr.Budget(stars=20)),
    ):
        assert used.stats.root_bounds == "auto_LiRPA CROWN and zonotope"
