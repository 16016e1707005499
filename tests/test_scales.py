"""Certificates at scales where rounding is no longer small: judged in exact rational arithmetic."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import METHODS, random_network


def scaled(network: nn.Sequential, factor: float, layers: slice = slice(None)) -> nn.Sequential:
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for layer in [m for m in twin if isinstance(m, nn.Linear)][layers]:
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
    return twin


def exactly(network: nn.Sequential, x: torch.Tensor) -> list[Fraction]:
    """The real-valued network at one point."""
    values = [Fraction(v) for v in x.tolist()]
    for layer in network:
        if isinstance(layer, nn.ReLU):
            values = [max(v, Fraction(0)) for v in values]
        else:
            rows, biases = layer.weight.tolist(), layer.bias.tolist()
            values = [
                sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
                for row, b in zip(rows, biases, strict=True)
            ]
    return values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-6, 1e3, 1e6, 1e7])
def test_large_and_tiny_weights_end_and_stay_certified(method: str, factor: float) -> None:
    for seed in range(3):
        network = scaled(random_network(seed, [3, 8, 8, 2]), factor, slice(0, 1))
        ones = torch.ones(3, dtype=torch.float64)
        stars = tr.StarBatch.from_box(-ones, ones)
        reached = tr.reach(network, stars, tr.Exact(method), keep_stars=False)
        for x in (*stars.sample(20, seed=seed)[0], *reached.argmax[0], *reached.argmin[0]):
            for n, value in enumerate(exactly(network, x)):
                assert Fraction(reached.lower[0, n].item()) <= value <= Fraction(reached.upper[0, n].item())


@pytest.mark.parametrize("bounds", ["lirpa", "zonotope"])
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e7])
def test_rounding_inside_root_bounds_does_not_cut_off_the_truth(bounds: str, factor: float) -> None:
    """The difference is 0.001 everywhere, far below the rounding of either network's own output."""
    original = scaled(random_network(3, [2, 6, 6, 1]), factor)
    permuted = copy.deepcopy(original)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        permuted[0].weight.copy_(original[0].weight[order])
        permuted[0].bias.copy_(original[0].bias[order])
        permuted[2].weight.copy_(original[2].weight[:, order])
        permuted[-1].bias.sub_(0.001)
    true = Fraction(original[-1].bias.item()) - Fraction(permuted[-1].bias.item())
    half = torch.full((2,), 0.5, dtype=torch.float64)
    for low, high in ((-half, half), (half * 0.1, half)):
        stars = tr.StarBatch.from_box(low, high)
        found = tr.discrepancy(original, permuted, stars, tr.Exact(root_bounds=bounds))
        assert Fraction(found.range_lower.item()) <= true <= Fraction(found.range_upper.item())


def test_boxes_far_from_zero_keep_their_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(2, 3, generator=g, dtype=torch.float64)
    layer = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.bias.copy_(-(W @ torch.full((3,), 1e8, dtype=torch.float64)))
    lower = torch.full((3,), 1e8, dtype=torch.float64)
    stars = tr.StarBatch.from_box(lower, lower + 1e-6)
    reached = tr.reach(nn.Sequential(nn.Identity()), stars.affine_map(layer))
    corners = torch.cartesian_prod(*[torch.tensor([1e8, 1e8 + 1e-6], dtype=torch.float64)] * 3)
    mapped = stars.affine_map(layer)
    for corner in corners:
        for n in range(2):
            value = Fraction(mapped.basis[0, 0, n].item()) + sum(
                Fraction(mapped.basis[0, 1 + m, n].item()) * Fraction(corner[m].item()) for m in range(3)
            )
            assert Fraction(reached.lower[0, n].item()) <= value <= Fraction(reached.upper[0, n].item())


def test_exact_is_only_said_where_both_ends_meet() -> None:
    """A pre-activation below the sign tolerance, blown up again: one region, a wide and valid interval."""
    network = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for layer, weight in ((network[0], 1e-11), (network[2], 1e11)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
    one = torch.ones(1, dtype=torch.float64)
    reached = tr.reach(network, tr.StarBatch.from_box(-one, one))
    assert reached.lower.item() <= 0
    assert reached.upper.item() >= 1
    assert reached.status == (tr.Status.BOUNDED,)


def test_a_point_star_contains_its_point() -> None:
    x = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    stars = tr.StarBatch.from_box(x, x)
    assert stars.contains(torch.stack((x[0], x[0] + 1))[None]).tolist() == [[True, False]]
