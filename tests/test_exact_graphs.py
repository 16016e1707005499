"""Exact answers on networks that are no chains equal a mixed-integer model of the same question."""

from __future__ import annotations

import pytest
import torch

import torchreach as tr
from tests.networks import METHODS
from tests.random_graphs import RandomGraph, graph_pair
from tests.test_graphs import CASES, network
from torchreach.reference.mixed_integer import affine_layers, forward

SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(200)]
SEEDS = [1, 3, *range(5, 12), SLOW[0], SLOW[2], SLOW[4], *SLOW[12:]]  # 12 but for three that take long


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_both_engines_equal_the_mixed_integer_model(seed: int) -> None:
    original, compressed, inputs = graph_pair(seed)
    ones = torch.ones(1, inputs, dtype=torch.float64)
    stars = tr.StarBatch.from_box(-ones, ones)
    expected = tr.mixed_integer_discrepancy(original, compressed, stars)
    x = 2 * torch.rand(2000, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1
    y = original(x) - compressed(x)
    assert (y >= expected.range_lower[0] - 1e-9).all()
    assert (y <= expected.range_upper[0] + 1e-9).all()
    for engine in METHODS:
        found = tr.discrepancy(original, compressed, stars, tr.Exact(engine))
        assert found.status == (tr.Status.EXACT,)
        torch.testing.assert_close(found.range_lower, expected.range_lower, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.range_upper, expected.range_upper, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [*range(4), *SLOW[12:40]])
@torch.no_grad()
def test_a_search_of_two_architectures_equals_the_mixed_integer_model(seed: int) -> None:
    original, _, inputs = graph_pair(seed)
    other = RandomGraph(seed + 1000, 2, inputs)
    ones = torch.ones(1, inputs, dtype=torch.float64)
    stars = tr.StarBatch.from_box(-ones, ones)
    expected = tr.mixed_integer_discrepancy(original, other, stars)
    found = tr.discrepancy(original, other, stars, "search", gap=1e-7)
    assert found.status == (tr.Status.EXACT,)
    torch.testing.assert_close(found.range_lower, expected.range_lower, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.range_upper, expected.range_upper, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_model_takes_what_is_lowered(name: str) -> None:
    module, shape = network(name)
    layers = affine_layers(module, shape)
    x = torch.randn(50, *shape, dtype=torch.float64)
    found = torch.from_numpy(forward(layers, x.flatten(1).numpy()))
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-12)


def test_random_graphs_hold_every_function_and_join() -> None:
    plans = [entry for seed in range(20) for entry in graph_pair(seed)[0].plan]  # type: ignore[union-attr]
    assert len({bend for bend, *_ in plans}) == 5
    assert len({join for _, join, *_ in plans}) == 6
