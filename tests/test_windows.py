"""Bounds of convolutions by the windows that a place depends on, against bounds by whole layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.domains import crown
from torchreach.domains.crown import Inputs, Network, Neurons, bounded
from torchreach.domains.joint import Both, joint_bounds
from torchreach.domains.pair import Pair
from torchreach.graph.layers import Rearrange
from torchreach.graph.windows import windows
from torchreach.read.steps import steps


class Residual(nn.Module):
    """Two blocks with a sum and a concatenation of their branches; the second one has a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.third, self.short = nn.Conv2d(6, 4, 3, stride=2), nn.Conv2d(6, 4, 1, stride=2)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2)
        self.end = nn.Linear(8 * 49, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        a = (a + self.second(a)).relu()
        a = torch.cat((self.third(nn.functional.pad(a, (0, 1, 0, 1))), self.short(a)), 1)
        return self.end(self.last(self.norm(a).relu()).relu().flatten(1))


NETWORKS = {
    "plain": (
        (2, 13, 12),
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, (3, 2), padding=(1, 0)),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 6 * 5, 3),
        ),
    ),
    "pooled": (
        (2, 16, 16),
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d((2, 1), (2, 1)),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(3, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 3 * 7, 2),
        ),
    ),
    "one axis": (
        (4, 60),
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(6, 6, 3, padding=4, dilation=4),
            nn.LeakyReLU(0.1),
            nn.Conv1d(6, 6, 4, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 29, 2),
        ),
    ),
    "channels last": (
        (16, 15, 3),
        lambda: nn.Sequential(
            Rearrange("permute", 0, 3, 1, 2),
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 16 * 15, 2),
        ),
    ),
    "residual": ((2, 14, 14), Residual),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(seed)
    shape, make = NETWORKS[name]
    module = make().double().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            nn.init.uniform_(layer.weight, -1, 1)
    return module, shape


def read(module: nn.Module, shape: tuple[int, ...]) -> Network:
    return Network.of(steps(module, shape, dtype=torch.float64, device=torch.device("cpu")))


def box(shape: tuple[int, ...], radius: float, count: int = 1, seed: int = 1) -> tuple[Tensor, Tensor]:
    middle = torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).flatten(1)
    return middle - radius, middle + radius


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bounds_by_windows_are_bounds_by_whole_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = read(*made(name))
    inputs = Inputs.of(*box(NETWORKS[name][0], 0.05, count=2))
    layers = bounded(network, inputs, None, NO_LIMIT)
    compared = 0
    for k in range(1, len(layers)):
        if not windows(network.maps[: k + 1]):
            continue
        layer, relu = layers[k], network.steps[k].relu
        assert relu is not None
        ends = torch.full_like(layer.low, -torch.inf), torch.full_like(layer.low, torch.inf), layer.error
        some = torch.rand(layer.low.shape, generator=torch.Generator().manual_seed(k)) < 0.4
        args = (network, layers[:k], inputs, some, ends, NO_LIMIT, NO_LIMIT)
        low, high, _ = crown._by_rows(*args)  # type: ignore[arg-type]
        with monkeypatch.context() as patched:
            patched.setattr(crown, "windows", lambda _: [])
            whole = Network(network.steps, network.maps)
            low_, high_, _ = crown._by_rows(whole, *args[1:])  # type: ignore[arg-type]
            assert not whole.seen[k]
        torch.testing.assert_close(low[some], low_[some], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(high[some], high_[some], rtol=1e-10, atol=1e-10)
        compared += int(some.sum())
    assert compared > 500


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_no_input_leaves_the_bounds(name: str) -> None:
    first, shape = made(name)
    second, _ = made(name)
    for parameter in second.parameters():
        parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    both_steps = [steps(m, shape, dtype=torch.float64, device=torch.device("cpu")) for m in (first, second)]
    low, high = box(shape, 0.03)
    both = Both.of(*both_steps, Pair.of(*both_steps, (low[0], high[0])))
    assert both.first.windowed
    upper = joint_bounds(both, low, high).upper[0]
    x = low + (high - low) * torch.randint(0, 3, (2000, low.shape[1]), dtype=torch.float64) / 2
    y = first(x.reshape(-1, *shape)) - second(x.reshape(-1, *shape))
    assert (y <= upper[0]).all()
    assert (-y <= upper[1]).all()


def test_layers_without_places_have_no_windows() -> None:
    dense = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 1)).double()
    assert not windows(read(dense, (300,)).maps[:2])
    assert not read(dense, (300,)).windowed


@torch.no_grad()
def test_neurons_whose_turn_comes_too_late_keep_intervals_and_bounds_hold() -> None:
    module, shape = made("plain")
    network, (low, high) = read(module, shape), box(shape, 0.05)
    ticks = itertools.count()
    late = Clock(2, now=lambda: float(next(ticks)))
    whole = bounded(network, Inputs.of(low, high), None, NO_LIMIT)
    some = bounded(network, Inputs.of(low, high), None, NO_LIMIT, late)

    def width(layers: list[Neurons]) -> float:
        return float((layers[-1].high - layers[-1].low).sum())

    assert width(whole) < width(some)
    z = module[:-2](((low + high) / 2).reshape(1, *shape)).flatten()
    assert (some[-1].least[0] <= z).all()
    assert (z <= some[-1].most[0]).all()
