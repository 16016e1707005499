"""Smooth activations: the table against 50 digits, planes against points, certificates against samples and attacks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import mpmath
import pytest
import torch
from mpmath import iv, mp
from torch import Tensor, nn
from torch.nn import functional as F

import torchreach as tr
from torchreach.core.errors import OptionError, UnsupportedLayerError
from torchreach.domains.box_difference import quick_bounds
from torchreach.domains.difference import difference_bounds, interval_difference
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.joint import Both
from torchreach.domains.pair import Pair
from torchreach.domains.smooth import Cells, CurvePlanes, activated
from torchreach.domains.zonotope import box_rows, interval_bounds, zonotope_bounds
from torchreach.graph.smooth import ENTRIES, ERROR, SMOOTH, Activations, Erf, smooth
from torchreach.read.module import chain
from torchreach.read.steps import steps
from torchreach.verbs.merge import merge
from torchreach.verbs.reach import replay

K, C = "0.044715", "2"


def _tanh_gate(x):
    return mpmath.sqrt(mpmath.mpf(C) / mp.pi) * (x + mpmath.mpf(K) * x**3)


def _exponential(alpha, scale=1, pace=1):
    return lambda x: scale * x if x >= 0 else scale * alpha * mpmath.expm1(pace * x)


# Layer, and what it computes, in arithmetic of as many digits as wanted.
CASES: dict[str, tuple[nn.Module, Callable]] = {
    "sigmoid": (nn.Sigmoid(), lambda x: 1 / (1 + mpmath.exp(-x))),
    "tanh": (nn.Tanh(), mpmath.tanh),
    "erf": (Erf(), mpmath.erf),
    "gelu": (nn.GELU(), lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2),
    "gelu tanh": (nn.GELU("tanh"), lambda x: x / (1 + mpmath.exp(-2 * _tanh_gate(x)))),
    "silu": (nn.SiLU(), lambda x: x / (1 + mpmath.exp(-x))),
    "elu": (nn.ELU(), _exponential(1)),
    "elu steep": (nn.ELU(2.5), _exponential(mpmath.mpf(2.5))),
    "elu flat": (nn.ELU(0.25), _exponential(mpmath.mpf(0.25))),
    "elu down": (nn.ELU(-1.0), _exponential(-1)),
    "celu": (nn.CELU(0.5), _exponential(mpmath.mpf(0.5), pace=2)),
    "selu": (nn.SELU(), _exponential(mpmath.mpf(1.6732632423543772), mpmath.mpf(1.0507009873554805))),
    "hardswish": (nn.Hardswish(), lambda x: x * min(max(x + 3, mpmath.mpf(0)), mpmath.mpf(6)) / 6),
    "softplus": (nn.Softplus(), lambda x: mpmath.log1p(mpmath.exp(x))),
    "softplus steep": (nn.Softplus(2.0, 8.0), lambda x: mpmath.log1p(mpmath.exp(2 * x)) / 2),
    "logsigmoid": (nn.LogSigmoid(), lambda x: -mpmath.log1p(mpmath.exp(-x))),
}
NAMES = list(CASES)


def random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(act: nn.Module, sizes: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Random weights, with which pre-activations reach the bent parts."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layer = nn.Linear(n_in, n_out, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(3 * (random(seed + 2 * i, n_out, n_in) - 0.5) / n_in**0.5 * 2)
            layer.bias.copy_(2 * random(seed + 2 * i + 1, n_out) - 1)
        layers += [layer, act]
    return nn.Sequential(*layers[:-1])


def box(inputs: int, radius: float, dtype: torch.dtype = torch.float64) -> tr.StarBatch:
    ends = torch.full((1, inputs), radius, dtype=dtype)
    return tr.StarBatch.from_box(-ends, ends)


def points() -> Tensor:
    """Of all magnitudes and both signs, and next to places where something happens."""
    small = 10 ** (6 * random(1, 60) - 5) * torch.where(random(2, 60) > 0.5, 1.0, -1.0)
    return torch.cat((small, 12 * random(3, 120) - 6, torch.tensor([0.0, 3.0, -3.0, 40.0, -40.0])))


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(50):
        yield


def test_every_entry_has_a_case() -> None:
    assert {type(layer) for layer, _ in CASES.values()} == set(SMOOTH)
    assert all(issubclass(entry.layer, nn.Module) for entry in ENTRIES)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes_are_off_by_less_than_the_table_says(name: str) -> None:
    layer, exact = CASES[name]
    f, x = smooth(layer), points()
    torch.testing.assert_close(f.value(x), layer(x), rtol=1e-12, atol=1e-12 + f.jump)
    off = [
        abs(float(exact(mpmath.mpf(a)) - mpmath.mpf(b))) for a, b in zip(x.tolist(), f.value(x).tolist(), strict=True)
    ]
    share = torch.tensor(off, dtype=torch.float64) / (ERROR * (f.height + f.steepest * x.abs()))
    assert float(share.max()) < 0.2  # what the table promises is several times what is seen
    h = mpmath.mpf(10) ** -15
    x = x[all_differ(f.turns, x)]
    slopes = [(exact(mpmath.mpf(a) + h) - exact(mpmath.mpf(a) - h)) / (2 * h) for a in x.tolist()]
    wrong = [abs(float(s - mpmath.mpf(b))) for s, b in zip(slopes, f.slope(x).tolist(), strict=True)]
    assert max(wrong) < 0.2 * f.slope_error + 1e-25
    assert float(f.slope(x).abs().max()) <= f.steepest + f.slope_error


def all_differ(turns, x: Tensor) -> Tensor:
    """Points that are not at a kink."""
    keep = torch.ones_like(x, dtype=torch.bool)
    for turn in turns:
        if turn.kink:
            keep &= (x - turn.at).abs() > 1e-12
    return keep


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_monotone_between_turns_and_extreme_at_them(name: str) -> None:
    f = smooth(CASES[name][0])
    ends = [-30.0, *(turn.at for turn in f.turns), 30.0]
    for low, high in zip(ends[:-1], ends[1:], strict=True):
        x = low + (high - low) * torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
        change = f.slope(x).diff()
        assert bool((change >= -2 * f.slope_error).all()) or bool((change <= 2 * f.slope_error).all())
        third = f.slope(x).diff().diff() / (x[1] - x[0]) ** 2
        noise = 8 * f.slope_error / float(x[1] - x[0]) ** 2
        assert float(third.abs().max()) <= f.curl * (1 + 1e-6) + noise
    for turn in f.turns:
        near = torch.tensor([turn.at - 1e-6, turn.at + 1e-6], dtype=torch.float64)
        sides = f.slope(near)
        assert turn.low <= float(sides.min()) + 1e-5
        assert float(sides.max()) - 1e-5 <= turn.high
        if not turn.kink:  # the derivative of the slope vanishes at the place, and the slope is what is said
            exact = CASES[name][1]
            at = mpmath.mpf(turn.at)
            assert turn.low < float(mpmath.diff(exact, at)) < turn.high
            assert abs(float(mpmath.diff(exact, at, 2))) < 1e-14


def test_the_third_derivative_of_gelu_by_tanh_stays_below_its_bound() -> None:
    """By interval arithmetic on [0, 8], the function being odd there; beyond, 1 - t^2 < 4 exp(-2 g) < 1e-40."""
    c, k = iv.sqrt(2 / iv.pi), iv.mpf(K)
    largest = 0.0
    for i in range(1600):
        x = iv.mpf([i / 200, (i + 1) / 200])
        g, g1, g2, g3 = c * (x + k * x**3), c * (1 + 3 * k * x**2), 6 * c * k * x, 6 * c * k
        decay = iv.exp(-2 * g)
        t, flat = (1 - decay) / (1 + decay), 4 * decay / (1 + decay) ** 2
        second = flat * (g2 - 2 * t * g1**2)
        third = flat * (g3 - 6 * t * g1 * g2 + g1**3 * (6 * t**2 - 2))
        value = (3 * second + x * third) / 2
        largest = max(largest, abs(float(value.a)), abs(float(value.b)))
    assert 0.776 < largest < smooth(nn.GELU("tanh")).curl


def intervals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """[count] of widths from 1e-9 to 20, points and ends at turns among them."""
    middle, width = 10 * random(seed, count) - 5, 20 * 10 ** (-9 * random(seed + 1, count) ** 2)
    middle[::7] = middle[::7].round()
    width[::11] = 0
    return middle - width / 2, middle + width / 2


@pytest.mark.parametrize("name", NAMES)
def test_lines_hold_on_their_intervals(name: str) -> None:
    f = smooth(CASES[name][0])
    lower, upper = intervals(2000, 4)
    cells = Cells.of(f, lower, upper)
    share = torch.cat(
        (random(6, 60, 1).expand(-1, 2000), random(7, 60, 2000), torch.eye(2)[:, :1].expand(2, 2000).double())
    )
    x = torch.minimum(lower + (upper - lower) * share, upper)
    y, allowed = f.value(x), 1e-15 * (1 + x.abs())
    (s, t), (v, w), (slope, middle, height) = cells.above(), cells.below(), cells.band()
    assert bool((s * x + t - y >= -allowed).all())
    assert bool((y - v * x - w >= -allowed).all())
    assert bool(((y - slope * x - middle).abs() <= height + allowed).all())
    low, high = cells.range()
    assert bool(((y >= low - allowed) & (y <= high + allowed)).all())
    low, high = cells.slopes
    inside = f.slope(x)
    assert bool(((inside >= low - 1e-14) & (inside <= high + 1e-14)).all())
    # Tight: the line above leaves no more in the middle than the interval's worst curvature and the cells' coarseness.
    wide = upper - lower
    excess = s * (lower + upper) / 2 + t - f.value((lower + upper) / 2)
    assert bool((excess <= (high - low) * wide / 2 + 4 * cells.error).all())


def hexagons(count: int, seed: int) -> Hexagon:
    """[1, count] of many scales around random neurons; all hold a point."""
    z, d = 8 * random(seed, count) - 4, (2 * random(seed + 1, count) - 1) * 10 ** (-4 * random(seed + 2, count))
    wide, narrow = 4 * 10 ** (-6 * random(seed + 3, count)), 10 ** (-5 * random(seed + 4, count))
    narrow[::9] = 0
    d[::13], narrow[::13] = 0, 0
    r = random(seed + 5, 4, count)
    parts = (
        *(z - wide * r[0], z + wide * r[1], z - d - wide * r[2] - narrow, z - d + wide * r[3] + narrow),
        *(d - narrow * r[0], d + narrow * r[3]),
    )
    return Hexagon(*(part[None] for part in parts)).tightened()


def pairs(hexagon: Hexagon, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(z, d) [count, N] in the hexagons, ends among them."""
    l1, u1, l2, u2, dl, du = (part[0] for part in hexagon.parts())
    t, s = random(seed, count, len(l1)), random(seed + 1, count, len(l1))
    t[::5], t[1::5], s[::3], s[1::3] = 0, 1, 0, 1
    d = dl + (du - dl) * t
    low, high = torch.maximum(l1, l2 + d), torch.minimum(u1, u2 + d)
    z = low + (high - low) * s
    keep = (low <= high) & (z >= l1) & (z <= u1) & (z - d >= l2) & (z - d <= u2)
    return torch.where(keep, z, torch.nan), d


