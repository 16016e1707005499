"""auto_LiRPA's bounds: of the right values, never missing one, never looser than those known before."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from itertools import pairwise
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchreach as tr
from tests.data import require_data
from tests.networks import devices, random_network
from torchreach.domains import lirpa
from torchreach.domains._lirpa_compat import converting, load_auto_lirpa
from torchreach.domains.lirpa import LirpaUnavailableError, preactivation_bounds
from torchreach.domains.root import root_bounds
from torchreach.domains.zonotope import Bounds, box_rows, interval_bounds
from torchreach.graph.steps import Step
from torchreach.read.load import load
from torchreach.read.steps import steps

try:
    load_auto_lirpa()
    REASON = ""
except ImportError as error:
    REASON = str(error)

# auto_LiRPA holds tensors in a type of its own, which no tensor of the simulated device can be.
DEVICES = devices(pytest.mark.skip(reason="auto_LiRPA does not work on the simulated device"))
needs_lirpa = pytest.mark.skipif(bool(REASON), reason=REASON or "auto_LiRPA works")


class Arithmetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.factor = nn.Parameter(torch.randn(6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (2 - self.first((x - 0.1307) / 0.3)) * self.factor
        return self.last(x.view(-1, 2, 3).relu().flatten(1)).relu()


class Residual(nn.Module):
    """Two blocks relu(x + f(x)), the second by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.conv = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense[0](x).relu()
        x = (x + self.dense[2](self.dense[1](x).relu())).relu().reshape(-1, 2, 2, 2)
        x = (x + self.conv[1](self.conv[0](x).relu())).relu()
        return self.last(x.flatten(1))


