"""Networks that are no chains: skips, concatenations, maxima and functions that bend twice, certified exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchreach as tr
from torchreach.core.errors import ShapeError, UnsupportedLayerError
from torchreach.read.module import chain
from torchreach.read.steps import steps


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last(F.relu(h + self.second(h)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(7, 3), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.cat([x, F.leaky_relu(self.first(x), 0.2)], 1)
        two = torch.cat((one, F.relu6(5 * self.second(one))), dim=1)
        return self.last(two)


class Extremes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bend, self.last = nn.Linear(3, 8), nn.PReLU(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        high, low = torch.maximum(a, b), torch.minimum(a, self.bend(b))
        return self.last((high - low).clamp(-0.5, 1.0) + F.hardsigmoid(low) + a.abs())


class Block(nn.Module):
    """A depthwise separable block with ReLU6 and a skip, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU6())
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.pointwise(self.depthwise(x))
        return self.head(torch.flatten(self.pool(x), 1))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2, padding=1)
        return self.head(self.pool(x).mean((2, 3)))


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 3, 3, stride=2), nn.ConvTranspose2d(3, 1, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.up(F.relu(self.down(x))))[:, 0, 1:3].flatten(1)


CASES = {
    "residual": (Residual, (3,)),
    "dense": (Dense, (3,)),
    "extremes": (Extremes, (3,)),
    "block": (Block, (1, 4, 4)),
    "pooled": (Pooled, (1, 6, 6)),
    "upsampled": (Upsampled, (1, 5, 5)),
}


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    kind, shape = CASES[name]
    torch.manual_seed(0)
    return kind().double().eval(), shape


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("traced", ["fx", "export"])
def test_graphs_are_read_as_they_compute(name: str, traced: str) -> None:
    module, shape = network(name)
    x = 2 * torch.randn(50, *shape, dtype=torch.float64)
    read = module
    if traced == "export":
        batch = {0: torch.export.Dim.DYNAMIC}
        read = torch.export.export(module, (x[:2],), dynamic_shapes=(batch,)).module(check_guards=False)
    layers = chain(read, shape)
    torch.testing.assert_close(layers(x), module(x))
    assert chain(layers, shape)[0] is layers[0]


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_shapes_follow_from_a_first_linear_layer(name: str) -> None:
    module, shape = network(name)
    x = torch.randn(5, *shape, dtype=torch.float64)
    torch.testing.assert_close(chain(module)(x), module(x))


