"""Chains: a module as flat layers computes what the module computes, and what is refused says why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchreach as tr
from torchreach.core.errors import InvalidNetworkError, ShapeError, UnsupportedLayerError
from torchreach.graph.layers import linear, magnitude
from torchreach.read import module as chains
from torchreach.read.module import chain

functional = nn.functional


class Functional(nn.Module):
    """Layers, bare parameters, a buffer, constants, dropout in both spellings."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.weight = nn.Parameter(torch.randn(8, 7))
        self.bias = nn.Parameter(torch.randn(7))
        self.register_buffer("mean", torch.randn(5))
        self.drop = nn.Dropout()
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = (x.view(x.size(0), -1) - self.mean) / 0.3
        x = self.drop(functional.relu(self.first(x)))
        x = (x @ self.weight + self.bias).clamp(min=0)
        x = functional.dropout(x, training=self.training)
        return 2 - functional.linear(x, self.last.weight, self.last.bias) * 3


class LooksAtShapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        assert x.ndim == 2
        if not isinstance(x.shape[1], int) or len(x.shape) == 3:
            return x
        return functional.relu(self.layer(x)).reshape(x.shape[0], 2, 2).flatten(1)


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean += torch.randn(3)
        self.last = nn.Linear(48, 4)

    def forward(self, x):
        x = functional.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        x = torch.relu_(self.norm(functional.avg_pool2d(x, 2)))
        return self.last(torch.flatten(x, 1))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        y = self.layer(x)
        y.relu_()
        return y


def _nested():
    return nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.ReLU(inplace=True)),
        nn.Dropout(),
        nn.BatchNorm1d(6),
        nn.Linear(6, 2),
    )


NETWORKS = [
    (_nested, None, (5,)),
    (Functional, None, (5,)),
    (lambda: nn.Sequential(Functional(), nn.ReLU(), nn.Linear(3, 2)), (5,), (5,)),
    (LooksAtShapes, (5,), (5,)),
    (Image, (1, 8, 8), (1, 8, 8)),
    (InPlace, None, (5,)),
]
IDS = ["nested", "functional", "mixed", "shapes", "image", "in_place"]


@pytest.mark.parametrize(("make", "input_shape", "shape"), NETWORKS, ids=IDS)
@pytest.mark.parametrize("training", [False, True])
def test_chain_equals_the_module_in_evaluation_mode(make, input_shape, shape, training):
    torch.manual_seed(0)
    module = make().train(training)
    layers = chain(module, input_shape)
    assert {m.training for m in module.modules()} == {training}  # left as it was
    x = torch.randn(7, *shape)
    with torch.no_grad():
        value = layers(x.clone())
        assert torch.equal(value, module.eval()(x.clone()))
        assert torch.equal(layers(x.clone()), value)
        module.train()  # no business of the chain's
        assert torch.equal(layers(x.clone()), value)


@pytest.mark.parametrize(("make", "input_shape", "shape"), NETWORKS, ids=IDS)
def test_training_the_module_changes_the_chain(make, input_shape, shape):
    torch.manual_seed(1)
    module = make().eval()
    layers = chain(module, input_shape)
    x = torch.randn(3, *shape)
    with torch.no_grad():
        before = layers(x.clone())
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        assert not torch.equal(layers(x.clone()), before)
        assert torch.equal(layers(x.clone()), module(x.clone()))


@pytest.mark.parametrize(("make", "input_shape", "shape"), NETWORKS, ids=IDS)
def test_affine_parts_of_the_chain_add_up(make, input_shape, shape):
    torch.manual_seed(2)
    x = torch.randn(4, *shape, dtype=torch.float64)
    with torch.no_grad():
        for layer in copy.deepcopy(chain(make().eval(), input_shape)).double():
            y = layer(x)
            if not isinstance(layer, nn.ReLU):
                torch.testing.assert_close(linear(layer, x) + layer(torch.zeros_like(x)), y)
                assert bool((magnitude(layer, x.abs()) >= linear(layer, x).abs() - 1e-12).all())
            x = y


def test_parameters_of_layers_are_the_same_objects():
    module = _nested()
    assert {id(p) for p in chain(module).parameters()} == {id(p) for p in module.parameters()}


