"""Operators of ONNX files: what each adds to a builder.

A handler takes the node, whose first input that depends on the network's input is at hand in the builder; handlers of
traced graphs (`graph_operations`) do the work wherever the operator means the same. Returns None, or the places of
several outputs in the builder.
"""

# Handlers share one signature.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from torchreach.graph.layers import Rearrange, Reshape
from torchreach.graph.lowering import PiecewiseLinear
from torchreach.graph.smooth import BY_ONNX
from torchreach.read.joins import extremum, slices
from torchreach.read.onnx_layers import OnnxLayers, OnnxNode, OnnxValue, tensor

_ARITHMETIC = {"Add": ("add", "add"), "Sub": ("sub", "rsub"), "Mul": ("mul", "mul"), "Div": ("div", None)}
SELU = {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}
_JOINS = {"Add": "add", "Sub": "sub", "Sum": "add"}
# Bits of the significand and of the exponent; of a whole number, what keeping it takes.
_T = onnx.TensorProto
_FLOATS: dict[int, tuple[int, int]] = {_T.FLOAT16: (11, 5), _T.BFLOAT16: (8, 8), _T.FLOAT: (24, 8), _T.DOUBLE: (53, 11)}
_HALF = {_T.FLOAT16: torch.float16, _T.BFLOAT16: torch.bfloat16}
DIGITS: dict[int, tuple[int, int]] = {
    **_FLOATS,
    _T.UINT8: (8, 4),
    _T.INT8: (8, 4),
    _T.UINT16: (16, 5),
    _T.INT16: (16, 5),
    _T.INT32: (32, 6),
}


