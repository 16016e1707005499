"""Deployed networks: the chain read from int8 and quantisation-aware-training modules gives the codes torch gives.

float64 sums and the kernels' float32 scaling may round a number at a threshold differently, which moves a code by
one: at most SLIPS of the codes, and never by more than one step.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.ao.quantization as tq
from torch import nn
from torch.nn import functional as F

import torchreach as tr
from tests.data import require_data
from tests.networks import exact, executed_steps
from torchreach.core.errors import FileFormatError, InvalidNetworkError, ShapeError, UnsupportedLayerError
from torchreach.domains.rounding import outputs
from torchreach.graph.layers import Reshape
from torchreach.graph.quantizer import Quantizer
from torchreach.read.module import chain

SLIPS = 0.002
ENGINES = [engine for engine in ("fbgemm", "x86", "onednn") if engine in torch.backends.quantized.supported_engines]

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*reduce_range", "ignore:.*must run observer")


@pytest.fixture
def engine(request):
    """Kernels to pack for; those in use come back afterwards."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = getattr(request, "param", ENGINES[0])
    yield torch.backends.quantized.engine
    torch.backends.quantized.engine = before


every_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True)


class Dense(nn.Module):
    """Modules and functions mixed, as user code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.fc1, self.relu, self.fc2, self.fc3 = nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 15), nn.Linear(15, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = self.relu(self.fc1(torch.flatten(self.quant(x), 1)))
        x = self.drop(F.relu(self.fc2(x))).reshape(x.shape[0], 15)
        return self.dequant(self.fc3(x))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.c1, self.r1, self.pool = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AvgPool2d(2)
        self.c2, self.bn, self.r2 = nn.Conv2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.r2(self.bn(self.c2(self.pool(self.r1(self.c1(self.quant(x)))))))
        return self.dequant(self.fc(x.view(x.shape[0], -1)))


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.c1, self.bn, self.r1, self.flat = (
            nn.Conv1d(2, 4, 3, dilation=2),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.fc = nn.Linear(20, 3)

    def forward(self, x):
        return self.dequant(self.fc(self.flat(self.r1(self.bn(self.c1(self.quant(x)))))))


NETWORKS = {
    "dense": (Dense, [], (10,)),
    "dense, fused": (Dense, [["fc1", "relu"]], (10,)),
    "pictures": (Pictures, [["c1", "r1"], ["c2", "bn", "r2"]], (2, 8, 8)),
    "signal": (Signal, [["c1", "bn", "r1"]], (2, 9)),
}


def samples(shape, count=1000, seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) * 1.5


def prepared(kind, fused, shape, qconfig, *, training=False):
    """A network with observers that have seen data; with fake quantisation where it is prepared for training."""
    torch.manual_seed(0)
    module = kind().train(training)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
    if fused:
        module = (tq.fuse_modules_qat if training else tq.fuse_modules)(module, fused)
    module.qconfig = qconfig
    module = (tq.prepare_qat if training else tq.prepare)(module)
    module(samples(shape, 300, seed=2))
    return module


def converted(name="dense", engine="fbgemm"):
    kind, fused, shape = NETWORKS[name]
    return tq.convert(prepared(kind, fused, shape, tq.get_default_qconfig(engine))), shape


def assert_same_codes(module, x, network):
    """The last quantiser's codes of `network` are those of `module` as torch executes it.

    Its chain adds up exactly; where kernels saturate, its steps do as they do.
    """
    assert isinstance(network[-1], Quantizer)
    with torch.no_grad():
        y = module(x).double()
    exact, (index, low, high) = (
        outputs(executed_steps(module, tuple(x.shape[1:]), kernels), x.double().flatten(1))
        for kernels in ("exact", "here")
    )
    fits = ((y.flatten(1)[index] - (low + high) / 2).abs() <= (high - low) / 2 + 0.01 * network[-1].scale).all(1)
    assert torch.equal(index[fits].unique(), torch.arange(len(x)))
    if torch.equal(exact[1], low):
        with torch.no_grad():
            steps = (y - network(x.double())).abs() / network[-1].scale
        assert steps.max() < 1.01
        assert (steps > 0.01).double().mean() <= SLIPS
    assert y.unique().numel() > 10  # they do something


@every_engine
@pytest.mark.parametrize("name", NETWORKS)
def test_int8_modules_agree_with_the_kernels(name, engine):
    module, shape = converted(name, engine)
    assert_same_codes(module, samples(shape), chain(module, shape))


def test_an_int8_module_is_read_as_quantisers_and_exact_weights(engine):  # noqa: ARG001
    module, shape = converted("dense, fused")
    network = chain(module, shape)
    kinds = [type(layer) for layer in network]
    assert kinds[:5] == [Quantizer, nn.Flatten, nn.Linear, nn.ReLU, Quantizer]
    weight = module.fc1.weight()
    exact = weight.int_repr().double() * weight.q_per_channel_scales()[:, None]
    assert network[2].weight.dtype == torch.float64
    torch.testing.assert_close(network[2].weight.detach(), exact, rtol=0, atol=0)
    torch.testing.assert_close(network[2].bias.detach(), module.fc1.bias().double(), rtol=0, atol=0)
    assert (network[0].lowest, network[0].highest) == (0, 255)  # reduce_range narrows the scale, not the codes
    # what comes into the network was computed in float32, what int8 layers pass on in integers
    assert [layer.arithmetic for layer in network if isinstance(layer, Quantizer)][:2] == ["float32", "integer"]
    assert [type(layer) for layer in chain(network)] == kinds


def test_affine_weights_and_symmetric_activations_agree(engine):  # noqa: ARG001
    affine = tq.QConfig(
        activation=tq.MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, dtype=torch.quint8),
        weight=tq.MinMaxObserver.with_args(qscheme=torch.per_tensor_affine, dtype=torch.qint8),
    )
    kind, _, shape = NETWORKS["dense"]
    module = prepared(kind, [], shape, affine)
    with torch.no_grad():
        module.fc1.weight.add_(0.2)
    module = tq.convert(module)
    assert module.fc1.weight().q_zero_point() != 0
    assert_same_codes(module, samples(shape), chain(module, shape))


def test_a_wrapper_of_stubs_is_read_before_and_after_conversion(engine):
    inner = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    wrapped = tq.QuantWrapper(inner)
    assert [type(layer) for layer in chain(wrapped)] == [nn.Linear, nn.ReLU, nn.Linear]
    wrapped.qconfig = tq.get_default_qconfig(engine)
    ready = tq.prepare(wrapped)
    x = samples((10,))
    ready(x)
    with torch.no_grad():
        torch.testing.assert_close(chain(ready)(x), ready(x))  # observers round nothing
    module = tq.convert(ready)
    assert_same_codes(module, x, chain(module))


def test_float_layers_beside_int8_ones_are_in_float64(engine):  # noqa: ARG001
    module, _ = converted()
    tail = nn.Linear(4, 3)
    both = nn.Sequential(module, tail, nn.ReLU(), nn.Linear(3, 2))
    network = chain(both)
    x = samples((10,))
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert tail.weight.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(network(x.double()).float(), both(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_modules_agree_before_and_after_conversion(name, engine):
    kind, fused, shape = NETWORKS[name]
    module = prepared(kind, fused, shape, tq.get_default_qat_qconfig(engine), training=True)
    before = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    x = samples(shape)
    chain(module, shape)  # reading feeds no observer, and leaves the mode
    assert module.training
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())
    module.eval().apply(tq.disable_observer)
    network = chain(module, shape)
    assert {layer.arithmetic for layer in network if isinstance(layer, Quantizer)} == {"float32"}
    assert_same_codes(module, x, network)
    module = tq.convert(module)
    assert_same_codes(module, x, chain(module, shape))


def test_fake_quantisation_that_is_switched_off_is_not_there(engine):
    kind, fused, shape = NETWORKS["dense, fused"]
    module = prepared(kind, fused, shape, tq.get_default_qat_qconfig(engine), training=True).eval()
    module.apply(tq.disable_fake_quant)
    network = tr.load(module, dtype=torch.float64)
    assert not any(isinstance(layer, Quantizer) for layer in network)
    with torch.no_grad():
        torch.testing.assert_close(network(samples(shape).double()).float(), module(samples(shape)))


def test_the_weight_only_twin_has_the_weights_and_no_rounding(engine):  # noqa: ARG001
    module, _ = converted("dense, fused")
    twin = tr.weight_only(module)
    kinds = [type(layer) for layer in twin if not isinstance(layer, nn.Flatten | Reshape)]
    assert kinds == [*[nn.Linear, nn.ReLU] * 2, nn.Linear]
    x = samples((10,)).double()
    weights = [module.fc1, module.fc2, module.fc3]
    for index, layer in enumerate(weights):
        x = F.linear(x, layer.weight().dequantize().double(), layer.bias().double())
        x = x.relu() if index < 2 else x
    torch.testing.assert_close(twin(samples((10,)).double()), x, rtol=0, atol=1e-5)
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert list(tr.weight_only(network)) == list(network)


# State dicts.


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_comes_back_as_the_same_kernels(name, engine, tmp_path):  # noqa: ARG001
    module, shape = converted(name)
    structure = NETWORKS[name][0]().eval()
    if name == "pictures":
        structure = tq.fuse_modules(structure, [["c2", "bn"]])
    if name == "signal":
        structure = tq.fuse_modules(structure, [["c1", "bn"]])
    torch.save(module.state_dict(), tmp_path / "small.pth")
    again = tr.load_int8(tmp_path / "small.pth", structure, shape)
    x = samples(shape)
    assert torch.equal(again(x), module(x))
    assert_same_codes(again, x, chain(again, shape))
    assert set(again.state_dict()) == set(module.state_dict())
    torch.save(again.state_dict(), tmp_path / "again.pth")
    assert torch.equal(tr.load_int8(tmp_path / "again.pth", structure, shape)(x), module(x))


def test_nested_names_and_an_exported_structure_are_enough(engine, tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
            self.head = nn.ModuleDict({"out": nn.Linear(8, 2)})

        def forward(self, x):
            return self.head["out"](self.body(x))

    class Stubbed(Nested):
        def __init__(self) -> None:
            super().__init__()
            self.stub, self.back = tq.QuantStub(), tq.DeQuantStub()

        def forward(self, x):
            return self.back(super().forward(self.stub(x)))

    module = Stubbed().eval()
    module.qconfig = tq.get_default_qconfig(engine)
    module = tq.prepare(module)
    x = samples((5,))
    module(x)
    module = tq.convert(module)
    program = torch.export.export(Nested().eval(), (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "float.pt2")
    again = tr.load_int8(module.state_dict(), tmp_path / "float.pt2")
    assert torch.equal(again(x), module(x))
    assert torch.equal(copy.deepcopy(again)(x), module(x))


class _Paper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 256), nn.Linear(256, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))))


@every_engine
def test_the_published_network_agrees_with_its_kernels_around_the_ten_images(engine):  # noqa: ARG001
    module = tr.load_int8(require_data("fnn_repair", "mnist_fnn_s_quan.pth"), _Paper())
    with pytest.warns(tr.UncalibratedWarning, match="'quant', 'fc1', 'fc2', 'fc3'"):
        network = tr.load(module)
    images = torch.from_numpy(np.load(require_data("fnn_repair", "images.npy"))).float().reshape(10, 1, 784)
    noise = torch.randn(10, 150, 784, generator=torch.Generator().manual_seed(0))
    x = (images + 0.1 * noise).reshape(-1, 784)
    assert_same_codes(module, x, network)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("quant.scale"), UnsupportedLayerError, "'quant' must be statically quantised, with scale"),
        (lambda s: (s.pop("quant.scale"), s.pop("quant.zero_point")), UnsupportedLayerError, "one quantiser, .* got 0"),
        (lambda s: s.update({"quant.scale": torch.tensor([0.0])}), InvalidNetworkError, "scale of 'quant' must be pos"),
        (lambda s: s.update({"fc2.scale": torch.tensor(torch.nan)}), InvalidNetworkError, "scale of 'fc2' must be pos"),
        (
            lambda s: s.update({"fc2.zero_point": torch.tensor(256)}),
            InvalidNetworkError,
            r"'fc2' must lie in \[0, 255\]",
        ),
        (lambda s: s.update({"fc9.scale": torch.tensor(1.0)}), UnsupportedLayerError, "'fc9' must be statically"),
        (
            lambda s: s.update({"fc1.running_mean": torch.ones(3)}),
            UnsupportedLayerError,
            "'fc1.running_mean' is no part",
        ),
        (lambda s: s.update({"fc3.weight": torch.ones(4, 15)}), UnsupportedLayerError, None),
        (
            lambda s: s.update({"fc4" + key[3:]: s.pop(key) for key in list(s) if key.startswith("fc1.")}),
            InvalidNetworkError,
            "by name or in order and of the same shapes: required fc2, fc3, fc4, got fc1, fc2, fc3",
        ),
        (
            lambda s: s.update({"fc3" + key[3:]: s[key] for key in list(s) if key.startswith("fc1.")}),
            ShapeError,
            r"'fc3' must have shape \(4, 15\), got \(20, 10\)",
        ),
    ],
)
def test_a_bad_state_dict_is_refused(change, error, message, engine):  # noqa: ARG001
    state = dict(converted()[0].state_dict())
    change(state)
    if message is None:
        del state["fc3._packed_params._packed_params"]
        message = "'fc3' must be statically quantised"
    with pytest.raises(error, match=message):
        tr.load_int8(state, Dense())


def test_layers_named_otherwise_are_matched_in_order_and_said_to_be(engine):
    """A QuantStub in front moves the names of a Sequential by one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    stubbed = nn.Sequential(tq.QuantStub(), *network, tq.DeQuantStub()).eval()
    stubbed.qconfig = tq.get_default_qconfig(engine)
    ready = tq.prepare(stubbed)
    x = samples((10,))
    ready(x)
    module = tq.convert(ready)
    with pytest.warns(UserWarning, match="matched in order, by shape: '0' is '1', '2' is '3'"):
        again = tr.load_int8(module.state_dict(), network)
    assert torch.equal(again(x), module(x))
    assert set(again.state_dict()) == set(module.state_dict())


