"""One suite over all domains, operations and dtypes: samples and exact ranges lie inside, dense twins agree.

A new operation is one entry of `AFFINE` (an affine layer), `FUNCTIONS` or `JOINS`; a new domain is one entry of
`DOMAINS`, a function from a network and a box to bounds of its outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchreach as tr
from torchreach.core.options import Exact
from torchreach.domains.box_difference import quick_bounds
from torchreach.domains.difference import difference_bounds, interval_difference
from torchreach.domains.joint import Both, joint_bounds
from torchreach.domains.pair import Pair
from torchreach.domains.root import root_bounds
from torchreach.domains.zonotope import box_rows, interval_bounds, zonotope_bounds
from torchreach.graph.affine_graph import AffineGraph, Term
from torchreach.graph.arithmetic import Arithmetic
from torchreach.graph.layers import (
    ElementwiseAffine,
    Rearrange,
    Reshape,
    fan_out,
    linear,
    magnitude,
    transpose,
    with_bias_magnitude,
)
from torchreach.graph.steps import Step
from torchreach.graph.twin_blocks import blocks
from torchreach.graph.twins import dense
from torchreach.read.steps import steps

DTYPES = [torch.float32, torch.float64]
Shape = tuple[int, ...]
FLAT, LINE, IMAGE = (4,), (2, 4), (2, 3, 3)


def normalised(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """Batch norm whose numbers are none of those it begins with."""
    layer = layer.eval()
    with torch.no_grad():
        for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert value is not None
            value.copy_(0.5 + torch.rand(value.shape))
    return layer


def skip() -> nn.Module:
    """x and W x, their difference added to a stack of both."""
    terms = (
        Term("part", (), 0), Term("layer", (0,), 0), Term("sub", (0, 1)), Term("cat", (2, 0), 1), Term("add", (1, 2)),
    )  # fmt: skip
    return AffineGraph((FLAT,), terms, (nn.Linear(4, 4),), (3, 4))


def sloped() -> nn.Module:
    layer = nn.PReLU(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.1, -0.5, 2.0]))
    return layer


# Affine layers and the shape of one input.
AFFINE: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "linear": (lambda: nn.Linear(4, 3), FLAT),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), FLAT),
    "linear of rows": (lambda: nn.Linear(4, 3), LINE),
    "convolution 1d": (lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1), LINE),
    "convolution": (lambda: nn.Conv2d(2, 3, 2, padding=1), IMAGE),
    "convolution, same": (lambda: nn.Conv2d(2, 2, 2, padding="same"), IMAGE),
    "strides": (lambda: nn.Conv2d(2, 2, (2, 3), stride=(2, 1), padding=(0, 1)), IMAGE),
    "dilation": (lambda: nn.Conv2d(2, 2, 2, dilation=2), IMAGE),
    "groups": (lambda: nn.Conv2d(2, 4, 2, groups=2), IMAGE),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, padding=1, output_padding=1), LINE),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, groups=2), IMAGE),
    "average 1d": (lambda: nn.AvgPool1d(2, 1, 1), LINE),
    "average": (lambda: nn.AvgPool2d(2, 1, 1, count_include_pad=False), IMAGE),
    "average, divisor": (lambda: nn.AvgPool2d(2, divisor_override=-3), IMAGE),
    "adaptive average": (lambda: Rearrange("adaptive_avg_pool2d", 2, terms=19), IMAGE),
    "batch norm 1d": (lambda: normalised(nn.BatchNorm1d(4)), FLAT),
    "batch norm": (lambda: normalised(nn.BatchNorm2d(2)), IMAGE),
    "scale and shift": (lambda: ElementwiseAffine(torch.tensor([[2.0], [-0.5]]), torch.tensor([[1.0], [3.0]])), LINE),
    "add a constant": (lambda: Arithmetic("add", torch.rand(4)), LINE),
    "constant minus": (lambda: Arithmetic("rsub", torch.rand(2, 1)), LINE),
    "times a constant": (lambda: Arithmetic("mul", torch.randn(4)), FLAT),
    "divided by a constant": (lambda: Arithmetic("div", torch.tensor(-3.0)), FLAT),
    "flatten": (nn.Flatten, IMAGE),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), FLAT),
    "reshape": (lambda: Reshape((4, 2)), LINE),
    "dropout": (lambda: nn.Dropout().eval(), FLAT),
    "permute": (lambda: Rearrange("permute", 0, 3, 1, 2), IMAGE),
    "slice": (lambda: Rearrange("slice", 2, 0, 4, 2), LINE),
    "select": (lambda: Rearrange("select", 1, -1), LINE),
    "gather": (lambda: Rearrange("index_select", 2, torch.tensor([3, 0, 0])), LINE),
    "flip": (lambda: Rearrange("flip", 1, 2), LINE),
    "sum": (lambda: Rearrange("sum", (1,), False, terms=3), LINE),
    "mean": (lambda: Rearrange("mean", (2, 3), True, terms=10), IMAGE),
    "pad": (lambda: Rearrange("pad", 1, 0, -1, 2), IMAGE),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), (4, 2, 2)),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 2)),
    "channel shuffle": (lambda: nn.ChannelShuffle(2), (4, 2, 1)),
    "graph": (skip, FLAT),
    "blocks": (lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)), IMAGE),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky": lambda z: F.leaky_relu(z, 0.2),
    "prelu": sloped(),
    "relu6": lambda z: F.relu6(4 * z),
    "clamp": lambda z: z.clamp(-0.3, 0.4),
    "at least": lambda z: z.clamp(min=0.2),
    "at most": lambda z: z.clamp(max=-0.1),
    "abs": torch.abs,
    "hardtanh": F.hardtanh,
    "hardsigmoid": lambda z: F.hardsigmoid(4 * z),
    "max pool": lambda z: F.max_pool1d(z.unsqueeze(1), 2, 1).flatten(1),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a.relu() + b,
    "sub": lambda a, b: a - b.relu(),
    "cat": lambda a, b: torch.cat((a.relu(), b), 1),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


class Bent(nn.Module):
    """A linear layer, an operation on its features (and on those of another), a linear layer."""

    def __init__(self, operation: Callable[..., Tensor], *, joins: bool) -> None:
        super().__init__()
        self.operation, self.first = copy.deepcopy(operation), nn.Linear(2, 3)
        self.other = nn.Linear(2, 3) if joins else None
        width = operation(*[torch.zeros(1, 3)] * (1 + joins)).shape[1]
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.first(x)] if self.other is None else [self.first(x), self.other(x)]
        return self.last(self.operation(*values))


@torch.no_grad()
def around(layer: nn.Module, shape: Shape) -> nn.Module:
    """An affine layer between a ReLU before it and one behind it."""
    size = layer(torch.zeros(1, *shape)).numel()
    enter = nn.Linear(2, torch.Size(shape).numel())
    return nn.Sequential(enter, nn.ReLU(), Reshape(shape), layer, nn.Flatten(), nn.ReLU(), nn.Linear(size, 2))


OPERATIONS = [*(f"affine: {name}" for name in AFFINE), *FUNCTIONS, *JOINS]


@cache
def network(name: str, dtype: torch.dtype) -> nn.Module:
    """A network of two inputs and two outputs around one operation; its numbers are float32 in every dtype."""
    torch.manual_seed(0)
    if name in FUNCTIONS or name in JOINS:
        return Bent(FUNCTIONS.get(name) or JOINS[name], joins=name in JOINS).to(dtype).eval()
    make, shape = AFFINE[name.removeprefix("affine: ")]
    return around(make(), shape).to(dtype).eval()


@cache
def twin(name: str, dtype: torch.dtype) -> nn.Module:
    other = copy.deepcopy(network(name, dtype))
    with torch.no_grad():
        for value in other.parameters():
            value.copy_((16 * value).round() / 16)
    return other


LOWER, UPPER = torch.tensor([[-0.25, -0.125]]), torch.tensor([[0.125, 0.25]])
Ends = tuple[Tensor, Tensor]
Read = tuple[Step, ...]


@cache
def read(name: str, dtype: torch.dtype) -> tuple[Read, Read]:
    both = (network(name, dtype), twin(name, dtype))
    return cast(
        tuple[Read, Read],
        tuple(steps(one, (2,), dtype=torch.float64, device=torch.device("cpu")) for one in both),
    )


def box() -> Ends:
    return LOWER.double(), UPPER.double()


def paired(name: str, dtype: torch.dtype) -> Pair:
    return Pair.of(*read(name, dtype), (LOWER[0].double(), UPPER[0].double()))


def by_layers(bound: Callable[[Pair], Ends]) -> Callable[[Pair], Ends]:
    """The bound of the pair without a single matrix: backward by each layer's transpose."""

    def layers(pair: Pair) -> Ends:
        return bound(replace(pair, maps=[blocks(s, t) for s, t in zip(pair.first, pair.second, strict=True)]))

    return layers


