"""Quantised TFLite networks as LiteRT's reference kernels (`OpResolverType.BUILTIN_REF`) execute them, bit for bit.

Multipliers are computed as the kernels' `Prepare` functions compute them: in float64, but the product of two scales in
float32 where LiteRT has it so (products, standalone ReLUs). Sources:
tflite/kernels/{fully_connected,conv,depthwise_conv,add,sub,mul,reduce,pooling,quantize,activations}.cc of LiteRT.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchreach.core.errors import FileFormatError
from torchreach.graph import deployed as ops
from torchreach.graph.layers import Reshape
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.requantise import LARGEST, DoubleFloat, FixedPoint, Mean, Requantise, away, fixed_point
from torchreach.read.tflite_file import CODES, TfliteFile, TfliteNode
from torchreach.read.tflite_windows import (
    activation,
    axes_of,
    axis_of,
    bias_of,
    constant,
    convolution,
    linear,
    pool,
    sizes_of,
)

RUNTIME = "LiteRT, reference kernels"
_RELUS = ("RELU", "RELU6", "RELU_N1_TO_1")
_LIMITS = {"": (None, None), "relu": (0.0, None), "relu6": (0.0, 6.0), "relu_n1_to_1": (-1.0, 1.0)}


def read_codes(file: TfliteFile) -> ops.DeployedNetwork:
    """The network. Raises: UnsupportedLayerError, InvalidNetworkError; FileFormatError: shapes that do not fit."""
    return _Codes(file).network()


class _Codes:
    def __init__(self, file: TfliteFile) -> None:
        self.file = file
        self.operations: list[ops.Operation] = []
        self.inputs: list[tuple[int, ...]] = []
        head, nodes = file.input, list(file.nodes)
        if file.tensors[head].kind == "FLOAT32":  # QUANTIZE
            head = nodes.pop(0).outputs[0]
        self.entry = file.tensors[head].grid()
        self.grids: dict[int, Quantizer] = {head: self.entry}
        self.places: dict[int, int] = {head: 0}
        self.output = file.output
        if nodes and nodes[-1].kind == "DEQUANTIZE" and nodes[-1].outputs == (file.output,):
            self.output = nodes.pop().inputs[0]
        self.zeros = [torch.zeros(1, *file.shape, dtype=torch.int64)]
        for node in nodes:
            self._add(node)

    def network(self) -> ops.DeployedNetwork:
        if self.output not in self.places or self.places[self.output] != len(self.operations):
            raise FileFormatError("its output is not the result of its last operator")
        return ops.DeployedNetwork(self.file.shape, self.entry, self.operations, self.inputs, RUNTIME)

    def _add(self, node: TfliteNode) -> None:
        handler = _HANDLERS.get(node.kind)
        if handler is None:
            node.refuse("torchreach has no rule for it on integer codes")
        if len(node.outputs) != 1 or not node.inputs:
            node.refuse("it must have inputs and one output")
        kinds = {self.file.tensors[i].kind for i in (*node.outputs, *(i for i in node.inputs if i in self.places))}
        if node.kind != "QUANTIZE" and kinds != {"INT8"}:
            node.refuse(f"its values must be int8 codes, got {', '.join(sorted(kinds))}")
        operation = handler(self, node)
        operation.activation = node.kind.lower() if node.kind in _RELUS else activation(node)
        reads = tuple(i for i in node.inputs if i in self.places)
        if isinstance(operation, ops.Added | ops.Multiplied):
            reads = tuple(node.inputs[:2])
            for i in reads:
                self._hold(node, i)
        elif not isinstance(operation, ops.Joined):
            reads = node.inputs[:1]
        if not reads or not all(i in self.places for i in reads):
            node.refuse("it reads a constant where a computed value is needed")
        self._put(operation, tuple(self.places[i] for i in reads), node)
        self.grids[node.outputs[0]], self.places[node.outputs[0]] = operation.grid, len(self.operations)

    def _put(self, operation: ops.Operation, places: tuple[int, ...], node: TfliteNode) -> None:
        self.operations.append(operation)
        self.inputs.append(places)
        try:
            found = operation(*(self.zeros[i] for i in places))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise FileFormatError(f"operator {node.place} ({node.name!r}, {node.kind}): {reason}") from None
        wanted = self.file.tensors[node.outputs[0]].shape
        if not isinstance(operation, ops.Constant) and tuple(found.shape[1:]) != wanted[1:]:
            raise FileFormatError(
                f"operator {node.place} ({node.name!r}, {node.kind}): its result is {tuple(found.shape[1:])}, and the "
                f"file says {wanted[1:]}"
            )
        self.zeros.append(found)

    def _hold(self, node: TfliteNode, i: int) -> None:
        """A constant of the file, as an operation without inputs."""
        if i in self.places:
            return
        tensor = constant(self.file, node, node.inputs.index(i), "operand")
        if tensor.kind != "INT8":
            node.refuse(f"its constant must be int8 codes, got {tensor.kind}")
        value = tensor.numbers()
        value = value if value.ndim == len(self.file.tensors[node.outputs[0]].shape) else value[None]
        self._put(ops.Constant(tensor.name, tensor.grid(), value), (), node)
        self.places[i] = len(self.operations)
        self.grids[i] = tensor.grid()

    def _grid(self, node: TfliteNode, rule: Requantise | None, kind: str | None = None) -> Quantizer:
        """The grid of a result: clamped as the fused activation says."""
        grid = self.file.tensors[node.outputs[0]].grid()
        lowest, highest = grid.lowest, grid.highest
        below, above = _LIMITS[activation(node) if kind is None else kind]
        if below is not None:
            lowest = max(lowest, self._code(grid, below))
        if above is not None:
            highest = min(highest, self._code(grid, above))
        if lowest > highest:
            node.refuse(f"its activation leaves no codes on the grid {grid}")
        return grid.changed(lowest=lowest, highest=highest, rule=rule)

    @staticmethod
    def _code(grid: Quantizer, value: float) -> int:
        return int(grid.zero_point) + int(away(torch.tensor(value) / grid.scale.float()))

    def _source(self, node: TfliteNode, at: int = 0) -> Quantizer:
        i = node.inputs[at]
        return self.grids[i] if i in self.grids else self.file.tensors[i].grid()

    def _sums(self, node: TfliteNode) -> ops.Sums:
        source, target = self._source(node), self.file.tensors[node.outputs[0]].grid()
        stored, bias = constant(self.file, node, 1, "weight"), bias_of(self.file, node)
        if stored.kind != "INT8" or not len(stored.scale):
            node.refuse(f"weights must be int8 codes with scales, got {stored.kind}")
        if bias is not None and bias.kind != "INT32":
            node.refuse(f"the bias must be int32, got {bias.kind}")
        dense, several = node.kind == "FULLY_CONNECTED", len(stored.scale) > 1
        if stored.zero_point.any() and (several or not dense):
            node.refuse("weights with a zero point must have one scale, and be of a fully connected layer")
        if several and stored.axis != (3 if node.kind == "DEPTHWISE_CONV_2D" else 0):
            node.refuse(f"weights must have one scale for each output channel, got scales along axis {stored.axis}")
        weight = stored.numbers().double() - float(stored.zero_point[0])
        added = None if bias is None else bias.numbers().double()
        scale = torch.from_numpy(stored.scale.copy()).double()
        scale = scale if several else scale[0]
        unit = source.scale * scale
        rule = (DoubleFloat if dense else FixedPoint)(unit, unit / target.scale)
        largest = max(abs(end - int(source.zero_point)) for end in (source.lowest, source.highest))
        if dense:
            layer, window, sides = linear(self.file, node, weight, added), None, (0, 0, 0, 0)
        else:
            layer, window = convolution(self.file, node, weight, added)
            sides = window.sides
        size = layer.weight.detach().abs().flatten(1).sum(1) * largest + (0 if added is None else added.abs())
        if bool((size * (unit / target.scale).clamp(min=1) * 2 > LARGEST).any()):
            node.refuse("its sums may leave int32, where kernels overflow")
        return ops.Sums(node.name, node.kind, self._grid(node, rule), layer, source, scale, sides=sides, last=not dense)

    def _same_grid(self, node: TfliteNode, inputs: int = 1) -> None:
        target = self.file.tensors[node.outputs[0]].grid()
        if not all(self._source(node, k).same_grid(target) for k in range(inputs)):
            node.refuse("its inputs must have the scale and the zero point of its output")

    def _average_pool_2d(self, node: TfliteNode) -> ops.Operation:
        self._same_grid(node)
        source, window = self._source(node), pool(self.file, node)
        height, width = self.file.tensors[node.inputs[0]].shape[1:3]
        rule = Mean(window.counts((height, width)), source.scale, int(source.zero_point))
        layer: Any = nn.AvgPool2d(window.kernel, window.stride, divisor_override=1)
        return ops.AveragePool(node.name, node.kind, self._grid(node, rule), layer, window.sides, last=True)

    def _max_pool_2d(self, node: TfliteNode) -> ops.Operation:
        self._same_grid(node)
        window = pool(self.file, node)
        grid = self._grid(node, None)
        return ops.MaxPool(node.name, node.kind, grid, window.kernel, window.stride, window.sides, last=True)

    def _mean(self, node: TfliteNode) -> ops.Operation:
        source, target = self._source(node), self.file.tensors[node.outputs[0]].grid()
        axes = axes_of(self.file, node)
        shape = self.file.tensors[node.inputs[0]].shape
        count = int(np.prod([shape[a] for a in axes]))
        rule = FixedPoint(source.scale / count, source.scale / target.scale, count)
        keep = bool(node.option("keepDims", False))
        return ops.MeanOver(node.name, node.kind, self._grid(node, rule, ""), source, axes, keep, count)

    def _reshape(self, node: TfliteNode) -> ops.Operation:
        self._same_grid(node)
        before, after = (self.file.tensors[i].shape for i in (node.inputs[0], node.outputs[0]))
        if not after or before[0] != after[0]:
            node.refuse(f"it must keep the batch axis, got {before} to {after}")
        return ops.Rearranged(node.name, node.kind, self._source(node), Reshape(after[1:]))

    def _pad(self, node: TfliteNode) -> ops.Operation:
        self._same_grid(node)
        return ops.Padded(node.name, node.kind, self._source(node), sizes_of(self.file, node))

    def _concatenation(self, node: TfliteNode) -> ops.Operation:
        self._same_grid(node, len(node.inputs))
        return ops.Joined(node.name, node.kind, self._grid(node, None), axis_of(self.file, node))

    def _quantize(self, node: TfliteNode) -> ops.Operation:
        if self.file.tensors[node.inputs[0]].kind not in CODES:
            node.refuse("floating-point operators among quantised ones are not supported")
        source, target = self._source(node), self.file.tensors[node.outputs[0]].grid()
        return self._rescaled(node, source.scale / target.scale, "")

    def _relu(self, node: TfliteNode, kind: str = "relu") -> ops.Operation:
        source, target = self._source(node), self.file.tensors[node.outputs[0]].grid()
        return self._rescaled(node, (source.scale.float() / target.scale.float()).double(), kind)

    def _relu6(self, node: TfliteNode) -> ops.Operation:
        return self._relu(node, "relu6")

    def _relu_n1_to_1(self, node: TfliteNode) -> ops.Operation:
        return self._relu(node, "relu_n1_to_1")

    def _rescaled(self, node: TfliteNode, factor: Tensor, kind: str) -> ops.Operation:
        source = self._source(node)
        rule = FixedPoint(source.scale, factor)
        if int(rule.shift) > 20:
            node.refuse("its result may leave int32, where kernels overflow")
        return ops.Rescaled(node.name, node.kind, self._grid(node, rule, kind), source)

    def _sum(self, node: TfliteNode, sign: int = 1) -> ops.Operation:
        first, second = self._source(node, 0), self._source(node, 1)
        target = self.file.tensors[node.outputs[0]].grid()
        if node.option("potScaleInt16", False) and target.highest > 127:
            node.refuse("16 bit sums are not supported")
        twice = 2 * torch.maximum(first.scale, second.scale)
        total = twice / (2.0**ops.Added.BITS * target.scale)
        if sign > 0 and not bool(total < 1):
            node.refuse("its output's scale must not be so much finer than its inputs'")
        factors = tuple(torch.stack(fixed_point(part)) for part in (first.scale / twice, second.scale / twice, total))
        return ops.Added(node.name, node.kind, self._grid(node, None), (first, second), factors, sign)  # type: ignore

    def _sub(self, node: TfliteNode) -> ops.Operation:
        return self._sum(node, -1)

    def _mul(self, node: TfliteNode) -> ops.Operation:
        first, second = self._source(node, 0), self._source(node, 1)
        target = self.file.tensors[node.outputs[0]].grid()
        product = first.scale.float() * second.scale.float()
        rule = FixedPoint(first.scale * second.scale, (product / target.scale.float()).double())
        if int(rule.shift) > 14:
            node.refuse("its result may leave int32, where kernels overflow")
        return ops.Multiplied(node.name, node.kind, self._grid(node, rule), (first, second))

    def _softmax(self, node: TfliteNode) -> ops.Operation:
        source, target = self._source(node), self.file.tensors[node.outputs[0]].grid()
        if int(target.zero_point) != -128 or abs(float(target.scale) * 256 - 1) > 1e-3:
            node.refuse("its output must have the scale 1/256 and the zero point -128")
        if self.file.output != node.outputs[0] and self.output != node.outputs[0]:
            node.refuse("it is supported as the last operator alone")
        beta = float(node.option("beta", 1.0))
        if not 0 < beta < 1e3:
            node.refuse(f"beta must be positive, got {beta}")
        return ops.Softmax(node.name, node.kind, self._grid(node, None, ""), float(source.scale), beta)


_HANDLERS = {
    "FULLY_CONNECTED": _Codes._sums,
    "CONV_2D": _Codes._sums,
    "DEPTHWISE_CONV_2D": _Codes._sums,
    "AVERAGE_POOL_2D": _Codes._average_pool_2d,
    "MAX_POOL_2D": _Codes._max_pool_2d,
    "MEAN": _Codes._mean,
    "RESHAPE": _Codes._reshape,
    "PAD": _Codes._pad,
    "CONCATENATION": _Codes._concatenation,
    "QUANTIZE": _Codes._quantize,
    "RELU": _Codes._relu,
    "RELU6": _Codes._relu6,
    "RELU_N1_TO_1": _Codes._relu_n1_to_1,
    "ADD": _Codes._sum,
    "SUB": _Codes._sub,
    "MUL": _Codes._mul,
    "SOFTMAX": _Codes._softmax,
}
