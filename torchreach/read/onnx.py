"""Reads an ONNX file as a graph of affine and piecewise linear operations, lowered to a chain of layers.

A direct reader, because the networks torchreach supports need a few dozen operators (`onnx_operations`) and names
that lead back to the file. Of the libraries tried on torch 2.15, onnx2torch 1.5.15 has no converter for the opset of
the ACAS Xu files; onnx2pytorch 0.6.0 reads them, but as an interpreter of the ONNX graph that would have to be traced
again to see its layers, and it fails where the constant is the left factor of a product.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from torchreach.core.errors import (
    FileFormatError,
    InvalidNetworkError,
    UncoveredKernelsWarning,
    UnsupportedLayerError,
)
from torchreach.graph.arithmetic import Arithmetic
from torchreach.graph.layers import Reshape
from torchreach.read.builder import ChainBuilder, check_finite
from torchreach.read.onnx_codes import is_quantised, read_codes
from torchreach.read.onnx_fold import FOLDED, folded
from torchreach.read.onnx_layers import OnnxNode, OnnxValue
from torchreach.read.onnx_operations import DIGITS, OnnxOperations, kind_name


def read_onnx(path: Path) -> nn.Module:
    """The network in `path`; every weight as stored. Raises as `load`.

    A quantised one is a `DeployedNetwork`, see `read.onnx_codes`.

    Warns: UncoveredKernelsWarning: dequantised weights with float activations, which onnxruntime may round.
    """
    model = _read(path)
    if is_quantised(model):
        return read_codes(model, path)
    reader = _Reader(model, path)
    for node in model.graph.node:
        reader.add(node)
    network = reader.finish()
    _warn_of_rounding(model, path)
    return network


def _warn_of_rounding(model: onnx.ModelProto, path: Path) -> None:
    """Of codes of weights that a product reads dequantised: onnxruntime makes MatMulNBits of it, which rounds."""
    stored = {n for node in model.graph.node if node.op_type == "DequantizeLinear" for n in node.output}
    rounded = [
        node.name or node.output[0]
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and node.input[1] in stored
        and not any(a.name == "transB" and a.i for a in node.attribute)
    ]
    if rounded:
        warnings.warn(
            f"{path}: dequantised weights with float activations in {', '.join(map(repr, rounded[:3]))}: read as a "
            "float network of these weights; onnxruntime also rounds what such layers read to 8 bits, by scales of "
            "each input's own, which is not covered",
            UncoveredKernelsWarning,
            stacklevel=4,
        )


def read_input_shape(path: Path) -> tuple[int, ...]:
    """Shape of one input of the network in `path`. Raises as `load`."""
    return _Reader(_read(path), path).features


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf, missing external data, validation
        raise FileFormatError(f"{path} is not a readable ONNX file: {_first_line(error)}") from None
    if not model.graph.node or not model.graph.input or not model.graph.output:
        raise FileFormatError(f"{path} is not a readable ONNX file: it holds no complete graph")
    if not all(
        isinstance(name, str) for name in _names(model.graph)
    ):  # protobuf gives bytes that are no text as they are
        raise FileFormatError(f"{path} is not a readable ONNX file: one of its names is no text")
    _sort(model.graph)
    return model


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    for node in graph.node:
        yield from (node.op_type, node.name, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    yield from (value.name for value in (*graph.initializer, *graph.input, *graph.output))


def _sort(graph: onnx.GraphProto) -> None:
    """Puts each node behind those it reads, as the standard asks; converters to float16 append their casts last.

    A sorted file stays as it is. Where nodes read each other in a circle, they stay for the reader to refuse.
    """
    open_names = {name for node in graph.node for name in node.output if name}
    waiting, order = list(graph.node), []
    while waiting:
        ready = (i for i, node in enumerate(waiting) if not open_names.intersection(node.input))
        order.append(waiting.pop(next(ready, 0)))
        open_names.difference_update(order[-1].output)
    if any(node is not before for node, before in zip(order, graph.node, strict=True)):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
        del graph.node[:]
        graph.node.extend(copies)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Reader(OnnxOperations):
    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.path, graph = path, model.graph
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}
        try:
            self.constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        except Exception as error:
            raise FileFormatError(f"{path}: a stored tensor is damaged: {_first_line(error)}") from None
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise UnsupportedLayerError(
                f"{path}: torchreach needs a network of one input and one output, got {len(inputs)} and "
                f"{len(graph.output)}"
            )
        head, self.kind = inputs[0].name, inputs[0].type.tensor_type.elem_type
        if self.kind not in DIGITS:
            raise UnsupportedLayerError(f"{path}: input {head!r} must hold numbers, got {kind_name(self.kind)}")
        self.output = graph.output[0].name
        self.readers = Counter([n for node in graph.node for n in node.input] + [self.output])
        sizes = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim]
        # One axis alone, or a column, holds features; otherwise the first axis is the batch.
        self.batched = len(sizes) > 1 and not (len(sizes) == 2 and sizes[1] == 1 and (sizes[0] or 1) > 1)
        self.batch = (sizes[0] or 1) if self.batched else 1
        features = sizes[1:] if self.batched else sizes
        if not features or None in features:
            raise UnsupportedLayerError(f"{path}: input {head!r} must have fixed feature sizes, got {sizes}")
        self.features: tuple[int, ...] = tuple(int(n) for n in features if n is not None)
        self.builder, self.product = ChainBuilder(self.features), None
        self.values = {head: OnnxValue(0, self.batched, self.kind)}

    def add(self, node: onnx.NodeProto) -> None:
        name = node.name or (node.output[0] if node.output else "")
        names = [n for n in node.input if n]
        if all(n in self.constants for n in names):
            self._fold(node, name)
            return
        place = f"layer {self.builder.position} ({name!r}, {node.op_type})"
        for n in names:
            if n not in self.constants and n not in self.values:
                raise UnsupportedLayerError(f"{place}: it reads {n!r}, which no node before it computes")
        values = [self.values[n] for n in names if n in self.values]
        self._take(values, place, name)
        if node.op_type == "Shape":
            ends = {a.name: a.i for a in node.attribute}
            self.constants[node.output[0]] = np.array(self._sizes())[ends.get("start", 0) : ends.get("end")]
            return
        handler = self.handler(node.op_type)
        if node.domain not in ("", "ai.onnx") or handler is None:
            self.builder.refuse(name, node.op_type)
        outputs = [n for n in node.output if n]
        if node.op_type != "Split" and any(self.readers[n] for n in outputs[1:]):
            self.builder.refuse(name, node.op_type, "its first output alone is supported")
        results = handler(self._known(node, name, outputs)) or [self.builder.at]
        for output, at in zip(outputs, results, strict=False):
            self.values[output] = OnnxValue(at, self.batched, self.kind)

    def _take(self, values: list[OnnxValue], place: str, name: str) -> None:
        first = values[0]
        if any((other.batched, other.kind) != (first.batched, first.kind) for other in values):
            raise UnsupportedLayerError(f"{place}: its values must agree about the batch axis and the element type")
        self.builder.move(first.at, name)
        self.batched, self.kind = first.batched, first.kind

    def _known(self, node: onnx.NodeProto, name: str, outputs: list[str]) -> OnnxNode:
        try:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        except Exception as error:
            raise FileFormatError(f"{self.path}: node {name!r} is damaged: {_first_line(error)}") from None
        inputs = (self.values.get(n, self.constants.get(n, ...)) if n else ... for n in node.input)
        alone = all(self.readers[n] == 1 for n in node.input if n in self.values)
        return OnnxNode(name, node.op_type, tuple(inputs), attributes, len(outputs), alone)

    def finish(self) -> nn.Sequential:
        if self.output not in self.values:
            raise UnsupportedLayerError(f"{self.path}: output {self.output!r} does not depend on the input")
        self.builder.move(self.values[self.output].at, "output")
        network = nn.Sequential(*_with_shape(list(self.builder.sequential()), self.features))
        kinds = {value.dtype for value in network.parameters()}
        if len(kinds) > 1:  # after a Cast to more digits: exact in the widest
            network = network.to(max(kinds, key=lambda kind: torch.finfo(kind).bits))
        try:
            check_finite(network)
        except InvalidNetworkError as error:
            raise InvalidNetworkError(f"{self.path}: {error}") from None
        return network

    def _fold(self, node: onnx.NodeProto, name: str) -> None:
        """A node of constants alone."""
        if node.op_type not in FOLDED:
            self.builder.refuse(name, node.op_type, "torchreach does not evaluate it on constants")
        try:
            outputs = folded(node, self.constants, self.opsets)
        except Exception as error:
            raise FileFormatError(f"{self.path}: node {name!r} is damaged: {_first_line(error)}") from None
        self.constants.update(zip(node.output, outputs, strict=False))


def _with_shape(layers: list[nn.Module], features: tuple[int, ...]) -> list[nn.Module]:
    """The layers, so that flat inputs are accepted too where the file's input has several axes.

    A Flatten behind elementwise layers comes first; other networks give their inputs the file's shape themselves.
    """
    if len(features) == 1 or (layers and isinstance(layers[0], nn.Flatten)):
        return layers
    count = next((i for i, layer in enumerate(layers) if not isinstance(layer, Arithmetic)), len(layers))
    if count == len(layers) or not isinstance(layers[count], nn.Flatten):
        return [Reshape(features), *layers]
    flat = [
        Arithmetic(layer.operation, layer.operand.expand(features).flatten())
        for layer in layers[:count]
        if isinstance(layer, Arithmetic)
    ]
    return [layers[count], *flat, *layers[count + 1 :]]
