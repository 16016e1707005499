"""Certified discrepancy against the exact mixed-integer model, samples, and itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import DEVICES, METHODS, random_network, random_pair, rounded_copy

RADIUS = 0.2


def random_box(seed: int, inputs: int) -> tr.StarBatch:
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(inputs, generator=g, dtype=torch.float64) * 0.5
    return tr.StarBatch.from_box(middle - RADIUS, middle + RADIUS)


def differences(original: nn.Module, compressed: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return original(x) - compressed(x)


@pytest.mark.parametrize("block", range(8))
def test_discrepancy_equals_the_mixed_integer_model_and_holds_for_samples(block: int) -> None:
    for seed in range(25 * block, 25 * (block + 1)):
        original, compressed, inputs = random_pair(seed)
        stars = random_box(seed, inputs)
        found = tr.discrepancy(original, compressed, stars, tr.Exact(METHODS[seed % 2]))
        reference = tr.mixed_integer_discrepancy(original, compressed, stars)
        torch.testing.assert_close(found.upper, reference.max_abs, atol=1e-6, rtol=0, msg=f"seed {seed}")
        torch.testing.assert_close(found.lower, reference.max_abs, atol=1e-6, rtol=0, msg=f"seed {seed}")
        torch.testing.assert_close(found.range_lower, reference.range_lower, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.range_upper, reference.range_upper, atol=1e-6, rtol=0)
        y = differences(original, compressed, stars.sample(10_000, seed=seed)[0])
        assert (y >= found.range_lower).all(), f"seed {seed}"
        assert (y <= found.range_upper).all(), f"seed {seed}"
        assert (y.abs() <= found.upper).all(), f"seed {seed}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_samples_never_leave_the_range(device: str, dtype: torch.dtype, method: str) -> None:
    """Samples are evaluated in float64: the certificate speaks of the real-valued networks."""
    for seed in range(20):
        original, compressed, inputs = random_pair(seed + 500)
        original, compressed = original.to(device, dtype), compressed.to(device, dtype)
        g = torch.Generator().manual_seed(seed)
        lower = torch.randn(3, inputs, generator=g).to(device, dtype)
        stars = tr.StarBatch.from_box(lower, lower + torch.rand(3, inputs, generator=g).to(device, dtype))
        budget = tr.Budget(stars=20) if seed % 2 else None
        found = tr.discrepancy(original, compressed, stars, tr.Exact(method), budget=budget)
        samples = stars.sample(2000, seed=seed).flatten(0, 1).double()
        y = differences(copy.deepcopy(original).double(), copy.deepcopy(compressed).double(), samples)
        y = y.reshape(3, 2000, -1)
        assert (y.amin(1) >= found.range_lower.double()).all(), f"seed {seed}"
        assert (y.amax(1) <= found.range_upper.double()).all(), f"seed {seed}"
        assert (found.lower <= found.upper).all()
        if budget is None:
            assert found.status == (tr.Status.EXACT,) * 3
            assert (found.upper - found.lower).max() < (1e-6 if dtype == torch.float64 else 1e-4)


def test_witnesses_replay_and_lie_in_the_set() -> None:
    original = random_network(1, [8, 16, 12, 3])
    compressed = rounded_copy(original, 16)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[2:6] = True
    stars = tr.StarBatch.from_image(torch.rand(4, 8, dtype=torch.float64), 0.3, mask, clip=(0, 1))
    found = tr.discrepancy(original, compressed, stars)
    assert found.witness.shape == (4, 3, 8)
    y = differences(original, compressed, found.witness.flatten(0, 1)).reshape(4, 3, 3)
    torch.testing.assert_close(y.diagonal(dim1=1, dim2=2).abs(), found.lower, atol=1e-10, rtol=0)
    assert stars.contains(found.witness, tolerance=1e-9).all()
    assert (found.witness >= 0).all()
    assert (found.witness <= 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_network_has_no_discrepancy_from_itself(method: str) -> None:
    network = random_network(4, [3, 10, 8, 2])
    stars = random_box(4, 3)
    found = tr.discrepancy(network, copy.deepcopy(network), stars, tr.Exact(method))
    assert found.lower.max() == 0
    assert found.upper.max() < 1e-9
    # and exactly the single network's regions, though every cut occurs twice
    assert found.regions.tolist() == [len(tr.reach(network, stars))]


def test_swapping_the_networks_mirrors_the_range() -> None:
    original, compressed, inputs = random_pair(2)
    stars = random_box(2, inputs)
    there, back = tr.discrepancy(original, compressed, stars), tr.discrepancy(compressed, original, stars)
    torch.testing.assert_close(there.range_lower, -back.range_upper, atol=1e-9, rtol=0)
    torch.testing.assert_close(there.upper, back.upper, atol=1e-9, rtol=0)


def test_a_constant_offset_is_found_exactly() -> None:
    original = random_network(6, [3, 8, 2])
    compressed = copy.deepcopy(original)
    with torch.no_grad():
        compressed[-1].bias.sub_(torch.tensor([0.25, -0.5]))
    found = tr.discrepancy(original, compressed, random_box(6, 3))
    wanted = torch.tensor([[0.25, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(found.range_lower, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.range_upper, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.upper, wanted.abs(), atol=1e-12, rtol=0)
    assert found.max_upper.item() == pytest.approx(0.5)
    assert found.within(0.51)
    assert not found.within(0.49)


def test_a_wrong_claim_would_be_noticed() -> None:
    """The checks above can fail: `certify` refuses a claim that is a little too good or too wide."""
    from dataclasses import replace

    original, compressed, inputs = random_pair(5)
    stars = random_box(5, inputs)
    found = tr.discrepancy(original, compressed, stars)
    assert tr.certify(found, original, compressed, stars).agrees
    for change in (-1e-4, 1e-4):
        wrong = replace(found, upper=found.upper + change, range_upper=found.range_upper + change)
        assert not tr.certify(wrong, original, compressed, stars).agrees


def test_slivers_are_neither_lost_nor_multiplied() -> None:
    """Two cuts a hair apart: 1e-7 keeps its own region, 1e-12 counts as coincident; both stay certified."""
    for gap, regions in ((1e-7, 3), (1e-12, 2)):
        pair = [nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double() for _ in range(2)]
        with torch.no_grad():
            for network, shift in zip(pair, (0.0, gap), strict=True):
                network[0].weight.fill_(1.0)
                network[0].bias.fill_(shift)
                network[2].weight.fill_(1.0)
                network[2].bias.zero_()
        for method in METHODS:
            stars = tr.StarBatch.from_box(-torch.ones(2).double(), torch.ones(2).double())
            found = tr.discrepancy(pair[0], pair[1], stars, tr.Exact(method))
            assert found.regions.tolist() == [regions]
            assert gap <= found.upper.item() <= gap + 1e-9