def test_pruned_layers_use_the_current_weight():
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 3))
    prune.l1_unstructured(module[0], "weight", amount=0.5)
    with torch.no_grad():
        module[0].weight_orig += 1  # `weight` itself is stale until the next forward pass
    expected = module[0].weight_orig * module[0].weight_mask
    layer = chain(module)[0]
    assert torch.equal(linear(layer, torch.eye(4)).T, expected)
    copy.deepcopy(layer)  # what analyses do with a chain


def test_parametrized_layers_are_followed():
    module = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU())
    x = torch.randn(5, 4)
    assert torch.equal(chain(module)(x), module(x))


class _Residual(InPlace):
    def forward(self, x):
        return self.layer(x).sum(1, keepdim=True) + x


class _Branch(InPlace):
    def forward(self, x):
        y = self.layer(x)
        return y * torch.relu(y)


class _TwoInputs(InPlace):
    def forward(self, x, y):
        return self.layer(x + y)


class _TwoOutputs(InPlace):
    def forward(self, x):
        y = self.layer(x)
        return y, torch.relu(y)


class _Noise(InPlace):
    def forward(self, x):
        return self.layer(x) + torch.randn(4)


class _AlwaysDrops(InPlace):
    def forward(self, x):
        return functional.dropout(self.layer(x))


class _Scaled(nn.Linear):
    def forward(self, x):
        return torch.atan(super().forward(x))


class _BatchMean(InPlace):
    def forward(self, x):
        return self.layer(x - x.mean(0))


class _MixesBatch(InPlace):
    def forward(self, x):
        return self.layer(x) + torch.ones(3, 4)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), nn.Softsign())),
            r"layer 2 \('1.1', Softsign\): .*not",
        ),
        (nn.Softsign(), "Softsign is not among them"),
        (_Branch(), "mul combines two values"),
        (_Residual(), "sum"),
        (_TwoInputs(), "node 'y': the network must have one input"),
        (_TwoOutputs(), "node 'output': the network must have one output"),
        (_Noise(), "draws random numbers"),
        (_AlwaysDrops(), "drops values in evaluation mode"),
        (nn.Sequential(_Scaled(5, 4)), r"layer 1 \('0.atan', .*atan"),
        (_BatchMean(), "mean"),
        (_MixesBatch(), r"shape \(3, 4\) could reach into the batch axis; input_shape"),
        (nn.Sequential(nn.Flatten(0)), "start_dim must be at least 1"),
        (
            nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")),
            "padding_mode must be 'zeros'",
        ),
        (nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False)), "no running statistics"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_sound_rule_is_refused_by_name(module, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        chain(module)


def test_hooks_that_could_change_a_layer_are_refused():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(lambda _m, _x, y: y * 2)
    with pytest.raises(UnsupportedLayerError, match=r"layer 0 \('0', Linear\): a forward hook"):
        chain(module)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_not_finite_are_named(value, kind):
    module = _nested()
    module[1][0].weight.data[0, 0] = value
    with pytest.raises(InvalidNetworkError, match=f"parameter '1.0.weight' contains {kind}"):
        chain(module)


def test_wrong_input_shape_names_the_layer():
    with pytest.raises(ShapeError, match=r"layer 0 \('0', Linear\) does not accept inputs of shape \(3,\)"):
        chain(nn.Sequential(nn.Linear(5, 4)), (3,))


@pytest.mark.parametrize("verb", ["discrepancy", "equivalent"])
def test_one_question_traces_each_network_once(verb, monkeypatch):
    traced = []
    trace = chains._trace
    monkeypatch.setattr(chains, "_trace", lambda *args: (traced.append(args[1]), trace(*args)))
    networks = Functional(), Functional()
    stars = tr.StarBatch.from_image(torch.zeros(1, 5), 0.1)
    arguments = () if verb == "discrepancy" else (1e-3,)
    getattr(tr, verb)(*networks, stars, *arguments, budget=tr.Budget(stars=50))
    assert [id(network) for network in traced] == [id(network) for network in networks]


def test_a_network_that_changed_between_two_questions_is_read_again():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1))

        def forward(self, x):
            return nn.functional.linear(x, 2 * self.weight)  # computed: the chain keeps what it was

    network, stars = Doubled(), tr.StarBatch.from_image(torch.zeros(1, 1), 1.0)
    assert float(tr.discrepancy(nn.Linear(1, 1, bias=False), network, stars).max_upper) > 0
    reference = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        reference[0].weight.fill_(6.0)
        network.weight.fill_(3.0)
    assert float(tr.discrepancy(reference, network, stars).max_upper) < 1e-5
