"""Walks a quantised ONNX file node by node: values, grids, QuantizeLinear and DequantizeLinear.

`read.onnx_codes_operations` has the operators on codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from torchreach.core.errors import InvalidNetworkError, UnsupportedLayerError
from torchreach.graph import deployed as ops
from torchreach.graph.quantizer import Quantizer
from torchreach.read.onnx_fold import FOLDED, folded

RUNTIME = "onnxruntime, CPU"
CODES = {np.dtype(np.int8): (-128, 127), np.dtype(np.uint8): (0, 255)}
DYNAMIC = (
    "its scales are computed from each input (quantize_dynamic): no fixed grid to certify; quantise the network with "
    "quantize_static"
)


@dataclass(frozen=True, eq=False)
class Value:
    """A computed value: place of its codes in the network, their grid; real: a float view of them.

    For what is not quantised yet: `makes`, which adds the operation once the grid of its result is known; relu.
    """

    place: int
    grid: Quantizer | None
    shape: tuple[int, ...]
    real: bool = False
    makes: Any = None
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Stored:
    """A dequantised constant: codes, scale [] or [C], zero point likewise, axis."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int


class CodesWalk:
    """The network so far; `handlers` by the operator's name."""

    handlers: ClassVar[dict[str, Callable[[Any], Value | Stored]]] = {}

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}
        self.constants: dict[str, Any] = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise UnsupportedLayerError(
                f"torchreach needs a network of one input and one output, got {len(inputs)} and {len(graph.output)}"
            )
        sizes = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim][1:]
        if not sizes or None in sizes:
            raise UnsupportedLayerError(f"input {inputs[0].name!r} must have fixed feature sizes, got {sizes}")
        self.shape = tuple(int(n) for n in sizes if n is not None)
        self.operations: list[ops.Operation] = []
        self.inputs: list[tuple[int, ...]] = []
        self.entry: Quantizer | None = None
        self.values: dict[str, Value | Stored] = {inputs[0].name: Value(0, None, self.shape, real=True)}
        self.zeros = [torch.zeros(1, *self.shape, dtype=torch.int64)]
        self.readers = Counter(n for node in graph.node for n in node.input)
        self.node = graph.node[0]
        self.position = 0
        for self.position, self.node in enumerate(graph.node):
            self._add()
        self.output = self.values.get(graph.output[0].name)

    def network(self) -> ops.DeployedNetwork:
        output = self.output
        if not isinstance(output, Value) or self.entry is None:
            raise UnsupportedLayerError("the output does not depend on the input by quantised operators")
        if output.makes is not None:
            raise UnsupportedLayerError(
                "the last operator is not followed by QuantizeLinear: its result is not on a grid"
            )
        if output.place != len(self.operations):
            raise UnsupportedLayerError("the output is not the result of the last operator")
        return ops.DeployedNetwork(self.shape, self.entry, self.operations, self.inputs, RUNTIME)

    def refuse(self, reason: str) -> NoReturn:
        name = self.node.name or (self.node.output[0] if self.node.output else "")
        raise UnsupportedLayerError(f"node {self.position} ({name!r}, {self.node.op_type}): {reason}")

    # -- the walk ---------------------------------------------------------------------------------------

    def _add(self) -> None:
        node = self.node
        names = [n for n in node.input if n]
        for n in names:
            if n not in self.constants and n not in self.values:
                self.refuse(f"it reads {n!r}, which no node before it computes")
        if all(n in self.constants for n in names) and node.op_type not in ("DequantizeLinear",):
            self._fold()
            return
        if node.op_type.startswith("Dynamic"):
            self.refuse(DYNAMIC)
        handler = self.handlers.get(node.op_type)
        if handler is None or (node.domain not in ("", "ai.onnx", "com.microsoft")):
            self.refuse("torchreach has no rule for it on integer codes")
        self.values[node.output[0]] = handler(self)

    def _fold(self) -> None:
        node = self.node
        if node.op_type not in FOLDED | {"QuantizeLinear"}:
            self.refuse("torchreach does not evaluate it on constants")
        self.constants.update(zip(node.output, folded(node, self.constants, self.opsets), strict=False))

    def _option(self, key: str, default: Any = None) -> Any:
        found = [onnx.helper.get_attribute_value(a) for a in self.node.attribute if a.name == key]
        return found[0] if found else default

    def _constant(self, at: int, default: Any = None) -> Any:
        """Input number `at`, a constant array; the default where it is left out."""
        name = self.node.input[at] if at < len(self.node.input) else ""
        if not name:
            return default
        if name not in self.constants:
            self.refuse(f"its input {at} must be a constant")
        return self.constants[name]

    def _value(self, at: int = 0, *, real: bool | None = None) -> Value:
        value = self.values.get(self.node.input[at])
        if not isinstance(value, Value):
            self.refuse(f"its input {at} must depend on the network's input")
        if value.makes is not None or value.grid is None or (real is not None and value.real is not real):
            self.refuse("it is a floating-point operator outside of a dequantised and quantised stretch")
        return value

    def _put(self, operation: ops.Operation, places: tuple[int, ...], relu: bool = False) -> Value:
        operation.activation = "relu" if relu else ""
        self.operations.append(operation)
        self.inputs.append(places)
        self.zeros.append(operation(*(self.zeros[i] for i in places)))
        return Value(len(self.operations), operation.grid, tuple(self.zeros[-1].shape[1:]))

    def _name(self) -> str:
        return self.node.name or self.node.output[0]

    def _grid_at(self, at: int) -> Quantizer:
        """The grid that inputs `at` (scale) and the next one (zero point) say."""
        scale, zero = np.asarray(self._constant(at)), self._constant(at + 1, np.zeros((), np.uint8))
        return self._grid(scale, np.asarray(zero))

    def _grid(self, scale: np.ndarray, zero: np.ndarray) -> Quantizer:
        if zero.dtype not in CODES:
            self.refuse(f"activations must be int8 or uint8 codes, got {zero.dtype}")
        lowest, highest = CODES[zero.dtype]
        scales, zeros = torch.from_numpy(scale.astype(np.float64)), torch.from_numpy(zero.astype(np.int64))
        return Quantizer(scales, zeros, lowest, highest, name=self._name())

    # -- QuantizeLinear and DequantizeLinear ------------------------------------------------------------

    def _quantize(self) -> Value:
        grid = self._grid_at(1)
        value = self.values[self.node.input[0]]
        assert isinstance(value, Value)
        if value.makes is not None:
            return value.makes(grid.with_relu() if value.relu else grid)
        if value.grid is None:  # the network's input, rearranged perhaps
            if self.entry is not None and not self.entry.same_grid(grid):
                self.refuse("the network's input must be quantised on one grid")
            self.entry = grid
            return replace(value, grid=grid, real=False)
        if not value.real or not value.grid.same_grid(grid) or value.grid.highest != grid.highest:
            self.refuse("codes are quantised again, on another grid")
        return replace(value, real=False)

    def _dequantize(self) -> Value | Stored:
        name = self.node.input[0]
        if name in self.constants:
            scale = np.asarray(self._constant(1), dtype=np.float32)
            codes = np.asarray(self.constants[name])
            zero = np.asarray(self._constant(2, np.zeros(scale.shape, codes.dtype)))
            if not bool((np.isfinite(scale) & (scale > 0)).all()):
                raise InvalidNetworkError(f"scales must be positive and finite, those of {self._name()!r} are not")
            return Stored(codes, scale, zero, int(self._option("axis", 1)))
        value, grid = self._value(real=False), self._grid_at(1)
        assert value.grid is not None
        if grid.lowest < 0 and max(self.readers[name], self.readers[self.node.output[0]]) > 1:
            self.refuse(
                "signed codes that two operators read are executed in several ways; quantise with unsigned activations "
                "(QuantType.QUInt8), or to QOperator"
            )
        if not value.grid.same_grid(grid):
            self.refuse("it must have the scale and the zero point of the codes that it reads")
        return replace(value, real=True)
