"""ONNX files of networks that are no chains compute what the module, and the runtime, compute."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchreach as tr
from tests.data import require_data
from tests.test_graphs import CASES, network
from tests.test_load import _onnx
from torchreach.core.errors import UnsupportedLayerError
from torchreach.read.load import load
from torchreach.read.save import save

onnxruntime = pytest.importorskip("onnxruntime")


def ran(path: Path, x: np.ndarray) -> np.ndarray:
    """The runtime's outputs, one input at a time: files say a batch of one."""
    session = onnxruntime.InferenceSession(str(path))
    return np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])


def exported(module: nn.Module, path: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Path:
    with warnings.catch_warnings():  # torch announces the end of its older exporter, the one without dependencies
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(1, *shape, dtype=dtype),), path, dynamo=False, input_names=["x"])
    return path


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_exported_graphs_agree_with_the_module_and_the_runtime(tmp_path: Path, name: str) -> None:
    module, shape = network(name)
    module = module.float()
    path = exported(module, tmp_path / "net.onnx", shape)
    x = torch.randn(20, *shape)
    read = load(path)
    torch.testing.assert_close(read(x), module(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(read(x.flatten(1)), module(x), rtol=0, atol=1e-6)
    np.testing.assert_allclose(read(x).numpy(), ran(path, x.numpy()), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_file_with_a_skip_is_certified_as_the_module_is(tmp_path: Path) -> None:
    module, shape = network("residual")
    path = exported(module, tmp_path / "net.onnx", shape, torch.float64)
    small = tr.quantize_weights(module, bits=5)
    stars = tr.StarBatch.from_box(-torch.ones(1, *shape).double(), torch.ones(1, *shape).double())
    expected, found = (tr.discrepancy(original, small, stars, "exact") for original in (module, path))
    torch.testing.assert_close(found.upper, expected.upper)
    assert found.stats.splits == expected.stats.splits


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


RNG = np.random.default_rng(0)
K = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)
D = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)  # depthwise, two outputs of each channel
T = RNG.standard_normal((2, 3, 3, 2)).astype(np.float32)
TENSORS = {
    "K": K,
    "T": T,
    "G": D[:, :1],
    "k": RNG.standard_normal(4).astype(np.float32),
    "slopes": np.float32([[[0.1]], [[-0.5]]]),
    "low": np.float32(-0.5),
    "high": np.float32(0.7),
    "ones": whole(1, 1),
    "pads": whole(0, 0, 1, 0, 0, 0, 0, 2),
    "crop": whole(0, 0, -1, 0, 0, 0, 0, -1),
    "ends": whole(4, 5),
    "axes": whole(2, 3),
    "steps": whole(1, 2),
    "last": whole(-1),
    "before": whole(-4),
    "three": whole(3),
    "sizes": whole(1, 3),
    "place": np.array(2),
    "places": whole(3, 0, 0, -1),
    "grid": np.array([[0, 1], [2, 3]]),
    "back": whole(-1),
}
# (operators, opset): each file takes x [1, 2, 4, 5]; outputs are compared as they are.
FILES = {
    "sum of three": ([("Relu", "x"), ("Abs", "x"), ("Sum", "v0 v1 x")], 17),
    "sub, concat": ([("Relu", "x"), ("Sub", "x v0"), ("Concat", "v0 v1 x", {"axis": 1}), ("Neg", "_")], 17),
    "concat of places": ([("Relu", "x"), ("Concat", "v0 x", {"axis": -1})], 17),
    "split": ([("Split", "x", {"axis": 1}, 2), ("Add", "v0 v0b")], 13),
    "split sizes": ([("Split", "x sizes", {"axis": 2}, 2), ("Relu", "v0b")], 13),
    "old split": ([("Split", "x", {"axis": 3, "split": [2, 3]}, 2), ("Relu", "v0b")], 11),
    "split unequally": ([("Split", "x", {"axis": 3, "num_outputs": 2}, 2), ("Relu", "v0b")], 18),
    "slice": ([("Slice", "x ones ends axes steps"), ("Relu", "_")], 17),
    "slice backwards": ([("Slice", "x last before three back"), ("Relu", "_")], 17),
    "old slice": ([("Slice", "x", {"axes": [2], "starts": [1], "ends": [9]}), ("Relu", "_")], 9),
    "gather one": ([("Gather", "x place", {"axis": 3}), ("Relu", "_")], 17),
    "gather several": ([("Gather", "x places", {"axis": -1}), ("Relu", "_")], 17),
    "gather a grid": ([("Gather", "x grid", {"axis": 2}), ("Relu", "_")], 17),
    "transpose": ([("Transpose", "x", {"perm": [0, 2, 3, 1]}), ("Relu", "_")], 17),
    "pad": ([("Pad", "x pads"), ("Conv", "_ K k")], 17),
    "crop": ([("Pad", "x crop"), ("Relu", "_")], 17),
    "pad some axes": ([("Pad", "x sizes  back"), ("Relu", "_")], 18),
    "old pad": ([("Pad", "x", {"pads": [0, 0, 0, 1, 0, 0, 0, 1]}), ("Relu", "_")], 10),
    "reduce": ([("ReduceMean", "x", {"axes": [1]}), ("ReduceSum", "_ back", {"keepdims": 0})], 17),
    "global": ([("Relu", "x"), ("GlobalAveragePool", "_"), ("GlobalMaxPool", "x"), ("Add", "v1 v2")], 17),
    "average": ([("AveragePool", "x", {"kernel_shape": [2, 3], "pads": [1, 1, 1, 1]}), ("Relu", "_")], 17),
    "average, uneven": (
        [
            ("AveragePool", "x", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}),
            ("Relu", "_"),
        ],
        17,
    ),
    "max": (
        [
            ("MaxPool", "x", {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 0]}),
            ("MaxPool", "_", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
            ("MaxPool", "_", {"kernel_shape": [1, 2], "auto_pad": "SAME_LOWER", "strides": [1, 2]}),
        ],
        17,
    ),
    "max, rounded up": ([("MaxPool", "x", {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1})], 17),
    "max, min": ([("Relu", "x"), ("Neg", "x"), ("Max", "x v1 low"), ("Min", "_ v0 high")], 17),
    "leaky": ([("LeakyRelu", "x", {"alpha": 0.2}), ("PRelu", "_ slopes")], 17),
    "clip": ([("Clip", "x low high"), ("Clip", "_  high"), ("Clip", "_")], 17),
    "old clip": ([("Clip", "x", {"min": 0.0, "max": 6.0})], 10),
    "hard": ([("HardSigmoid", "x"), ("HardSigmoid", "_", {"alpha": 0.5, "beta": 0.25})], 17),
    "conv": ([("Conv", "x K k", {"dilations": [1, 2], "pads": [0, 1, 2, 3], "strides": [2, 1]})], 17),
    "same": ([("Conv", "x K", {"auto_pad": "SAME_LOWER", "strides": [1, 2]}), ("Relu", "_")], 17),
    "depthwise": ([("Conv", "x G", {"group": 2}), ("Relu", "_")], 17),
    "transposed": (
        [("ConvTranspose", "x T", {"strides": [2, 1], "pads": [1, 0, 1, 0], "output_padding": [1, 0]})],
        17,
    ),
    "a product read twice": (
        [("Transpose", "x", {"perm": [0, 1, 3, 2]}), ("MatMul", "v0 M"), ("Add", "v1 m"), ("Sub", "v2 v1")],
        17,
    ),
}
TENSORS |= {"M": RNG.standard_normal((4, 3)).astype(np.float32), "m": np.float32([1, 2, 3])}