def test_pickled_modules_and_other_files_are_refused(engine, tmp_path):  # noqa: ARG001
    module, _ = converted()
    torch.save(module, tmp_path / "module.pth")
    with pytest.raises(FileFormatError, match=r"can run any code when it is read.*save module.state_dict\(\)"):
        tr.load_int8(tmp_path / "module.pth", Dense())
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(FileFormatError, match="must hold a state dict, got list"):
        tr.load_int8(tmp_path / "list.pth", Dense())
    (tmp_path / "noise.pth").write_bytes(pickle.dumps(object()))
    with pytest.raises(FileFormatError, match="must hold a state dict that"):
        tr.load_int8(tmp_path / "noise.pth", Dense())
    with pytest.raises(FileFormatError, match="no such file"):
        tr.load_int8(tmp_path / "missing.pth", Dense())
    with pytest.raises(FileFormatError, match="a .pt2 file"):
        tr.load_int8(module.state_dict(), tmp_path / "net.onnx")


# Bad input.


def test_uncalibrated_scales_are_named_once(engine):
    module = Dense().eval()
    module.qconfig = tq.get_default_qconfig(engine)
    module = tq.convert(tq.prepare(module))
    with pytest.warns(tr.UncalibratedWarning, match="'quant', 'fc1', 'fc2', 'fc3'") as caught:
        chain(module)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", tr.UncalibratedWarning)
        chain(module)
        chain(converted()[0])


