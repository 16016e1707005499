"""Walks a quantised ONNX file node by node: values, grids, QuantizeLinear and DequantizeLinear.

`read.onnx_codes_operations` has the operators on codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, NoReturn

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from torchreach.core.errors import FileFormatError, InvalidNetworkError, TorchreachError, UnsupportedLayerError
from torchreach.graph import deployed as ops
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.requantise import SingleQuotient
from torchreach.read.onnx_fold import FOLDED, folded

RUNTIME = "onnxruntime, CPU"
LARGEST_VALUE = 2**26  # numbers of one value: a damaged file may ask for any size
CODES = {np.dtype(np.int8): (-128, 127), np.dtype(np.uint8): (0, 255)}
DYNAMIC = (
    "its scales are computed from each input (quantize_dynamic): no fixed grid to certify; quantise the network with "
    "quantize_static"
)

FLOATING = "onnxruntime has no integer kernels of these, and sums in float32 in an order of its own"
MERGED = "codes are quantised again on another grid, which onnxruntime merges into a third one"
INTEGERS = "its sums stay integers, which floating-point operators scale; quantise with quantize_static, to codes"


@dataclass(frozen=True, eq=False)
class Value:
    """A computed value: place of its codes in the network, their grid; real: a float view of them.

    direct: it is the very result of a DequantizeLinear. paired: the codes of that are of a QuantizeLinear that nothing
    else reads. For what is not quantised yet: `makes`, which adds the operation once the grid of its result is known;
    ends: of a Relu or Clip in between.
    """

    place: int
    grid: Quantizer | None
    shape: tuple[int, ...]
    real: bool = False
    direct: bool = False
    paired: bool = False
    makes: Any = None
    ends: tuple[float, float] | None = None


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
        # Since version 4 of the format, a stored tensor that is an input too is no constant.
        inputs = [value for value in graph.input if value.name not in self.constants or model.ir_version >= 4]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise UnsupportedLayerError(
                f"torchreach needs a network of one input and one output, got {len(inputs)} and {len(graph.output)}"
            )
        if model.functions:
            raise UnsupportedLayerError(f"torchreach does not read functions, got {model.functions[0].name!r}")
        if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            raise UnsupportedLayerError(f"input {inputs[0].name!r} must hold float32 numbers")
        sizes = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim][1:]
        if not sizes or None in sizes:
            raise UnsupportedLayerError(f"input {inputs[0].name!r} must have fixed feature sizes, got {sizes}")
        self.shape = tuple(int(n) for n in sizes if n is not None)
        if prod(self.shape) > LARGEST_VALUE:
            raise UnsupportedLayerError(f"input {inputs[0].name!r} must have fewer than {LARGEST_VALUE} numbers")
        self.operations: list[ops.Operation] = []
        self.inputs: list[tuple[int, ...]] = []
        self.entry: Quantizer | None = None
        self.values: dict[str, Value | Stored] = {inputs[0].name: Value(0, None, self.shape, real=True)}
        self.zeros = [torch.zeros(1, *self.shape, dtype=torch.int64)]
        self.nodes, self.node, self.position = list(graph.node), graph.node[0], 0
        self.readers = Counter([n for node in graph.node for n in node.input] + [graph.output[0].name])
        self.kinds = {n: node.op_type for node in graph.node for n in node.output}
        self.readings = {n: node.op_type for node in graph.node for n in node.input}  # of what has one reader
        for self.position, self.node in enumerate(graph.node):
            try:
                self._add()
            except TorchreachError:
                raise
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise FileFormatError(f"{self._place()} is damaged: {reason}") from None
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

    def refuse(self, reason: str, at: int | None = None) -> NoReturn:
        """Raises UnsupportedLayerError about the node at hand, or number `at`."""
        raise UnsupportedLayerError(f"{self._place(at)}: {reason}")

    def _place(self, at: int | None = None) -> str:
        at = self.position if at is None else at
        node = self.nodes[at]
        name = node.name or (node.output[0] if node.output else "")
        return f"node {at} ({name!r}, {node.op_type})"

    def _bounded(self, *sizes: int) -> None:
        """Refuses a value of so many numbers."""
        if min(sizes) < 0 or prod(sizes) > LARGEST_VALUE:
            self.refuse(f"its values must have fewer than {LARGEST_VALUE} numbers, got {' x '.join(map(str, sizes))}")

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
        if node.op_type in ("ConvInteger", "MatMulInteger"):
            self.refuse(INTEGERS)
        if self._option("channels_last", 0):
            self.refuse("channels_last must be 0")
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

    def _computed(self, at: int = 0) -> Value:
        """Input number `at`, which depends on the network's input."""
        value = self.values.get(self.node.input[at])
        if not isinstance(value, Value):
            self.refuse(f"its input {at} must depend on the network's input")
        if value.makes is not None and self.readers[self.node.input[at]] > 1:
            self.refuse("it reads a floating-point result that is read twice: onnxruntime does not fuse such layers")
        return value

    def _value(self, at: int = 0, *, real: bool | None = None) -> Value:
        value = self._computed(at)
        if value.makes is not None or value.grid is None or (real is not None and value.real is not real):
            self.refuse("it is a floating-point operator outside of a dequantised and quantised stretch")
        return value

    def _codes(self, at: int) -> Value:
        """Codes as input number `at` of an operator on codes, whose scale and zero point are the next two."""
        value, grid = self._value(at, real=False), self._grid_at(at + 1)
        assert value.grid is not None
        if not same(value.grid, grid):
            self.refuse(f"its input {at} must have the scale and the zero point of the codes that it reads")
        return value

    def _put(self, operation: ops.Operation, places: tuple[int, ...], relu: bool = False) -> Value:
        operation.activation = "relu" if relu else ""
        self.operations.append(operation)
        self.inputs.append(places)
        self.zeros.append(operation(*(self.zeros[i] for i in places)))
        self._bounded(*self.zeros[-1].shape)
        return Value(len(self.operations), operation.grid, tuple(self.zeros[-1].shape[1:]))

    def _name(self) -> str:
        return self.node.name or self.node.output[0]

    def _grid_at(self, at: int) -> Quantizer:
        """The grid that inputs `at` (scale) and the next one (zero point) say."""
        scale, zero = np.asarray(self._constant(at)), self._constant(at + 1, np.zeros((), np.uint8))
        return self._grid(scale, np.asarray(zero))

    def _grid(self, scale: np.ndarray, zero: np.ndarray) -> Quantizer:
        if zero.dtype not in CODES:
            self.refuse(f"activations must be int8 or uint8 codes, got {zero.dtype}: {FLOATING}")
        if scale.dtype != np.float32:
            self.refuse(f"scales must be float32 numbers, got {scale.dtype}")
        lowest, highest = CODES[zero.dtype]
        scales, zeros = torch.from_numpy(scale.astype(np.float64)), torch.from_numpy(zero.astype(np.int64))
        return Quantizer(scales, zeros, lowest, highest, name=self._name())

    def _sides(self, shape: tuple[int, ...]) -> ops.Sides:
        """The padding of a window over values [C, H, W]: left, right, top, bottom."""
        if self._option("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            self.refuse("auto_pad must be NOTSET: write the padding out")
        top, left, bottom, right = (int(n) for n in self._option("pads", (0, 0, 0, 0)))
        if min(top, left, bottom, right) < 0:
            self.refuse("padding must not be negative")
        self._bounded(shape[0], shape[1] + top + bottom, shape[2] + left + right)
        return left, right, top, bottom

    # -- QuantizeLinear and DequantizeLinear ------------------------------------------------------------

    def _quantize(self) -> Value:
        if self._option("output_dtype", 0) and len(self.node.input) < 3:
            self.refuse("it must name its zero point")
        grid, value = self._grid_at(1), self._computed()
        if value.makes is not None:
            return value.makes(grid)
        if value.grid is None:  # the network's input, rearranged perhaps
            if self.entry is not None and not same(self.entry, grid):
                self.refuse("the network's input must be quantised on one grid")
            if self.entry is None:
                self.entry = grid
                for operation in self.operations:
                    operation.grid = grid
            return replace(value, grid=grid, real=False)
        if not value.real:
            self.refuse("it must read floating-point numbers")
        if same(value.grid, grid):
            return replace(value, real=False)
        if value.direct:
            self.refuse(MERGED)
        return self._rescaled(value, grid)

    def _rescaled(self, value: Value, grid: Quantizer) -> Value:
        """Codes dequantised and quantised on another grid, in float32."""
        assert value.grid is not None
        grid = grid.changed(rule=SingleQuotient(value.grid.scale, grid.scale))
        operation = ops.Rescaled(self._name(), self.node.op_type, grid, value.grid)
        return self._put(operation, (value.place,), relu=grid.lowest == int(grid.zero_point))

    def _dequantize(self) -> Value | Stored:
        if self._option("block_size", 0):
            self.refuse("scales must be of tensors or channels, not of blocks")
        name, result = self.node.input[0], self.node.output[0]
        if name in self.constants:
            scale, codes = np.asarray(self._constant(1)), np.asarray(self.constants[name])
            zero = np.asarray(self._constant(2, np.zeros(scale.shape, codes.dtype)))
            if scale.dtype != np.float32:
                self.refuse(f"scales must be float32 numbers, got {scale.dtype}")
            if not bool((np.isfinite(scale) & (scale > 0)).all()):
                raise InvalidNetworkError(f"scales must be positive and finite, those of {self._name()!r} are not")
            return Stored(codes, scale, zero, int(self._option("axis", 1)) % max(codes.ndim, 1))
        paired = self.kinds.get(name) == "QuantizeLinear" and self.readers[name] == self.readers[result] == 1
        return replace(self._codes(0), real=True, direct=True, paired=paired)


def same(first: Quantizer, second: Quantizer) -> bool:
    """Whether codes of both mean the same, and are of one type."""
    return first.same_grid(second) and first.highest == second.highest
