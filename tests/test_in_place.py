"""Networks that change a value in place and use it again: read as what torch computes, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao import quantization

from torchreach.app.shared import evaluate
from torchreach.core.errors import UnsupportedLayerError
from torchreach.read.module import chain, exported_module
from torchreach.training.fit import run
from torchreach.verbs.int8_kernels import runner

Change = Callable[["Skip", Tensor], Tensor]


class Skip(nn.Module):
    """Uses z twice, the second time after `change`, which may change it in place."""

    def __init__(self, change: Change, layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.gain, self.kept, self.layer = nn.Parameter(torch.randn(4)), torch.ones(4), layer
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        y = self.change(self, z)
        return self.one(y) + self.other(z)


def _operator(code: str) -> Change:
    """An augmented assignment to a second name of z."""
    scope: dict[str, Change] = {}
    exec(f"def change(net, z):\n    y = z\n    y {code}\n    return y", {"torch": torch}, scope)
    return scope["change"]


CHANGES: dict[str, Change] = {
    **{code: _operator(code) for code in ("+= 1", "+= torch.relu(z)", "+= net.gain", "-= z / 3", "*= -2", "/= 4")},
    "functional": lambda _, z: F.relu(z, True),
    "truth": lambda _, z: F.relu(z, inplace=1),  # type: ignore[arg-type]
    "leaky_relu": lambda _, z: F.leaky_relu(z, 0.1, True),
    "hardtanh": lambda _, z: F.hardtanh(z, -1, 1, True),
    "relu6": lambda _, z: F.relu6(z, True),
    "elu": lambda _, z: F.elu(z, 1.0, True),
    "silu": lambda _, z: F.silu(z, True),
    "hardswish": lambda _, z: F.hardswish(z, inplace=True),
    "hardsigmoid": lambda _, z: F.hardsigmoid(z, True),
    "selu": lambda _, z: F.selu(z, True),
    "torch": lambda _, z: torch.relu_(z),
    "method": lambda _, z: z.relu_(),
    "clamp": lambda _, z: z.clamp_(-0.5, 0.5),
    "add": lambda _, z: z.add_(torch.relu(z), alpha=2),
    "dropped": lambda _, z: F.dropout(z, 0.5, False, True),
}


def _agree(module: nn.Module, source: nn.Module) -> None:
    x = torch.randn(9, 3)
    with torch.no_grad():
        for shape in (None, (3,)):
            torch.testing.assert_close(chain(source, shape)(x), module(x))


@pytest.mark.parametrize("name", CHANGES)
def test_later_uses_see_what_a_call_changed(name: str) -> None:
    module = Skip(CHANGES[name]).eval()
    _agree(module, module)


@pytest.mark.parametrize("name", ["+= torch.relu(z)", "leaky_relu", "hardtanh", "silu", "clamp"])
def test_later_uses_see_what_an_exported_call_changed(name: str) -> None:
    module = Skip(CHANGES[name]).eval()
    _agree(module, exported_module(torch.export.export(module, (torch.zeros(9, 3),))))


LAYERS = (
    *(nn.ReLU(True), nn.LeakyReLU(0.1, True), nn.Hardtanh(inplace=True), nn.ReLU6(True), nn.Hardsigmoid(True)),
    *(nn.ELU(inplace=True), nn.SiLU(True), nn.Hardswish(True), nn.Sequential(nn.ReLU(True), nn.Linear(4, 4))),
)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_later_uses_see_what_a_layer_changed(layer: nn.Module) -> None:
    module = Skip(lambda net, z: net.layer(z), layer).eval()  # type: ignore[misc]
    _agree(module, module)


class Changes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, True)


WRAPPED = (
    *(nn.Sequential(nn.ReLU(True)), Changes(), nn.DataParallel(Changes())),
    nn.Sequential(nn.Unflatten(1, (2, 2)), nn.ReLU(True), nn.Flatten()),
)


@pytest.mark.parametrize("inner", WRAPPED)
def test_a_wrapped_network_that_changes_what_is_used_again_is_refused(inner: nn.Module) -> None:
    module = Skip(lambda net, z: net.layer(z), nn.DataParallel(inner))  # type: ignore[misc]
    with pytest.raises(UnsupportedLayerError, match="'layer.layer': it changes in place what is used again"):
        chain(module)
    alone = nn.Sequential(nn.Linear(3, 4), nn.DataParallel(inner))
    _agree(alone, alone)


def test_a_wrapped_network_may_change_values_of_its_own() -> None:
    module = Skip(lambda net, z: net.layer(z), nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU(True))))  # type: ignore[misc]
    _agree(module, module)


@pytest.mark.parametrize(
    ("function", "rest"),
    [(F.relu, (True,)), (F.relu6, (True,)), (F.leaky_relu, (0.1, True)), (F.hardtanh, (-1, 1, True)),
     (F.hardsigmoid, (True,))],
)  # fmt: skip
def test_graphs_that_ask_for_it_by_position(function: Callable[..., Tensor], rest: tuple) -> None:
    graph = fx.Graph()
    z = graph.call_module("first", (graph.placeholder("x"),))
    parts = graph.call_module("one", (graph.call_function(function, (z, *rest)),)), graph.call_module("other", (z,))
    graph.output(graph.call_function(torch.add, parts))
    module = fx.GraphModule(Skip(CHANGES["method"]), graph)
    _agree(module, module)


def _parts(_: Skip, z: Tensor) -> Tensor:
    parts = (2 * z).chunk(2, 1)
    parts[0].relu_()
    return torch.cat((parts[0], parts[1]), 1)


def _out(_: Skip, z: Tensor) -> Tensor:
    y = 2 * z
    torch.clamp(z, 0, 1, out=y)
    return y


def _state(net: Skip, z: Tensor) -> Tensor:
    gain = net.gain.detach()
    gain += 1
    return gain * z


def _kept(net: Skip, z: Tensor) -> Tensor:
    net.kept.mul_(2)
    return net.kept * z


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_parts, "may share its memory"),
        (lambda _, z: z.view(-1, 4).relu_(), "may share its memory"),
        (_out, "does not follow what it writes"),
        (lambda _, z: torch.zeros(1, 4).add_(z), "does not follow what it writes"),
        (_state, "a tensor of the network in place"),
        (_kept, "a tensor of the network in place"),
    ],
)
def test_changes_of_shared_memory_are_refused(change: Change, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        chain(Skip(change), (3,))


class Observed(nn.Module):
    """Prepared for quantisation with an observer behind its ReLU, whose rounded value it may ignore."""

    def __init__(self, ignored: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.relu, self.other, self.ignored = nn.Linear(3, 4), nn.ReLU(True), nn.Linear(4, 2), ignored
        self.qconfig = quantization.get_default_qat_qconfig("x86")
        quantization.prepare(self, inplace=True, allow_list={nn.Linear, nn.ReLU})
        self(torch.randn(100, 3))
        self.eval().apply(quantization.disable_observer)

    def forward(self, x: Tensor) -> Tensor:
        z = self.one(x)
        y = self.relu(z)
        return self.other(z if self.ignored else y)


@torch.no_grad()
def test_what_an_observed_layer_leaves_in_its_input_is_not_rounded() -> None:
    module, x = Observed(ignored=False), torch.randn(9, 3)
    torch.testing.assert_close(chain(module)(x.double()), module(x).double(), atol=1e-6, rtol=0)
    with pytest.raises(UnsupportedLayerError, match="a value that is used again"):
        chain(Observed(ignored=True), (3,))


def test_runs_leave_their_inputs_as_they_were() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.ReLU(True), nn.Linear(3, 2))
    x = torch.randn(5, 3)
    before = x.clone()
    y = runner(module)(x), run(module, x), evaluate(module, x)
    torch.testing.assert_close(x, before)
    for value in y:
        assert value is not None
        torch.testing.assert_close(value.float(), module(before.clone()))
    assert evaluate(module, x.double()).dtype == torch.float64


def test_constants_of_the_forward_pass_may_be_changed() -> None:
    def scaled(net: Skip, z: Tensor) -> Tensor:
        gain = net.gain * 2
        same, size = gain, z.shape[1]
        gain += 0.5
        gain.mul_(3)
        size += 0
        return (z * gain + same).reshape(-1, size)

    module = Skip(scaled)
    x = torch.randn(9, 3)
    torch.testing.assert_close(chain(module, (3,))(x), module(x))