def reached(name: str, dtype: torch.dtype, engine: str) -> Ends:
    found = tr.reach(network(name, dtype), tr.StarBatch.from_box(LOWER.to(dtype), UPPER.to(dtype)), Exact(engine))
    return found.lower, found.upper


def compared(bound: Callable[[Pair], tuple[Tensor, Tensor]]) -> Callable[[str, torch.dtype], Ends]:
    """A domain of the difference y1 - y2."""
    return lambda name, dtype: bound(paired(name, dtype))


def by_hexagon(first: str, last: str) -> Callable[[Pair], Ends]:
    def bound(pair: Pair) -> Ends:
        found = difference_bounds(pair, *box())[-1]
        return getattr(found, first), getattr(found, last)

    return bound


def by_interval(pair: Pair) -> Ends:
    found = interval_difference(pair, *box())
    return found.dl, found.du


def quick(pair: Pair) -> Ends:
    above = quick_bounds(Both.of(pair.first, pair.second, pair), *box()).upper
    return -above[:, 1], above[:, 0]


def by_joint(pair: Pair) -> Ends:
    above = joint_bounds(Both.of(pair.first, pair.second), *box()).upper
    return -above[:, 1], above[:, 0]


def by_lirpa(name: str, dtype: torch.dtype) -> Ends:
    """Root bounds as engines take them: auto_LiRPA's, widened for its rounding."""
    return root_bounds(read(name, dtype)[0], *box_rows(*box()), "lirpa", 1e-6, 0)[0][-1]


