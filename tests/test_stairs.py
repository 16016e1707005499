"""Staircases in place of the noise of rounding: planes above them, bounds of branches, and what they gain."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from torch import Tensor

from tests.networks import executed_steps
from tests.test_deployed import case
from torchreach.core.evidence import Evidence
from torchreach.domains.hexagon import Hexagon, height
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.relaxed_difference import RelaxedDifference
from torchreach.domains.rounding import varying
from torchreach.domains.stairs import FEW, StairPair, Stairs, staircase_graph
from torchreach.graph.steps import Step, steps_of
from torchreach.read.module import chain
from torchreach.search.result import Question
from torchreach.search.signs import search_signs

F = torch.float64


class Nothing:
    """Nothing is attained."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.met = Evidence(torch.full((2, outputs), torch.inf, dtype=F), torch.zeros(2, outputs, inputs, dtype=F))
        self.met.lower = torch.full((2, outputs), -1e3, dtype=F)

    def offer(self, x: Tensor) -> None: ...


def stairs(n: int, count: int, seed: int) -> Stairs:
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(n, generator=g, dtype=F)  # noqa: E731
    scale, shift = uniform(0.05, 0.4), uniform(-0.1, 0.1)
    base = scale * torch.randint(0, 3, (n,), generator=g)
    rounds = torch.rand(n, generator=g) < 0.8
    counts = torch.randint(0, count + 1, (n,), generator=g).to(F)
    return Stairs(rounds, base, scale, counts, shift, scale, torch.zeros(n, dtype=F))


def values(s: Stairs, z: Tensor) -> tuple[Tensor, Tensor]:
    """f(z) [R, N] on either side of a threshold: the definition, without a tolerance."""
    at = (z - s.shift - s.base) / s.scale
    codes = (torch.ceil(at - 0.5), torch.floor(at + 0.5))
    low, high = (s.base + s.scale * torch.minimum(code.clamp(min=0), s.count) for code in codes)
    return torch.where(s.rounds, low, z.clamp(min=0)), torch.where(s.rounds, high, z.clamp(min=0))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("count", [1, FEW, 12])
def test_planes_lie_above_every_staircase(count: int, both: bool) -> None:
    """At random points of random hexagons, at their thresholds, and at the ends of their codes."""
    n, g = 40, torch.Generator().manual_seed(count)
    first = stairs(n, count, 5 + count) if both else None
    pair = StairPair.of(first, stairs(n, count, count), torch.zeros(n, dtype=F))
    assert pair is not None
    middle, width = torch.randn(2, 6, n, generator=g, dtype=F)[..., :n].unbind(0)
    z = 0.6 * middle
    ends = [part * torch.rand(6, n, generator=g, dtype=F) for part in (0.8 * width.abs(),) * 4]
    hexagon = Hexagon(z - ends[0], z + ends[1], z - ends[2], z + ends[3], -ends[0] - ends[3], ends[1] + ends[2])
    hexagon = hexagon.with_difference(0.5 * hexagon.dl, 0.5 * hexagon.du).tightened()
    packed = pair.packed(hexagon, pair.codes.expand(6, -1, -1))
    graph = staircase_graph(hexagon, pair, packed[:, 6:])
    alpha, beta, p, q = torch.randn(4, 6, n, generator=g, dtype=F)
    top = height(graph, alpha, beta, p, q)[0]
    seen = 0
    for k in range(400):
        share = torch.rand(2, 6, n, generator=g, dtype=F)
        z = hexagon.l1 + share[0] * (hexagon.u1 - hexagon.l1)
        z2 = hexagon.l2 + share[1] * (hexagon.u2 - hexagon.l2)
        if k % 2:  # on a threshold
            code = (torch.rand(6, n, generator=g, dtype=F) * pair.second.count).floor()
            z2 = torch.where(pair.second.rounds & (pair.second.count > 0), pair.second.threshold(code), z2)
        inside = (z2 >= hexagon.l2) & (z2 <= hexagon.u2) & (z - z2 >= hexagon.dl) & (z - z2 <= hexagon.du)
        seen += int(inside.sum())
        for a in values(pair.first, z):
            for a2 in values(pair.second, z2):
                value = alpha * a + beta * (a - a2) - p * z - q * (z - z2)
                assert bool((value <= top + 1e-9)[inside].all())
    assert seen > 1000


def prepared(seed: int, inputs: int, eps: float) -> tuple[RelaxedDifference, list[tuple[Step, ...]], Tensor, Tensor]:
    """A relaxation over a box, both networks, and the ends [M] of the box."""
    original, small, x = case(seed, inputs=inputs)
    one = steps_of(chain(copy.deepcopy(original).double(), (inputs,)), (inputs,), dtype=F, device=torch.device("cpu"))
    other = executed_steps(small, (inputs,), "exact")  # no sums saturate, as in `difference`
    ends = [(x.to(F) + sign * eps).flatten() for sign in (-1, 1)]
    first, second, index = varying(one, other, *ends)
    low, high = (end[index] for end in ends)
    relaxed = RelaxedDifference.of(first, second, low, high, InputGrid.of(second[0]))
    assert relaxed.pair is not None
    return relaxed, [first, second], low, high


def difference(networks: list[tuple[Step, ...]], x: Tensor) -> Tensor:
    y = []
    for steps in networks:
        value = x
        for step in steps:
            z = step.linear(value) + step.bias
            value = step.quantizer(z) if step.quantizer is not None else step.activate(z)
        y.append(value)
    return y[0] - y[1]


@pytest.mark.parametrize("eps", [0.03, 0.008])
@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_no_input_leaves_the_bounds_of_a_search_by_codes(seed: int, eps: float) -> None:
    relaxed, networks, low, high = prepared(seed, 6, eps)
    pair, root, pairs = relaxed.staircases()
    g = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(20_000, len(low), generator=g, dtype=F)
    corner = torch.rand(x.shape, generator=g) < 0.5
    y = difference(networks, torch.cat((x, torch.where(corner, low, high))))
    met = Nothing(pair.outputs, len(relaxed.low))
    before = None
    states = search_signs(pair, relaxed.low, relaxed.high, Question(), root=root, stairs=pairs, best=met)
    for state in islice(states, 12):
        upper = relaxed.clamped(state.upper)
        assert bool((y.amax(0) <= upper[0] + 1e-9).all())
        assert bool(((-y).amax(0) <= upper[1] + 1e-9).all())
        assert before is None or bool((state.upper <= before).all())
        before = state.upper


@torch.no_grad()
def test_staircases_are_tighter_than_noise() -> None:
    """With as many states of a search, never looser; and tighter where neurons take few codes."""
    found = []
    for seed in range(3):
        relaxed, networks, low, high = prepared(seed, 6, 0.008)
        pair, root, pairs = relaxed.staircases()
        met = Nothing(pair.outputs, len(relaxed.low))
        ends = relaxed.low, relaxed.high, Question()
        *_, noise = islice(search_signs(relaxed.pair, *ends, root=relaxed.root, best=met), 8)
        *_, codes = islice(search_signs(pair, *ends, root=root, stairs=pairs, best=met), 8)
        x = low + (high - low) * torch.rand(50_000, len(low), dtype=F, generator=torch.Generator().manual_seed(0))
        reached = float(difference(networks, x).abs().max())
        found.append((float(codes.upper.max()) - reached, float(noise.upper.max()) - reached))
    assert all(own < 1.05 * other for own, other in found), found
    assert found[0][0] < 0.9 * found[0][1], found
