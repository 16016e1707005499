"""Quantised ONNX files of every opset and in rarer forms: executed code for code, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")

from tests.onnx_models import FloatNetwork, check, quantised

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
