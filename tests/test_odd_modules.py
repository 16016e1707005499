"""Modules that compute something else than their classes and parameters suggest: read truly, or refused by name."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchreach as tr
from torchreach.compress.constraints import Constraints, is_weight_only
from torchreach.core.errors import InvalidNetworkError, TorchreachError, UnsupportedLayerError
from torchreach.read.module import chain
from torchreach.read.save import save

functional = nn.functional
pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces the end of TorchScript and of older norms


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).double()


def with_layer(change) -> nn.Module:
    """The dense network after `change` of its first layer."""
    network = dense()
    change(network[0])
    return network


class Around(nn.Module):
    """Code of the user's around a module."""

    def __init__(self, inner, forward=None, **values):
        super().__init__()
        self.inner, self._code = inner, forward or (lambda self, x: self.inner(x) * 2)
        for name, value in values.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self._code(self, x)


def around(forward, **values) -> nn.Module:
    return Around(dense(), forward, **values)


class CallsMore(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + 1


class DoublesWeights(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Backwards(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


class AlwaysDrops(nn.Dropout):
    def train(self, mode=True):  # noqa: ARG002
        return self


class Annotated(nn.ReLU):
    mask = torch.zeros(6, dtype=torch.bool)
    splits_at_zero = True


class Sine(nn.Module):
    splits_at_zero = True
    mask = torch.ones(6, dtype=torch.bool)

    def forward(self, x):
        return x.sin()


class Rounds(nn.Module):
    """A grid whose ties fall differently in another precision."""

    def forward(self, weight):
        return (weight / 0.1).round() * 0.1


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


def shadowed(layer):
    layer.__dict__["weight"] = 3 * layer.weight.detach()


def plain_weight(layer):
    weight = 3 * layer.weight.detach()
    del layer.weight
    layer.weight = weight


def own_forward(layer):
    layer.forward = lambda x: functional.linear(x, layer.weight, layer.bias) + 7


def edited_graph():
    module = torch.fx.symbolic_trace(dense())
    next(node for node in module.graph.nodes if node.target == "1").replace_all_uses_with(
        next(node for node in module.graph.nodes if node.target == "0")
    )
    return module


def stateful(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self.inner(x) * self.calls


def small_batches(self, x):
    return self.inner(x) if x.shape[0] > 5 else self.inner(x).relu()


def single_rows(self, x):
    return self.inner(x).relu() if x.shape[0] == 1 else self.inner(x)


def writes(self, x):
    self.gain.mul_(2)
    return self.inner(x) * self.gain


TRUE = {
    "DataParallel": lambda: nn.DataParallel(dense()),
    "DataParallel inside": lambda: Around(nn.DataParallel(dense())),
    "traced call": lambda: Around(CallsMore(4, 3).double()),
    "traced forward of a Sequential": lambda: Around(own_sequential()),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), DoublesWeights(1, 2, 3), nn.Flatten()).double(),
    "order of a Sequential": lambda: Backwards(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double(),
    "annotated ReLU": lambda: nn.Sequential(dense()[0], Annotated(), dense()[2]),
    "shadowed weight": lambda: with_layer(shadowed),
    "weight as an attribute": lambda: with_layer(plain_weight),
    "spectral norm": lambda: with_layer(parametrizations.spectral_norm),
    "weight norm": lambda: with_layer(parametrizations.weight_norm),
    "older spectral norm": lambda: with_layer(nn.utils.spectral_norm),
    "older weight norm": lambda: with_layer(nn.utils.weight_norm),
    "orthogonal": lambda: with_layer(parametrizations.orthogonal),
    "grid": lambda: with_layer(lambda layer: parametrize.register_parametrization(layer, "weight", Rounds())),
    "bias on a grid": lambda: with_layer(lambda layer: parametrize.register_parametrization(layer, "bias", Rounds())),
    "pruned": lambda: with_layer(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
    "sparse": lambda: with_layer(lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.to_sparse_csr()))),
    "whole numbers": lambda: around(lambda self, x: self.inner(x) / self.n, n=torch.tensor([3, 5, 7, 9])),
    "numbers before parameters": lambda: nn.Sequential(Around(nn.Identity(), lambda _, x: 0.1 * x), dense()),
    "negative divisor": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.AvgPool2d(2, divisor_override=-3)
    ).double(),
    "zero width": lambda: nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3)).double(),
    "nothing": lambda: nn.Sequential(),
}


def test_compiled_modules_are_what_was_compiled():
    """(Not called, because compiling takes seconds.)"""
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(chain(nn.Sequential(torch.compile(dense())))(x), dense()(x))


