"""Quantised ONNX files are read as onnxruntime's CPU provider executes them, code for code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import torchreach as tr
from tests.data import require_data
from torchreach.core.errors import FileFormatError, UnsupportedLayerError

quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")

from tests.onnx_models import check, executed, quantised  # noqa: E402

FORMATS = [
    (kind, activation, weight, per_channel)
    for kind in ("QDQ", "QOperator")
    for activation, weight in (("QUInt8", "QInt8"), ("QUInt8", "QUInt8"), ("QInt8", "QInt8"))
    for per_channel in (False, True)
]


def windows() -> np.ndarray:
    frames = np.fromfile(require_data("mlperf_tiny", "ad01_normal_id_01.bin"), dtype="<f4").reshape(-1, 128)
    return np.stack([frames[i : i + 5].ravel() for i in range(len(frames) - 4)])


def ad01(folder: Path, *form) -> Path:
    return quantised(require_data("mlperf_tiny", "ad01_float.onnx"), folder / "ad01.onnx", windows()[::20], *form)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (count, 3, 32, 32)).astype(np.float32)


def resnet8(folder: Path, *form) -> Path:
    return quantised(require_data("mlperf_tiny", "resnet8_float.onnx"), folder / "resnet8.onnx", pictures(3), *form)


@pytest.mark.parametrize(("kind", "activation", "weight", "per_channel"), FORMATS)
def test_ad01_is_executed_code_for_code(kind, activation, weight, per_channel, tmp_path):
    check(ad01(tmp_path, kind, activation, weight, per_channel), windows())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "activation", "weight", "per_channel"), FORMATS)
def test_ad01_is_executed_code_for_code_at_many_inputs(kind, activation, weight, per_channel, tmp_path):
    rng = np.random.default_rng(0)
    x = windows()[rng.integers(196, size=10_000)] + rng.normal(0, 5, (10_000, 640))
    check(ad01(tmp_path, kind, activation, weight, per_channel), x.astype(np.float32))


@pytest.mark.parametrize(("kind", "weight"), [("QDQ", "QInt8"), ("QOperator", "QInt8"), ("QDQ", "QUInt8")])
def test_resnet8_is_executed_code_for_code(kind, weight, tmp_path):
    check(resnet8(tmp_path, kind, "QUInt8", weight, True), pictures(4, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "activation", "weight", "per_channel"), FORMATS)
def test_resnet8_is_executed_code_for_code_at_many_inputs(kind, activation, weight, per_channel, tmp_path):
    path = resnet8(tmp_path, kind, activation, weight, per_channel)
    if (kind, activation) == ("QDQ", "QInt8"):
        with pytest.raises(UnsupportedLayerError, match="executed in several ways"):
            tr.load(path)
        return
    check(path, pictures(1000, 1))


def random_network(seed: int, folder: Path) -> tuple[Path, tuple[int, ...]]:
    """Convolutions, a sum of two, pools and a layer, in float: [3, 9, 9] -> [4]."""
    rng, stored, nodes = np.random.default_rng(seed), [], []

    def constant(name: str, *shape: int) -> str:
        value = (rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)
        stored.append(numpy_helper.from_array(value, name))
        return name

    def add(op: str, inputs: list[str], **attributes) -> str:
        nodes.append(helper.make_node(op, inputs, [f"v{len(nodes)}"], f"n{len(nodes)}", **attributes))
        return f"v{len(nodes) - 1}"

    channels = int(rng.integers(2, 6))
    at = add("Conv", ["x", constant("w0", channels, 3, 3, 3), constant("b0", channels)], pads=[1, 0, 0, 1])
    at = add("Relu", [at])
    groups = channels if rng.integers(2) else 1
    side = add("Conv", [at, constant("w1", channels, channels // groups, 3, 3), constant("b1", channels)],
               pads=[1, 1, 1, 1], group=groups)  # fmt: skip
    if rng.integers(2):
        side = add("Relu", [side])
    at = add("Add", [at, side])
    at = add("MaxPool", [at], kernel_shape=[2, 2], strides=[2, 2])
    at = add("GlobalAveragePool", [at])
    at = add("Flatten", [at])
    at = add("Gemm", [at, constant("w2", 4, channels), constant("b2", 4)], transB=1)
    nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ("n", 3, 9, 9)), ("y", ("n", 4)))]
    graph = helper.make_graph(nodes, "random", ends[:1], ends[1:], stored)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "float.onnx"
    )
    return folder / "float.onnx", (3, 9, 9)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "activation", "weight", "per_channel"), FORMATS)
def test_random_networks_are_executed_code_for_code(seed, kind, activation, weight, per_channel, tmp_path):
    source, shape = random_network(seed, tmp_path)
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 1, (5, *shape)).astype(np.float32)
    path = quantised(source, tmp_path / "q.onnx", rows, kind, activation, weight, per_channel)
    if (kind, activation) == ("QDQ", "QInt8"):
        with pytest.raises(UnsupportedLayerError, match="executed in several ways"):
            tr.load(path)
        return
    check(path, rng.normal(0, 1.5, (50, *shape)).astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "activation", "weight"), [("QDQ", "QUInt8", "QInt8"), ("QOperator", "QInt8", "QInt8")]
)
@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_what_is_certified_contains_what_onnxruntime_computes(seconds, kind, activation, weight, tmp_path):
    path = ad01(tmp_path, kind, activation, weight, False)
    original = tr.load(require_data("mlperf_tiny", "ad01_float.onnx"))
    centre = windows()[0]
    stars = tr.StarBatch.from_box(torch.from_numpy(centre - 0.01), torch.from_numpy(centre + 0.01))
    found = tr.discrepancy(original, str(path), stars, budget=tr.Budget(seconds=seconds))
    x = (centre + np.random.default_rng(0).uniform(-0.01, 0.01, (300, 640))).astype(np.float32)
    with torch.no_grad():
        off = (original(torch.from_numpy(x)) - torch.from_numpy(executed(path, x))).abs().amax(0)
    assert bool((off <= found.upper[0]).all())
    assert bool((found.lower <= found.upper).all())


def test_dynamic_scales_are_refused_by_that_name(tmp_path):
    target = tmp_path / "dynamic.onnx"
    quantization.quantize_dynamic(require_data("mlperf_tiny", "ad01_float.onnx"), target)
    with pytest.raises(UnsupportedLayerError, match=r"dynamic.onnx: node .*DynamicQuantizeLinear.*quantize_dynamic"):
        tr.load(target)


def test_a_result_that_is_not_quantised_is_not_read_as_codes(tmp_path):
    stored = [numpy_helper.from_array(v, n) for n, v in (("s", np.float32(0.1)), ("z", np.uint8(3)))]
    stored += [numpy_helper.from_array(np.ones((4, 4), np.int8), "w"), numpy_helper.from_array(np.int8(0), "v")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "first"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "second"),
        helper.make_node("DequantizeLinear", ["w", "s", "v"], ["e"], "third"),
        helper.make_node("MatMul", ["d", "e"], ["m"], "fourth"),
        helper.make_node("Add", ["m", "d"], ["a"], "fifth"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["y"], "sixth"),
    ]
    ends = [
        helper.make_tensor_value_info(n, k, ("n", 4)) for n, k in (("x", TensorProto.FLOAT), ("y", TensorProto.UINT8))
    ]
    model = helper.make_model(helper.make_graph(nodes, "open", ends[:1], ends[1:], stored))
    onnx.save(model, tmp_path / "open.onnx")
    with pytest.raises(UnsupportedLayerError, match=r"node 4 \('fifth', Add\).*outside of"):
        tr.load(tmp_path / "open.onnx")


def test_operators_without_a_rule_are_refused_by_name_place_and_file(tmp_path):
    scale, zero = numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(3), "z")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "first"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "second"),
        helper.make_node("Sigmoid", ["d"], ["e"], "third"),
        helper.make_node("QuantizeLinear", ["e", "s", "z"], ["y"], "fourth"),
    ]
    ends = [
        helper.make_tensor_value_info(n, k, ("n", 4)) for n, k in (("x", TensorProto.FLOAT), ("y", TensorProto.UINT8))
    ]
    model = helper.make_model(helper.make_graph(nodes, "odd", ends[:1], ends[1:], [scale, zero]))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(UnsupportedLayerError, match=r"odd.onnx: node 2 \('third', Sigmoid\)"):
        tr.load(tmp_path / "odd.onnx")


def test_damaged_files_end_in_one_line(tmp_path):
    whole, rng = ad01(tmp_path, "QDQ", "QUInt8", "QInt8", False).read_bytes(), np.random.default_rng(0)
    path, failed = tmp_path / "damaged.onnx", 0
    for _ in range(50):
        content = bytearray(whole)
        for place in rng.integers(0, min(len(content), 6000), 4):
            content[len(content) - 1 - int(place)] = int(rng.integers(256))
        path.write_bytes(content)
        try:
            tr.load(path)
        except tr.TorchreachError as error:
            failed += "\n" not in str(error)
    assert failed
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"^[^\n]*damaged.onnx[^\n]*$"):
        tr.load(path)
