"""Bounds of the difference of two networks: planes against sampled neurons, bounds against samples and exact values."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreach as tr
from tests.networks import DEVICES_SIM_SLOW, random_network, rounded_copy
from torchreach.core.errors import InvalidSetError, ShapeError, UnsupportedLayerError
from torchreach.domains.box_difference import quick_bounds
from torchreach.domains.difference import difference_bounds
from torchreach.domains.hexagon import ClosedPlanes, Graph, Hexagon, height, start_slopes
from torchreach.domains.joint import Both
from torchreach.domains.pair import Pair
from torchreach.domains.zonotope import zonotope_bounds
from torchreach.graph.twin_blocks import blocks
from torchreach.graph.twins import dense
from torchreach.read.steps import steps
from torchreach.search.signs import search_signs
from torchreach.search.witness import ascend
from torchreach.training.loss import matrices
from torchreach.verbs.merge import merge

SHAPES = ([3, 4], [4, 12, 8, 3], [6, 10, 10, 10, 2], [20, 16, 12, 4], [3, 6, 6, 6, 6, 6, 2])
NOISE = (0.0, 1e-3, 1e-2, 0.3)


def pair_of(original: nn.Module, compressed: nn.Module, shape: tuple[int, ...], device: str = "cpu") -> Pair:
    both = (steps(m, shape, dtype=torch.float64, device=torch.device(device)) for m in (original, compressed))
    return Pair.of(*both)


def quick(pair: Pair, lower: Tensor, upper: Tensor) -> tuple[list[Hexagon], Tensor]:
    """Bounds of both networks' hidden neurons, without any of z - z2, and those of y1 - y2 and y2 - y1."""
    found = quick_bounds(Both.of(pair.first, pair.second, pair), lower, upper)
    inf = torch.full((), torch.inf, device=lower.device)
    hidden = []
    for one, other in zip(*found.neurons, strict=True):
        far = inf.expand_as(one.low)
        hidden.append(Hexagon(one.low, one.high, other.low, other.high, -far, far))
    return hidden, found.upper