def own_sequential():
    network = dense()
    network.forward = lambda x: network[2](network[0](x))
    return network


@pytest.mark.parametrize("name", TRUE)
def test_what_a_call_computes_is_read(name):
    module = TRUE[name]().eval()
    x = torch.randn(7, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        found = chain(module, (4,))(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: own_sequential(), r"layer 0 \('', Sequential\): the instance has a 'forward' of its own"),
        (lambda: with_layer(own_forward), r"layer 0 \('0', Linear\): the instance has a 'forward' of its own"),
        (lambda: Around(with_layer(own_forward)), r"layer 0 \('inner.0', Linear\): the instance has a 'forward'"),
        (lambda: nn.Sequential(CallsMore(4, 4)), r"\('0', CallsMore\): its class defines __call__"),
        (lambda: torch.jit.script(dense()), r"TorchScript hides its layers: .* torch.export.export\(module"),
        (lambda: Around(torch.jit.script(dense())), r"layer 0 \('inner', .*TorchScript hides its layers"),
        (lambda: hooked(nn.DataParallel(dense())), r"DataParallel\): a forward hook may change"),
        (
            lambda: nn.Sequential(dense(), AlwaysDrops()),
            r"'1', AlwaysDrops\): a train\(\) method keeps it in training",
        ),
        (lambda: nn.Sequential(dense()[0], Sine()), r"layer 1 \('1.sin', Tensor.sin\).*not among them"),
        (
            lambda: with_layer(lambda m: parametrize.register_parametrization(m, "bias", Noise())),
            "draws random numbers",
        ),
        (
            lambda: with_layer(lambda m: m.register_forward_pre_hook(lambda _, x: x)),
            r"'0', Linear\): a forward pre-hook",
        ),
        (edited_graph, r"call module.recompile\(\)"),
        (lambda: around(stateful), "must not depend on state, random numbers or the size of the batch"),
        (lambda: around(lambda self, x: self.inner(x) * random.random()), "must not depend on state, random numbers"),
        (lambda: around(small_batches), "the size of the batch"),
        (lambda: around(single_rows), "the size of the batch"),
        (lambda: around(writes, gain=torch.ones(4)), r"'mul_', mul_\): it changes a tensor of the network in place"),
        (lambda: around(lambda self, x: self.inner(x.to(self.h).double()), h=torch.ones(1).half()), "float16 rounds"),
        (lambda: around(lambda self, x: self.inner(x.float().double())), "conversion to torch.float32 rounds"),
        (lambda: around(lambda self, x: torch.dot(x, self.inner(x))), "function torch.dot|dot combines two values"),
        (
            lambda: around(lambda self, x: torch.cat((self.inner(x), torch.ones(1, 2)), 1)),
            r"cat\): all parts must depend on the input",
        ),
        (lambda: around(lambda _, x: x.view(torch.int64)), r"'view', view\): called in a way torchreach does not know"),
        (
            lambda: nn.Sequential(dense(), nn.Softmax(1), dense()),
            r"Softmax\).*as the last layer",
        ),
        (lambda: around(lambda self, x: self.inner(x).log_softmax(0)), r"LogSoftmax\).*over the features"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)),
            r"'0.weight' must hold real floating",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        chain(make(), (4,))


def noisy(layer):
    parametrize.register_parametrization(layer, "bias", Noise())


def hooked(module):
    module.register_forward_hook(lambda _module, _x, y: y + 1)
    return module


def test_an_empty_place_of_a_sequential_is_named():
    network = dense()
    network._modules["1"] = None
    with pytest.raises(UnsupportedLayerError, match=r"layer 1 \('1', None\)"):
        chain(network)


def test_global_hooks_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda _module, _x, y: y)
    try:
        with pytest.raises(UnsupportedLayerError, match="a global forward hook"):
            chain(dense())
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense().to("meta"), "'0.weight' has no values, it is on the meta device"),
        (lambda: with_layer(nan_norm), r"weights must be finite: parameter '0.weight' contains NaN"),
        (lambda: negative_variance(), r"'0', BatchNorm1d\): running_var \+ eps must be positive"),
    ],
)
def test_numbers_that_mean_nothing_are_named(make, message):
    with pytest.raises(InvalidNetworkError, match=message):
        chain(make())


def nan_norm(layer):
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original1.zero_()  # 0 / 0


def negative_variance():
    module = nn.Sequential(nn.BatchNorm1d(4)).eval()
    module[0].running_var[0] = -1
    return module


