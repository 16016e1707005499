"""What torch and its tools write, end to end: certified against the original, and executed at random inputs."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.ao.quantization as tq
from torch import nn

import torchreach as tr
from tests.test_quantized_graphs import convert, dense, pt2e, samples
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.results import Status

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = 1000
DYNAMIC = ({0: torch.export.Dim("batch", min=2, max=10_000)},)


class Residual(nn.Module):
    """Convolutions with batch norm, a skip and a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.b1(self.c1(x)))
        return self.fc(nn.functional.max_pool2d(torch.relu(self.c2(h) + h), 2).flatten(1))


def residual() -> nn.Module:
    torch.manual_seed(0)
    network = Residual()
    network.b1.running_mean.uniform_(-0.2, 0.2)
    network.b1.running_var.uniform_(0.5, 1.5)
    return network.eval()


class InHalf(nn.Module):
    """float32 at both ends."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.half()).float()


NETWORKS = {"dense": (dense, (10,)), "residual": (residual, (1, 4, 4))}


def assert_holds(original, compressed, shape, execute, moved=1, single=True, **options) -> tr.Discrepancy:
    """Certifies the pair on a box of `moved` inputs, around which nothing that is executed leaves the interval.

    single: the certificate speaks of real numbers, so that what float32 rounds comes on top.
    """
    center = samples((1, *shape), 1)[0].flatten()
    low, high = center.clone(), center.clone()
    low[:moved] -= 0.1
    high[:moved] += 0.1
    stars = tr.StarBatch.from_box(low, high).reshape(shape)
    found = tr.discrepancy(original, compressed, stars, budget=tr.Budget(seconds=10), **options)
    generator = torch.Generator().manual_seed(1)
    x = (low + (high - low) * torch.rand(COUNT, len(low), generator=generator)).reshape(COUNT, *shape)
    with torch.no_grad():
        difference = (original(x).double() - execute(x).double()).numpy()
    slack = 1e-6 if single else 0.0
    assert (difference >= found.range_lower.numpy() - slack).all()
    assert (difference <= found.range_upper.numpy() + slack).all()
    return found


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weight_only_copies_of_torchao_hold_as_modules_and_as_files_of_a_fixed_batch(scheme, tmp_path):
    tools = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    small = copy.deepcopy(original)
    if scheme == "int8":
        tools.quantize_(small, tools.Int8WeightOnlyConfig())
    else:
        four = tools.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=tools.PerAxis(0))
        tools.quantize_(small, four)
    torch.export.save(torch.export.export(small, (torch.rand(4, 32),)), tmp_path / "small.pt2")
    for network in (small, tmp_path / "small.pt2"):
        assert assert_holds(original, network, (32,), small).status == (Status.EXACT,)


def test_static_pt2e_copies_hold_as_modules_programs_and_files(tmp_path):
    original, module = dense().eval(), convert(pt2e(dense(), (10,), "x86"))
    program = torch.export.export(module, (samples((10,), 4),), dynamic_shapes=DYNAMIC)
    torch.export.save(program, tmp_path / "small.pt2")
    for network in (module, program, tmp_path / "small.pt2"):
        found = assert_holds(original, network, (10,), module)
        assert found.semantics.value == "deployed int8"


def test_a_pt2e_copy_with_a_skip_is_refused_at_its_sum_and_told_what_to_do():
    module = convert(pt2e(residual(), (1, 4, 4), "x86"))
    with pytest.raises(UnsupportedLayerError, match=r"'add', add\): .*must be chains.*torchreach.quantize_weights"):
        tr.load(module, input_shape=(1, 4, 4))


@pytest.mark.parametrize("name", NETWORKS)
def test_traced_graph_modules_hold(name):
    make, shape = NETWORKS[name]
    small = tr.quantize_weights(make().eval(), 4)
    traced = torch.fx.symbolic_trace(small)
    assert assert_holds(make().eval(), traced, shape, traced).status == (Status.EXACT,)


def onnxruntime_of(path):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (head,) = session.get_inputs()
    kind = np.float16 if "float16" in head.type else np.float32

    def execute(x):
        return torch.cat(
            [torch.from_numpy(session.run(None, {head.name: p.numpy().astype(kind)})[0]) for p in x.split(1)]
        )

    return execute


def export(network, shape, path, *, dynamo, dtype=torch.float32):
    if dynamo:
        pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    torch.onnx.export(network, (torch.rand(1, *shape, dtype=dtype),), path, dynamo=dynamo, verbose=False)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_both_onnx_exporters_of_torch_are_read(name, dynamo, tmp_path):
    make, shape = NETWORKS[name]
    original = make().eval()
    export(original, shape, tmp_path / "net.onnx", dynamo=dynamo)
    found = assert_holds(original, tmp_path / "net.onnx", shape, onnxruntime_of(tmp_path / "net.onnx"))
    assert float(found.max_upper) < 1e-6


@pytest.mark.parametrize("ends", ["half", "float, by torch", "float, by a converter"])
def test_float16_onnx_files_hold_as_they_are_executed(ends, tmp_path):
    original, path = dense().eval(), tmp_path / "half.onnx"
    if ends == "half":
        export(dense().eval().half(), (10,), path, dynamo=False, dtype=torch.float16)
    elif ends == "float, by torch":
        export(InHalf(dense().eval().half()), (10,), path, dynamo=False)
    else:
        tools = pytest.importorskip("onnxruntime.transformers.float16")
        export(original, (10,), path, dynamo=False)
        model = tools.convert_float_to_float16(onnx.load(path), keep_io_types=True)
        assert [node.op_type for node in model.graph.node][-1] == "Cast"  # the input's cast stands last in the file
        onnx.save(model, path)
    found = assert_holds(original, path, (10,), onnxruntime_of(path), single=False)
    assert found.semantics.value == "as executed in float16"
    assert float(found.max_upper) < 0.01


def test_a_half_network_with_float32_ends_holds_as_a_module_and_as_a_file(tmp_path):
    original, small = dense().eval(), InHalf(dense().eval().half())
    torch.export.save(torch.export.export(small, (torch.rand(3, 10),)), tmp_path / "half.pt2")
    for network in (small, tmp_path / "half.pt2"):
        found = assert_holds(original, network, (10,), small, single=False)
        assert found.semantics.value == "as executed in float16"


def test_inputs_are_rounded_only_where_the_whole_network_is_in_that_precision():
    class Twice(InHalf):
        def forward(self, x):
            return super().forward(x) + (x - x.half().float()).sum(1, keepdim=True)

    with pytest.raises(UnsupportedLayerError, match="half.*rounds"):
        tr.load(Twice(dense().half()), input_shape=(10,))
    for network in (InHalf(dense()), nn.Sequential(InHalf(dense().half()), nn.Linear(4, 2))):
        with pytest.raises(
            UnsupportedLayerError, match="half.*conversion to torch.float16 rounds, and not all weights"
        ):
            tr.load(network, input_shape=(10,))


def test_int8_state_dicts_are_certified_by_a_torch_without_their_kernels(monkeypatch):
    def missing(*_):
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack NoQEngine")

    original = dense().eval()
    wrapped = tq.QuantWrapper(dense()).eval()
    wrapped.qconfig = tq.default_qconfig
    prepared = tq.prepare(wrapped)
    prepared(samples((10,), 300, seed=2))
    module = tq.convert(prepared)
    state, x = module.state_dict(), samples((10,), 200)
    with torch.no_grad():
        want = module(x)
    expected = assert_holds(original, tr.load_int8(state, original), (10,), module, kernels="exact")
    monkeypatch.setattr(torch.ops.quantized, "linear_prepack", missing)
    with pytest.warns(
        UserWarning, match=r"this torch cannot run the int8 layers \(Didn't find engine.*--kernels exact"
    ):
        described = tr.load_int8(state, original)
    with torch.no_grad(), warnings.catch_warnings():
        assert float((described(x.double()) - want).abs().max()) <= 1e-5
    found = assert_holds(original, described, (10,), module, kernels="exact")
    assert float(found.max_upper) == pytest.approx(float(expected.max_upper), rel=1e-6)
