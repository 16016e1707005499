"""Files: what is loaded computes what the file computes, and a bad file gives one clear line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.data import require_data
from tests.test_chain import IDS, NETWORKS
from torchreach.core.errors import FileFormatError, InvalidNetworkError, UnsupportedLayerError
from torchreach.read.load import load


def test_all_acasxu_networks_agree_with_onnxruntime():
    import onnxruntime

    files = sorted(require_data("acasxu").glob("*.onnx"))
    assert len(files) == 45
    x = torch.rand(10, 5, generator=torch.Generator().manual_seed(0)) - 0.5
    for file in files:
        network = load(file)
        assert [type(m) for m in network] == [nn.Flatten, *[nn.Linear, nn.ReLU] * 6, nn.Linear]
        session = onnxruntime.InferenceSession(str(file))
        expected = np.concatenate([session.run(None, {"input": row.reshape(1, 1, 1, 5).numpy()})[0] for row in x])
        with torch.no_grad():
            torch.testing.assert_close(network(x).numpy(), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(network(x.reshape(10, 1, 1, 5)).numpy(), expected, rtol=0, atol=1e-6)


def _onnx(path, nodes, tensors, shape, opset=17, kind="FLOAT"):
    """Saves a network. A node is (kind, inputs, attributes), "_" the value computed last."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    last, made = "x", []
    for k, (operator, inputs, *attributes) in enumerate(nodes):
        names = [last if name == "_" else name for name in inputs.split()]
        last = "noise" if operator == "RandomNormal" else f"v{k}"
        made.append(helper.make_node(operator, names, [last], name=f"n{k}", **(attributes[0] if attributes else {})))
    graph = helper.make_graph(
        made,
        "graph",
        [helper.make_tensor_value_info("x", getattr(TensorProto, kind), shape)],
        [helper.make_empty_tensor_value_info(last)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), str(path))
    return path


def _random(**shapes):
    rng = np.random.default_rng(sum(map(ord, shapes)))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