class Stacked(nn.Module):
    """Features of two depths side by side, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(15, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        return self.last(torch.cat((x, a, self.second(a).relu()), 1))


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 0, 2, 1))


def picture() -> nn.Module:
    network = nn.Sequential(
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Conv2d(3, 2, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 6)),
        *(nn.Unflatten(1, (2, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4)),
        nn.ReLU(inplace=True),
    )
    network[0].running_mean += 0.3  # type: ignore[operator]
    network[2].running_var += 1  # type: ignore[operator]
    return network


def dense(*sizes: int) -> nn.Sequential:
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def bent(function: type[nn.Module], *arguments: float) -> nn.Module:
    """Two layers of it, at values on both sides of every breakpoint."""
    first, second, last = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)
    with torch.no_grad():
        first.weight *= 12
        second.weight *= 4
    return nn.Sequential(first, function(*arguments), second, function(*arguments), last)


def pooled(*layers: nn.Module, wide: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(wide, 2))


NETWORKS = {
    "dense": (lambda: dense(5, 12, 9, 7, 3), (5,)),
    "affine": (lambda: nn.Sequential(nn.Linear(5, 3)), (5,)),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), (5,)),
    "arithmetic": (Arithmetic, (5,)),
    "picture": (picture, (1, 8, 8)),
    "residual": (Residual, (8,)),
    "stacked": (Stacked, (5,)),
    "leaky": (lambda: bent(nn.LeakyReLU, 0.1), (5,)),
    "relu6": (lambda: bent(nn.ReLU6), (5,)),
    "max pool": (lambda: pooled(nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU(), wide=3), (1, 4, 4)),
    "average pool": (lambda: pooled(nn.AvgPool2d(3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), wide=2), (1, 4, 4)),
    "transpose": (lambda: pooled(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.ReLU(), wide=128), (1, 4, 4)),
    "padding": (lambda: pooled(Padded(), nn.Conv2d(2, 2, 3, 2), nn.ReLU(), wide=12), (1, 4, 4)),
}


def read(network: nn.Module, shape: tuple[int, ...], device: str = "cpu") -> tuple[Step, ...]:
    return steps(network.to(device).eval(), shape, dtype=torch.float64, device=torch.device(device))


def boxes(inputs: int, device: str = "cpu", width: float = 0.4) -> tuple[Tensor, Tensor]:
    """Three boxes [3, N_in]."""
    lower = torch.rand(3, inputs, dtype=torch.float64, device=device) - 0.5
    return lower, lower + width * torch.rand(3, inputs, dtype=torch.float64, device=device)


def bounds_of(network: tuple[Step, ...], lower: Tensor, upper: Tensor) -> Bounds:
    rows = box_rows(lower, upper)
    return preactivation_bounds(network, *rows, interval_bounds(network, *rows))


def unknown(network: tuple[Step, ...], x: Tensor) -> Bounds:
    """Bounds that say nothing, of as many boxes as there are points."""
    return [(-infinite, infinite) for infinite in (torch.full_like(z, torch.inf) for z in received(network, x))]


def samples(lower: Tensor, upper: Tensor, count: int) -> Tensor:
    """[count * S, N_in] points of the boxes, corners among them."""
    share = torch.rand(count, *lower.shape, dtype=torch.float64, device=lower.device)
    share[: count // 4] = share[: count // 4].round()
    return (lower + (upper - lower) * share).flatten(0, 1)


def received(network: tuple[Step, ...], x: Tensor) -> list[Tensor]:
    """What the activations of each step receive, and the output: what bounds are held against."""
    values = []
    for step in network:
        values.append(step.linear(x) + step.bias)
        x = step.activate(values[-1])
    return values


def assert_contains(network: tuple[Step, ...], bounds: Bounds, x: Tensor) -> None:
    for (low, high), value, step in zip(bounds, received(network, x), network, strict=True):
        assert low.dtype == torch.float64
        assert low.device == value.device
        assert not low.requires_grad
        value, slack = value.reshape(-1, *low.shape), 1e-12 * (1 + value.reshape(-1, *low.shape).abs())
        assert bool(((low <= value + slack) & (value <= high + slack)).all())
        bounded = torch.ones_like(low, dtype=torch.bool) if step.relu is None else step.relu.expand_as(low)
        assert torch.equal(low.isfinite(), bounded)


@needs_lirpa
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bounds_contain_what_each_relu_receives(name: str, device: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = read(make(), shape, device)
    lower, upper = boxes(prod(shape), device)
    bounds = bounds_of(network, lower, upper)
    assert_contains(network, bounds, samples(lower, upper, 2000))
    for (low, high), (low2, high2), step in zip(
        bounds, interval_bounds(network, *box_rows(lower, upper)), network, strict=True
    ):
        on = slice(None) if step.relu is None else step.relu
        assert bool((low >= low2 - 1e-9)[:, on].all())
        assert bool((high <= high2 + 1e-9)[:, on].all())


@needs_lirpa
@pytest.mark.parametrize("name", ["residual", "stacked", "leaky", "relu6", "max pool", "transpose", "padding"])
def test_reach_of_any_graph_uses_it_and_finds_the_same_regions(name: str) -> None:
    torch.manual_seed(1)
    make, shape = NETWORKS[name]
    network, middle = make().double().eval(), torch.rand(shape, dtype=torch.float64) - 0.5
    radius = torch.zeros_like(middle)
    radius.flatten()[:3] = 0.3
    stars = tr.StarBatch.from_box((middle - radius)[None], (middle + radius)[None])
    found, own = (tr.reach(network, stars, tr.Exact(root_bounds=kind)) for kind in ("lirpa", "zonotope"))
    assert found.stats.root_bounds == "auto_LiRPA CROWN and zonotope"
    assert own.stats.root_bounds == "zonotope"
    assert found.count.tolist() == own.count.tolist()
    torch.testing.assert_close((found.lower, found.upper), (own.lower, own.upper))
    both = tr.merge(network, coarse(network), input_shape=shape)
    found, own = (tr.reach(both, stars, tr.Exact(root_bounds=kind)) for kind in ("lirpa", "zonotope"))
    assert found.stats.root_bounds == "auto_LiRPA CROWN and zonotope"
    assert found.count.tolist() == own.count.tolist()


def coarse(network: nn.Module) -> nn.Module:
    """The network with weights on a coarse grid."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_((16 * parameter).round() / 16)
    return other


