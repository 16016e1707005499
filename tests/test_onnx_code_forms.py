"""Quantised ONNX files of every opset and in rarer forms: executed code for code, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import torchreach as tr
from torchreach.core.errors import UncoveredKernelsWarning, UnsupportedLayerError
from torchreach.graph.deployed import Rescaled

pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")

from tests.onnx_models import FloatNetwork, check, executed, quantised

OPSETS = (10, 11, 13, 15, 18, 19, 20, 21, 22, 23)
FORMS = [
    (kind, activation, weight)
    for kind in ("QDQ", "QOperator")
    for activation, weight in (("QUInt8", "QInt8"), ("QUInt8", "QUInt8"), ("QInt8", "QInt8"))
]
SHAPE = (3, 8, 8)


def joined(opset: int, seed: int) -> FloatNetwork:
    """Every operator whose arguments moved between opsets, and values side by side on grids of their own."""
    net = FloatNetwork(opset, seed)
    first = net.clip(net.convolution(net.pad("x", [0, 0, 1, 0, 0, 0, 1, 2]), 3, 4, 0), 0, 1.5)
    first = net.add("MaxPool", [first], kernel_shape=[2, 2], strides=[1, 1])
    second = net.add("Relu", [net.convolution(net.pad(first, [0, 0, 1, 1, 0, 0, 1, 1]), 4, 3, 0)])
    at = net.add("Concat", [first, second], axis=1)
    at = net.add("AveragePool", [at], kernel_shape=[2, 3], strides=[2, 2])
    at = net.add("GlobalAveragePool", [net.convolution(at, 7, 5)])
    at = net.add("Gemm", [net.along("Squeeze", at, [2, 3]), net.weights(4, 5), net.weights(4)], transB=1)
    net.add("Flatten", [net.along("Unsqueeze", at, [2, -1])])
    return net


def plain(opset: int, seed: int) -> FloatNetwork:
    """One value after the other, so that signed codes have one reader each."""
    net = FloatNetwork(opset, seed)
    at = net.clip(net.convolution(net.add("Transpose", ["x"], perm=[0, 1, 3, 2]), 3, 4), 0, 1)
    at = net.add("AveragePool", [net.pad(at, [0, 0, 0, 1, 0, 0, 2, 1])], kernel_shape=[2, 2], strides=[2, 2])
    at = net.add("MaxPool", [at], kernel_shape=[3, 2], strides=[1, 2])
    at = net.add("Reshape", [at, net.constant(np.int64([0, -1]))])
    net.add("Gemm", [at, net.weights(24, 5), net.weights(5)])
    return net


def made(folder: Path, net: FloatNetwork, *form, **options) -> Path:
    rows = np.random.default_rng(1).normal(0, 1, (4, *SHAPE)).astype(np.float32)
    return quantised(net.save(folder / "float.onnx", SHAPE), folder / "codes.onnx", rows, *form, **options)


def inputs(count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, (count, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
def test_every_opset_is_executed_code_for_code(opset, kind, tmp_path):
    check(made(tmp_path, joined(opset, opset), kind, "QUInt8", "QInt8", False), inputs(50))


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("kind", "activation", "weight"), FORMS)
def test_every_opset_and_form_is_executed_code_for_code_at_many_inputs(opset, kind, activation, weight, tmp_path):
    several = kind != "QDQ" or opset >= 13  # scales for channels, which DequantizeLinear has since then
    for seed in range(3):
        nets = [plain(opset, seed)] + [joined(opset, seed)] * ((kind, activation) != ("QDQ", "QInt8"))
        for net in nets:
            check(made(tmp_path, net, kind, activation, weight, several and seed == 1), inputs(1000))


@pytest.mark.parametrize(("kind", "activation", "weight"), FORMS)
def test_means_of_windows_round_with_the_zero_point_added(kind, activation, weight, tmp_path):
    # Means of four codes of one grid are ties every fourth time: odd and even zero points round them apart.
    for seed in range(4):
        check(made(tmp_path, plain(17, seed), kind, activation, weight, False), inputs(50))


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """The file cut off, with bytes replaced, or with one thing in it that is wrong."""
    kind = int(rng.integers(6))
    if kind == 0:
        return whole[: int(rng.integers(1, len(whole)))]
    if kind == 1:
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 5):
            content[int(place)] = int(rng.integers(256))
        return bytes(content)
    model = onnx.load_from_string(whole)
    graph = model.graph
    node = graph.node[int(rng.integers(len(graph.node)))]
    stored = graph.initializer[int(rng.integers(len(graph.initializer)))]
    if kind == 2:
        graph.node.remove(node)
    elif kind == 3:  # another number of a scale, zero point, weight or shape
        value = numpy_helper.to_array(stored)
        values = (np.nan, np.inf, 0.0, -1.0, 1e38) if value.dtype.kind == "f" else (0, 1, -1, -128, 127, 2**40)
        wrong = np.asarray(values[int(rng.integers(len(values)))]).astype(value.dtype)
        stored.CopyFrom(numpy_helper.from_array(np.full_like(value, wrong), stored.name))
    elif kind == 4:
        dims = (stored.dims, [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim])[int(rng.integers(2))]
        sizes = [int(2 ** rng.integers(20, 62)) if rng.integers(2) else int(n) for n in dims]
        if dims is stored.dims:
            stored.dims[:] = sizes
        else:
            for d, n in zip(graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
                d.dim_value = n
    elif node.attribute and node.attribute[0].ints:
        node.attribute[0].ints[0] = int(rng.choice([-1, 0, 7, 2**31, 2**62]))
    else:
        node.input[int(rng.integers(len(node.input)))] = graph.node[-1].output[0]
    return model.SerializeToString()


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
def test_damaged_files_end_in_a_network_or_in_one_line(kind, tmp_path):
    whole = made(tmp_path, joined(17, 0), kind, "QUInt8", "QInt8", False).read_bytes()
    path, said = tmp_path / "damaged.onnx", []
    for seed in range(100):
        path.write_bytes(mutated(whole, np.random.default_rng(seed)))
        try:
            assert isinstance(tr.load(path), torch.nn.Module)
        except tr.TorchreachError as error:
            said.append(str(error))
    assert 0 < len(said) < 100
    assert all("\n" not in line and str(path) in line for line in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes.onnx", "damaged.onnx", "float.onnx"]


@pytest.mark.parametrize(("kind", "activation", "weight"), [form for form in FORMS if form[:2] != ("QDQ", "QInt8")])
def test_sums_with_codes_of_the_file_are_executed_code_for_code(kind, activation, weight, tmp_path):
    net = FloatNetwork(17, 3)
    at = net.convolution("x", 3, 4)
    at = net.add("Relu", [net.add("Add", [net.constant(np.float32([[[0.3]], [[-1.2]], [[0.7]], [[2]]])), at])])
    at = net.add("MatMul", [net.add("Flatten", [at]), net.weights(256, 5)])
    net.add("Add", [at, net.weights(5)])
    check(made(tmp_path, net, kind, activation, weight, False), inputs(60))


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
def test_codes_on_another_grid_are_bounded_as_executed(kind, tmp_path):
    # Zero points in the middle keep the Clip, which reads numbers and is quantised on the next grid.
    net = FloatNetwork(17, 5)
    at = net.clip(net.add("Flatten", [net.convolution("x", 3, 2)]), -0.1, 0.8)
    net.add("Gemm", [at, net.weights(128, 3), net.weights(3)])
    path = made(tmp_path, net, kind, "QInt8", "QInt8", False, extra_options={"ActivationSymmetric": True})
    network, x = check(path, inputs(50)), inputs(1)
    assert any(isinstance(operation, Rescaled) for operation in network.operations)
    stars = tr.StarBatch.from_box(torch.from_numpy(x - 0.02), torch.from_numpy(x + 0.02))
    found = tr.discrepancy(tmp_path / "float.onnx", path, stars, budget=tr.Budget(seconds=2))
    points = (x + np.random.default_rng(0).uniform(-0.02, 0.02, (200, *SHAPE))).astype(np.float32)
    with torch.no_grad():
        original = tr.load(tmp_path / "float.onnx")(torch.from_numpy(points))
    off = (original - torch.from_numpy(executed(path, points))).abs().amax(0)
    assert bool((off <= found.upper[0]).all())


def small(kind: str, folder: Path, **options) -> onnx.ModelProto:
    net = FloatNetwork(21, 0)
    at = net.add("Flatten", [net.add("Relu", [net.convolution("x", 3, 2)])])
    net.add("Gemm", [at, net.weights(128, 3), net.weights(3)])
    form = {"activation": "QUInt8", "weight": "QInt8"} | options.pop("form", {})
    return onnx.load(made(folder, net, kind, form["activation"], form["weight"], False, **options))


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"activation": "QUInt16"}, r"QuantizeLinear\): .*uint16: onnxruntime has no integer kernels"),
        (
            {"activation": "QInt16", "weight": "QInt16"},
            r"QuantizeLinear\): .*int16: onnxruntime has no integer kernels",
        ),
        ({"weight": "QInt4"}, r"Conv\): .*int4: onnxruntime has no integer kernels"),
        ({"weight": "QUInt4"}, r"Conv\): .*uint4: onnxruntime has no integer kernels"),
    ],
)
def test_numbers_of_16_and_4_bits_are_refused_by_name(form, reason, tmp_path):
    small("QDQ", tmp_path, form=form)
    with pytest.raises(UnsupportedLayerError, match=r"codes.onnx: node \d+ \(.*" + reason):
        tr.load(tmp_path / "codes.onnx")


def test_layers_that_onnxruntime_does_not_fuse_are_refused(tmp_path):
    path = tmp_path / "codes.onnx"
    model = small("QDQ", tmp_path)
    layer = next(node for node in model.graph.node if node.op_type == "Gemm")
    at = list(model.graph.node).index(layer) + 1
    relu = helper.make_node("Relu", [layer.output[0]], ["r"])  # whose zero point lies in the middle
    model.graph.node.insert(at, relu)
    model.graph.node[at + 1].input[0] = "r"
    onnx.save(model, path)
    with pytest.raises(UnsupportedLayerError, match=r"Relu\): its QuantizeLinear does not saturate so.*float32"):
        tr.load(path)
    model.graph.node[at].CopyFrom(model.graph.node[at + 1])
    model.graph.node[at].input[0], model.graph.node[at].output[0] = layer.output[0], "beside"
    model.graph.node[at + 1].input[0] = layer.output[0]
    onnx.save(model, path)
    with pytest.raises(UnsupportedLayerError, match=r"QuantizeLinear\): .*read twice: onnxruntime does not fuse"):
        tr.load(path)


def test_pairs_of_grids_that_onnxruntime_merges_are_refused(tmp_path):
    model = small("QDQ", tmp_path)
    at, first = next((i, node) for i, node in enumerate(model.graph.node) if node.op_type == "QuantizeLinear")
    pair = [
        helper.make_node("Relu", [model.graph.node[at + 1].output[0]], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["d"]),
    ]
    model.graph.initializer.extend(
        numpy_helper.from_array(v, n) for n, v in (("s", np.float32(0.01)), ("z", np.uint8(0)))
    )
    reader = next(node for node in model.graph.node if node.op_type == "Conv")
    reader.input[0] = "d"
    nodes = [*model.graph.node[: at + 2], *pair, *model.graph.node[at + 2 :]]
    for part in (nodes, [node for node in nodes if node is not pair[0]]):
        del model.graph.node[:]
        model.graph.node.extend(part)
        onnx.save(model, tmp_path / "codes.onnx")
        with pytest.raises(UnsupportedLayerError, match="onnxruntime merges into a third one"):
            tr.load(tmp_path / "codes.onnx")
        pair[1].input[0] = pair[0].input[0]


def test_codes_that_are_read_by_another_scale_are_refused(tmp_path):
    model = small("QOperator", tmp_path)
    layer = next(node for node in model.graph.node if node.op_type == "QLinearConv")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.3), "other"))
    layer.input[1] = "other"
    onnx.save(model, tmp_path / "codes.onnx")
    with pytest.raises(UnsupportedLayerError, match=r"QLinearConv\): its input 0 must have the scale"):
        tr.load(tmp_path / "codes.onnx")


@pytest.mark.parametrize("op", ["ConvInteger", "MatMulInteger"])
def test_sums_that_stay_integers_are_refused_by_name(op, tmp_path):
    parts = [
        ("s", np.float32(0.1)),
        ("z", np.uint8(3)),
        ("w", np.ones((3, 3, 1, 1) if op[0] == "C" else (8, 8), np.int8)),
    ]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node(op, ["q", "w", "z"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, k, ("n", *SHAPE)) for n, k in (("x", 1), ("y", 6)))
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in parts]
    onnx.save(helper.make_model(helper.make_graph(nodes, "sums", [x], [y], stored)), tmp_path / "sums.onnx")
    with pytest.raises(UnsupportedLayerError, match=rf"sums.onnx: node 1 \('y', {op}\): its sums stay integers"):
        tr.load(tmp_path / "sums.onnx")


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.INT8])
def test_codes_of_weights_alone_are_read_as_floats_with_a_warning(kind, tmp_path):
    # onnxruntime rounds the input of such a product to 8 bits: it is off by far more than float32.
    codes = np.random.default_rng(0).integers(-7, 8, (64, 4))
    stored = [
        helper.make_tensor("w", kind, codes.shape, codes.ravel().tolist()),
        numpy_helper.from_array(np.float32(0.1), "s"),
        helper.make_tensor("z", kind, (), [0]),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"], "product"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("n", size)) for n, size in (("x", 64), ("y", 4))]
    graph = helper.make_graph(nodes, "weights", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "weights.onnx")
    with pytest.warns(UncoveredKernelsWarning, match=r"weights.onnx.*'product'.*rounds what such layers read"):
        network = tr.load(tmp_path / "weights.onnx")
    x = np.random.default_rng(1).normal(0, 1, (20, 64)).astype(np.float32)
    assert np.allclose(network(torch.from_numpy(x)).detach().numpy(), x @ (codes * np.float32(0.1)), atol=1e-4)


def altered(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Makes another network of the file, which may be valid: one number, node or edge of it is another."""
    graph = model.graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    at = int(rng.integers(len(graph.node)))
    node = graph.node[at]
    held = [i for i, name in enumerate(node.input) if name in stored]
    read = [i for i, name in enumerate(node.input) if name not in stored]
    kind = int(rng.integers(7))
    if kind in (0, 1) and held:  # for one reader alone
        i = int(rng.choice(held))
        value = stored[node.input[i]]
        if value.dtype.kind == "f":
            value = (value * rng.uniform(0.5, 1.5)).astype(value.dtype)
        elif value.dtype.itemsize == 1:
            to = value.dtype if kind else np.dtype({"i": np.uint8, "u": np.int8}[value.dtype.kind])
            value = (value.astype(int) + int(rng.integers(-3, 4))).clip(
                *(getattr(np.iinfo(to), e) for e in ("min", "max"))
            )
            value = value.astype(to)
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"other{len(stored)}"))
        node.input[i] = f"other{len(stored)}"
    elif kind == 2 and read:
        op = str(rng.choice(["Relu", "Identity", "Flatten", "Dropout"]))
        new = helper.make_node(op, [node.input[read[0]]], [f"new{len(graph.node)}"])
        node.input[read[0]] = new.output[0]
        graph.node.insert(at, new)
    elif kind == 3 and read and at:
        node.input[read[0]] = graph.node[int(rng.integers(at))].output[0]
    elif kind == 4:
        graph.output[0].CopyFrom(onnx.ValueInfoProto(name=node.output[0]))
    elif kind == 5 and len(node.input) == 3 and node.op_type.lower().endswith("quantizelinear"):
        del node.input[2]
    else:
        twin = onnx.NodeProto.FromString(node.SerializeToString())
        twin.output[0] = f"twin{len(graph.node)}"
        later = [(n, i) for n in graph.node[at + 1 :] for i, name in enumerate(n.input) if name == node.output[0]]
        if later:
            reader, i = later[-1]
            reader.input[i] = twin.output[0]
        graph.node.insert(at + 1, twin)
    del graph.value_info[:]