def excess_of_planes(name: str, neurons: int, count: int, seed: int) -> tuple[float, int]:
    """Largest excess of alpha a + beta e over its plane, relative; and how many samples there were."""
    f, hexagon = smooth(CASES[name][0]), hexagons(neurons, seed)
    z, d = pairs(hexagon, count, seed + 6)
    a = f.value(z)
    e = a - f.value(z - d)
    worst, seen = -math.inf, 0
    (low, high), (least, most) = activated_ends(f, hexagon)
    allowed = 1e-14 * (1 + z.abs())
    inside = (a >= low - allowed) & (a <= high + allowed) & (e >= least - allowed) & (e <= most + allowed)
    assert bool((inside | z.isnan()).all())
    for apart in (False, True):
        # one neuron a row, so that sums over neurons are single heights
        alpha, beta = 2 * random(seed + 8, 2, neurons) - 1
        rows = []
        for i in torch.arange(neurons).split(50):
            part = CurvePlanes.of(f, hexagon.map(lambda x, i=i: x[:, i]), torch.arange(len(i)))
            p, q, height = part.above(alpha[i].diag()[None], beta[i].diag()[None], neurons, apart=apart)
            rows.append(torch.stack((p[0].diagonal(), q[0].diagonal(), height[0])))
        p, q, heights = torch.cat(rows, 1)
        value = alpha * a + beta * e - p * z - q * d - heights
        value = value / (1 + z.abs())
        seen += int((~value.isnan()).sum())
        worst = max(worst, float(torch.nan_to_num(value, nan=-math.inf).max()))
    return worst, seen