def test_uncalibrated_fake_quantisation_is_named(engine):
    module = Dense().train()
    module.qconfig = tq.get_default_qat_qconfig(engine)
    module = tq.prepare_qat(module)
    with pytest.warns(tr.UncalibratedWarning, match=r"'quant.activation_post_process', 'fc1.weight_fake_quant'"):
        chain(module)


@pytest.mark.parametrize("value", [0.0, -0.5, torch.nan, torch.inf])
@pytest.mark.parametrize("layer", ["quant", "fc2"])
def test_scales_that_are_not_positive_are_refused_by_name(layer, value, engine):  # noqa: ARG001
    module, _ = converted()
    part = getattr(module, layer)
    part.scale = torch.tensor([value]) if layer == "quant" else value
    with pytest.raises(InvalidNetworkError, match=f"'{layer}[.']"):
        chain(module)


@pytest.mark.parametrize("value", [-1, 256])
def test_zero_points_out_of_range_are_refused_by_name(value, engine):  # noqa: ARG001
    module, _ = converted()
    module.fc2.zero_point = value
    with pytest.raises(InvalidNetworkError, match=rf"'fc2' must lie in \[0, 255\], got {value}"):
        chain(module)


def test_weights_and_biases_that_are_not_finite_are_refused_by_name(engine):  # noqa: ARG001
    module, _ = converted()
    weight, bias = module.fc2.weight(), module.fc2.bias()
    module.fc2.set_weight_bias(weight, torch.full_like(bias, torch.nan))
    with pytest.raises(InvalidNetworkError, match=r"fc2.bias' contains NaN"):
        chain(module)
    module.fc2.set_weight_bias(torch._make_per_tensor_quantized_tensor(weight.int_repr(), 0.0, 0), bias)
    with pytest.raises(InvalidNetworkError, match=r"'fc2'.*weight's scale must be positive and finite, got 0"):
        chain(module)