@pytest.mark.parametrize("options", [
    {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True}, {"kernel_size": 2, "stride": 1, "dilation": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rank", [1, 2])
def test_max_pooling_is_read_with_all_its_options(options: dict, rank: int) -> None:
    torch.manual_seed(0)
    kinds = (nn.Conv1d, nn.MaxPool1d) if rank == 1 else (nn.Conv2d, nn.MaxPool2d)
    module = nn.Sequential(kinds[0](1, 2, 1), kinds[1](**options)).double()
    shape = (1, 7, 6)[: rank + 1]
    x = torch.randn(20, *shape, dtype=torch.float64)
    torch.testing.assert_close(chain(module, shape)(x), module(x))


def patterns(layers: nn.Sequential, x: Tensor) -> int:
    """Number of different signs of all ReLUs at inputs x."""
    signs = []
    for layer in layers:
        if type(layer).__name__ in ("ReLU", "MaskedReLU"):
            flat = x.flatten(1)
            signs.append((flat > 0)[:, layer.mask] if hasattr(layer, "mask") else flat > 0)
        x = layer(x)
    return len(torch.unique(torch.cat(signs, 1), dim=0))


@pytest.mark.parametrize(("name", "radius"), [("residual", 1.0), ("block", 0.2), ("pooled", 3.0)])
@pytest.mark.parametrize("engine", ["vertices", "programs"])
@torch.no_grad()
def test_exact_reach_counts_the_patterns_that_occur(name: str, radius: float, engine: str) -> None:
    module, shape = network(name)
    centre = 0.3 * torch.randn(1, *shape, dtype=torch.float64)
    spread = torch.zeros_like(centre)
    spread.flatten()[:2] = radius
    stars = tr.StarBatch.from_box(centre - spread, centre + spread)
    found = tr.reach(module, stars, tr.Exact(engine))
    count = 151 if name == "block" else 301
    grid = radius * torch.linspace(-1, 1, count, dtype=torch.float64)
    x = centre.repeat(count**2, *[1] * len(shape)).flatten(1)
    x[:, :2] += torch.cartesian_prod(grid, grid)
    x = x.reshape(-1, *shape)
    y = module(x)
    assert len(found) >= 4
    assert len(found) == patterns(chain(module, shape), x)
    assert (y >= found.lower[0] - 1e-9).all()
    assert (y <= found.upper[0] + 1e-9).all()
    torch.testing.assert_close(found.lower[0], y.amin(0), atol=2e-2 * radius, rtol=0)
    torch.testing.assert_close(found.upper[0], y.amax(0), atol=2e-2 * radius, rtol=0)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_discrepancy_of_graphs_is_certified_by_every_method(name: str) -> None:
    module, shape = network(name)
    small = tr.quantize_weights(module, bits=5)
    torch.manual_seed(1)
    centre = 0.3 * torch.randn(1, *shape, dtype=torch.float64)
    radius = torch.zeros_like(centre)
    radius.flatten()[:3] = 0.3
    stars = tr.StarBatch.from_box(centre - radius, centre + radius)
    exact = tr.discrepancy(module, small, stars, "exact")
    assert exact.status[0] is tr.Status.EXACT
    search = tr.discrepancy(module, small, stars, "search", budget=tr.Budget(stars=50))
    assert search.stats.fallback == ""
    assert (search.upper >= exact.lower - 1e-9).all()
    assert (search.lower <= exact.upper + 1e-9).all()
    x = centre - radius + 2 * radius * torch.rand(2000, *shape, dtype=torch.float64)
    seen = (module(x) - small(x)).abs().amax(0)
    assert (seen <= exact.upper[0] + 1e-9).all()


@torch.no_grad()
def test_a_graph_differs_from_itself_by_nothing() -> None:
    module, shape = network("extremes")
    stars = tr.StarBatch.from_box(-torch.ones(1, *shape).double(), torch.ones(1, *shape).double())
    for method in ("exact", "search"):
        assert float(tr.discrepancy(module, copy.deepcopy(module), stars, method).max_upper) <= 1e-9


class InPlace(nn.Module):
    """The ReLU changes what the skip reads."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.first, self.last, self.view = nn.Linear(3, 4), nn.Linear(4, 2), view

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        y = (z.view(-1, 4) if self.view else z).relu_()
        return self.last(z + y)


def test_values_changed_in_place_are_read_as_they_are_afterwards() -> None:
    torch.manual_seed(0)
    module = InPlace(view=False).double()
    x = torch.randn(9, 3, dtype=torch.float64)
    torch.testing.assert_close(chain(module, (3,))(x), module(x))
    with pytest.raises(UnsupportedLayerError, match="share its memory"):
        chain(InPlace(view=True), (3,))


@pytest.mark.parametrize("slopes", [1, 4])
@torch.no_grad()
def test_the_slopes_of_a_float32_prelu_are_read_without_rounding(slopes: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.PReLU(slopes, init=0.0137), nn.Linear(4, 2))
    module[1].weight.mul_(torch.rand(slopes))
    x = 100 * torch.randn(50, 3, dtype=torch.float64)
    y = x
    for step in steps(module, (3,), dtype=torch.float64, device=x.device):
        y = step.activate(step.linear(y) + step.bias)
    torch.testing.assert_close(y, copy.deepcopy(module).double()(x), atol=1e-11, rtol=1e-14)
    torch.testing.assert_close(chain(module, (3,))(x.float()), module(x.float()))


class Shuffled(nn.Module):
    """Channels and pixels in other places, by layers and by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shuffle, self.leave = nn.Conv2d(1, 4, 3, padding=1), nn.ChannelShuffle(2), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pixel_shuffle(self.shuffle(self.enter(x).relu()), 2)
        return self.leave(torch.channel_shuffle(nn.functional.pixel_unshuffle(x, 2), 4).flatten(1))


@torch.no_grad()
def test_shuffled_channels_and_pixels_are_read_from_layers_functions_and_exports() -> None:
    torch.manual_seed(0)
    module, x = Shuffled().eval(), torch.rand(5, 1, 2, 2)
    torch.testing.assert_close(chain(module, (1, 2, 2))(x), module(x))
    program = torch.export.export(module, (x[:1],))
    torch.testing.assert_close(tr.load(program)(x[:1]), module(x[:1]))
    found = tr.discrepancy(module, tr.quantize_weights(module, 8), tr.StarBatch.from_box(x[:1], x[:1] + 0.1), "exact")
    assert found.status == (tr.Status.EXACT,)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_what_is_not_piecewise_linear_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match="mul combines two values"):
        chain(nn.Sequential(nn.Linear(2, 2), Product()), (2,))
    with pytest.raises(UnsupportedLayerError, match="Softsign"):
        chain(nn.Sequential(nn.Linear(2, 2), nn.Softsign()), (2,))


class Joined(nn.Module):
    def __init__(self, join: str) -> None:
        super().__init__()
        self.one, self.other, self.join = nn.Linear(3, 2), nn.Linear(3, 4), join

    def forward(self, x: Tensor) -> Tensor:
        if self.join == "cat":
            return torch.cat((self.one(x).unsqueeze(1), self.other(x).unsqueeze(1)), 1)
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("join", ["add", "cat"])
def test_values_that_do_not_fit_together_are_refused(join: str) -> None:
    with pytest.raises(ShapeError, match=r"shapes .*2.*4.* (do not broadcast|differ in another axis than 1)"):
        chain(Joined(join), (3,))
