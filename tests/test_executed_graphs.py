"""Networks that are no chains, as torch executes them: what its kernels compute stays inside the bounds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchreach as tr
from torchreach.core.errors import InvalidNetworkError, UnsupportedLayerError
from torchreach.core.results import Semantics
from torchreach.domains import graph_execution
from torchreach.domains.execution import Format, rounding
from torchreach.domains.graph_execution import graph_rounding
from torchreach.read.module import graph
from torchreach.read.steps import steps

HALF = [torch.float16, torch.bfloat16]
COUNT = 2000


class Residual(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(4, 8), nn.Linear(8, 3), activation
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.activation(self.first(x))
        for layer in self.inner:
            z = z + self.activation(layer(z))
        return self.last(z)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.pool, self.last = nn.MaxPool2d(2, padding=1, ceil_mode=True), nn.Linear(27, 2)
        self.norm.running_mean.normal_()  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.2, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        z = self.pool(F.leaky_relu(self.norm(self.one(x)), 0.1))
        return self.last((self.two(z) + z).flatten(1))


class Of(nn.Module):
    """One function of the input, and of four weights."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


CASES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Residual(nn.ReLU()),
    "leaky": lambda: Residual(nn.LeakyReLU(0.01)),
    "steep": lambda: Residual(nn.LeakyReLU(1.3)),
    "relu6": lambda: Residual(nn.ReLU6()),
    "hardtanh": lambda: Residual(nn.Hardtanh(-0.3, 0.7)),
    "prelu": lambda: Residual(nn.PReLU(8, 0.1)),
    "chain": lambda: nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 2)),
    "pooled": Pooled,
    "slope": lambda: Of(lambda x, _: F.leaky_relu(x, -0.37)),
    "slopes": lambda: Of(F.prelu),
    "clamp": lambda: Of(lambda x, _: x.clamp(-0.1, 0.3)),
    "floor": lambda: Of(lambda x, _: x.clamp(min=0.1)),
    "ceiling": lambda: Of(lambda x, _: x.clamp(max=0.1)),
    "sum": lambda: Of(lambda x, w: x + torch.relu(x * w)),
    "difference": lambda: Of(lambda x, w: torch.relu(x * w) - x),
    "weighted": lambda: Of(lambda x, w: torch.add(x, torch.relu(x * w), alpha=0.3)),
    "absolute": lambda: Of(lambda x, _: x.abs() + x),
    "extremes": lambda: Of(lambda x, w: torch.maximum(x * w, x) - torch.minimum(x, -x) / 3),
    "stacked": lambda: Of(lambda x, w: torch.cat((F.leaky_relu(x * w, 0.1), x[:, 1:]), 1) + 0.123),
}


def case(name: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(len(name))
    return CASES[name]().eval().to(dtype), (1, 4, 4) if name == "pooled" else (4,)


def boxes(shape: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Four boxes [4, *shape], from a point to a wide one."""
    width = torch.tensor([0.0, 0.01, 0.5, 3.0], dtype=torch.float64).reshape(-1, *[1] * len(shape))
    middle = scale * torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return middle - width, middle + width


def shares(name: str, dtype: torch.dtype, scale: float, count: int) -> Tensor:
    """[4] largest (real - executed) of inputs of each box, as a share of its bound; above 1 is outside."""
    module, shape = case(name, dtype)
    low, high = boxes(shape, scale)
    below, above = graph_rounding(graph(module, shape), low.flatten(1), high.flatten(1), Format(dtype))
    share = torch.rand(count, 4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share[::2] = share[::2].round()
    x = (low + (high - low) * share).flatten(0, 1)
    with torch.no_grad():
        off = (copy.deepcopy(module).double()(x) - module(x.to(dtype)).double()).unflatten(0, (count, 4))
    margin = 1e-12 * (1 + off.abs())
    return torch.maximum((off - margin) / above, (off + margin) / below).nan_to_num(0.0).amax((0, 2))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_torch_kernels_stay_inside_the_bounds_of_graphs(name: str, dtype: torch.dtype) -> None:
    for scale in (1.0, 4.0):
        assert bool((shares(name, dtype, scale, COUNT) <= 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CASES)
def test_a_hundred_thousand_inputs_stay_inside_the_bounds_of_graphs(name: str, dtype: torch.dtype) -> None:
    assert bool((shares(name, dtype, 2.0, 100_000) <= 1).all())


@pytest.mark.parametrize("name", ["sum", "slope", "clamp"])
def test_an_operation_whose_rounding_is_forgotten_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = graph_execution._Part
    spread, scaled = part.spread, part.scaled
    if name == "clamp":  # ends as numbers of the format
        monkeypatch.setattr(part, "scaled", lambda value, by, _=None: scaled(value, by))
    else:  # what all but the input rounds
        monkeypatch.setattr(part, "spread", lambda own, i, *ends, **how: own if i else spread(own, i, *ends, **how))
    assert bool((shares(name, torch.bfloat16, 1.0, COUNT) > 1).any())


@pytest.mark.parametrize("dtype", HALF)
def test_bounds_of_a_chain_agree_with_those_of_its_steps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    low, high = boxes((4,), 1.0)
    own = steps(module, (4,), dtype=torch.float64, device=torch.device("cpu"))
    known = torch.stack(rounding(own, low, high, Format(dtype)))
    found = torch.stack(graph_rounding(graph(module, (4,)), low, high, Format(dtype)))
    share = (found[1] - found[0]) / (known[1] - known[0])
    assert bool(((share > 0.5) & (share < 2)).all())


@pytest.mark.parametrize("dtype", HALF)
def test_half_copies_of_graphs_are_certified_as_executed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    original = Residual(nn.LeakyReLU(0.1))
    stars = tr.StarBatch.from_box(torch.full((1, 4), -0.1), torch.full((1, 4), 0.1))
    half = copy.deepcopy(original).to(dtype)
    found = tr.discrepancy(original, half, stars, gap=0.1)
    assert found.semantics is {torch.float16: Semantics.FLOAT16, torch.bfloat16: Semantics.BFLOAT16}[dtype]
    x = stars.sample(5000)[0]
    with torch.no_grad():
        seen = original.double()(x.double()) - half(x.to(dtype)).double()
    assert bool((seen <= found.range_upper[0]).all())
    assert bool((seen >= found.range_lower[0]).all())
    assert bool((found.lower > 0).all())
    assert bool((found.upper < 20 * found.lower).all())


def test_graphs_that_may_overflow_or_round_in_unknown_ways_are_refused_by_name() -> None:
    low, high = torch.full((1, 4), -10.0).double(), torch.full((1, 4), 10.0).double()
    large = Of(lambda x, _: 5e3 * x + torch.relu(5e3 * x)).half()
    with pytest.raises(InvalidNetworkError, match=r"add .*may overflow"):
        graph_rounding(graph(large, (4,)), low, high, Format(torch.float16))
    for function, name in (
        (lambda x, _: F.hardsigmoid(x), "PiecewiseLinear"),
        (lambda x, _: torch.relu(x).mean(1, keepdim=True) + x, "mean"),
    ):
        with pytest.raises(UnsupportedLayerError, match=rf"{name} \(.*how it is executed is not known"):
            graph_rounding(graph(Of(function).half(), (4,)), low, high, Format(torch.float16))