class OnnxOperations(OnnxLayers):
    """The handlers, by lower-case name of the operator; `read.onnx` walks the file and calls them."""

    kind: int  # element type of the value at hand

    def handler(self, op: str) -> Callable[[OnnxNode], Sequence[int] | None] | None:
        if op in _ARITHMETIC:
            return self._elementwise
        if op in BY_ONNX:
            return self._smooth
        return getattr(self, f"_onnx_{op.lower()}", None)

    def _arithmetic(self, node: Any, operation: str, operand: Any) -> None:
        self.builder.arithmetic(operation, torch.tensor(float(operand), dtype=torch.float64), node.name)

    def _axis(self, node: OnnxNode, axis: int) -> int:
        """An axis of the file as the builder counts it, the batch being 0."""
        rank = len(self._sizes())
        if not -rank <= axis < rank:
            self._refuse(node, node.op, f"its axis must lie in [-{rank}, {rank}), got {axis}")
        return self._axis_of(node, axis % rank + (not self.batched))

    # Of several values, and arithmetic with constants.

    def _elementwise(self, node: OnnxNode) -> None:
        if "axis" in node.attributes:
            self._refuse(node, node.op, "broadcasting along an axis (opset 6 and older) is not supported")
        if len(node.values) > 1:
            if node.op == "Mul":
                self._join_mul(node, *node.values)
                return
            if node.op not in _JOINS:
                self._refuse(node, node.op, "it combines two values that both depend on the input")
            self._join(node, _JOINS[node.op])
            return
        first = isinstance(node.inputs[0], OnnxValue)
        waiting, self.product = self.product, None
        if waiting is not None and waiting[0] == self.builder.at and node.alone and self._bias(node, waiting[1]):
            return
        operation = _ARITHMETIC[node.op][0 if first else 1]
        if operation is None:
            self._refuse(node, node.op, "division by a value that depends on the input")
        if operation in ("add", "sub") and not node.constant.any():
            return
        self.builder.arithmetic(operation, tensor(node.constant), node.name)

    def _bias(self, node: OnnxNode, product: nn.Linear) -> bool:
        """Folds `x W + b` into one layer; whether that was possible."""
        constant, rows = node.constant, (1, *self.shape)
        if node.op not in ("Add", "Sub") or constant.size != product.out_features or prod(rows) != constant.size:
            return False
        if np.broadcast_shapes(rows, constant.shape) != rows:  # [m, 1] + [m] is a matrix
            return False
        if node.op == "Sub" and constant is node.inputs[0]:
            return False
        bias = tensor(constant).reshape(-1)
        product.bias = nn.Parameter(-bias if node.op == "Sub" else bias)
        product.bias_apart = True  # type: ignore[assignment]  # two operations, each of which rounds in half precision
        return True

    def _join(self, node: OnnxNode, op: str) -> None:
        first, *others = (value.at for value in node.values)
        if len(node.values) < len(node.inputs):
            self._refuse(node, node.op, "all its values must depend on the input, got a constant")
        for other in others:
            self.builder.join(op, (first, other), node.name)
            first = self.builder.at

    def _onnx_sum(self, node: OnnxNode) -> None:
        self._join(node, "add")

    def _onnx_neg(self, node: OnnxNode) -> None:
        self._arithmetic(node, "mul", -1)

    def _onnx_max(self, node: OnnxNode) -> None:
        self._extremum(node, largest=True)

    def _onnx_min(self, node: OnnxNode) -> None:
        self._extremum(node, largest=False)

    def _extremum(self, node: OnnxNode, *, largest: bool) -> None:
        constants = [value for value in node.inputs if not isinstance(value, OnnxValue)]
        if any(value.size != 1 for value in constants):
            self._refuse(node, node.op, "all but single numbers must depend on the input")
        reduce(lambda a, b: self._larger(node, a, b, largest), (value.at for value in node.values))
        for value in constants:
            ends = (float(value), None) if largest else (None, float(value))
            self._op_clamp(node, None, *ends)

    def _larger(self, node: OnnxNode, a: int, b: int, largest: bool) -> int:
        extremum(self.builder, a, b, node.name, largest=largest)
        return self.builder.at

    def _onnx_concat(self, node: OnnxNode) -> None:
        if len(node.values) < len(node.inputs):
            self._refuse(node, node.op, "all its parts must depend on the input, got a constant")
        axis = self._axis(node, node.attributes["axis"])
        self.builder.join("cat", tuple(value.at for value in node.values), node.name, axis)

    # Functions of each feature.

    def _smooth(self, node: OnnxNode) -> None:
        given: dict[str, Any] = {
            key: value.decode() if isinstance(value, bytes) else value for key, value in node.attributes.items()
        }
        if node.op == "Selu":  # whose constants torch's has, too
            given = {key: value for key, value in given.items() if abs(value - SELU.get(key, np.inf)) > 1e-6}
        try:
            layer = BY_ONNX[node.op].called(**given)
        except TypeError as error:
            self._refuse(node, node.op, str(error))
        self.builder.append(layer, node.name)

    def _onnx_softmax(self, node: OnnxNode) -> None:
        self._op_softmax(node, None, self._axis(node, node.attributes.get("axis", len(self._sizes()) - 1)))

    def _onnx_logsoftmax(self, node: OnnxNode) -> None:
        self._op_log_softmax(node, None, self._axis(node, node.attributes.get("axis", len(self._sizes()) - 1)))

    def _onnx_relu(self, node: OnnxNode) -> None:
        self._op_relu(node, None)

    def _onnx_leakyrelu(self, node: OnnxNode) -> None:
        self._op_leaky_relu(node, None, node.attributes.get("alpha", 0.01))

    def _onnx_prelu(self, node: OnnxNode) -> None:
        if not isinstance(node.inputs[0], OnnxValue):
            self._refuse(node, node.op, "its slopes must be constant")
        slope = tensor(node.inputs[1])
        while slope.ndim and slope.shape[0] == 1:
            slope = slope[0]
        if slope.ndim > len(self.shape) or torch.broadcast_shapes(slope.shape, self.shape) != self.shape:
            self._refuse(node, node.op, f"slopes {tuple(slope.shape)} do not broadcast to features {self.shape}")
        self._pointwise(node, PiecewiseLinear.leaky(slope))

    def _onnx_clip(self, node: OnnxNode) -> None:
        ends = [node.given(1), node.given(2)]
        if any(isinstance(end, OnnxValue) for end in ends):
            self._refuse(node, node.op, "its ends must be constant")
        ends = [node.attributes.get(key) if end is None else end for key, end in zip(("min", "max"), ends, strict=True)]
        ends = [None if end is None or not np.isfinite(end) else float(end) for end in ends]
        if ends == [None, None]:
            self.builder.append(nn.Identity(), node.name)
        else:
            self._op_clamp(node, None, *ends)

    def _onnx_hardsigmoid(self, node: OnnxNode) -> None:
        scale, shift = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
        self._pointwise(node, PiecewiseLinear(((1.0, scale, shift), (-1.0, scale, shift - 1))))

    def _onnx_abs(self, node: OnnxNode) -> None:
        self._op_abs(node, None)

    def _onnx_identity(self, node: OnnxNode) -> None:
        self.builder.append(nn.Identity(), node.name)

    def _onnx_cast(self, node: OnnxNode) -> None:
        to = node.attributes["to"]
        reason = f"from {kind_name(self.kind)} to {kind_name(to)} it rounds"
        if self.builder.at == 0 and node.alone and to in _HALF and self.kind in (_T.FLOAT, _T.DOUBLE):
            # Nothing reads the input besides, which would see other numbers.
            self.builder.entry = _HALF[to], node.name, node.op, reason
        elif not _keeps_values(self.kind, to):
            self._refuse(node, node.op, reason)
        self.kind = to
        self.builder.append(nn.Identity(), node.name)

    def _onnx_dropout(self, node: OnnxNode) -> None:
        if node.given(2) is not None and bool(node.inputs[2]):
            self._refuse(node, node.op, "training_mode must be false")
        self.builder.append(nn.Dropout(), node.name)

    # Shapes, selections, sums.

    def _onnx_flatten(self, node: OnnxNode) -> None:
        axis = node.attributes.get("axis", 1)
        axis += len(self.shape) + 1 if axis < 0 else 0
        if axis != (1 if self.batched else 0):
            self._refuse(node, node.op, f"axis must keep the batch alone, got {axis}")
        self.batched = True
        self.builder.append(nn.Flatten(), node.name)

    def _onnx_reshape(self, node: OnnxNode) -> None:
        if not isinstance(node.inputs[0], OnnxValue) or len(node.values) > 1:
            self._refuse(node, node.op, "its shape must be constant")
        old = self._sizes()
        sizes = node.option(1, "shape")
        if node.attributes.get("allowzero") and 0 in sizes and 0 not in old:
            self._refuse(node, node.op, f"{old} does not fit into {sizes} with allowzero")
        new = [old[i] if n == 0 and i < len(old) else n for i, n in enumerate(sizes)]
        if new.count(-1) == 1:
            new[new.index(-1)] = prod(old) // max(1, -prod(new))
        if self.batched or (len(new) > 1 and new[0] == 1):
            if not new or new[0] != self.batch or len(new) < 2:
                self._refuse(node, node.op, f"it must keep the batch axis of {old}, got {new}")
            self.batched, new = True, new[1:]
        if prod(new) != prod(self.shape):
            self._refuse(node, node.op, f"{old} does not fit into {sizes}")
        self.builder.append(nn.Flatten() if len(new) == 1 else Reshape(tuple(new)), node.name)

    def _onnx_squeeze(self, node: OnnxNode) -> None:
        axes, old = node.option(1, "axes"), self._sizes()
        at = [i for i, n in enumerate(old) if n == 1] if axes is None else sorted(a % len(old) for a in axes)
        if self.batched and 0 in at:
            self._refuse(node, node.op, "it must keep axis 0, the batch: give its axes")
        if any(old[i] != 1 for i in at):
            self._refuse(node, node.op, f"axes {at} of {old} must have size 1")
        self._become([n for i, n in enumerate(old) if i not in at], node)

    def _onnx_unsqueeze(self, node: OnnxNode) -> None:
        new, axes = self._sizes(), node.option(1, "axes", [])
        for axis in sorted(a % (len(new) + len(axes)) for a in axes):
            if axis == 0 and self.batched:
                self._refuse(node, node.op, "axis 0 is the batch")
            self.batched |= axis == 0
            new.insert(axis, 1)
        self._become(new, node)

    def _become(self, sizes: list[int], node: OnnxNode) -> None:
        self.builder.append(Reshape(tuple(sizes[1:] if self.batched else sizes)), node.name)

    def _onnx_transpose(self, node: OnnxNode) -> None:
        order = node.attributes.get("perm", list(range(len(self._sizes())))[::-1])
        axes = list(order) if self.batched else [0, *(axis + 1 for axis in order)]
        self._op_permute(node, None, *axes)

    def _onnx_slice(self, node: OnnxNode) -> None:
        starts, ends = node.option(1, "starts"), node.option(2, "ends")
        axes = node.option(3, "axes") or list(range(len(starts)))
        for axis, start, end, step in zip(
            axes, starts, ends, node.option(4, "steps") or [1] * len(starts), strict=True
        ):
            place = self._axis(node, axis)
            index = range(self.shape[place - 1])[start:end:step]
            if step > 0:
                self._op_slice(node, None, place, index.start, index.stop, step)
            else:
                self.builder.append(Rearrange("index_select", place, torch.tensor(index, dtype=torch.long)), node.name)

    def _onnx_gather(self, node: OnnxNode) -> None:
        if not isinstance(node.inputs[0], OnnxValue):
            self._refuse(node, node.op, "its indices must be constant")
        axis = self._axis(node, node.attributes.get("axis", 0))
        size, index = self.shape[axis - 1], node.inputs[1]
        if ((index < -size) | (index >= size)).any():
            self._refuse(node, node.op, f"its indices must lie in [-{size}, {size}), got {index.tolist()}")
        index = tensor(index % size).long()
        if index.ndim == 0:
            self._op_select(node, None, axis, int(index))
            return
        shape = [*self.shape[: axis - 1], *index.shape, *self.shape[axis:]]
        self._op_index_select(node, None, axis, index.flatten())
        if index.ndim > 1:
            self.builder.append(Reshape(tuple(shape)), node.name)

    def _onnx_split(self, node: OnnxNode) -> list[int]:
        axis = self._axis(node, node.attributes.get("axis", 0))
        size = self.shape[axis - 1]
        part = -(-size // node.outputs)
        sizes = node.option(1, "split") or [max(0, min(part, size - i * part)) for i in range(node.outputs)]
        return slices(self.builder, self.builder.at, axis, sizes, node.name)

    def _onnx_pad(self, node: OnnxNode) -> None:
        pads, value = node.option(1, "pads"), node.given(2)
        value = node.attributes.get("value", 0.0) if value is None else float(value)
        if node.attributes.get("mode", b"constant") != b"constant" or value != 0:
            self._refuse(node, node.op, "torchreach supports padding by zeros")
        rank = len(self._sizes())
        axes = [a % rank for a in node.option(3, "axes") or range(rank)]
        before, after = [0] * rank, [0] * rank
        for k, axis in enumerate(axes):
            before[axis], after[axis] = pads[k], pads[k + len(axes)]
        if self.batched and (before[0], after[0]) != (0, 0):
            self._refuse(node, node.op, "axis 0 is the batch")
        self._pad(node, before[self.batched :], after[self.batched :])

    def _onnx_reducesum(self, node: OnnxNode) -> None:
        self._reduction(node, "sum")

    def _onnx_reducemean(self, node: OnnxNode) -> None:
        self._reduction(node, "mean")

    def _reduction(self, node: OnnxNode, op: str) -> None:
        axes, keep = node.option(1, "axes"), bool(node.attributes.get("keepdims", 1))
        if not axes and node.attributes.get("noop_with_empty_axes"):
            return
        places = sorted(self._axis(node, a) for a in axes or range(len(self._sizes())))
        if op == "mean" and len(self.shape) in (2, 3) and places == list(range(2, len(self.shape) + 1)):
            self._onnx_globalaveragepool(node)  # the mean over all places of each channel
            if not keep:
                self.builder.append(nn.Flatten(), node.name)
            return
        self._reduce(node, op, places, keep, None)


def _keeps_values(kind: int, to: int) -> bool:
    """Whether every number of one ONNX element type is one of the other."""
    if kind == to:
        return True
    return kind in DIGITS and to in _FLOATS and all(a <= b for a, b in zip(DIGITS[kind], _FLOATS[to], strict=True))


def kind_name(kind: int) -> str:
    return onnx.TensorProto.DataType.Name(kind)