def test_schemes_without_a_rule_are_refused_by_name(engine):  # noqa: ARG001
    dynamic = tq.quantize_dynamic(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    with pytest.raises(UnsupportedLayerError, match=r"layer 0 \('0', Linear\): dynamic quantisation chooses its scale"):
        chain(dynamic)
    recurrent = tq.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)))
    with pytest.raises(UnsupportedLayerError, match=r"layer 0 \('0', LSTM\): dynamic"):
        chain(recurrent)
    module, _ = converted()
    with pytest.raises(UnsupportedLayerError, match=r"'0', quantised Linear\): its input must be quantised"):
        chain(nn.Sequential(module.fc1))
    with pytest.raises(UnsupportedLayerError, match=r"'1', Linear\): it is given a quantised tensor"):
        chain(nn.Sequential(module.quant, nn.Linear(10, 3)))
    four_bits = torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint4x2)
    with pytest.raises(UnsupportedLayerError, match=r"must be torch.quint8 or torch.qint8, got torch.quint4x2"):
        chain(nn.Sequential(four_bits))
    with pytest.raises(UnsupportedLayerError, match=r"quantized\..*Hardswish\): of the eager int8 modules"):
        chain(nn.Sequential(module.quant, torch.ao.nn.quantized.Hardswish(0.1, 0)))
    module.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayerError, match=r"'fc1', Linear\): a forward hook"):
        chain(module)


