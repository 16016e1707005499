"""Operators of a quantised ONNX file on codes: layers, sums, pools, values side by side.

A handler adds an operation, or, where its grid is not known before a QuantizeLinear, gives what will add it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from torchreach.graph import deployed as ops
from torchreach.graph.kernels import IntegerLayer, Pairing
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.requantise import LARGEST, SingleFloat
from torchreach.graph.weights import linear_layer
from torchreach.read.onnx_codes_shapes import CodesShapes
from torchreach.read.onnx_codes_walk import CODES, FLOATING, MERGED, Stored, Value, same


@cache
def pairing() -> Pairing:
    """How onnxruntime adds unsigned codes times signed weights on this machine; exactly, where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return Pairing.EXACT
    helper, kinds = onnx.helper, onnx.TensorProto
    parts = [("s", kinds.FLOAT, 1.0), ("z", kinds.UINT8, 0), ("v", kinds.INT8, 0), ("t", kinds.FLOAT, 256.0)]
    stored = [helper.make_tensor(name, kind, (), [number]) for name, kind, number in parts]
    stored.append(helper.make_tensor("w", kinds.INT8, (2, 1), [127, 127]))
    node = helper.make_node("QLinearMatMul", ["x", "s", "z", "w", "s", "v", "t", "z"], ["y"])
    ends = [helper.make_tensor_value_info(name, kinds.UINT8, (1, size)) for name, size in (("x", 2), ("y", 1))]
    graph = helper.make_graph([node], "pair", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, 2), 255, np.uint8)})
    return Pairing.EXACT if int(np.asarray(found)[0, 0]) > 200 else Pairing.FBGEMM