_DENSE = _random(A=(5, 4), a=4, B=(4, 3), b=3, C=(3, 4), m=(1, 1, 5))
_DENSE["d"] = np.float32([0.5, 3, 0.7, 2])
_PICTURE = _random(K=(3, 1, 3, 3), k=3, w=3, o=3, u=3, D=(12, 2))
_PICTURE["v"] = np.float32([0.5, 3, 0.7])
_SIZES = {"flat": np.array([0, -1]), "one": np.array([1, -1]), "image": np.array([-1, 1, 2, 2])}
_HALVES = {"kernel_shape": [2, 2], "strides": [2, 2]}
_CASES = {
    "normalised": (
        [
            *(
                ("Sub", "_ m"),
                ("Flatten", "_"),
                ("MatMul", "_ A"),
                ("Add", "a _"),
                ("Div", "_ d"),
                ("Relu", "_"),
            ),
            *(("Gemm", "_ C b", {"alpha": 0.5, "beta": 2.0, "transB": 1}), ("Sub", "b _")),
        ],
        _DENSE,
        (1, 1, 1, 5),
    ),
    "reshaped": (
        [
            *(
                ("Reshape", "_ flat"),
                ("MatMul", "_ A"),
                ("Sub", "_ a"),
                ("Reshape", "_ image"),
                ("Clip", "_ zero"),
            ),
            *(("Mul", "_ two"), ("Reshape", "_ one"), ("Identity", "_"), ("Gemm", "_ B")),
        ],
        {**_DENSE, **_SIZES, "zero": np.array(0, np.float32), "two": np.array(2, np.float32)},
        (1, 1, 5),
    ),
    "column": (
        [("MatMul", "M _"), ("Add", "_ c"), ("Relu", "_"), ("MatMul", "L _")],
        _random(M=(4, 5), c=(4, 1), L=(2, 4)),
        (5, 1),
    ),
    "picture": (
        [
            ("Conv", "_ K k", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
            ("BatchNormalization", "_ w o u v", {"epsilon": 1e-3}),
            *(
                ("Relu", "_"),
                ("AveragePool", "_", _HALVES),
                ("Dropout", "_"),
                ("Flatten", "_"),
                ("MatMul", "_ D"),
            ),
        ],
        _PICTURE,
        (1, 1, 8, 8),
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_onnx_operators_agree_with_onnxruntime(tmp_path, name):
    import onnxruntime

    nodes, tensors, shape = _CASES[name]
    path = _onnx(tmp_path / "net.onnx", nodes, tensors, shape)
    network = load(path)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    rows = torch.from_numpy(x) if name != "column" else torch.from_numpy(x)[None]
    with torch.no_grad():
        torch.testing.assert_close(network(rows).numpy().reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
        if name == "normalised":
            torch.testing.assert_close(network(rows.reshape(1, 5)), network(rows))


_DOUBLE = {name: value.astype(np.float64) for name, value in _random(E=(4, 3)).items()}
_AXES = {"row": np.array([0]), "one": np.array([1]), "two": np.array([2, 3]), "rows": np.array([-1, 5])}
_MORE = {
    "old unsqueeze": ([("Unsqueeze", "a", {"axes": [0]}), ("MatMul", "x A"), ("Add", "_ v0")], _DENSE, (1, 5), 9),
    "unsqueeze": ([("Unsqueeze", "a row"), ("MatMul", "x A"), ("Add", "_ v0")], {**_DENSE, **_AXES}, (1, 5), 13),
    "old axes": (
        [("MatMul", "_ A"), ("Unsqueeze", "_", {"axes": [1]}), ("Relu", "_"), ("Squeeze", "_", {"axes": [1]})],
        _DENSE,
        (1, 5),
        11,
    ),
    "axes": (
        [("MatMul", "_ A"), ("Unsqueeze", "_ one"), ("Relu", "_"), ("Squeeze", "_ one"), ("MatMul", "_ B")],
        {**_DENSE, **_AXES},
        (1, 5),
        17,
    ),
    "allowzero": ([("Reshape", "_ rows", {"allowzero": 1}), ("MatMul", "_ A")], {**_DENSE, **_AXES}, (1, 1, 5), 17),
    "wider": ([("MatMul", "_ A"), ("Cast", "_", {"to": 11}), ("MatMul", "_ E")], {**_DENSE, **_DOUBLE}, (1, 5), 17),
    "places": (
        [("Conv", "_ K k"), ("GlobalAveragePool", "_"), ("Flatten", "_"), ("Relu", "_")],
        _PICTURE,
        (1, 1, 8, 8),
        17,
    ),
    "means": ([("Conv", "_ K k"), ("ReduceMean", "_", {"axes": [2, 3]})], _PICTURE, (1, 1, 8, 8), 13),
    "means flat": (
        [("Conv", "_ K k"), ("ReduceMean", "_ two", {"keepdims": 0}), ("Relu", "_")],
        {**_PICTURE, **_AXES},
        (1, 1, 8, 8),
        18,
    ),
    "same size": ([("Conv", "_ K k", {"auto_pad": "SAME_UPPER", "kernel_shape": [3, 3]})], _PICTURE, (1, 1, 8, 8), 17),
    "part of a shape": (
        [("Shape", "x", {"end": 1}), ("Concat", "v0 minus", {"axis": 0}), ("Reshape", "x v1"), ("MatMul", "_ A")],
        {**_DENSE, "minus": np.array([-1])},
        (1, 1, 5),
        17,
    ),
}


@pytest.mark.parametrize("name", _MORE)
def test_onnx_files_of_all_opsets_agree_with_onnxruntime_on_flat_inputs_too(tmp_path, name):
    import onnxruntime

    nodes, tensors, shape, opset = _MORE[name]
    path = _onnx(tmp_path / "net.onnx", nodes, tensors, shape, opset)
    network = load(path)
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    dtype = next(network.parameters()).dtype
    with torch.no_grad():
        for rows in (torch.from_numpy(x), torch.from_numpy(x).flatten(1)):
            torch.testing.assert_close(
                network(rows.to(dtype)).numpy(), expected, rtol=1e-6, atol=1e-6, check_dtype=False
            )


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.filterwarnings("ignore")  # torch announces the end of its older exporter, the one without dependencies
def test_what_torch_exports_agrees_with_onnxruntime(tmp_path, free):
    import onnxruntime

    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 2, 3, padding="same"), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    nets = {
        "dense": nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
        ),
        "picture": nn.Sequential(*layers, nn.Linear(8, 3)),
        "groups": nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=4), nn.AdaptiveAvgPool2d(1)),
    }
    x = torch.rand(1, 1, 4, 4)
    for name, net in nets.items():
        path = tmp_path / f"{name}.onnx"
        axes = {"dynamic_axes": {"x": {0: "batch"}}} if free else {}
        torch.onnx.export(net.eval(), (x,), path, dynamo=False, input_names=["x"], **axes)
        expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(load(path)(x).numpy(), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(load(path)(x.flatten(1)).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "kind", "message"),
    [
        ([("Cast", "_", {"to": 10}), ("MatMul", "_ A")], "FLOAT", r"'n0', Cast\): from FLOAT to FLOAT16 it rounds"),
        ([("MatMul", "_ A"), ("Cast", "_", {"to": 6})], "FLOAT", "Cast.*from FLOAT to INT32 it rounds"),
        ([("Cast", "_", {"to": 5})], "FLOAT16", "from FLOAT16 to INT16 it rounds"),
        ([("Cast", "_", {"to": 1})], "INT32", "from INT32 to FLOAT it rounds"),
        ([("Cast", "_", {"to": 1})], "STRING", "input 'x' must hold numbers, got STRING"),
        ([("Reshape", "_ zero", {"allowzero": 1})], "FLOAT", r"does not fit into \[0, 5\] with allowzero"),
        ([("Squeeze", "_")], "FLOAT", "Squeeze.*must keep axis 0, the batch"),
        ([("Gemm", "_ A column")], "FLOAT", r"its bias must have shape \[1, 4\], got \[4, 1\]"),
        ([("MatMul", "_ A"), ("Softmax", "_", {"axis": 0})], "FLOAT", r"axis 0 is the batch"),
        ([("MatMul", "_ A"), ("LogSoftmax", "_"), ("Relu", "_")], "FLOAT", "LogSoftmax as the last layer"),
    ],
)
def test_onnx_files_that_compute_something_else_are_refused(tmp_path, nodes, kind, message):
    tensors = {**_DENSE, "zero": np.array([0, 5]), "column": np.ones((4, 1), np.float32)}
    with pytest.raises(UnsupportedLayerError, match=message):
        load(_onnx(tmp_path / "net.onnx", nodes, tensors, (1, 5), kind=kind))


