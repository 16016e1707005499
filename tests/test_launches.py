"""How many operations and host reads exact reach asks of an accelerator: fences that a change must not exceed.

Counted on the simulated device, which takes the batch sizes of CUDA, so that the numbers are the same in every run.
Where a change needs fewer, lower the numbers below: they are what was counted, and `MARGIN` is allowed beyond.
`python -m tests.test_launches` prints them as counted now.
"""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass

import pytest
import torch
from torch import nn

import torchreach as tr
from tests.networks import METHODS, random_network, rounded_copy
from tests.simulated_device import NAME, WHY_NOT, Counts, counting, simulated

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no simulated device: {WHY_NOT}")

MARGIN = 1.05


@dataclass(frozen=True)
class Asked:
    """Of a device, by a call or by a part of one."""

    launches: float
    reads: float
    uploads: float

    @staticmethod
    def of(counts: Counts) -> Asked:
        return Asked(counts.launches, counts.reads, counts.uploads)

    def less(self, other: Asked, parts: int = 1) -> Asked:
        """The difference, shared out among so many parts."""
        return Asked(*((x - y) / parts for x, y in zip(astuple(self), astuple(other), strict=True)))

    def within(self, limit: Asked) -> bool:
        return all(x <= MARGIN * most for x, most in zip(astuple(self), astuple(limit), strict=True))


NOTHING = Asked(0, 0, 0)
# Reach of the merged pair on a box that no neuron cuts, for each of its layers: reading the network included.
PER_LAYER = {"vertices": Asked(510, 16.7, 0), "programs": Asked(673, 18, 0)}
# On a box that many neurons cut, for each split, beyond the call on the box that none cuts.
PER_SPLIT = {"vertices": Asked(14.6, 0.756, 0), "programs": Asked(741, 10.4, 0)}
# The same on eight boxes at once.
PER_SPLIT_OF_EIGHT = {"vertices": Asked(0.993, 0.0516, 0)}
# What `discrepancy` asks beyond `reach` on the merged pair.
BEYOND_REACH = {"vertices": Asked(2364, 44, 14), "programs": Asked(2403, 44, 14)}

UNCUT, RADIUS = 1e-4, {"vertices": 0.2, "programs": 0.08}


def pair() -> tuple[nn.Module, nn.Module]:
    original = random_network(3, [3, 12, 10, 8, 2])
    return original, rounded_copy(original, 16)


def box(radius: float, stars: int = 1) -> tr.StarBatch:
    middle = torch.linspace(-0.5, 0.5, 3 * stars, dtype=torch.float64).view(stars, 3)
    return tr.StarBatch.from_box(middle - radius, middle + radius)


@functools.cache
def reached(method: str, radius: float, stars: int = 1) -> tuple[tr.ReachResult, Asked]:
    with simulated():
        module, sets = tr.merge(*pair()).to(NAME), box(radius, stars).to(NAME)
        with counting() as counts:
            found = tr.reach(module, sets, tr.Exact(method, "zonotope"), keep_stars=False)
    return found, Asked.of(counts)


def per_layer(method: str) -> Asked:
    found, asked = reached(method, UNCUT)
    assert found.stats.splits == 0
    return asked.less(NOTHING, len(found.stats.layers))


def per_split(method: str, stars: int = 1) -> Asked:
    found, asked = reached(method, RADIUS[method], stars)
    return asked.less(reached(method, UNCUT)[1], found.stats.splits)


def beyond_reach(method: str) -> Asked:
    with simulated():
        (original, compressed), sets = (network.to(NAME) for network in pair()), box(RADIUS[method]).to(NAME)
        with counting() as counts:
            tr.discrepancy(original, compressed, sets, tr.Exact(method, "zonotope"))
    return Asked.of(counts).less(reached(method, RADIUS[method])[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_nothing_cuts(method: str) -> None:
    assert (asked := per_layer(method)).within(PER_LAYER[method]), asked


@pytest.mark.parametrize("method", METHODS)
def test_a_split(method: str) -> None:
    assert (asked := per_split(method)).within(PER_SPLIT[method]), asked


def test_more_stars_share_launches() -> None:
    assert (asked := per_split("vertices", 8)).within(PER_SPLIT_OF_EIGHT["vertices"]), asked


@pytest.mark.parametrize("method", ["vertices", pytest.param("programs", marks=pytest.mark.slow)])
def test_discrepancy_beside_reach(method: str) -> None:
    assert (asked := beyond_reach(method)).within(BEYOND_REACH[method]), asked


@pytest.mark.parametrize("method", METHODS)
def test_regions_and_intervals_are_those_of_the_cpu(method: str) -> None:
    there, _ = reached(method, RADIUS[method])
    here = tr.reach(tr.merge(*pair()), box(RADIUS[method]), tr.Exact(method, "zonotope"), keep_stars=False)
    assert len(there) == len(here) > 10
    for name in ("lower", "upper", "attained_lower", "attained_upper"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), atol=1e-12, rtol=0)
    if method == "vertices":  # which program settles a neuron is a matter of rounding
        assert there.stats.layers == here.stats.layers


if __name__ == "__main__":
    for measured in (per_layer, per_split, beyond_reach):
        print(measured.__name__, {method: measured(method) for method in METHODS})
    print("per_split of eight", per_split("vertices", 8))