class CodesOperations(CodesShapes):
    """The handlers."""

    # -- layers -----------------------------------------------------------------------------------------

    def _stored(self, at: int) -> Stored:
        value = self.values.get(self.node.input[at])
        if not isinstance(value, Stored):
            self.refuse(f"its input {at} must be a dequantised constant")
        return value

    def _bias(self, at: int, unit: np.ndarray) -> np.ndarray | None:
        """The bias of a QDQ layer as integers in units of the sum."""
        if at >= len(self.node.input) or not self.node.input[at]:
            return None
        value = self.values.get(self.node.input[at])
        if isinstance(value, Stored) and value.codes.dtype == np.int32 and not value.zero.any():
            if not np.allclose(value.scale, unit, rtol=1e-5):
                self.refuse("the bias must have the scale of the sum, scale of the input times scale of the weight")
            return value.codes
        self.refuse("the bias must be int32 codes, dequantised")

    def _layer(self) -> Value:
        """Conv, Gemm or MatMul between DequantizeLinear and QuantizeLinear."""
        value, stored = self._value(real=True), self._stored(1)
        assert value.grid is not None
        unit = np.float32(float(value.grid.scale)) * stored.scale
        bias = self._bias(2, unit)
        make = self._sums(value, stored, bias)
        return replace(value, makes=make)

    def _qlinear(self) -> Value:
        """QLinearConv, QGemm and QLinearMatMul: input, weight and result with their grids."""
        value = self._codes(0)
        gemm = self.node.op_type == "QGemm"
        weight, scale = self._constant(3), np.asarray(self._constant(4), dtype=np.float32)
        zero = np.asarray(self._constant(5, np.zeros(scale.shape, weight.dtype)))
        bias = self._constant(6 if gemm else 8) if self.node.op_type != "QLinearMatMul" else None
        axis = 0 if self.node.op_type == "QLinearConv" or (gemm and self._option("transB", 0)) else 1
        if gemm and len(self.node.input) < 9:
            self.refuse("its result must be codes")
        return self._sums(value, Stored(weight, scale, zero, axis), bias)(self._grid_at(7 if gemm else 6))

    def _sums(self, value: Value, stored: Stored, bias: np.ndarray | None) -> Any:
        """What adds the operation, given the grid of its result."""
        node, source = self.node, value.grid
        assert source is not None
        if stored.codes.dtype not in CODES:
            self.refuse(f"weights must be int8 or uint8 codes, got {stored.codes.dtype}: {FLOATING}")
        codes, scale, zero = (torch.from_numpy(np.array(part)) for part in (stored.codes, stored.scale, stored.zero))
        convolution = node.op_type in ("Conv", "QLinearConv")
        several = scale.numel() > 1
        if several and (zero.numel() != scale.numel() or stored.codes.shape[stored.axis] != scale.numel()):
            self.refuse("weights must have one scale and zero point for each output channel")
        along = [-1 if several and i == stored.axis else 1 for i in range(codes.ndim)]
        weight = codes.double() - zero.double().reshape(along if several else ())
        if not convolution:
            if (self._option("transA", 0), self._option("alpha", 1.0), self._option("beta", 1.0)) != (0, 1.0, 1.0):
                self.refuse("transA must be 0, alpha and beta 1")
            across = node.op_type in ("QLinearMatMul", "MatMul") or not self._option("transB", 0)
            weight = weight.t().contiguous() if across else weight
        if several and stored.axis != (0 if convolution or weight.shape == codes.shape else 1):
            self.refuse(f"weights must have one scale for each output channel, got scales along axis {stored.axis}")
        scale = scale.reshape(-1) if several else scale.reshape(())
        added = None if bias is None else torch.from_numpy(np.asarray(bias, dtype=np.float64)).reshape(-1)
        self._bounded(weight.shape[0], *(value.shape[1:] if convolution else value.shape[:-1]))
        layer, sides = self._convolution(value, weight, added) if convolution else (linear_layer(weight, added), None)
        reach = max(abs(end - int(source.zero_point)) for end in (source.lowest, source.highest))
        size = layer.weight.abs().flatten(1).sum(1) * reach + (0 if added is None else added.abs())
        if bool((size > LARGEST).any()):
            self.refuse("its sums may leave int32, where kernels overflow")
        name, kind, at = self._name(), node.op_type, self.position
        if source.lowest < 0 and stored.codes.dtype != np.int8:
            self.refuse("weights of signed codes must be int8: onnxruntime has no other integer kernel")

        def make(grid: Quantizer) -> Value:
            self._fused(at, grid, value)
            single = (source.scale.float() * scale) / grid.scale.float()
            unit = source.scale * scale.double()
            shape = (-1, 1, 1) if convolution and several else ()
            parts = [part.reshape(shape) if several and convolution else part for part in (unit, single)]
            integers = self._integers(name, kind, stored, source, layer if convolution else None, weight)
            rounded = grid.changed(rule=SingleFloat(*parts), layer=integers)
            relu = grid.lowest == int(grid.zero_point)  # to which `quantize_static` leaves a ReLU
            operation = ops.Sums(name, kind, rounded, layer, source, scale, sides=sides or (0, 0, 0, 0))
            return self._put(operation, (value.place,), relu)

        return make

    def _fused(self, at: int, grid: Quantizer, *values: Value) -> None:
        """Refuses what onnxruntime does not execute as one integer kernel: node `at`, whose result has this grid.

        Pairs of QuantizeLinear and DequantizeLinear of signed codes become unsigned; other signed codes stay, and a
        kernel takes one type alone.
        """
        if any(value.grid is None or value.grid.highest != grid.highest for value in values):
            self.refuse("what it reads and its result must have codes of one type", at)
        if self.nodes[at].op_type.startswith("Q") or grid.lowest >= 0:
            return
        result = self.node.output[0]
        ends = self.readers[result] == 1 and self.readings.get(result) == "DequantizeLinear"
        if not ends or not all(value.paired for value in values):
            self.refuse(
                "signed codes that two operators read are executed in several ways; quantise with unsigned activations "
                "(QuantType.QUInt8), or to QOperator",
                at,
            )

    def _integers(
        self, name: str, kind: str, stored: Stored, source: Quantizer, geometry: Any, weight: Tensor
    ) -> IntegerLayer | None:
        """What an x86 kernel of unsigned codes and signed weights reads; None where sums are exact everywhere.

        Of DequantizeLinear and QuantizeLinear it makes unsigned codes, where they are signed.
        """
        signed = source.lowest < 0
        if stored.codes.dtype != np.int8 or (signed and kind.startswith("Q")):
            return None
        if geometry is not None and weight.shape[1] == 1 and geometry.groups == len(weight):
            return None  # depthwise kernels multiply one by one
        zero = torch.from_numpy(stored.zero.astype(np.float64)).reshape(-1)
        scale = torch.from_numpy(stored.scale.astype(np.float64)).reshape(-1)
        count = len(weight)
        along = (-1, *[1] * (weight.ndim - 1)) if len(zero) > 1 else ()
        codes = weight + zero.reshape(along or ())
        return IntegerLayer(
            name,
            codes.to(torch.int64),
            scale.expand(count),
            zero.expand(count),
            None,
            float(source.scale),
            int(source.zero_point) + (128 if signed else 0),
            255,
            geometry,
            pairing=pairing(),
        )

    def _convolution(self, value: Value, weight: Tensor, bias: Tensor | None) -> tuple[nn.Conv2d, ops.Sides]:
        groups, channels = int(self._option("group", 1)), value.shape[0]
        if weight.ndim != 4 or len(value.shape) != 3 or weight.shape[1] * groups != channels:
            self.refuse(f"weights {tuple(weight.shape)} do not fit values {value.shape} in {groups} groups")
        sides = self._sides((max(weight.shape[0], channels), *value.shape[1:]))
        stride, dilation = (tuple(int(n) for n in self._option(key, (1, 1))) for key in ("strides", "dilations"))
        sizes: Any = (tuple(weight.shape[2:]), stride, 0, dilation, groups)
        layer = nn.Conv2d(channels, weight.shape[0], *sizes, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer, sides

    # -- sums, means, maxima ----------------------------------------------------------------------------

    def _sum(self) -> Value:
        values = [self._operand(0, 1), self._operand(1, 0)]
        return replace(values[0], makes=self._adds(*values))

    def _qlinear_add(self) -> Value:
        return self._adds(self._operand(0, 3), self._operand(3, 0))(self._grid_at(6))

    def _operand(self, at: int, other: int) -> Value:
        """Input number `at` of a sum: a value, or codes of the file, given the axes of input number `other`."""
        name, real = self.node.input[at], not self.node.op_type.startswith("Q")
        stored: Any = self.values.get(name) if real else self.constants.get(name)
        if stored is None or isinstance(stored, Value):
            return self._value(at, real=True) if real else self._codes(at)
        shape = self._computed(other).shape
        grid = self._grid(stored.scale, stored.zero) if real else self._grid_at(at + 1)
        codes = np.array(stored.codes if real else stored)
        codes = codes.reshape((1,) * (1 + len(shape) - codes.ndim) + codes.shape)
        if codes.dtype not in CODES or np.broadcast_shapes(codes.shape, (1, *shape)) != (1, *shape):
            self.refuse(f"its input {at} must be int8 or uint8 codes that fit {shape}, got {codes.dtype} {codes.shape}")
        return self._put(ops.Constant(name, grid, torch.from_numpy(np.broadcast_to(codes, (1, *shape)).copy())), ())

    def _adds(self, first: Value, second: Value) -> Any:
        name, kind, at = self._name(), self.node.op_type, self.position
        assert first.grid is not None and second.grid is not None  # noqa: PT018
        if first.shape != second.shape:
            self.refuse(f"its values must have one shape, got {first.shape} and {second.shape}")
        grids = first.grid, second.grid

        def make(grid: Quantizer) -> Value:
            if kind == "Add" and grid.lowest < 0:
                self.refuse("onnxruntime sums signed codes of a QDQ graph in several ways; quantise to QOperator", at)
            self._fused(at, grid, first, second)
            return self._put(ops.AddedSingle(name, kind, grid, grids), (first.place, second.place))

        return make

    def _pool(self) -> Value:
        value = self._value(real=True)
        return replace(value, makes=self._means(value))

    def _qlinear_pool(self) -> Value:
        return self._means(self._codes(0))(self._grid_at(3))

    def _means(self, value: Value) -> Any:
        name, kind, source, at = self._name(), self.node.op_type, value.grid, self.position
        assert source is not None
        kernel, stride, sides = self._window(value)
        if any(sides):
            self.refuse("padding is not supported")
        signed = source.lowest < 0 and not kind.startswith("Q")
        whole = "Global" in kind or kernel == value.shape[1:]  # which onnxruntime computes alike, behind convolutions
        count = prod(value.shape[1:])
        pool: Any = nn.AvgPool2d(kernel, stride)  # type: ignore[arg-type]

        def make(grid: Quantizer) -> Value:
            self._fused(at, grid, value)
            if not whole:
                return self._put(ops.MeanSingle(name, kind, grid, source, pool, 128 * signed), (value.place,))
            factor = source.scale.float() / (grid.scale.float() * torch.tensor(float(count)))
            rounded = grid.changed(rule=SingleFloat(source.scale / count, factor))
            return self._put(ops.MeanOver(name, kind, rounded, source, (2, 3), True, count), (value.place,))

        return make

    def _window(self, value: Value) -> tuple[tuple[int, ...], tuple[int, ...], ops.Sides]:
        """Kernel, stride and padding (left, right, top, bottom) of a pool."""
        if len(value.shape) != 3:
            self.refuse(f"it takes values [C, H, W], got {value.shape}")
        if self._option("ceil_mode", 0) or any(n != 1 for n in self._option("dilations", ())):
            self.refuse("ceil_mode and dilations are not supported")
        kernel, stride = (tuple(int(n) for n in self._option(k, (1, 1))) for k in ("kernel_shape", "strides"))
        return kernel, stride, self._sides(value.shape)

    def _max_pool(self) -> Value:
        value = self._value()
        assert value.grid is not None
        kernel, stride, sides = self._window(value)
        operation = ops.MaxPool(self._name(), self.node.op_type, value.grid, kernel, stride, sides, last=False)
        return replace(self._put(operation, (value.place,)), real=value.real)

    def _clamp(self) -> Value:
        """Relu and Clip: behind a layer, where its QuantizeLinear makes them needless, or of dequantised codes."""
        value, ends = self._computed(), (0.0, float("inf"))
        if self.node.op_type == "Clip":
            given = (self._option(key, self._constant(at)) for at, key in ((1, "min"), (2, "max")))
            least, most = (None if n is None else float(np.asarray(n, np.float32).reshape(())) for n in given)
            ends = (float("-inf") if least is None else least, float("inf") if most is None else most)
        behind = value.grid is not None and value.ends is None and (value.makes is not None or value.real)
        if not behind or not ends[0] <= 0 <= ends[1]:
            self.refuse("it must follow a layer or a DequantizeLinear, once, and keep zero")
        make, at = value.makes, self.position

        def limited(grid: Quantizer) -> Value:
            scale = np.float32(float(grid.scale))
            codes = [float(np.rint(np.float32(end) / scale)) + int(grid.zero_point) for end in ends]
            low, high = (int(min(max(code, grid.lowest), grid.highest)) for code in codes)
            needless = (low, high) == (grid.lowest, grid.highest)
            if make is None and needless and value.direct and value.grid is not None and not same(value.grid, grid):
                self.refuse(MERGED)
            if make is None:
                return self._rescaled(value, grid.limited(low, high))
            if not needless or np.ndim(self._constant(1)):
                self.refuse("its QuantizeLinear does not saturate so: onnxruntime executes the layer in float32", at)
            return make(grid)

        return replace(value, makes=limited, ends=ends)

    # -- values side by side ----------------------------------------------------------------------------

    def _concat(self) -> Value:
        values = [self._value(at, real=True) for at in range(len(self.node.input))]
        return replace(values[0], makes=self._joins(values))

    def _qlinear_concat(self) -> Value:
        count = len(self.node.input)
        if count < 5 or count % 3 != 2:
            self.refuse(f"it must have a scale, a zero point, and three inputs for each value, got {count} inputs")
        return self._joins([self._codes(at) for at in range(2, count, 3)])(self._grid_at(0))

    def _joins(self, values: list[Value]) -> Any:
        name, kind, rank = self._name(), self.node.op_type, 1 + len(values[0].shape)
        axis = int(self._option("axis", 1))
        if not -rank <= axis < rank or axis % rank == 0:
            self.refuse("values are joined along another axis than the batch")

        def make(grid: Quantizer) -> Value:
            parts = [v if v.grid is not None and same(v.grid, grid) else self._rescaled(v, grid) for v in values]
            return self._put(ops.Joined(name, kind, grid, axis % rank), tuple(part.place for part in parts))

        return make


CodesOperations.handlers = {
    "QuantizeLinear": CodesOperations._quantize,
    "DequantizeLinear": CodesOperations._dequantize,
    **dict.fromkeys(("Conv", "Gemm", "MatMul"), CodesOperations._layer),
    **dict.fromkeys(("QLinearConv", "QGemm", "QLinearMatMul"), CodesOperations._qlinear),
    "Add": CodesOperations._sum,
    "QLinearAdd": CodesOperations._qlinear_add,
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), CodesOperations._pool),
    **dict.fromkeys(("QLinearAveragePool", "QLinearGlobalAveragePool"), CodesOperations._qlinear_pool),
    "MaxPool": CodesOperations._max_pool,
    **dict.fromkeys(("Relu", "Clip"), CodesOperations._clamp),
    "Concat": CodesOperations._concat,
    "QLinearConcat": CodesOperations._qlinear_concat,
    "Flatten": CodesOperations._flatten,
    "Reshape": CodesOperations._reshape,
    "Transpose": CodesOperations._transpose,
    "Pad": CodesOperations._pad,
    "Squeeze": CodesOperations._squeeze,
    "Unsqueeze": CodesOperations._unsqueeze,
    **dict.fromkeys(("Identity", "Dropout"), CodesOperations._same),
}