def test_activations_with_a_scale_per_channel_are_refused_by_name(engine):  # noqa: ARG001
    per_channel = tq.FakeQuantize(
        tq.MovingAveragePerChannelMinMaxObserver,
        -128,
        127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_affine,
        ch_axis=1,
    )
    per_channel(samples((5,)))
    with pytest.raises(UnsupportedLayerError, match=r"'0', Quantizer\): activations must have one scale .* got 5"):
        chain(nn.Sequential(per_channel))
    floating = tq.FakeQuantize(
        tq.PerChannelMinMaxObserver, 0, 255, dtype=torch.quint8, qscheme=torch.per_channel_affine_float_qparams
    )
    with pytest.raises(UnsupportedLayerError, match="floating-point zero points"):
        chain(nn.Sequential(floating))


def test_the_command_line_compares_a_state_dict_with_the_exported_original(engine, tmp_path):
    from typer.testing import CliRunner

    from torchreach.app.cli import app

    original = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    wrapped = tq.QuantWrapper(copy.deepcopy(original))
    wrapped.qconfig = tq.get_default_qconfig(engine)
    ready = tq.prepare(wrapped)
    ready(samples((4,)))
    state = {key.removeprefix("module."): value for key, value in tq.convert(ready).state_dict().items()}
    torch.save(state, tmp_path / "small.pth")
    program = torch.export.export(original, (samples((4,), 2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "original.pt2")
    box = "0,0.02;0.1,0.12;-0.3,-0.29;0,0"
    ran = CliRunner().invoke(
        app, ["compare", str(tmp_path / "original.pt2"), str(tmp_path / "small.pth"), "--box", box]
    )
    assert ran.exit_code == 0, ran.output
    assert "certified: |y1 - y2| <=" in ran.output


@every_engine
@pytest.mark.parametrize("zero_point", [0, 128, 253])
def test_kernels_round_within_a_stated_error_of_the_threshold(zero_point, engine):  # noqa: ARG001
    """u (9 |z| + 20 |b|) for the float32 operations, and u 256 scale: onednn adds the zero point before it rounds."""
    unit = 2.0**-24
    generator = torch.Generator().manual_seed(0)
    for trial in range(400):
        share = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        code, step = int(share[0] * 100) + 1, trial % 3 + 0.5
        x_scale, w_scale = (float(np.float32(s)) for s in (share[1] * 0.1 + 0.001, share[2] * 0.01 + 0.0001))
        bias = float(np.float32(7 * code * x_scale * w_scale * (trial % 2)))
        z = 7 * code * x_scale * w_scale + bias
        scale = float(np.float32(z / (step * (1 + (share[3] - 0.5) * 600 * unit))))  # z / scale is about k + 1/2
        layer = torch.ao.nn.quantized.Linear(1, 1)
        weight = torch._make_per_tensor_quantized_tensor(torch.tensor([[7]], dtype=torch.int8), w_scale, 0)
        layer.set_weight_bias(weight, torch.tensor([bias]))
        layer.scale, layer.zero_point = scale, zero_point
        x = torch._make_per_tensor_quantized_tensor(torch.tensor([[code]], dtype=torch.uint8), x_scale, 0)
        got = int(layer(x).int_repr())
        slack = unit * (9 * z + 20 * abs(bias) + 256 * scale)
        quantizer = Quantizer(scale, zero_point, 0, 255)
        low, high = quantizer.code_range(exact(z - slack), exact(z + slack))
        assert low <= got <= high
        assert high - low <= 1
