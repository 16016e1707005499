"""Reads a TFLite file: float networks as chains of layers, quantised ones as LiteRT's kernels execute them.

Inputs and outputs keep the file's own order of axes, [B, H, W, C] for pictures. Inside, a float network has channels
first, and axes are put back where an operator looks at their order.

Int8 weights with float activations ("dynamic range") are read as the numbers that they stand for. LiteRT's kernels also
round such a layer's inputs, by a scale of each input's own; that is not covered, and a warning says so.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from torchreach.core.errors import (
    FileFormatError,
    InvalidNetworkError,
    ShapeError,
    UncoveredKernelsWarning,
    UnsupportedLayerError,
)
from torchreach.graph.layers import ElementwiseAffine, Rearrange, Reshape
from torchreach.read.builder import ChainBuilder, check_finite
from torchreach.read.tflite_codes import read_codes
from torchreach.read.tflite_file import CODES, TfliteFile, TfliteNode, TfliteTensor, parse
from torchreach.read.tflite_windows import (
    activation,
    axes_of,
    axis_of,
    constant,
    convolution,
    linear,
    pool,
    sizes_of,
)

_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "relu_n1_to_1": nn.Hardtanh}
_WEIGHTED = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")


def read_tflite(path: Path) -> nn.Module:
    """The network in `path`: an `nn.Sequential` of layers in float32, or a `DeployedNetwork`. Raises as `load`.

    Warns: UncoveredKernelsWarning: int8 weights with float activations, whose kernels may round these.
    """
    file = parse(path)
    try:
        if file.tensors[file.input].kind in CODES or (file.nodes and file.nodes[0].kind == "QUANTIZE"):
            return read_codes(file)
        return _Floats(file).network()
    except (UnsupportedLayerError, InvalidNetworkError, FileFormatError, ShapeError) as error:
        raise type(error)(f"{path}: {error}") from None


def read_input_shape(path: Path) -> tuple[int, ...]:
    """Shape of one input of the network in `path`. Raises as `load`."""
    return parse(path).shape


class _Floats:
    """values: node of each computed tensor, with channels first (`True`) or as in the file, by what there is."""

    def __init__(self, file: TfliteFile) -> None:
        self.file, self.builder = file, ChainBuilder(file.shape)
        self.values: dict[int, dict[bool, int]] = {file.input: {False: 0}}
        self.folded: dict[int, Tensor] = {}
        if file.tensors[file.input].kind != "FLOAT32":
            raise UnsupportedLayerError(f"the input must be float32 or int8, got {file.tensors[file.input].kind}")

    def network(self) -> nn.Sequential:
        dynamic = []
        for node in self.file.nodes:
            self._add(node)
            if node.kind in _WEIGHTED and self.file.tensors[node.inputs[1]].kind in CODES:
                dynamic.append(node.name)
        if self.file.output not in self.values:
            raise UnsupportedLayerError("the output does not depend on the input")
        self._take(self.file.output, False, "output")
        network = self.builder.finish()
        check_finite(network)
        if dynamic:
            warnings.warn(
                f"{self.file.path}: int8 weights with float activations in {', '.join(map(repr, dynamic[:3]))} "
                "(dynamic range): read as a float network of these weights; LiteRT also rounds what such layers read, "
                "by a scale of each input's own, which is not covered",
                UncoveredKernelsWarning,
                stacklevel=4,
            )
        return network

    def _add(self, node: TfliteNode) -> None:
        self.builder.position = node.place
        if len(node.outputs) != 1 or not node.inputs:
            node.refuse("it must have inputs and one output")
        if node.kind == "DEQUANTIZE" and self.file.tensors[node.inputs[0]].data is not None:
            self.folded[node.outputs[0]] = self.file.tensors[node.inputs[0]].real()
            return
        handler = _HANDLERS.get(node.kind)
        if handler is None:
            node.refuse("torchreach has no rule for it")
        if self.file.tensors[node.outputs[0]].kind != "FLOAT32":
            node.refuse(f"its result must be float32, got {self.file.tensors[node.outputs[0]].kind}")
        first = handler(self, node)
        function = activation(node)
        if function:
            self.builder.append(_ACTIVATIONS[function](), node.name)
        shape, wanted = self.builder.shape, self.file.tensors[node.outputs[0]].shape[1:]
        found = None if shape is None else (*shape[1:], shape[0]) if first else shape
        if found != wanted:
            node.refuse(f"its result is {found}, and the file says {wanted}")
        self.values[node.outputs[0]] = {first: self.builder.at}

    def _take(self, index: int, first: bool, name: str) -> None:
        """The next layer takes this value, channels first or as in the file."""
        held = self.values[index]
        if first not in held:
            self.builder.move(next(iter(held.values())), name)
            order = (0, 3, 1, 2) if first else (0, 2, 3, 1)
            self.builder.append(Rearrange("permute", *order), name)
            held[first] = self.builder.at
        self.builder.move(held[first], name)

    def _computed(self, node: TfliteNode, at: int = 0) -> int:
        index = node.inputs[at] if len(node.inputs) > at else -1
        if index not in self.values:
            node.refuse("it reads a constant where a computed value is needed")
        return index

    def _numbers(self, node: TfliteNode, at: int, what: str) -> Tensor:
        """A constant operand as float32 numbers."""
        index = node.inputs[at] if len(node.inputs) > at else -1
        if index in self.folded:
            return self.folded[index]
        tensor: TfliteTensor = constant(self.file, node, at, what)
        if tensor.kind not in ("FLOAT32", "FLOAT16", *CODES):
            node.refuse(f"its {what} must hold numbers, got {tensor.kind}")
        if tensor.kind in CODES and not len(tensor.scale):
            node.refuse(f"its {what} has codes without a scale")
        return tensor.real()

    def _is_first(self, index: int) -> bool:
        return next(iter(self.values[index]))

    # -- operators: each says whether its result has channels first ------------------------------------

    def _layer(self, node: TfliteNode) -> bool:
        weight = self._numbers(node, 1, "weight")
        has_bias = len(node.inputs) > 2 and node.inputs[2] >= 0
        bias = self._numbers(node, 2, "bias") if has_bias else None
        index = self._computed(node)
        if node.kind == "FULLY_CONNECTED":
            layer = linear(self.file, node, weight, bias)
            self._take(index, False, node.name)
            if not node.option("keepNumDims", False) and len(self.builder.shape or ()) > 1:
                self.builder.append(Reshape((layer.in_features,)), node.name)
            self.builder.append(layer, node.name)
            return False
        layer, window = convolution(self.file, node, weight, bias)
        self._take(index, True, node.name)
        left, right, top, bottom = window.sides
        if left == right and top == bottom:
            layer.padding = (top, left)
        else:
            self.builder.append(Rearrange("pad", *window.sides), node.name)
        self.builder.append(layer, node.name)
        return True

    def _pool(self, node: TfliteNode) -> bool:
        index, window = self._computed(node), pool(self.file, node)
        self._take(index, True, node.name)
        left, right, top, bottom = window.sides
        if node.kind == "MAX_POOL_2D":
            # Padding of maxima counts for nothing, so only the number of places matters.
            more = bottom > top or right > left
            layer = nn.MaxPool2d(window.kernel, window.stride, (top, left), ceil_mode=more)
            self.builder.append(layer, node.name)
        elif not any(window.sides):
            self.builder.append(nn.AvgPool2d(window.kernel, window.stride), node.name)
        else:
            height, width = self.file.tensors[node.inputs[0]].shape[1:3]
            share = (1 / window.counts((height, width)))[..., 0].float()
            self.builder.append(Rearrange("pad", *window.sides), node.name)
            self.builder.append(nn.AvgPool2d(window.kernel, window.stride, divisor_override=1), node.name)
            self.builder.append(ElementwiseAffine(share, torch.zeros(())), node.name)
        return True

    def _mean(self, node: TfliteNode) -> bool:
        axes, shape = axes_of(self.file, node), self.file.tensors[node.inputs[0]].shape
        self._take(self._computed(node), False, node.name)
        terms = int(torch.tensor([shape[a] for a in axes]).prod())
        self.builder.append(Rearrange("mean", axes, bool(node.option("keepDims", False)), terms=terms), node.name)
        return False

    def _reshape(self, node: TfliteNode) -> bool:
        before, after = (self.file.tensors[i].shape for i in (node.inputs[0], node.outputs[0]))
        if not after or before[0] != after[0]:
            node.refuse(f"it must keep the batch axis, got {before} to {after}")
        self._take(self._computed(node), False, node.name)
        self.builder.append(Reshape(after[1:]), node.name)
        return False

    def _pad(self, node: TfliteNode) -> bool:
        sizes = sizes_of(self.file, node)
        self._take(self._computed(node), False, node.name)
        self.builder.append(Rearrange("pad", *sizes), node.name)
        return False

    def _concatenation(self, node: TfliteNode) -> bool:
        nodes = []
        for at in range(len(node.inputs)):
            self._take(self._computed(node, at), False, node.name)
            nodes.append(self.builder.at)
        self.builder.join("cat", tuple(nodes), node.name, axis_of(self.file, node))
        return False

    def _arithmetic(self, node: TfliteNode) -> bool:
        operation = node.kind.lower()
        if len(node.inputs) != 2:
            node.refuse("it must have two inputs")
        one, other = node.inputs
        if one in self.values and other in self.values:
            if operation == "mul":
                node.refuse("products of two computed values are not supported")
            first = self._is_first(one) and self._is_first(other)
            nodes = []
            for index in (one, other):
                self._take(index, first, node.name)
                nodes.append(self.builder.at)
            self.builder.join(operation, (nodes[0], nodes[1]), node.name)
            return first
        at = 0 if one in self.values else 1
        operand = self._numbers(node, 1 - at, "operand")
        rank = len(self.file.tensors[node.inputs[at]].shape)
        if operand.ndim > rank or (operand.ndim == rank and operand.shape[0] != 1):
            node.refuse(f"a constant of shape {tuple(operand.shape)} reaches into the batch axis")
        self._take(self._computed(node, at), False, node.name)
        self.builder.arithmetic("rsub" if operation == "sub" and at else operation, operand, node.name)
        return False

    def _pointwise(self, node: TfliteNode) -> bool:
        index = self._computed(node)
        first = self._is_first(index)
        self._take(index, first, node.name)
        self.builder.append(_ACTIVATIONS[node.kind.lower()](), node.name)
        return first

    def _softmax(self, node: TfliteNode) -> bool:
        self._take(self._computed(node), False, node.name)
        beta = float(node.option("beta", 1.0))
        if beta != 1:
            self.builder.append(ElementwiseAffine(torch.tensor(beta), torch.zeros(())), node.name)
        self.builder.append(nn.Softmax(-1), node.name)
        return False


_HANDLERS = {
    **dict.fromkeys(_WEIGHTED, _Floats._layer),
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D"), _Floats._pool),
    **dict.fromkeys(("ADD", "SUB", "MUL"), _Floats._arithmetic),
    **dict.fromkeys(("RELU", "RELU6", "RELU_N1_TO_1"), _Floats._pointwise),
    "MEAN": _Floats._mean,
    "RESHAPE": _Floats._reshape,
    "PAD": _Floats._pad,
    "CONCATENATION": _Floats._concatenation,
    "SOFTMAX": _Floats._softmax,
}