# What is bounded ("y" of the network, "z" of its twin, "d" their difference), and how.
DOMAINS: dict[str, tuple[str, Callable[[str, torch.dtype], Ends]]] = {
    "interval": ("y", lambda name, dtype: interval_bounds(read(name, dtype)[0], *box_rows(*box()))[-1]),
    "zonotope": ("y", lambda name, dtype: zonotope_bounds(read(name, dtype)[0], *box_rows(*box()))[-1]),
    "stars as vertices": ("y", lambda name, dtype: reached(name, dtype, "vertices")),
    "stars as programs": ("y", lambda name, dtype: reached(name, dtype, "programs")),
    "hexagon, first": ("y", compared(by_hexagon("l1", "u1"))),
    "hexagon, second": ("z", compared(by_hexagon("l2", "u2"))),
    "difference": ("d", compared(by_hexagon("dl", "du"))),
    "difference, quick": ("d", compared(quick)),
    "difference, joint": ("d", compared(by_joint)),
    "difference, interval": ("d", compared(by_interval)),
    "hexagon by layers, first": ("y", compared(by_layers(by_hexagon("l1", "u1")))),
    "hexagon by layers, second": ("z", compared(by_layers(by_hexagon("l2", "u2")))),
    "difference by layers": ("d", compared(by_layers(by_hexagon("dl", "du")))),
    "difference by layers, quick": ("d", compared(by_layers(quick))),
    "difference by layers, joint": ("d", compared(by_layers(by_joint))),
    "difference by layers, interval": ("d", compared(by_layers(by_interval))),
    "auto_LiRPA": ("y", by_lirpa),
}


