"""TFLite files are read as LiteRT executes them: int8 networks code for code, float ones up to rounding."""

from __future__ import annotations

import math
import re
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import torchreach as tr
from tests.data import require_data
from tests.tflite_models import Model, executed, schema
from torchreach.core.errors import FileFormatError, UncoveredKernelsWarning, UnsupportedLayerError
from torchreach.core.results import Status
from torchreach.graph.deployed import DeployedNetwork

INT8 = ("hello_world_int8", "ad01_int8", "kws_ref_model", "pretrainedResnet_quant")
FLOAT = {"hello_world_float": 3.0, "ad01_fp32": 30.0, "pretrainedResnet": 100.0}
SAME, VALID = 0, 1
NONE, RELU, RELU6 = 0, 1, 3


def file(name: str) -> Path:
    kept = Path(__file__).resolve().parents[1] / "docs" / "hello_world" / f"{name}.tflite"
    return kept if kept.exists() else require_data("mlperf_tiny", f"{name}.tflite")


def codes(rng: np.random.Generator, count: int, shape: tuple[int, ...], low: int = -128) -> np.ndarray:
    return rng.integers(low, low + 256, (count, *shape)).astype(np.int8 if low else np.uint8)


def check_codes(path: Path, x: np.ndarray) -> DeployedNetwork:
    """The network in `path`, which must compute LiteRT's codes at x."""
    network = tr.load(path)
    assert isinstance(network, DeployedNetwork)
    want = executed(path.read_bytes(), x)
    for part, wanted in zip(np.array_split(x, -(-len(x) // 250)), np.array_split(want, -(-len(x) // 250)), strict=True):
        assert np.array_equal(network.codes(torch.from_numpy(part.astype(np.int64))).numpy(), wanted)
    return network


@pytest.mark.parametrize("name", INT8)
def test_int8_networks_are_executed_code_for_code(name):
    network = tr.load(file(name))
    check_codes(file(name), codes(np.random.default_rng(0), 20, network.shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_int8_networks_are_executed_code_for_code_at_many_inputs(name):
    network = tr.load(file(name))
    check_codes(file(name), codes(np.random.default_rng(1), 10_000, network.shape))


def windows() -> np.ndarray:
    """Real inputs of ad01: windows of 5 frames of 128 numbers, [196, 640]."""
    frames = np.fromfile(require_data("mlperf_tiny", "ad01_normal_id_01.bin"), dtype="<f4").reshape(-1, 128)
    return np.stack([frames[i : i + 5].ravel() for i in range(len(frames) - 4)])


def test_real_inputs_are_quantised_and_executed_code_for_code():
    network = tr.load(file("ad01_int8"))
    x = torch.from_numpy(windows())
    q = network.quantise(x)
    check_codes(file("ad01_int8"), q.numpy().astype(np.int8))
    assert torch.equal(network(x), network.grid.value(network.codes(q)).float())
    assert (network.entry.value(q) - x).abs().max() <= network.entry.scale / 2 + 1e-6


@pytest.mark.parametrize("name", FLOAT)
def test_float_networks_agree_up_to_rounding(name):
    network, rng = tr.load(file(name)), np.random.default_rng(0)
    from torchreach.read.load import input_shape

    shape = input_shape(file(name))
    x = (rng.standard_normal((20, *shape)) * FLOAT[name]).astype(np.float32)
    want = executed(file(name).read_bytes(), x, reference=False)
    with torch.no_grad():
        found = network(torch.from_numpy(x)).numpy()
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


def test_int8_weights_with_float_activations_are_read_as_the_numbers_they_stand_for():
    path = file("kws_ref_model_float32")
    with pytest.warns(UncoveredKernelsWarning, match="dynamic range"):
        network = tr.load(path)
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)  # the same with float weights
    for tensor in model.subgraphs[0].tensors:
        if tensor.type == schema.TensorType.INT8:
            buffer = model.buffers[tensor.buffer]
            real = buffer.data.view(np.int8).astype(np.float32) * tensor.quantization.scale[0]
            buffer.data = np.frombuffer(real.astype(np.float32).tobytes(), dtype=np.uint8)
            tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    x = (np.random.default_rng(0).standard_normal((20, 49, 10, 1)) * 50).astype(np.float32)
    want = executed(bytes(builder.Output()), x, reference=False)
    with torch.no_grad():
        assert np.abs(network(torch.from_numpy(x)).numpy() - want).max() <= 1e-5


def test_hello_world_is_certified_over_its_whole_domain_exactly():
    paths = file("hello_world_float"), file("hello_world_int8")
    stars = tr.StarBatch.from_box(torch.zeros(1), torch.full((1,), 2 * math.pi))
    found = tr.discrepancy(*map(str, paths), stars)
    assert found.status == (Status.EXACT,)
    assert float(found.lower) == pytest.approx(0.11527, abs=1e-5)
    assert float(found.upper) == pytest.approx(0.11527, abs=2e-5)
    assert "fixed-point multipliers" in repr(found)
    # Every code by LiteRT, the original on a fine grid.
    x = np.linspace(0, 2 * math.pi, 200_001, dtype=np.float32)[:, None]
    float_net, int8_net = map(tr.load, paths)
    every = np.arange(-128, 128).astype(np.int8)[:, None]
    table = int8_net.grid.value(torch.from_numpy(executed(paths[1].read_bytes(), every).astype(np.int64)))
    y2 = table[int8_net.quantise(torch.from_numpy(x)).flatten() + 128]
    with torch.no_grad():
        y1 = float_net(torch.from_numpy(x)).double()
    largest = float((y1 - y2).abs().max())
    assert largest <= float(found.upper)
    assert largest >= float(found.lower) - 1e-5


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_ad01_is_certified_as_it_is_executed(seconds):
    float_net, int8_net = tr.load(file("ad01_fp32")), tr.load(file("ad01_int8"))
    x = torch.from_numpy(windows()[:1])
    stars = tr.StarBatch.from_box(x[0] - 0.01, x[0] + 0.01)
    found = tr.discrepancy(float_net, int8_net, stars, budget=tr.Budget(seconds=seconds))
    near = x + torch.empty(500, 640).uniform_(-0.01, 0.01, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = (float_net(near) - int8_net(near)).abs().amax(0)
    assert bool((off <= found.upper[0]).all())
    assert bool((found.lower <= found.upper).all())


def test_a_softmax_of_codes_says_what_to_compare_instead():
    network = tr.load(file("kws_ref_model"))
    stars = tr.StarBatch.from_box(torch.zeros(1, *network.shape), torch.ones(1, *network.shape))
    with pytest.raises(UnsupportedLayerError, match=r"not bounded.*scores.*can be read and executed"):
        tr.discrepancy(network, network, stars)


def test_integers_stay_what_they_are_whatever_dtype_is_asked_for():
    network = tr.load(file("ad01_int8"))
    x = torch.from_numpy(codes(np.random.default_rng(0), 3, network.shape).astype(np.int64))
    assert torch.equal(tr.load(file("ad01_int8"), dtype=torch.float32).half().codes(x), network.codes(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", INT8)
def test_codes_are_the_same_on_cuda(name):
    network = tr.load(file(name))
    x = torch.from_numpy(codes(np.random.default_rng(0), 20, network.shape).astype(np.int64))
    assert torch.equal(tr.load(file(name)).cuda().codes(x.cuda()).cpu(), network.codes(x))


def test_scores_are_the_network_without_its_softmax():
    network = tr.load(file("kws_ref_model"))
    x = torch.from_numpy(codes(np.random.default_rng(0), 3, network.shape).astype(np.int64))
    scores = network.scores()
    assert torch.equal(network.operations[-1](scores.codes(x)), network.codes(x))


class Random:
    """One random quantised layer after the other, each on a random grid, at [B, H, W, C]."""

    def __init__(self, seed: int) -> None:
        self.rng, self.model = np.random.default_rng(seed), Model()
        self.shape = (1, *(int(n) for n in self.rng.integers(3, 9, 2)), int(self.rng.integers(1, 5)))
        self.head = self.at = self.value(self.shape)

    def value(self, shape: tuple[int, ...], like: int | None = None) -> int:
        if like is not None:
            grid = self.model.graph.tensors[like].quantization
            return self.model.tensor(shape, scale=grid.scale[0], zero=int(grid.zeroPoint[0]))
        return self.model.tensor(
            shape, scale=float(self.rng.uniform(0.01, 0.1)), zero=int(self.rng.integers(-128, 128))
        )

    def scale(self, at: int) -> float:
        return float(self.model.graph.tensors[at].quantization.scale[0])

    def weights(self, shape: tuple[int, ...], axis: int, per_channel: bool) -> tuple[int, int]:
        count = shape[axis]
        scales = self.rng.uniform(0.002, 0.02, count if per_channel else 1)
        data = self.rng.integers(-127, 128, shape)
        weight = self.model.tensor(shape, data=data, scale=scales, axis=axis)
        bias = self.model.tensor(
            (count,), "INT32", data=self.rng.integers(-500, 500, count), scale=scales * self.scale(self.at)
        )
        return weight, bias

    def window(self) -> tuple[int, int, int, int, int]:
        """kernel, stride, padding, and the places that come out."""
        kernel, stride = int(self.rng.integers(1, 4)), int(self.rng.integers(1, 3))
        padding = int(self.rng.integers(0, 2))
        sizes = [-(-n // stride) if padding == SAME else -(-(n - kernel + 1) // stride) for n in self.shape[1:3]]
        return kernel, stride, padding, *sizes

    def convolution(self) -> None:
        kernel, stride, padding, height, width = self.window()
        depthwise = bool(self.rng.integers(0, 2))
        options = {"padding": padding, "strideW": stride, "strideH": stride}
        options |= {"dilationWFactor": 1, "dilationHFactor": 1, "fusedActivationFunction": self.activation()}
        channels = self.shape[3]
        if depthwise:
            times = int(self.rng.integers(1, 3))
            weight, bias = self.weights((1, kernel, kernel, channels * times), 3, True)
            options["depthMultiplier"], out = times, channels * times
        else:
            out = int(self.rng.integers(1, 6))
            weight, bias = self.weights((out, kernel, kernel, channels), 0, bool(self.rng.integers(0, 2)))
        self.put("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [self.at, weight, bias], (1, height, width, out),
                 "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions", options)  # fmt: skip

    def activation(self) -> int:
        return int(self.rng.choice([NONE, RELU, RELU6]))

    def put(self, kind: str, inputs: list[int], shape: tuple[int, ...], options: str = "", values: dict | None = None,
            like: int | None = None) -> None:  # fmt: skip
        self.at = self.model.add(kind, inputs, self.value(shape, like), options, **(values or {}))
        self.shape = shape

    def pool(self, kind: str) -> None:
        kernel, stride, padding, height, width = self.window()
        values = {
            "padding": padding,
            "strideW": stride,
            "strideH": stride,
            "filterWidth": kernel,
            "filterHeight": kernel,
        }
        self.put(kind, [self.at], (1, height, width, self.shape[3]), "Pool2DOptions", values, like=self.at)

    def pad(self) -> None:
        sizes = np.array([[0, 0], *self.rng.integers(0, 3, (2, 2)), [0, 0]])
        shape = tuple(int(n + s.sum()) for n, s in zip(self.shape, sizes, strict=True))
        self.put("PAD", [self.at, self.model.tensor((4, 2), "INT32", data=sizes)], shape, "PadOptions", like=self.at)

    def sum(self) -> None:
        kind = str(self.rng.choice(["ADD", "SUB", "MUL"]))
        name = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions"}[kind]
        if self.rng.integers(0, 2):
            shape = self.shape[-1:] if self.rng.integers(0, 2) else self.shape
            other = self.model.tensor(
                shape, data=self.rng.integers(-128, 128, shape), scale=float(self.rng.uniform(0.01, 0.1)), zero=3
            )
        else:  # the value itself on another grid
            other = self.model.add("QUANTIZE", [self.at], self.value(self.shape), "QuantizeOptions")
        inputs = [self.at, other] if self.rng.integers(0, 2) else [other, self.at]
        self.put(kind, inputs, self.shape, name, {"fusedActivationFunction": self.activation()})

    def join(self) -> None:
        padded = (*self.shape[:3], 2 * self.shape[3])
        self.put("CONCATENATION", [self.at, self.at], padded, "ConcatenationOptions", {"axis": 3}, like=self.at)

    def relu(self) -> None:
        self.put(str(self.rng.choice(["RELU", "RELU6"])), [self.at], self.shape)

    def end(self, *, softmax: bool = True) -> None:
        """MEAN or RESHAPE, then a fully connected layer, and perhaps softmax."""
        channels = self.shape[3]
        if self.rng.integers(0, 2):
            axes = self.model.tensor((2,), "INT32", data=[1, 2])
            self.put("MEAN", [self.at, axes], (1, channels), "ReducerOptions", {"keepDims": False})
        else:
            flat = int(np.prod(self.shape))
            shape = self.model.tensor((2,), "INT32", data=[1, flat])
            self.put("RESHAPE", [self.at, shape], (1, flat), "ReshapeOptions", like=self.at)
        weight, bias = self.weights((5, self.shape[1]), 0, bool(self.rng.integers(0, 2)))
        self.put(
            "FULLY_CONNECTED",
            [self.at, weight, bias],
            (1, 5),
            "FullyConnectedOptions",
            {"fusedActivationFunction": self.activation()},
        )
        if softmax and self.rng.integers(0, 2):
            out = self.model.tensor((1, 5), scale=1 / 256, zero=-128)
            self.at = self.model.add("SOFTMAX", [self.at], out, "SoftmaxOptions", beta=1.0)

    def build(self) -> bytes:
        layers = [self.convolution, lambda: self.pool("AVERAGE_POOL_2D"), lambda: self.pool("MAX_POOL_2D"), self.pad]
        layers += [self.sum, self.join, self.relu, self.convolution]
        for _ in range(4):
            if min(self.shape[1:3]) >= 3:
                layers[int(self.rng.integers(len(layers)))]()
        self.end()
        return self.model.packed(self.head, self.at)


def check_random(seed: int, folder: Path, count: int) -> None:
    made = Random(seed)
    path = folder / "random.tflite"
    path.write_bytes(made.build())
    shape = tuple(int(n) for n in made.model.graph.tensors[made.head].shape[1:])
    check_codes(path, codes(made.rng, count, shape))


@pytest.mark.parametrize("seed", range(20))
def test_random_quantised_graphs_are_executed_code_for_code(seed, tmp_path):
    check_random(seed, tmp_path, 20)


@pytest.mark.slow
def test_many_random_quantised_graphs_are_executed_code_for_code(tmp_path):
    for seed in range(20, 400):
        check_random(seed, tmp_path, 200)


class Chain(Random):
    """Layers one after the other, without ReLU6."""

    def activation(self) -> int:
        return int(self.rng.choice([NONE, RELU]))

    def build(self) -> bytes:
        for layer in (self.convolution, lambda: self.pool("AVERAGE_POOL_2D"), self.pad, self.convolution):
            if min(self.shape[1:3]) >= 3:
                layer()
        self.put("QUANTIZE", [self.at], self.shape, "QuantizeOptions")
        self.end(softmax=False)
        return self.model.packed(self.head, self.at)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("inputs", [1, 3, 400])
def test_random_chains_stay_within_what_is_certified(seed, inputs, tmp_path):
    path = tmp_path / "chain.tflite"
    path.write_bytes(Chain(seed).build())
    network = tr.load(path)
    assert isinstance(network, DeployedNetwork)
    generator = torch.Generator().manual_seed(seed)
    centre = network.entry.value(torch.randint(-128, 128, network.shape, generator=generator)).float()
    radius = torch.zeros(centre.numel())
    radius[torch.randperm(centre.numel(), generator=generator)[:inputs]] = 1.5 * float(network.entry.scale)
    radius = radius.reshape(centre.shape)
    twin = tr.weight_only(network, network.shape).float()
    stars = tr.StarBatch.from_box((centre - radius)[None], (centre + radius)[None])
    found = tr.discrepancy(twin, network, stars, budget=tr.Budget(seconds=None if inputs == 1 else 2))
    x = centre + radius * torch.empty(3000, *network.shape).uniform_(-1, 1, generator=generator)
    with torch.no_grad():
        off = (twin.double()(x.double()) - network(x)).abs().amax(0)
    assert bool((off <= found.upper[0] * (1 + 1e-6) + 1e-6).all())
    assert bool((found.lower <= found.upper).all())
    if inputs == 1:
        assert bool((found.upper - found.lower).max() <= 1e-3 * found.upper.max() + 1e-6)


def with_ends(head: str, scale: float) -> tuple[bytes, Model]:
    """Quantise, one layer, dequantise; or uint8 codes at both ends."""
    model = Model()
    grid = {"scale": scale, "zero": 5}
    first = model.tensor((1, 4), head, **({} if head == "FLOAT32" else {"scale": scale, "zero": 133}))
    inner = model.add("QUANTIZE", [first], model.tensor((1, 4), **grid), "QuantizeOptions")
    rng = np.random.default_rng(0)
    weight = model.tensor((3, 4), data=rng.integers(-127, 128, (3, 4)), scale=0.01)
    bias = model.tensor((3,), "INT32", data=[10, -20, 30], scale=0.01 * scale)
    middle = model.tensor((1, 3), scale=0.05, zero=-7)
    model.add("FULLY_CONNECTED", [inner, weight, bias], middle, "FullyConnectedOptions")
    last = model.tensor((1, 3), head, **({} if head == "FLOAT32" else {"scale": 0.05, "zero": 121}))
    if head == "FLOAT32":
        model.add("DEQUANTIZE", [middle], last, "DequantizeOptions")
    else:
        model.add("QUANTIZE", [middle], last, "QuantizeOptions")
    return model.packed(first, last), model


def test_float_ends_are_rounded_as_litert_rounds_them(tmp_path):
    content, _ = with_ends("FLOAT32", 0.03125)  # a power of two, so that ties are met
    (tmp_path / "ends.tflite").write_bytes(content)
    network = tr.load(tmp_path / "ends.tflite")
    x = (np.arange(-4096, 4096, dtype=np.float32).reshape(-1, 4) / 64 / 16).astype(np.float32)
    assert np.array_equal(network(torch.from_numpy(x)).numpy(), executed(content, x))
    stars = tr.StarBatch.from_box(-torch.ones(4), torch.ones(4))
    found = tr.discrepancy(network, network, stars)
    assert float(found.upper.max()) == 0


def test_unsigned_ends_are_rescaled_as_litert_does(tmp_path):
    content, _ = with_ends("UINT8", 0.03)
    (tmp_path / "ends.tflite").write_bytes(content)
    check_codes(tmp_path / "ends.tflite", codes(np.random.default_rng(0), 200, (4,), 0))


def test_operators_without_a_rule_are_refused_by_name_place_and_file(tmp_path):
    model = Model()
    head = model.tensor((1, 4), scale=0.1)
    out = model.add("LOGISTIC", [head], model.tensor((1, 4), scale=1 / 256, zero=-128))
    path = tmp_path / "odd.tflite"
    path.write_bytes(model.packed(head, out))
    with pytest.raises(UnsupportedLayerError, match=r"odd.tflite: operator 0 \('t1', LOGISTIC\)"):
        tr.load(path)
    model = Model()
    head = model.tensor((1, 4), "FLOAT32")
    out = model.add("CUSTOM", [head], model.tensor((1, 4), "FLOAT32"))
    model.model.operatorCodes[0].customCode = "mine"
    path.write_bytes(model.packed(head, out))
    with pytest.raises(UnsupportedLayerError, match=r"odd.tflite: operator 0 \('t1', CUSTOM mine\)"):
        tr.load(path)


@pytest.mark.parametrize("name", ["hello_world_int8", "hello_world_float"])
def test_damaged_files_end_in_one_line(name, tmp_path):
    whole, rng = file(name).read_bytes(), np.random.default_rng(0)
    path = tmp_path / "damaged.tflite"
    for k in range(200):
        content = bytearray(whole[: int(rng.integers(0, len(whole)))] if k % 4 == 0 else whole)
        for _ in range(int(rng.integers(1, 8)) if k % 4 and content else 0):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(content)
        with suppress(tr.TorchreachError):  # anything else fails; a change of a weight may well go unseen
            tr.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"^[^\n]*damaged.tflite is not a readable TFLite file: [^\n]*$"):
        tr.load(path)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(tr.TorchreachError, match=re.escape("pip install 'torchreach[tflite]'")):
        tr.load(file("hello_world_int8"))
