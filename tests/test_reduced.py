"""The reduced network computes the network wherever signs are what the root bounds say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import DEVICES, random_network
from torchreach.domains.zonotope import zonotope_bounds
from torchreach.graph.reduced import reduce
from torchreach.read.steps import steps
from torchreach.verbs.reach import replay


def conv_network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    ).double()


def prepared(network: nn.Module, stars: tr.StarBatch):
    whole = steps(network, stars.shape, dtype=torch.float64, device=stars.device)
    rows, _, _ = stars.normalised()
    slack, _ = stars.rounding()
    bounds = zonotope_bounds(whole, rows, slack)
    signs = [(low >= 0).long() - (high <= 0).long() for low, high in bounds]
    return whole, reduce(whole, signs, bounds), signs, bounds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["dense", "conv", "merged"])
def test_it_is_the_same_function_with_fewer_neurons(kind: str, device: str) -> None:
    network, shape, radius = {
        "dense": (random_network(1, [4, 30, 30, 3]), (4,), 0.05),
        "conv": (conv_network().eval(), (1, 4, 4), 0.02),
        "merged": (tr.merge(random_network(1, [4, 30, 20, 3]), random_network(2, [4, 30, 20, 3])), (4,), 0.05),
    }[kind]
    g = torch.Generator().manual_seed(0)
    middle = torch.rand(2, *shape, generator=g, dtype=torch.float64)
    stars = tr.StarBatch.from_box((middle - radius).to(device), (middle + radius).to(device))
    whole, result, signs, _ = prepared(network.to(device), stars)
    assert result is not None
    smaller, fewer, _, left_out = result
    for step, less, sign, rest in zip(whole, smaller, signs, left_out, strict=False):
        assert int(less.relu.sum()) + rest == int(step.relu.sum())
        assert rest <= int((sign != 0).all(0).sum())
    assert sum(left_out) > 0
    x = stars.sample(50, seed=1).flatten(0, 1)
    value, error = replay(whole, x)
    again, other = replay(smaller, x)
    assert ((value - again).abs() <= error + other).all()
    assert (value - again).abs().max() < 1e-12
    assert other.max() < 1e-10
    assert [s.shape[1] for s in fewer] == [step.features for step in smaller]


def test_neurons_of_different_sign_on_different_stars_stay() -> None:
    network = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.zero_()
    stars = tr.StarBatch.from_box(torch.tensor([[1.0], [-2.0]]).double(), torch.tensor([[2.0], [-1.0]]).double())
    _, result, _, _ = prepared(network, stars)
    assert result is None or result[3] == [0]


def test_a_wide_box_keeps_the_network_as_it_is() -> None:
    network = random_network(3, [3, 10, 10, 10, 10, 2])
    ones = torch.ones(3, dtype=torch.float64)
    _, result, _, _ = prepared(network, tr.StarBatch.from_box(-10 * ones, 10 * ones))
    assert result is None  # carrying all live neurons along would be wider than any layer


def test_statistics_count_the_neurons_left_out() -> None:
    network = random_network(1, [4, 30, 30, 3])
    middle = torch.full((4,), 0.3, dtype=torch.float64)
    stars = tr.StarBatch.from_box(middle - 0.05, middle + 0.05)
    for method in ("vertices", "programs"):
        for layer in tr.reach(network, stars, tr.Exact(method)).stats.layers:
            assert layer.neurons == 30
            assert layer.settled["root"] > 20 * layer.stars