def activated_ends(f, hexagon: Hexagon):
    """Bounds of a and e as `activated` gives them."""
    n = hexagon.l1.shape[1]
    act = nn.Sequential(
        nn.Linear(1, n), next(layer for layer, _ in CASES.values() if smooth(layer).name == f.name), nn.Linear(n, 1)
    )
    step = steps(act.double(), (1,), dtype=torch.float64, device=torch.device("cpu"), smooth=True)[0]
    return activated(step, hexagon)


@pytest.mark.parametrize("name", NAMES)
def test_planes_of_the_difference_hold_on_their_hexagons(name: str) -> None:
    worst, seen = excess_of_planes(name, 500, 60, 10)
    assert seen > 40_000
    assert worst <= 2e-15


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_planes_of_the_difference_hold_on_a_million_points(name: str) -> None:
    total = 0
    for seed in range(20, 28):
        worst, seen = excess_of_planes(name, 2000, 60, 50 * seed)
        assert worst <= 2e-15
        total += seen
    assert total > 1_000_000


def attacked(
    original: nn.Module, compressed: nn.Module, lower: Tensor, upper: Tensor, count: int, steps: int
) -> Tensor:
    """[N_out] largest |y1 - y2| over samples and gradient ascent from the best of them, in float64."""
    first, second = (copy.deepcopy(m).double() for m in (original, compressed))
    x = lower + (upper - lower) * random(99, count, *lower.shape)
    x[: count // 4] = torch.where(random(98, count // 4, *lower.shape) > 0.5, upper, lower)
    with torch.no_grad():
        value = (first(x) - second(x)).abs()
    best = value.amax(0)
    for n in range(len(best)):
        at = x[value[:, n].topk(16).indices].clone()
        for step in range(steps):
            at.requires_grad_()
            y = (first(at) - second(at))[:, n]
            (gradient,) = torch.autograd.grad(y.abs().sum(), at)
            best[n] = torch.maximum(best[n], y.abs().max().detach())
            pace = 0.3 * 0.8**step * (upper - lower)
            at = torch.minimum(torch.maximum(at.detach() + pace * gradient.sign(), lower), upper)
    return best


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name in NAMES),
        *((name, torch.float32) for name in ("tanh", "gelu")),
        *(pytest.param(name, torch.float32, marks=pytest.mark.slow) for name in NAMES if name not in ("tanh", "gelu")),
    ],
)
def test_no_sample_and_no_attack_leaves_a_certificate(name: str, dtype: torch.dtype) -> None:
    original = network(CASES[name][0], [4, 10, 8, 3], dtype=dtype)
    compressed = tr.quantize_weights(original, 6)
    stars = box(4, 0.4, dtype)
    found = tr.discrepancy(original, compressed, stars, method="search", budget=tr.Budget(stars=40))
    ends = stars.bounding_box()
    best = attacked(original, compressed, ends[0][0], ends[1][0], 2000, 8)
    assert bool((best <= found.upper[0] * (1 + 1e-6)).all())
    assert bool((found.lower[0] >= 0.9 * best).all())
    with torch.no_grad():
        first, second = (copy.deepcopy(m).double()(found.witness[0].double()) for m in (original, compressed))
    attained = (first - second).abs().diagonal()
    assert bool((attained >= found.lower[0] * (1 - 1e-6)).all())
    assert bool((found.lower <= found.upper).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_sample_of_a_million_leaves_a_certificate(name: str) -> None:
    original = network(CASES[name][0], [5, 16, 16, 3], seed=3)
    for radius, compressed in ((0.05, tr.quantize_weights(original, 8)), (1.0, tr.prune_weights(original, 0.3))):
        stars = box(5, radius)
        found = tr.discrepancy(original, compressed, stars, method="search", budget=tr.Budget(stars=200))
        ends = stars.bounding_box()
        best = attacked(original, compressed, ends[0][0], ends[1][0], 1_000_000, 40)
        assert bool((best <= found.upper[0]).all())


def layer_ranges(module: nn.Sequential, x: Tensor) -> list[Tensor]:
    result = []
    for layer in module:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            result.append(x)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_every_layer_hold_and_nest(name: str) -> None:
    original = network(CASES[name][0], [3, 8, 8, 2], seed=5)
    compressed = tr.quantize_weights(original, 5)
    lower, upper = torch.full((2, 3), -0.3).double(), torch.tensor([[0.3] * 3, [-0.2] * 3]).double()
    both = [
        steps(m, (3,), dtype=torch.float64, device=torch.device("cpu"), smooth=True) for m in (original, compressed)
    ]
    pair = Pair.of(both[0], both[1])
    rows, slack = box_rows(lower, upper)
    full, interval = difference_bounds(pair, lower, upper), interval_difference(pair, lower, upper)
    quick = quick_bounds(Both.of(*both, pair), lower, upper).upper
    zonotopes, intervals = zonotope_bounds(both[0], rows, slack), interval_bounds(both[0], rows, slack)
    x = lower[:, None] + (upper - lower)[:, None] * random(8, 2, 3000, 3)
    with torch.no_grad():
        z, z2 = layer_ranges(original, x), layer_ranges(compressed, x)
    for k, hexagon in enumerate(full):
        for value, low, high in (
            (z[k], hexagon.l1, hexagon.u1), (z2[k], hexagon.l2, hexagon.u2), (z[k] - z2[k], hexagon.dl, hexagon.du),
            (z[k], *zonotopes[k]), (z[k], *intervals[k]),
        ):  # fmt: skip
            assert bool(((value >= low[:, None] - 1e-12) & (value <= high[:, None] + 1e-12)).all())
    d = z[-1] - z2[-1]
    for top in (torch.stack((interval.du, -interval.dl), 1), quick):
        assert bool((torch.stack((d.amax(1), -d.amin(1)), 1) <= top + 1e-12).all())
    assert bool((full[-1].du <= interval.du + 1e-12).all())


def test_equal_networks_differ_by_nothing() -> None:
    original = network(nn.GELU(), [3, 6, 2])
    found = tr.discrepancy(original, copy.deepcopy(original), box(3, 1.0))
    assert float(found.upper.max()) == 0.0
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed[2].weight += 0.01
    both = [steps(m, (3,), dtype=torch.float64, device=torch.device("cpu"), smooth=True) for m in (original, changed)]
    hexagon = difference_bounds(Pair.of(both[0], both[1]), *(end.double() for end in box(3, 1.0).bounding_box()[:2]))[0]
    assert float(hexagon.du.max()) == 0.0  # the first layer is shared


def test_replayed_values_hold_their_error() -> None:
    module = network(nn.SiLU(), [3, 6, 2])
    x = 4 * random(11, 200, 3) - 2
    step = steps(module, (3,), dtype=torch.float64, device=torch.device("cpu"), smooth=True)
    value, error = replay(step, x)
    assert float(error.max()) < 1e-12
    assert bool(((value - module(x)).abs() <= 2 * error).all())


class Skips(nn.Module):
    """A skip, a ReLU beside a smooth activation, and a carried value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        return self.last(a + torch.cat((F.silu(self.second(a)[:, :3]), self.second(a)[:, 3:].relu()), 1))


def test_graphs_with_skips_are_certified() -> None:
    torch.manual_seed(0)
    original = Skips().double()
    compressed = tr.quantize_weights(original, 6)
    stars = box(3, 0.5)
    found = tr.discrepancy(original, compressed, stars, budget=tr.Budget(stars=60))
    best = attacked(original, compressed, *(end[0] for end in stars.bounding_box()[:2]), 2000, 8)
    assert bool((best <= found.upper[0]).all())
    assert float((found.upper[0] / best).max()) < 3
    merged = merge(original, compressed, (3,))
    x = random(12, 20, 3)
    torch.testing.assert_close(merged(x), original(x) - compressed(x))
    with pytest.raises(UnsupportedLayerError, match="Tanh"):
        merged(stars)


def test_convolutions_are_certified() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GELU(), nn.Conv2d(3, 2, 2), nn.SiLU(), nn.Flatten(), nn.Linear(18, 2)
    )
    compressed = tr.prune_weights(original, 0.2)
    lower = random(13, 1, 1, 6, 6).float()
    stars = tr.StarBatch.from_box(lower, lower + 0.02)
    found = tr.discrepancy(original, compressed, stars, budget=tr.Budget(stars=4))
    best = attacked(original, compressed, lower[0].double(), (lower + 0.02)[0].double(), 1000, 4)
    assert bool((best <= found.upper[0]).all())
    assert float((found.upper[0] / best).max()) < 2


class Calls(nn.Module):
    """Functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        functions = (
            torch.sigmoid, lambda v: v.tanh(), F.gelu, lambda v: F.gelu(v, approximate="tanh"), F.silu,
            lambda v: F.elu(v, 0.5), F.hardswish, F.logsigmoid, lambda v: F.celu(F.selu(v), alpha=0.7),
        )  # fmt: skip
        for layer, function in zip(self.layers, functions, strict=True):
            x = function(layer(x))
        return x


@pytest.mark.parametrize("traced", ["fx", "export", "program"])
def test_functions_and_methods_are_read_as_they_compute(traced: str) -> None:
    torch.manual_seed(0)
    module, x = Calls().double(), 3 * random(14, 50, 4)
    read: nn.Module = module
    if traced != "fx":
        program = torch.export.export(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        read = (program.run_decompositions({}) if traced == "program" else program).module(check_guards=False)
    layers = chain(read, (4,))
    torch.testing.assert_close(layers(x), module(x))
    kinds = {type(layer) for layer in layers}
    assert {nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Hardswish, nn.LogSigmoid} <= kinds


def test_exact_reach_names_the_activation_and_the_cure() -> None:
    module = network(nn.Tanh(), [2, 3, 2])
    for call in (
        lambda: tr.reach(module, box(2, 1.0)),
        lambda: tr.discrepancy(module, tr.quantize_weights(module, 8), box(2, 1.0), method="exact"),
    ):
        with pytest.raises(UnsupportedLayerError, match=r"Tanh\(\) is smooth.*method='search'"):
            call()


@pytest.mark.parametrize(
    "second",
    [(nn.Sigmoid(), [2, 3, 2]), (nn.ReLU(), [2, 3, 2]), (nn.Tanh(), [2, 4, 3, 2])],
    ids=["another function", "ReLU", "another shape"],
)
def test_networks_that_make_no_pair_are_bounded_jointly(second: tuple[nn.Module, list[int]]) -> None:
    first, other = network(nn.Tanh(), [2, 3, 2]), network(*second)
    found = tr.discrepancy(first, other, box(2, 1.0), gap=1e-3, budget=tr.Budget(stars=3000))
    x = 2 * random(3, 20_000, 2) - 1
    with torch.no_grad():
        y = (first(x) - other(x)).abs()
    assert (y.amax(0) <= found.upper[0]).all()
    assert (found.upper - found.lower).max() < 1e-2


def test_half_precision_is_read_as_real_valued_only_on_request() -> None:
    module = network(nn.GELU(), [2, 4, 2], dtype=torch.float32)
    half = copy.deepcopy(module).half()
    with pytest.raises(UnsupportedLayerError, match=r"GELU.*arithmetic='real'"):
        tr.discrepancy(module, half, box(2, 0.1, torch.float32))
    found = tr.discrepancy(module, half, box(2, 0.1, torch.float32), arithmetic="real", budget=tr.Budget(stars=1))
    assert 0 < float(found.upper.max()) < 0.1


def test_parameters_without_a_rule_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match="CELU.*positive"):
        chain(nn.Sequential(nn.Linear(2, 2), nn.CELU(-1.0)))


@pytest.mark.parametrize("top1", [False, True])
def test_equivalence_is_answered(top1: bool) -> None:
    original = network(nn.Tanh(), [3, 8, 3], seed=7)
    compressed = tr.quantize_weights(original, 8)
    asked = {"top1": True} if top1 else {"epsilon": 0.2}
    found = tr.equivalent(original, compressed, box(3, 0.01), **asked, budget=tr.Budget(stars=50))
    assert found.answer == (tr.Answer.EQUIVALENT,)
    if not top1:
        found = tr.equivalent(original, compressed, box(3, 0.01), 1e-6, budget=tr.Budget(stars=50))
        assert found.answer == (tr.Answer.NOT_EQUIVALENT,)


def test_gaps_and_tolerances_end_the_search() -> None:
    original = network(nn.SiLU(), [2, 6, 2], seed=9)
    compressed = tr.quantize_weights(original, 6)
    wide = tr.discrepancy(original, compressed, box(2, 0.3), budget=tr.Budget(stars=1))
    gap = 0.3 * float((wide.upper - wide.lower).max())
    found = tr.discrepancy(original, compressed, box(2, 0.3), gap=gap)
    assert float((found.upper - found.lower).max()) <= gap
    assert found.stats.branches > 1
    found = tr.discrepancy(original, compressed, box(2, 0.3), tolerance=2 * float(wide.upper.max()))
    assert found.reasons[0] is tr.Reason.WITHIN
    with pytest.raises(OptionError):
        tr.discrepancy(original, compressed, box(2, 0.3), gap=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_bounds_the_difference_and_falls_along_its_gradient(name: str) -> None:
    original = network(CASES[name][0], [3, 8, 8, 2], seed=11)
    student = tr.quantize_weights(original, 5)
    lower, upper = torch.full((1, 3), -0.1).double(), torch.full((1, 3), 0.1).double()
    loss = tr.DiscrepancyLoss(original, student)
    before = loss(lower, upper)
    before.backward()
    assert float(before) >= float(attacked(original, student, lower[0], upper[0], 500, 3).mean())
    with torch.no_grad():
        size = sum(float((p.grad**2).sum()) for p in student.parameters() if p.grad is not None)
        for p in student.parameters():
            assert p.grad is not None
            p -= 1e-5 * p.grad / size**0.5
    # to first order, the loss falls by the length of the step times the gradient's
    assert float(before - loss(lower, upper)) == pytest.approx(1e-5 * size**0.5, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_planes_follow_the_slope_along_the_interval(name: str) -> None:
    """Halving the interval of z around a steady difference quarters what planes leave open, away from kinks."""
    f = smooth(CASES[name][0])
    left = []
    for width in (0.2, 0.1):
        z = torch.tensor([-1.5, -0.8, 0.7, 1.6], dtype=torch.float64)
        d = torch.full_like(z, 1e-3)
        hexagon = Hexagon(*(x[None] for x in (z - width, z + width, z - d - width, z - d + width, d, d)))
        planes = CurvePlanes.of(f, hexagon, torch.arange(4))
        (p, q, r), (a, b, c) = planes.rise, planes.fall
        left.append(((p - a) * z + (q - b) * d + r - c)[0])
    assert bool((left[1] <= 0.3 * left[0] + 1e-14).all())


class Products(nn.Module):
    """Activations as exporters write them out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = self.layers[1](x * torch.sigmoid(1.7 * x))
        x = self.layers[2](x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
        return self.layers[3](F.hardsigmoid(x) * x)


@pytest.mark.parametrize("traced", ["fx", "export"])
def test_products_that_are_activations_are_recognised(traced: str) -> None:
    torch.manual_seed(1)
    module, x = Products().double(), 3 * random(15, 50, 4)
    read: nn.Module = module
    if traced != "fx":
        read = torch.export.export(module, (x[:2],)).module(check_guards=False)
    layers = chain(read, (4,))
    torch.testing.assert_close(layers(x), module(x))
    names = [f.name for layer in layers if isinstance(layer, Activations) for f, _ in layer.parts]
    assert names == ["SiLU()", "GELU()", "Hardswish()"]
    stars, compressed = box(4, 0.1), tr.quantize_weights(module, 6)
    found = tr.discrepancy(module, compressed, stars, budget=tr.Budget(stars=4))
    best = attacked(module, compressed, *(end[0] for end in stars.bounding_box()[:2]), 1000, 4)
    assert bool((best <= found.upper[0]).all())
    assert float((found.upper[0] / best).max()) < 2


@pytest.mark.parametrize("opset", [11, 14, 20])
def test_files_are_read_as_the_modules_they_come_from(tmp_path: Path, opset: int) -> None:
    torch.manual_seed(2)
    kinds = [nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ELU(0.5), nn.SELU(), nn.Softplus()]
    if opset >= 14:
        kinds += [nn.CELU(0.5), nn.Hardswish()]
    module = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.SiLU(), nn.Flatten(), *(part for k in kinds for part in (nn.Linear(8, 8), k))
    )
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(1, 1, 3, 3),), path, dynamo=False, input_names=["x"], opset_version=opset
        )
    x = torch.randn(20, 1, 3, 3)
    torch.testing.assert_close(tr.load(path)(x), module(x), rtol=1e-5, atol=1e-6)
    stars = tr.StarBatch.from_box(x[:1], x[:1] + 0.01)
    found = tr.discrepancy(module, path, stars, budget=tr.Budget(stars=1))
    assert 0 <= float(found.upper.max()) < 1e-5