@needs_lirpa
@torch.no_grad()
def test_bounds_are_tighter_in_depth_than_intervals() -> None:
    torch.manual_seed(1)
    network = read(dense(5, 12, 9, 7, 3), (5,))
    lower, upper = boxes(5)
    ends = bounds_of(network, lower, upper)[-1], interval_bounds(network, *box_rows(lower, upper))[-1]
    widths = [(high - low).mean() for low, high in ends]
    assert widths[0] < 0.7 * widths[1]


@needs_lirpa
@torch.no_grad()
def test_bounds_are_those_of_the_library_s_own_layers() -> None:
    torch.manual_seed(2)
    module = dense(5, 9, 8, 3).double()
    network, (lower, upper) = read(module, (5,)), boxes(5)
    unknown = [
        (torch.full_like(part, -torch.inf), torch.full_like(part, torch.inf)) for part in received(network, lower)
    ]
    found = preactivation_bounds(network, *box_rows(lower, upper), unknown)[-1]
    library = load_auto_lirpa()
    box = library.PerturbationLpNorm(norm=torch.inf, x_L=lower, x_U=upper)
    with converting():
        bounded = library.BoundedModule(module, lower[:1], bound_opts={"sparse_intermediate_bounds": False})
        identity = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
        own = bounded.compute_bounds(x=(library.BoundedTensor(lower, box),), C=identity, method="CROWN")
    torch.testing.assert_close(found, tuple(own), rtol=0, atol=1e-9)


@needs_lirpa
@torch.no_grad()
def test_affine_bounds_are_exact() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    lower, upper = boxes(4)
    matrix = module[1].weight @ module[0].weight  # type: ignore[operator]
    centre, radius = module((lower + upper) / 2), (upper - lower) / 2 @ matrix.abs().T
    ((low, high),) = bounds_of(read(module, (4,)), lower, upper)
    torch.testing.assert_close(low, centre - radius, rtol=0, atol=1e-12)
    torch.testing.assert_close(high, centre + radius, rtol=0, atol=1e-12)


@needs_lirpa
@torch.no_grad()
def test_acasxu_bounds_are_sound_and_close_to_samples_on_a_small_box() -> None:
    network = read(load(require_data("acasxu", "ACASXU_run2a_1_1_batch_2000.onnx")), (1, 1, 5))
    centre = torch.tensor([[-0.29, 0.01, 0.495, 0.35, 0.4]], dtype=torch.float64)
    lower, upper = centre - 0.002, centre + 0.002
    bounds = preactivation_bounds(network, *box_rows(lower, upper), unknown(network, lower))
    x = samples(lower, upper, 4000)
    assert_contains(network, bounds, x)
    for (low, high), value in list(zip(bounds, received(network, x), strict=True))[:3]:
        assert ((high - low).mean() / (value.amax(0) - value.amin(0)).mean()) < 1.5


@needs_lirpa
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_bounds_of_two_networks_side_by_side(device: str) -> None:
    torch.manual_seed(3)
    first, second = dense(5, 9, 7, 3), dense(5, 6, 3)  # of unlike depth: features of the shorter one pass a ReLU
    network = read(tr.merge(first, second), (5,), device)
    lower, upper = boxes(5, device)
    bounds = bounds_of(network, lower, upper)
    assert_contains(network, bounds, samples(lower, upper, 2000))
    alone = bounds_of(read(first, (5,), device), lower, upper)
    for both, own, count in zip(bounds[:-1], alone, (9, 7), strict=False):
        torch.testing.assert_close([end[:, :count] for end in both], list(own), check_dtype=False)


@needs_lirpa
@torch.no_grad()
def test_linear_parts_that_both_networks_share_cancel() -> None:
    torch.manual_seed(4)
    affine = nn.Sequential(nn.Linear(5, 2))
    low, high = bounds_of(read(tr.merge(affine, affine), (5,)), *boxes(5))[-1]
    assert bool((low <= 0).all())
    assert bool((high >= 0).all())
    assert high.abs().max() < 1e-12