def check_altered(folder: Path, seeds: range) -> int:
    """How many altered files both read: they must agree about these."""
    equal = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        source = folder / f"{seed % 12}.onnx"
        if not source.exists():
            net = (plain, joined)[seed % 2](17, seed % 12)
            made(folder, net, *FORMS[seed % 6], False).rename(source)
        model = onnx.load(source)
        for _ in range(int(rng.integers(1, 3))):
            altered(model, rng)
        onnx.save(model, folder / "altered.onnx")
        try:
            network = tr.load(folder / "altered.onnx")
        except tr.TorchreachError:
            continue
        try:
            found = executed(folder / "altered.onnx", inputs(5))
        except Exception:  # onnxruntime's, of many kinds: it takes the file for invalid
            continue
        x = torch.from_numpy(inputs(5))
        own = network(x) if found.dtype == np.float32 else network.codes(network.quantise(x))
        assert np.array_equal(own.numpy(), found), seed
        equal += 1
    return equal


def test_altered_files_are_executed_code_for_code_or_refused(tmp_path):
    assert check_altered(tmp_path, range(80)) > 10


@pytest.mark.slow
def test_altered_files_are_executed_code_for_code_or_refused_many_times(tmp_path):
    assert check_altered(tmp_path, range(1000, 2500)) > 150