def test_whole_numbers_become_floats_exactly(tmp_path):
    network = load(
        _onnx(tmp_path / "net.onnx", [("Cast", "_", {"to": 1}), ("MatMul", "_ A")], _DENSE, (1, 5), kind="UINT8")
    )
    assert [type(layer) for layer in network] == [nn.Linear]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([("Gemm", "_ W"), ("Softsign", "_")], r"layer 1 \('n1', Softsign\).*not among"),
        ([("Relu", "_"), ("Mul", "_ x")], r"layer 1 \('n1', Mul\).*combines two values"),
        ([("Div", "W _")], "division by a value that depends on the input"),
        ([("Flatten", "_", {"axis": 0})], "axis must keep the batch alone"),
        (
            [("Relu", "_"), ("RandomNormal", "", {"shape": [5]}), ("Add", "v0 noise")],
            r"\('n1', RandomNormal\)",
        ),
    ],
)
def test_unsupported_onnx_operators_are_refused_by_name(tmp_path, nodes, message):
    tensors = _random(W=(5, 5))
    with pytest.raises(UnsupportedLayerError, match=message):
        load(_onnx(tmp_path / "net.onnx", nodes, tensors, (1, 5)))


def test_onnx_weights_that_are_not_finite_are_refused(tmp_path):
    weight = np.full((5, 5), np.nan, dtype=np.float32)
    with pytest.raises(InvalidNetworkError, match=r"must be finite.*NaN"):
        load(_onnx(tmp_path / "net.onnx", [("Gemm", "_ W")], {"W": weight}, (1, 5)))


@pytest.mark.parametrize(("make", "shape"), [(make, shape) for make, _, shape in NETWORKS], ids=IDS)
def test_exported_programs_agree_with_the_module(tmp_path, make, shape):
    torch.manual_seed(4)
    module = make().eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "net.pt2")
    network = load(tmp_path / "net.pt2")
    x = torch.randn(6, *shape)
    with torch.no_grad():
        torch.testing.assert_close(network(x.clone()), module(x.clone()))


def test_dtype_converts_a_copy():
    module = NETWORKS[0][0]()
    network = load(module, dtype=torch.float64)
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.onnx", None, r"no such file: .*missing\.onnx"),
        ("net.onnx", b"this is not a network", "is not a readable ONNX file"),
        ("empty.onnx", b"", "is not a readable ONNX file"),
        ("net.pt2", b"PK\x03\x04 broken", r"is not a readable .pt2 program"),
        ("net.bin", b"", r"must end in .onnx, .tflite or .pt2 \(torch.export.save\), got '.bin'"),
        ("net.pth", b"", r"a state dict has no structure; .* torchreach.load_int8\(path, float_network\)"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.95, 0.999])
def test_a_truncated_onnx_file_is_refused(tmp_path, keep):
    nodes, tensors, shape = _CASES["normalised"]
    data = _onnx(tmp_path / "net.onnx", nodes, tensors, shape).read_bytes()
    (tmp_path / "net.onnx").write_bytes(data[: int(keep * len(data))])
    with pytest.raises((FileFormatError, UnsupportedLayerError)):
        load(tmp_path / "net.onnx")