@cache
def truth(what: str, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of what is bounded [K, 2], and its exact range [1, 2]: one function for all dtypes of the network."""
    both = [f(name, torch.float64) for f in (network, twin)]
    x = LOWER.double() + (UPPER - LOWER).double() * torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    corners = torch.cartesian_prod(*torch.cat((LOWER, UPPER)).double().T)
    with torch.no_grad():
        y = [one(torch.cat((x, corners))) for one in both]
        stars = tr.StarBatch.from_box(*box())
        module = tr.merge(*both, input_shape=(2,)) if what == "d" else both[what == "z"]
        exact = tr.reach(module, stars, Exact("vertices"))
    return {"y": y[0], "z": y[1], "d": y[0] - y[1]}[what], exact.lower, exact.upper


def slow(domain: str, dtype: torch.dtype) -> bool:
    """Bounds are computed in float64: another dtype of the network is another way into a few of them."""
    return domain == "auto_LiRPA" or (dtype == torch.float32 and not domain.startswith(("stars", "zonotope")))


@pytest.mark.parametrize(
    ("domain", "dtype"),
    [
        pytest.param(domain, dtype, marks=[pytest.mark.slow] * slow(domain, dtype), id=f"{domain}-{str(dtype)[6:]}")
        for domain in DOMAINS
        for dtype in DTYPES
    ],
)
@torch.no_grad()
def test_samples_and_exact_ranges_lie_inside(domain: str, dtype: torch.dtype) -> None:
    what, bound = DOMAINS[domain]
    for name in OPERATIONS:
        low, high = (end.double() for end in bound(name, dtype))
        y, exact_low, exact_high = truth(what, name)
        slack = 1e-12 * (1 + y.abs().max())
        assert (y >= low - slack).all() and (y <= high + slack).all(), f"{name}: a sample lies outside"  # noqa: PT018
        slack = 1e-9 * (1 + y.abs().max())
        inside = (exact_low >= low - slack).all() and (exact_high <= high + slack).all()
        assert inside, f"{name}: the exact range lies outside"
        # Of a few neurons, no domain gives more than a few times the range.
        wide = 10 * (exact_high - exact_low) + 1
        assert ((high - low) <= wide).all(), f"{name}: bounds say nothing"


def dense_twin(layer: nn.Module, shape: Shape) -> tuple[Tensor, Tensor]:
    """W [N_out, N_in] and b [N_out], column by column from the layer itself."""
    unit = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        b = layer(torch.zeros_like(unit[:1])).flatten()
        return (layer(unit).flatten(1) - b).T, b


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", AFFINE)
@torch.no_grad()
def test_affine_rules_equal_their_dense_twins(name: str, dtype: torch.dtype) -> None:
    make, shape = AFFINE[name]
    torch.manual_seed(0)
    layer = make()
    W, b = dense_twin(copy.deepcopy(layer).double(), shape)
    layer = layer.to(dtype)
    x = torch.randn(7, *shape, dtype=dtype)
    tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps}
    flat = x.flatten(1).double()
    torch.testing.assert_close(linear(layer, x).flatten(1).double(), flat @ W.T, **tolerance)
    torch.testing.assert_close(layer(x).flatten(1).double(), flat @ W.T + b, **tolerance)
    size = magnitude(layer, x.abs()).flatten(1).double()
    if not isinstance(layer, AffineGraph | nn.Sequential):  # where terms cancel, |W| is that of the parts
        torch.testing.assert_close(size, flat.abs() @ W.abs().T, **tolerance)
    assert (size >= flat.abs() @ W.abs().T - tolerance["atol"]).all()
    assert (with_bias_magnitude(layer, x.abs()).flatten(1).double() >= size + b.abs() - tolerance["atol"]).all()
    y = torch.randn(7, *layer(x).shape[1:], dtype=dtype)
    back = transpose(layer, y, shape).flatten(1).double()
    torch.testing.assert_close(back, y.flatten(1).double() @ W, **tolerance)
    back = transpose(layer, y.abs(), shape, magnitude=True).flatten(1).double()
    # <|W|^T y, x> = <y, |W| x>
    torch.testing.assert_close(
        (back * x.abs().flatten(1)).sum(1).double(), (y.abs().flatten(1) * size).sum(1).double(), rtol=1e-5, atol=0
    )
    most = fan_out(layer, y[0].numel())
    assert ((W != 0).sum(0) <= most).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", AFFINE)
@torch.no_grad()
def test_twin_layers_equal_their_matrices(name: str, dtype: torch.dtype) -> None:
    """All that bounds ask of two networks' layers, by the layers themselves and by W, V and W - V."""
    g = torch.Generator().manual_seed(1)
    for first, second in zip(*read(f"affine: {name}", dtype), strict=True):
        own, W, V = blocks(first, second), dense(first), dense(second)
        D = W - V
        n_out, n_in = W.shape
        a, e, p, q = (torch.randn(3, n, dtype=torch.float64, generator=g) for n in (n_in, n_in, n_out, n_out))
        assert own.shape == (n_out, n_in)
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
        close(own.forth(a, e), (a @ W.T, e @ V.T + a @ D.T))
        close(own.forth(a), (a @ W.T, a @ D.T))
        close(own.back(p, q), (p @ W + q @ D, q @ V))
        close(own.back(p, q, beta=False)[0], p @ W + q @ D)
        some = torch.arange(n_out)[::2]
        close(own.rows(some), (W[some], V[some], D[some]))
        assert (own.spread(a.abs()) >= a.abs() @ D.abs().T - 1e-12).all()
        assert (own.size(a.abs()) >= own.spread(a.abs()) - 1e-12).all()
        assert (own.influence(p.abs()) >= p.abs() @ W.abs() - 1e-12).all()
        if (D == 0).all():
            assert (own.forth(a)[1] == 0).all()
        rows, columns = torch.arange(n_out)[1::2], torch.arange(n_in)[1::2]
        part = own.part(rows, columns)
        W, V, D = (M[rows][:, columns] for M in (W, V, D))
        a, e, p, q = a[:, columns], e[:, columns], p[None, :, rows], q[None, :, rows]
        close(part.forth(a, e), (a @ W.T, e @ V.T + a @ D.T))
        close(part.back(p, q), (p @ W + q @ D, q @ V))
