"""Quantised graphs (convert_fx, PT2E, exported programs) and torchao's weight-only layers, read as chains."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.ao.quantization as tq
from torch import fx, nn
from torch.nn import functional as F

import torchreach as tr
from tests.test_quantized_networks import ENGINES, SLIPS, assert_same_codes, samples
from torchreach.core.errors import InvalidNetworkError, UnsupportedLayerError
from torchreach.graph.quantizer import Quantizer
from torchreach.read.module import chain

pytestmark = pytest.mark.filterwarnings("ignore")
_BATCH = ({0: torch.export.Dim("batch", min=2, max=10_000)},)


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 4))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2, self.bn = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(54, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.c2(F.relu(self.c1(x)))))
        return self.fc(x.reshape(x.shape[0], -1))


class Functional(nn.Module):
    """Layers that conversion turns into calls of quantized.linear, and layers that stay modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(10, 20), nn.Linear(12, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 20) * 0.2), nn.Parameter(torch.randn(12))

    def forward(self, x):
        return self.last(torch.relu(F.linear(torch.relu(self.first(x)), self.weight, self.bias)))


def quantised_values(module, x):
    """Outputs of the fake-quantise modules of a traced graph on activations, in order."""
    values = []

    class Recorder(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.op == "call_module" and isinstance(self.fetch_attr(n.target), tq.FakeQuantizeBase):
                values.append(value.double())
            return value

    with torch.no_grad():
        Recorder(module).run(x)
    return values


@pytest.mark.parametrize(("kind", "shape"), [(Functional, (10,)), (Pictures, (2, 8, 8))])
def test_graphs_of_the_fx_tools_agree_with_the_kernels(kind, shape):
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

    x = samples(shape)
    ready = prepare_fx(kind().eval(), tq.get_default_qconfig_mapping(ENGINES[0]), (x,))
    with torch.no_grad():
        torch.testing.assert_close(chain(ready, shape)(x), ready(x))
    module = convert_fx(ready)
    assert_same_codes(module, x, chain(module, shape))
    ready = prepare_qat_fx(kind().train(), tq.get_default_qat_qconfig_mapping(ENGINES[0]), (x,))
    ready(x)
    ready.eval().apply(tq.disable_observer)
    # Quantiser by quantiser, each from torch's own value before it: two quantisers in a row map grid points onto
    # thresholds of the next grid, where one slip of float32 recurs at many inputs and grows further down.
    values = [value for value in quantised_values(ready, x) if len(value) == len(x)]
    network = chain(ready, shape)
    value, at = x.double(), 0
    for layer in network:
        before, value = value, layer(value).detach()
        if isinstance(layer, Quantizer):
            slack = 1e-5 * (before.abs() + layer.scale)
            low, high = layer.code_range(before - slack, before + slack)
            codes = layer.codes(values[at])
            assert bool(((codes >= low) & (codes <= high)).all())
            assert (low != high).double().mean() < 0.01
            value, at = values[at], at + 1
    assert at == len(values) >= 4


# PT2E. torchao's import takes seconds; what follows imports it where it is used.


def pt2e(module, shape, tool, *, training=False):
    """`module` prepared by a quantiser of torchao and shown some data."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    program = torch.export.export(module.train(training), (samples(shape, 8),), dynamic_shapes=_BATCH)
    if tool == "x86":
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=training))
    else:
        scheme = get_symmetric_quantization_config(
            is_per_channel=tool != "per tensor", is_qat=training, is_dynamic=tool == "dynamic"
        )
        quantizer = XNNPACKQuantizer().set_global(scheme)
    ready = (prepare_qat_pt2e if training else prepare_pt2e)(program.module(), quantizer)
    ready(samples(shape, 300, seed=2))
    return ready


def convert(ready):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    return convert_pt2e(ready)


def assert_agrees(module, x, network):
    if isinstance(network[-1], Quantizer):
        assert_same_codes(module, x, network)
        return
    with torch.no_grad():
        error = (module(x).double() - network(x.double())).abs()
    assert (error > 1e-5).double().mean() <= SLIPS
    assert any(isinstance(layer, Quantizer) for layer in network)


@pytest.mark.parametrize("tool", ["x86", "per tensor", "per channel"])
@pytest.mark.parametrize(("kind", "shape"), [(dense, (10,)), (Pictures, (2, 8, 8))])
def test_pt2e_modules_and_their_files_agree_with_torch(kind, shape, tool, tmp_path):
    x = samples(shape)
    module = convert(pt2e(kind(), shape, tool))
    network = chain(module, shape)
    assert {layer.arithmetic for layer in network if isinstance(layer, Quantizer)} == {"float32"}
    assert_agrees(module, x, network)
    torch.export.save(torch.export.export(module, (x[:8],), dynamic_shapes=_BATCH), tmp_path / "small.pt2")
    loaded = tr.load(tmp_path / "small.pt2")
    assert [type(layer) for layer in loaded] == [type(layer) for layer in network]
    assert_agrees(module, x, loaded)
    assert not any(isinstance(layer, Quantizer) for layer in tr.weight_only(module, shape))


@pytest.mark.parametrize(("kind", "shape"), [(dense, (10,)), pytest.param(Pictures, (2, 8, 8), marks=pytest.mark.slow)])
def test_pt2e_training_graphs_agree_before_and_after_conversion(kind, shape):
    ready = pt2e(kind(), shape, "per channel", training=True)
    import torchao.quantization.pt2e as tools

    tools.move_exported_model_to_eval(ready)
    ready.apply(tools.disable_observer)
    x = samples(shape)
    assert_agrees(ready, x, chain(ready, shape))
    module = convert(ready)
    assert_agrees(module, x, chain(module, shape))


def test_dynamic_pt2e_graphs_are_refused_by_name():
    module = convert(pt2e(dense(), (10,), "dynamic"))
    with pytest.raises(UnsupportedLayerError, match="choose_qparams.*dynamic quantisation chooses its scale"):
        chain(module)


def test_weight_only_layers_of_torchao_are_their_dequantised_weights(tmp_path):
    tools = pytest.importorskip("torchao.quantization")
    x = samples((64,))
    for scheme, levels in (
        (tools.Int8WeightOnlyConfig(), 256),
        (tools.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=tools.PerGroup(32)), 32),
    ):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        tools.quantize_(module, scheme)
        network = chain(module)
        assert [type(layer.weight) for layer in network if isinstance(layer, nn.Linear)] == [nn.Parameter] * 2
        assert network[0].weight[0].unique().numel() <= levels
        with torch.no_grad():
            torch.testing.assert_close(network(x), module(x), rtol=0, atol=1e-5)
            torch.export.save(torch.export.export(module, (x[:1],)), tmp_path / "net.pt2")
            torch.testing.assert_close(tr.load(tmp_path / "net.pt2")(x), module(x), rtol=0, atol=1e-5)
    module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    tools.quantize_(module, tools.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(UnsupportedLayerError, match=r"'0', Linear\): Int8Tensor quantises its input: dynamic"):
        chain(module)


# Graphs written by hand, for what the tools do not produce by themselves.


def graph(*calls, **constants):
    """A module that applies calls (target, arguments after x) one after another; strings name constants."""
    import torch.ao.quantization.fx._decomposed

    root = nn.Module()
    for name, value in constants.items():
        root.register_buffer(name, value)
    made = fx.Graph()
    value = made.placeholder("x")
    for target, *rest in calls:
        function = operator.attrgetter(target)(torch.ops) if isinstance(target, str) else target
        arguments = [made.get_attr(a) if isinstance(a, str) else a for a in rest]
        value = made.call_function(function, (value, *arguments))
    made.output(value)
    return fx.GraphModule(root, made)


QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
_CODES = (-128, 127, torch.int8)


def test_codes_may_be_reshaped_but_not_computed_with():
    around = (QUANTIZE, 0.1, 3, *_CODES), (DEQUANTIZE, 0.1, 3, *_CODES)
    module = graph(around[0], (torch.flatten, 1), around[1])
    x = samples((2, 3))
    torch.testing.assert_close(chain(module)(x), module(x), rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedLayerError, match=r"ReLU\): it is given integer codes"):
        chain(graph(around[0], (torch.relu,), around[1]))
    with pytest.raises(UnsupportedLayerError, match="must return numbers, not integer codes"):
        chain(graph(around[0]))
    with pytest.raises(UnsupportedLayerError, match="must be codes that quantize_per_tensor made"):
        chain(graph(around[1]))
    with pytest.raises(UnsupportedLayerError, match=r"must be those of .* \(0.1, 3\), got 0.2 and 3"):
        chain(graph(around[0], (DEQUANTIZE, 0.2, 3, *_CODES)))


def test_bad_numbers_in_a_graph_are_refused():
    with pytest.raises(InvalidNetworkError, match="scale of 'quantize_per_tensor_default' must be positive"):
        chain(graph((QUANTIZE, 0.0, 3, *_CODES), (DEQUANTIZE, 0.0, 3, *_CODES)))
    with pytest.raises(InvalidNetworkError, match=r"must lie in \[-128, 127\], got 128"):
        chain(graph((QUANTIZE, 0.1, 128, *_CODES), (DEQUANTIZE, 0.1, 128, *_CODES)))
    with pytest.warns(tr.UncalibratedWarning, match="'quantize_per_tensor_default'"):
        chain(graph((QUANTIZE, 1.0, 0, *_CODES), (DEQUANTIZE, 1.0, 0, *_CODES)))
    codes = torch.ones(3, 10, dtype=torch.int8)
    for scale in (0.0, torch.nan):
        module = graph((F.linear, "codes"), codes=codes)
        weight = next(node for node in module.graph.nodes if node.op == "get_attr")
        with module.graph.inserting_after(weight):
            real = module.graph.call_function(operator.attrgetter(DEQUANTIZE)(torch.ops), (weight, scale, 0, *_CODES))
        weight.replace_all_uses_with(real, delete_user_cb=lambda user, real=real: user is not real)
        module.recompile()
        with pytest.raises(InvalidNetworkError, match="weight's scale must be positive and finite"):
            chain(module)


def test_activations_with_a_scale_per_channel_are_refused():
    per_channel = "quantized_decomposed.quantize_per_channel.default"
    module = graph((per_channel, "s", "z", 1, *_CODES), s=torch.ones(5), z=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(UnsupportedLayerError, match="activations must have one scale and zero point"):
        chain(module)


def test_fake_quantise_functions_are_quantisers():
    module = graph((torch.fake_quantize_per_tensor_affine, 0.1, 3, -128, 127))
    network = chain(module)
    assert [type(layer) for layer in network] == [Quantizer]
    assert network[0].arithmetic == "float32"
    x = samples((5,))
    torch.testing.assert_close(network(x), module(x), rtol=0, atol=1e-6)