def test_a_certificate_does_not_trust_the_name_of_an_attribute():
    """|x|: as many features as the mask has."""
    network = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        network[2].weight.fill_(1.0)
        network[0].bias.zero_()
        network[2].bias.zero_()
    network[1].mask = torch.tensor([False, False])
    box = tr.StarBatch.from_box(-torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    found = tr.reach(network, box)
    assert found.upper.item() == pytest.approx(1)
    assert found.lower.item() == pytest.approx(0, abs=1e-9)


def test_reading_leaves_the_module_alone():
    """A `train` method that rewrites weights (as adapters that merge themselves do) is not called."""

    class Merges(nn.Sequential):
        merged = 0

        def train(self, mode=True):
            type(self).merged += 1
            return super().train(mode)

    module = Merges(*dense()).train()
    assert Merges.merged == 1
    layers = chain(Around(module), (4,))
    assert module.training
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(layers(x), 2 * module(x))


def random_module(seed: int) -> nn.Module:
    """Two to four layers, each perhaps changed by one of the ways in which a module can be odd."""
    g = random.Random(seed)
    torch.manual_seed(seed)
    changes = [
        *(shadowed, plain_weight, own_forward, parametrizations.weight_norm, nn.utils.spectral_norm, hooked),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
        lambda layer: parametrize.register_parametrization(layer, "weight", Rounds()),
        lambda layer: setattr(layer, "in_features", 1),
        lambda layer: setattr(layer, "mask", torch.zeros(4, dtype=torch.bool)),
        lambda layer: setattr(layer, "__class__", CallsMore),
        lambda layer: setattr(layer, "inplace", True),
        lambda layer: layer.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    ]
    codes = [
        *(stateful, small_batches, single_rows),
        lambda self, x: self.inner(x) + self.inner.training,
        lambda self, x: (self.inner(x) - 0.3) / 0.7,
        lambda self, x: torch.relu_(self.inner(x)),
        lambda self, x: self.inner(x)[:, [1, 0, 3, 2]],
        lambda self, x: self.inner(x).reshape(x.shape[0], 2, 2).transpose(1, 2).flatten(1),
        lambda self, x: self.inner(x).view(-1, 2, 2).flatten(1),
        lambda self, x: self.inner(x) if x.sum() > 0 else -self.inner(x),
        lambda self, x: x + 0 * self.inner(x),
        lambda self, x: self.inner(x.relu_()) + 0 * x.mean(),
        lambda self, x: self.inner(x).clamp(0, 1),
        lambda self, x: self.inner(torch.zeros_like(x) + 1),
        lambda self, x: self.inner(x).clamp(min=0).contiguous(),
    ]
    wrappers = [
        nn.DataParallel,
        nn.Sequential,
        lambda m: Backwards(nn.ReLU(), m),
        lambda m: torch.compile(m, backend="eager"),
    ]
    layers: list[nn.Module] = []
    for _ in range(g.randint(1, 3)):
        layer: nn.Module = nn.Linear(4, 4).double()
        if g.random() < 0.3:
            g.choice(changes)(layer)
        if g.random() < 0.3:
            layer = Around(layer, g.choice(codes))
        if g.random() < 0.2:
            layer = g.choice(wrappers)(layer)
        layers += [layer, g.choice([nn.ReLU(), Annotated(), nn.ReLU(inplace=True), nn.Identity(), nn.Dropout()])]
    module: nn.Module = nn.Sequential(*layers)
    return Around(module, g.choice(codes)) if g.random() < 0.3 else module


@pytest.mark.parametrize("block", range(6))
def test_odd_modules_agree_with_their_layers_or_are_refused(block):
    agreed = 0
    for seed in range(25 * block, 25 * block + 25):
        module = random_module(seed).eval()
        x = torch.randn(7, 4, dtype=torch.float64)
        try:
            layers = chain(module, (4,))
        except TorchreachError:
            continue
        with torch.no_grad():
            torch.testing.assert_close(layers(x.clone()), module(x.clone()), rtol=1e-11, atol=1e-11, msg=f"seed {seed}")
            torch.testing.assert_close(layers(x[:1]), module(x[:1].clone()), rtol=1e-11, atol=1e-11, msg=f"seed {seed}")
        agreed += 1
    assert agreed >= 5  # not all is refused


def test_computed_weights_come_out_as_the_module_computes_them():
    """A grid in float32 beside a float64 network: read in float32, compared in float64."""
    original = nn.Sequential(nn.Linear(1, 64, bias=False))
    with torch.no_grad():  # ties of weight / 0.1, which fall otherwise in float64
        original[0].weight.copy_((torch.arange(64)[:, None] + 0.5) * 0.1)
    small = nn.Sequential(nn.Linear(1, 64, bias=False))
    small.load_state_dict(original.state_dict())
    parametrize.register_parametrization(small[0], "weight", Rounds())
    one = torch.ones(1, 1)
    found = tr.discrepancy(original.double(), small, tr.StarBatch.from_box(one, one))
    expected = (original(one.double()) - small(one).double()).abs()
    torch.testing.assert_close(found.upper.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["path", "program", "onnx"])
def test_networks_are_given_by_path_or_exported_program(tmp_path, kind):
    network = dense()
    program = torch.export.export(network, (torch.zeros(2, 4).double(),))
    torch.export.save(program, tmp_path / "net.pt2")
    save(chain(network), tmp_path / "net.onnx", (4,))
    given = {"path": tmp_path / "net.pt2", "program": program, "onnx": str(tmp_path / "net.onnx")}[kind]
    box = tr.StarBatch.from_box(torch.zeros(1, 4).double(), torch.full((1, 4), 0.1).double())
    assert tr.discrepancy(network, given, box).max_upper.item() < 1e-9
    assert tr.equivalent(given, network, box, epsilon=1e-6).answer == (tr.Answer.EQUIVALENT,)
    assert len(tr.reach(given, box)) == len(tr.reach(network, box))
    assert torch.equal(tr.merge(given, network)(box.center), torch.zeros(1, 4).double())
    options = tr.RepairOptions(samples=4, epochs=1)
    assert tr.repair(network, given, box, target=0.1, iterations=1, training=options).after.max_upper.item() < 1e-9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda x: x,
            "a network must be a torch.nn.Module, .* got function; put the function into the forward",
        ),
        (None, "a network must be .* got NoneType"),
        ({"0.weight": torch.ones(2, 2)}, "got dict"),
        ("net.bin", "no such file: net.bin"),
    ],
)
def test_what_is_no_network_is_refused_by_every_analysis(given, message):
    box = tr.StarBatch.from_box(torch.zeros(1, 4).double(), torch.ones(1, 4).double())
    for analysis in (
        lambda: tr.discrepancy(dense(), given, box),
        lambda: tr.equivalent(given, dense(), box, epsilon=1.0),
        lambda: tr.reach(given, box),
        lambda: tr.merge(dense(), given),
        lambda: tr.repair(dense(), given, box, target=0.5),
    ):
        with pytest.raises(TorchreachError, match=message):
            analysis()
    with pytest.raises(TorchreachError, match=r"compared on a torchreach.StarBatch, got Tensor"):
        tr.discrepancy(dense(), dense(), torch.zeros(1, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "inputs"),
    [
        (nn.Sequential(nn.Linear(2, 0), nn.ReLU(), nn.Linear(0, 3)), nn.Sequential(nn.Linear(2, 3)), 2),
        (nn.Sequential(nn.Linear(0, 3)), nn.Sequential(nn.Linear(0, 2), nn.ReLU(), nn.Linear(2, 3)), 0),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(3, 3)), 3),
        (nn.Sequential(), nn.Sequential(nn.ReLU()), 3),
    ],
    ids=["zero width", "no inputs", "no Linear", "nothing"],
)
def test_networks_with_little_in_them_are_compared(first, second, inputs):
    first, second = first.double(), second.double()
    box = tr.StarBatch.from_box(-torch.ones(1, inputs).double(), torch.ones(1, inputs).double())
    found = tr.discrepancy(first, second, box)
    x = box.sample(200)[0]
    with torch.no_grad():
        y = (first(x) - second(x)).abs().amax(0)
    assert (y <= found.upper[0] + 1e-12).all()
    assert (found.upper - found.lower).max() < 1e-6
    assert tr.equivalent(first, second, box, epsilon=100.0).answer == (tr.Answer.EQUIVALENT,)


def test_buffers_of_the_user_s_are_no_grid():
    network = dense()
    network[0].weight_scale = torch.ones(6, 4)  # plain attributes, not what quantize_weights leaves
    network[0].weight_codes = torch.ones(3)
    network[2].register_buffer("weight_scale", torch.zeros(()))
    network[2].register_buffer("weight_codes", torch.tensor([-7, 7]))
    assert not is_weight_only(network)
    assert Constraints.read(network).grids == {}
    assert is_weight_only(tr.quantize_weights(dense()))