def noisy_copy(network: nn.Module, noise: float, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    return twin


def boxes(seed: int, count: int, inputs: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(count, inputs, generator=g, dtype=torch.float64)
    radius = 10 ** (2 * torch.rand(count, 1, generator=g, dtype=torch.float64) - 1.7)
    return middle - radius, middle + radius


def samples(lower: Tensor, upper: Tensor, count: int, seed: int) -> Tensor:
    """[count, B, N_in]: half of them corners."""
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(count, *lower.shape, generator=g, dtype=torch.float64)
    share[::2] = share[::2].round()
    return lower + (upper - lower) * share.to(lower.device)


def layers_at(pair: Pair, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """z and z2 of every layer, the two networks each on their own."""
    result, a, b = [], x, x
    for k in range(pair.depth):
        z = a @ matrices(pair, k)[0].T + pair.b[k]
        z2 = b @ matrices(pair, k)[1].T + pair.b[k] - pair.db[k]
        result.append((z, z2))
        a, b = z.relu(), z2.relu()
    return result


def random_hexagons(count: int) -> Hexagon:
    """Hexagons [1, count] of many scales, d up to 10^4 times smaller than z; all hold a point."""
    g = torch.Generator().manual_seed(7)

    def rand() -> Tensor:
        return torch.rand(count, generator=g, dtype=torch.float64)

    scale = 10 ** (4 * rand() - 3)
    small = scale * 10 ** (-4 * rand())
    z, d = scale * (4 * rand() - 2), small * (4 * rand() - 2)

    def wide(size: Tensor) -> Tensor:
        return size * rand() * (rand() > 0.1)

    parts = (
        z - wide(scale),
        z + wide(scale),
        z - d - wide(scale),
        z - d + wide(scale),
        d - wide(small),
        d + wide(small),
    )
    return Hexagon(*(part[None] for part in parts)).tightened()


def points_of(hexagon: Hexagon, count: int) -> tuple[Tensor, Tensor]:
    """(z, d) [count, N] in every hexagon, its edges, corners and the lines z = 0 and z2 = 0 among them."""
    g = torch.Generator().manual_seed(8)
    l1, u1, l2, u2, dl, du = (part[0] for part in hexagon.parts())
    shape = (count, len(l1))
    t = torch.rand(*shape, generator=g, dtype=torch.float64)
    t[::5], t[1::5] = 0, 1
    d = dl + (du - dl) * t
    low, high = torch.maximum(l1, l2 + d), torch.minimum(u1, u2 + d)
    t = torch.rand(*shape, generator=g, dtype=torch.float64)
    t[::3], t[1::7] = 0, 1
    z = low + (high - low).clamp(min=0) * t
    z[3::11] = z[3::11].clamp(min=0).minimum(high[3::11]).maximum(low[3::11])
    z[5::11] = d[5::11].minimum(high[5::11]).maximum(low[5::11])
    inside = (low <= high) & (z - d >= l2) & (z - d <= u2)
    # a sample outside by rounding repeats one that is inside
    first = inside.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(inside, z, z.gather(0, first)), torch.where(inside, d, d.gather(0, first))


def excess_of_planes(wrong: float) -> dict[str, float]:
    """Largest excess of alpha a + beta e over its plane, relative to z, per kind of plane."""
    hexagon = random_hexagons(300)
    assert not Graph.of(hexagon).empty.any()
    graph = Graph.of(hexagon)
    z, d = points_of(hexagon, 4000)
    a = z.relu()
    e = a - (z - d).relu()
    g = torch.Generator().manual_seed(9)
    result: dict[str, float] = {}
    for _ in range(4):
        alpha, beta, p0, q0 = torch.randn(4, 1, 300, generator=g, dtype=torch.float64)
        slopes = {
            "any": (p0, q0),
            "start": start_slopes(graph, alpha, beta),
            "apart": start_slopes(graph, alpha, beta, apart=True),
        }
        raised = {kind: height(graph, alpha, beta, *pq)[0] for kind, pq in slopes.items()}
        # closed form: each neuron a box of its own, so that the summed height is its own
        alone = hexagon.map(lambda part: part.T.contiguous())
        p, q, r = ClosedPlanes.of(alone).above(alpha.T[:, None], beta.T[:, None], 1)
        slopes["closed"], raised["closed"] = (p[:, 0].T, q[:, 0].T), r.sum(2).T
        size = hexagon.sizes()[0]
        for kind, (p, q) in slopes.items():
            above = (alpha * a + beta * e - p * (1 + wrong) * z - q * d - raised[kind]) / size
            result[kind] = max(result.get(kind, -1.0), float(above.max()))
    return result


def test_planes_lie_above_sampled_neurons_and_a_wrong_slope_is_caught() -> None:
    right, wrong = excess_of_planes(0.0), excess_of_planes(0.01)
    assert right.keys() == {"any", "start", "apart", "closed"}
    for kind in right:
        assert right[kind] <= 1e-14, (kind, right[kind])
        assert wrong[kind] > 1e-3, (kind, wrong[kind])


def test_a_hexagon_without_points_is_empty_and_a_single_point_is_not() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    point = Hexagon(one, one, 0.5 * one, 0.5 * one, 0.5 * one, 0.5 * one)
    nothing = Hexagon(one, 2 * one, -2 * one, -one, 0 * one, one)
    assert not Graph.of(point).empty.any()
    assert Graph.of(nothing).empty.all()


@pytest.mark.parametrize("device", DEVICES_SIM_SLOW)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *((sizes, torch.float64) for sizes in SHAPES),
        *((sizes, torch.float32) for sizes in SHAPES[:2]),
        *(pytest.param(sizes, torch.float32, marks=pytest.mark.slow) for sizes in SHAPES[2:]),
    ],
    ids=str,
)
def test_no_sample_and_no_attack_leaves_the_bounds(sizes: list[int], dtype: torch.dtype, device: str) -> None:
    for seed, noise in enumerate(NOISE):
        original = random_network(seed, sizes)
        pair = pair_of(original, noisy_copy(original, noise, seed), (sizes[0],), device)
        lower, upper = (part.to(device, dtype) for part in boxes(seed, 3, sizes[0]))
        found = difference_bounds(pair, lower, upper)
        lower, upper = lower.double(), upper.double()
        hidden, value = quick(pair, lower, upper)
        x = samples(lower, upper, 5000, seed)
        attacked = [ascend(pair, lower[i : i + 1], upper[i : i + 1], starts=6, steps=25).met.witness for i in range(3)]
        x = torch.cat((x, torch.stack(attacked, 2).flatten(0, 1)))
        for k, (z, z2) in enumerate(layers_at(pair, x)):
            slack = 1e-13 * (1 + z.abs().amax() + z2.abs().amax())
            for h in (found[k], *hidden[k : k + 1]):
                for y, low, high in ((z, h.l1, h.u1), (z2, h.l2, h.u2), (z - z2, h.dl, h.du)):
                    assert (y >= low - slack).all()
                    assert (y <= high + slack).all()
        y, error = pair.evaluate(x.flatten(0, 1))
        y, error = (part.reshape(len(x), 3, -1) for part in (y, error))
        assert (y - error <= found[-1].du).all()
        assert (y + error >= found[-1].dl).all()
        assert (y - error <= value[:, 0]).all()
        assert (-y - error <= value[:, 1]).all()
        assert error.max() < 1e-9


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_bounds_are_never_looser_than_zonotopes_of_the_networks(sizes: list[int]) -> None:
    for seed, noise in enumerate(NOISE):
        original = random_network(seed, sizes)
        pair = pair_of(original, noisy_copy(original, noise, seed), (sizes[0],))
        lower, upper = boxes(seed, 3, sizes[0])
        found = difference_bounds(pair, lower, upper)
        rows = torch.cat((((lower + upper) / 2)[:, None], torch.diag_embed((upper - lower) / 2)), 1)
        slack = 1e-15 * rows.abs().sum(1)
        first, second = (zonotope_bounds(s, rows, slack) for s in (pair.first, pair.second))
        for h, (low1, high1), (low2, high2) in zip(found, first, second, strict=True):
            tiny = 1e-12 * (1 + high1.abs().amax())
            assert (h.u1 <= high1 + tiny).all()
            assert (h.l1 >= low1 - tiny).all()
            assert (h.u2 <= high2 + tiny).all()
            assert (h.l2 >= low2 - tiny).all()
            assert (h.du <= high1 - low2 + tiny).all()
            assert (h.dl >= low1 - high2 - tiny).all()


def test_near_copies_are_bounded_far_tighter_than_apart() -> None:
    original = random_network(1, [6, 20, 20, 3])
    pair = pair_of(original, noisy_copy(original, 1e-4, 1), (6,))
    h = difference_bounds(pair, *boxes(1, 4, 6))[-1]
    assert ((h.du - h.dl) < 0.02 * (h.u1 - h.l2)).all()


def test_identical_networks_differ_by_exactly_zero() -> None:
    original = random_network(3, [5, *[50] * 6, 5])
    pair = pair_of(original, copy.deepcopy(original), (5,))
    lower, upper = boxes(3, 4, 5)
    for h in difference_bounds(pair, lower, upper):
        assert h.dl.abs().max() == 0
        assert h.du.abs().max() == 0
    assert quick(pair, lower, upper)[1].abs().max() == 0
    y, error = pair.evaluate(lower)
    assert y.abs().max() == 0
    assert error.max() == 0


def test_layers_before_the_first_change_add_nothing() -> None:
    original = random_network(4, [4, 10, 10, 2])
    compressed = copy.deepcopy(original)
    last = compressed[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.add_(0.25)
    pair = pair_of(original, compressed, (4,))
    assert pair.shared == 2
    h = difference_bounds(pair, *boxes(4, 3, 4))[-1]
    torch.testing.assert_close(h.du, torch.full_like(h.du, -0.25), atol=1e-12, rtol=0)
    torch.testing.assert_close(h.dl, torch.full_like(h.dl, -0.25), atol=1e-12, rtol=0)


class Turned(nn.Module):
    """A reshape that only its own attribute tells from another one."""

    def __init__(self, shape: tuple[int, int], last: nn.Module) -> None:
        super().__init__()
        self.shape, self.last = shape, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.reshape(-1, *self.shape).permute(0, 2, 1).flatten(1))


POOLS = [
    (nn.AvgPool2d(2), nn.AvgPool2d(2, divisor_override=3)),
    (nn.AvgPool2d(2, padding=1), nn.AvgPool2d(2, padding=1, count_include_pad=False)),
    (nn.AvgPool1d(2, padding=1), nn.AvgPool1d(2, padding=1, count_include_pad=False)),
]


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_layers_with_equal_weights_and_other_settings_are_no_one_network(case: int) -> None:
    """Settings that `repr` does not show."""
    if case < 3:
        pools = POOLS[case]
        shape = (1, 4, 4) if isinstance(pools[0], nn.AvgPool2d) else (1, 6)
        last = nn.Linear(pools[0](torch.zeros(1, *shape)).numel(), 2)
        both = [nn.Sequential(pool, nn.Flatten(), last).double() for pool in pools]
    else:
        shape, last = (6,), nn.Linear(6, 2)
        both = [Turned(sizes, last).double() for sizes in ((2, 3), (3, 2))]
    g = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(1, *shape, dtype=torch.float64, generator=g)
    stars = tr.StarBatch.from_box(x - 0.1, x + 0.1)
    with torch.no_grad():
        reached = (both[0](x) - both[1](x)).abs().max()
    assert reached > 1e-3
    for method in ("exact", "search"):
        found = tr.discrepancy(*both, stars, method)
        assert found.upper.max() >= reached
        assert found.lower.max() >= reached - 1e-9
    assert tr.equivalent(*both, stars, float(reached) / 2).answer == (tr.Answer.NOT_EQUIVALENT,)
    assert tr.discrepancy(both[0], copy.deepcopy(both[0]), stars).upper.max() == 0


@pytest.mark.parametrize("case", range(3))
@torch.no_grad()
def test_layers_of_other_settings_are_apart_without_matrices_too(case: int) -> None:
    shape = (1, 4, 4) if isinstance(POOLS[case][0], nn.AvgPool2d) else (1, 6)
    both = [nn.Sequential(pool, nn.Flatten()).double() for pool in POOLS[case]]
    first, second = (steps(one, shape, dtype=torch.float64, device=torch.device("cpu"))[0] for one in both)
    own, W, V = blocks(first, second), dense(first), dense(second)
    assert (W != V).any()
    x = torch.eye(W.shape[1], dtype=torch.float64)
    torch.testing.assert_close(own.forth(x)[1], (W - V).T)
    y = torch.eye(W.shape[0], dtype=torch.float64)
    torch.testing.assert_close(own.back(None, y), (W - V, V))


def exact_maximum(pair: Pair, lower: Tensor, upper: Tensor) -> list[Fraction]:
    """Largest y1 - y2 over the box in rational arithmetic, of networks whose neurons are all active on it."""

    def whole(values: Tensor) -> np.ndarray:
        return np.vectorize(Fraction, otypes=[object])(values.numpy())

    maps = []
    weights = list(zip(*(matrices(pair, k) for k in range(pair.depth)), strict=True))
    for own, shifts in ((weights[0], [s.bias for s in pair.first]), (weights[1], [s.bias for s in pair.second])):
        W, b = whole(own[0]), whole(shifts[0])
        for M, s in zip(own[1:], shifts[1:], strict=True):
            W, b = whole(M) @ W, whole(M) @ b + whole(s)
        maps.append((W, b))
    (W, b), (V, c) = maps
    low, high, D = whole(lower), whole(upper), W - V
    return list(np.where(D > 0, D * high, D * low).sum(1) + b - c)


def test_bounds_hold_in_rational_arithmetic() -> None:
    """Where all neurons are active the bound is the maximum itself: without an allowance many would fall short."""
    inside = 0
    for seed in range(30):
        original = random_network(seed, [4, 6, 6, 3])
        for layer in list(original)[:-1]:
            if isinstance(layer, nn.Linear):
                with torch.no_grad():
                    layer.weight.abs_()
                    layer.bias.abs_().add_(50)
        pair = pair_of(original, rounded_copy(original, 64), (4,))
        lower, upper = boxes(seed, 1, 4)
        largest = exact_maximum(pair, lower[0], upper[0])
        hidden, value = quick(pair, lower, upper)
        assert all(h.settled().all() for h in hidden)
        for bound in (difference_bounds(pair, lower, upper)[-1].du[0], value[0, 0]):
            for y, b in zip(largest, bound.tolist(), strict=True):
                assert Fraction(b) >= y
                inside += float(Fraction(b) - y) < 1e-8
    assert inside == 30 * 3 * 2


@pytest.mark.parametrize("seed", range(8))
def test_bounds_contain_the_exact_range(seed: int) -> None:
    original = random_network(seed, [3, 7, 6, 2])
    compressed = rounded_copy(original, 8)
    lower, upper = boxes(seed, 2, 3)
    exact = tr.discrepancy(original, compressed, tr.StarBatch.from_box(lower, upper))
    h = difference_bounds(pair_of(original, compressed, (3,)), lower, upper)[-1]
    assert (h.du >= exact.range_upper - 1e-9).all()
    assert (h.dl <= exact.range_lower + 1e-9).all()


def test_convolutions_and_batch_norm_are_covered() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    norm = original[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    original = original.eval()
    compressed = rounded_copy(original, 64)
    pair = pair_of(original, compressed, (1, 4, 4))
    assert pair.exact == [False, False]
    lower, upper = boxes(0, 2, 16)
    h = difference_bounds(pair, lower, upper)[-1]
    x = samples(lower, upper, 3000, 0)
    with torch.no_grad():
        y = (original(x.reshape(-1, 1, 4, 4)) - compressed(x.reshape(-1, 1, 4, 4))).reshape(3000, 2, 3)
    assert (y <= h.du + 1e-12).all()
    assert (y >= h.dl - 1e-12).all()


def test_wrong_input_is_named() -> None:
    a, b = random_network(0, [3, 5, 2]), random_network(1, [3, 6, 2])
    with pytest.raises(ShapeError, match=r"one architecture.*\(3,\) -> 5 -> 2.*\(3,\) -> 6 -> 2"):
        pair_of(a, b, (3,))
    with pytest.raises(ShapeError, match="one architecture"):
        pair_of(a, random_network(1, [3, 5, 5, 2]), (3,))
    pair = pair_of(a, rounded_copy(a, 8), (3,))
    zero = torch.zeros(1, 3)
    with pytest.raises(ShapeError, match=r"\[B, 3\], got \(1, 4\)"):
        difference_bounds(pair, torch.zeros(1, 4), torch.ones(1, 4))
    with pytest.raises(InvalidSetError, match="lower <= upper"):
        difference_bounds(pair, zero + 1, zero)
    with pytest.raises(InvalidSetError, match="finite"):
        difference_bounds(pair, zero, zero + torch.inf)
    mixed = merge(a, random_network(2, [3, 4, 4, 2]))
    with pytest.raises(UnsupportedLayerError, match="require a box"):
        pair_of(mixed, copy.deepcopy(mixed), (3,))


def test_a_layer_that_is_off_everywhere_leaves_the_biases() -> None:
    original = random_network(2, [3, 5, 4, 4, 2])
    with torch.no_grad():
        original[2].bias.fill_(-100.0)
    pair = pair_of(original, noisy_copy(original, 1e-2, 2), (3,))
    lower, upper = boxes(2, 3, 3)
    y = pair.evaluate(lower)[0]
    *_, h = difference_bounds(pair, lower, upper)
    for low, high in (
        (h.dl, h.du),
        (-quick(pair, lower, upper)[1][:, 1], quick(pair, lower, upper)[1][:, 0]),
    ):
        torch.testing.assert_close(low, y, atol=1e-12, rtol=0)
        torch.testing.assert_close(high, y, atol=1e-12, rtol=0)
    states = list(search_signs(pair, lower[0], upper[0]))
    assert states[-1].closed
