"""Float networks as ONNX files of any opset, their quantised twins, and what onnxruntime computes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

import torchreach as tr
from torchreach.graph.deployed import DeployedNetwork


class Reader(quantization.CalibrationDataReader):
    def __init__(self, name: str, rows: np.ndarray) -> None:
        self.rows: Iterator[dict] = iter([{name: row[None]} for row in rows])

    def get_next(self) -> dict | None:
        return next(self.rows, None)


def quantised(
    source: Path, target: Path, rows: np.ndarray, kind: str, activation: str, weight: str, per_channel: bool, **options
) -> Path:
    """A twin of the float network in `source`, made by `quantize_static` on calibration rows [B, *shape]."""
    name = onnx.load(source).graph.input[0].name
    quantization.quantize_static(
        source,
        target,
        Reader(name, rows),
        quant_format=getattr(quantization.QuantFormat, kind),
        activation_type=getattr(quantization.QuantType, activation),
        weight_type=getattr(quantization.QuantType, weight),
        per_channel=per_channel,
        **options,
    )
    return target


def executed(path: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in x])


def check(path: Path, x: np.ndarray) -> DeployedNetwork:
    """The network in `path`, which must compute what onnxruntime does at x."""
    network = tr.load(path)
    assert isinstance(network, DeployedNetwork)
    for part in np.array_split(x, -(-len(x) // 100)):
        assert np.array_equal(network(torch.from_numpy(part)).numpy(), executed(path, part))
    return network


class FloatNetwork:
    """A float network node by node, as files of `opset` write it; each method gives the name of the result."""

    def __init__(self, opset: int, seed: int = 0) -> None:
        self.opset, self.rng = opset, np.random.default_rng(seed)
        self.stored: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []

    def constant(self, value: Any) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.stored)}"))
        return self.stored[-1].name

    def weights(self, *shape: int) -> str:
        scale = np.sqrt(np.prod(shape[1:]) or 1)
        return self.constant((self.rng.normal(0, 1, shape) / scale).astype(np.float32))

    def add(self, op: str, inputs: Sequence[str], **attributes) -> str:
        at = len(self.nodes)
        self.nodes.append(helper.make_node(op, inputs, [f"v{at}"], f"n{at}", **attributes))
        return f"v{at}"

    def convolution(self, x: str, channels: int, filters: int, pad: int = 1) -> str:
        stored = [self.weights(filters, channels, 3, 3), self.weights(filters)]
        return self.add("Conv", [x, *stored], pads=[pad] * 4)

    def clip(self, x: str, least: float, most: float) -> str:
        if self.opset < 11:
            return self.add("Clip", [x], min=float(least), max=float(most))
        return self.add("Clip", [x, self.constant(np.float32(least)), self.constant(np.float32(most))])

    def pad(self, x: str, sizes: Sequence[int]) -> str:
        if self.opset < 11:
            return self.add("Pad", [x], pads=sizes)
        return self.add("Pad", [x, self.constant(np.int64(sizes))])

    def along(self, op: str, x: str, axes: Sequence[int]) -> str:
        """Squeeze and Unsqueeze."""
        if self.opset < 13:
            return self.add(op, [x], axes=axes)
        return self.add(op, [x, self.constant(np.int64(axes))])

    def save(self, path: Path, shape: Sequence[int]) -> Path:
        self.nodes[-1].output[0] = "y"
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", *shape))
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        opsets = [helper.make_opsetid("", self.opset)]
        graph = helper.make_graph(self.nodes, "network", [x], [y], self.stored)
        version = helper.find_min_ir_version_for(opsets)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path