@needs_lirpa
def test_a_point_is_a_box() -> None:
    torch.manual_seed(6)
    point = torch.rand(2, 4, dtype=torch.float64)
    for low, high in bounds_of(read(dense(4, 6, 2), (4,)), point, point):
        assert bool((low <= high).all())
        torch.testing.assert_close(low, high)


@needs_lirpa
@torch.no_grad()
def test_stars_that_are_no_boxes() -> None:
    """Zonotopes know what the box around a star does not; points are taken in the star."""
    torch.manual_seed(7)
    network = read(dense(4, 8, 8, 2), (4,))
    rows, slack = torch.randn(3, 6, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    low, high = root_bounds(network, rows, slack, "lirpa", 1e-9, 0)[0][-1]
    t = 2 * torch.rand(3, 500, 5, dtype=torch.float64) - 1
    y = received(network, (rows[:, :1] + t @ rows[:, 1:]).flatten(0, 1))[-1].reshape(3, 500, 2)
    assert bool(((low[:, None] <= y) & (y <= high[:, None])).all())


@needs_lirpa
def test_nothing_global_changes_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(7)
    network = read(Residual(), (8,))
    state = torch.get_rng_state()
    subscript = hasattr(torch._C.Node, "__getitem__")
    handlers, filters = list(logging.getLogger().handlers), list(warnings.filters)
    lower = torch.zeros(2, 8, dtype=torch.float64)
    bounds_of(network, lower, lower + 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET
    assert warnings.filters == filters
    assert hasattr(torch._C.Node, "__getitem__") == subscript
    assert "numpy.lib.arraysetops" not in sys.modules
    assert "".join(capfd.readouterr()) == ""


def test_activations_that_bend_smoothly_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    network = steps(module, (4,), dtype=torch.float64, device=torch.device("cpu"), smooth=True)
    lower = torch.zeros(1, 4, dtype=torch.float64)
    with pytest.raises(LirpaUnavailableError, match="smooth 1: only affine maps and ReLUs are handed to auto_LiRPA"):
        bounds_of(network, lower, lower + 1)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    library = SimpleNamespace(PerturbationLpNorm=fail)
    monkeypatch.setattr(lirpa, "load_auto_lirpa", fail if isinstance(error, ImportError) else lambda: library)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("auto_LiRPA is not installed"), "auto_LiRPA is not installed"),
        (KeyError("an operator"), "auto_LiRPA cannot bound this network: KeyError: 'an operator'"),
    ],
)
def test_what_fails_is_reported_and_zonotopes_stand(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    network, rows = read(dense(4, 3, 2), (4,)), box_rows(torch.zeros(1, 4).double(), torch.ones(1, 4).double())
    with pytest.raises(LirpaUnavailableError, match=said):
        preactivation_bounds(network, *rows, interval_bounds(network, *rows))
    assert root_bounds(network, *rows, "lirpa", 1e-9, 0)[1] == "zonotope"


@needs_lirpa
def test_wrong_bounds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    monkeypatch.setattr(
        lirpa, "twins", lambda *_, **__: SimpleNamespace(transpose=lambda y: y.new_zeros(*y.shape[:-1], 4))
    )
    lower = torch.rand(1, 4, dtype=torch.float64)
    network = read(dense(4, 4, 4), (4,))
    with pytest.raises(LirpaUnavailableError, match="miss a value the network takes"):
        bounds_of(network, lower, lower + 0.01)


@needs_lirpa
def test_auto_lirpa_is_used_where_it_can_pay() -> None:
    network = random_network(5, [3, 10, 10, 2])
    ones = torch.ones(3, dtype=torch.float64)
    stars = tr.StarBatch.from_box(-ones, ones)
    assert tr.reach(network, stars).stats.root_bounds == "zonotope"
    for used in (
        tr.reach(network, stars, tr.Exact(root_bounds="lirpa")),
        tr.reach(network, stars, budget=tr.Budget(stars=20)),
    ):
        assert used.stats.root_bounds == "auto_LiRPA CROWN and zonotope"