def file(path: Path, nodes: list[tuple], opset: int) -> Path:
    """As `_onnx`; an operator of several outputs gives their number, "v0b" is the second of "v0"."""
    import onnx

    made = [(node[0], node[1], *node[2:3]) for node in nodes]
    tensors = {name: TENSORS[name] for name in " ".join(node[1] for node in nodes).split() if name in TENSORS}
    model = onnx.load(_onnx(path, made, tensors, (1, 2, 4, 5), opset))
    for k, (own, node) in enumerate(zip(model.graph.node, nodes, strict=True)):
        if len(node) > 3:
            own.output.append(f"v{k}b")
        names = node[1].split(" ")
        if "" in names:  # an input left out
            del own.input[:]
            own.input.extend(name if name != "_" else f"v{k - 1}" for name in names)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_operators_agree_with_the_runtime(tmp_path: Path, name: str) -> None:
    nodes, opset = FILES[name]
    path = file(tmp_path / "net.onnx", nodes, opset)
    x = np.random.default_rng(1).standard_normal((5, 2, 4, 5)).astype(np.float32)
    expected = ran(path, x)
    found = load(path)(torch.from_numpy(x)).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([("Relu", "x"), ("Mul", "v0 x")], r"layer 1 \('n1', Mul\): mul combines two values that both depend"),
        ([("MatMul", "x x")], r"\('n0', MatMul\): one of its factors must be constant"),
        ([("Concat", "x x", {"axis": 0})], r"\('n0', Concat\): axis 0 is the batch"),
        ([("Gather", "x places", {"axis": 1})], r"\('n0', Gather\): its indices must lie in \[-2, 2\)"),
        ([("Transpose", "x", {"perm": [1, 0, 2, 3]})], r"\('n0', permute\)|\('n0', Transpose\): axis 0"),
        ([("Pad", "x pads high")], r"\('n0', Pad\): torchreach supports padding by zeros"),
        ([("Softmax", "x")], r"\('n0', Softmax\)"),
        ([("Max", "x slopes")], r"\('n0', Max\): all but single numbers must depend on the input"),
        ([("Relu", "nothing")], r"\('n0', Relu\): it reads 'nothing', which no node before it computes"),
        ([("Clip", "x high low")], r"\('n0', Clip\): its ends must be numbers with min <= max"),
        ([("ReduceSum", "x")], r"\('n0', ReduceSum\): axis 0 is the batch"),
        ([("NonZero", "x")], r"\('n0', NonZero\)"),
        ([("MaxPool", "x", {"kernel_shape": [1, 1], "strides": [4, 3], "ceil_mode": 1})], "behind the end is read"),
        (
            [("AveragePool", "x", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]})],
            "padding that does not count must be equal",
        ),
    ],
)
def test_what_has_no_rule_is_refused_by_name_and_place(tmp_path: Path, nodes: list[tuple], message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        load(file(tmp_path / "net.onnx", nodes, 17))


def test_an_operator_of_another_domain_is_refused(tmp_path: Path) -> None:
    import onnx

    model = onnx.load(file(tmp_path / "net.onnx", [("Relu", "x")], 17))
    model.graph.node[0].domain = "com.microsoft"
    onnx.save(model, str(tmp_path / "net.onnx"))
    with pytest.raises(UnsupportedLayerError, match=r"layer 0 \('n0', Relu\)"):
        load(tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["resnet8", "ad01"])
@torch.no_grad()
def test_networks_of_tinyml_agree_with_the_runtime(name: str) -> None:
    path = require_data("mlperf_tiny", f"{name}_float.onnx")
    session = onnxruntime.InferenceSession(str(path))
    shape = session.get_inputs()[0].shape[1:]
    x = np.random.default_rng(0).uniform(0, 255, (3, *shape)).astype(np.float32)
    expected = np.concatenate([session.run(None, {session.get_inputs()[0].name: row[None]})[0] for row in x])
    np.testing.assert_allclose(load(path)(torch.from_numpy(x)).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_what_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 2), nn.AdaptiveAvgPool2d(2))  # on 3 x 3, where windows differ
    with pytest.raises(UnsupportedLayerError, match=r"does not write this network as \.onnx.*save as \.pt2"):
        save(module, tmp_path / "net.onnx", (1, 4, 4))
    assert not (tmp_path / "net.onnx").exists()
