"""Operators of a quantised ONNX file on codes: layers, sums, pools, order and shape.

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

from torchreach.core.errors import UnsupportedLayerError
from torchreach.graph import deployed as ops
from torchreach.graph.kernels import IntegerLayer, Pairing
from torchreach.graph.layers import Rearrange, Reshape
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.requantise import LARGEST, SingleFloat
from torchreach.graph.weights import linear_layer
from torchreach.read.onnx_codes_walk import CODES, CodesWalk, Stored, Value


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


class CodesOperations(CodesWalk):
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
        return Value(value.place, value.grid, value.shape, real=True, makes=make)

    def _qlinear(self) -> Value:
        """QLinearConv, QGemm and QLinearMatMul: input, weight and result with their grids."""
        value = self._value(real=False)
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
            self.refuse(f"weights must be int8 or uint8 codes, got {stored.codes.dtype}")
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
        layer, sides = self._convolution(value, weight, added) if convolution else (linear_layer(weight, added), None)
        reach = max(abs(end - int(source.zero_point)) for end in (source.lowest, source.highest))
        size = layer.weight.abs().flatten(1).sum(1) * reach + (0 if added is None else added.abs())
        if bool((size > LARGEST).any()):
            self.refuse("its sums may leave int32, where kernels overflow")
        name, kind = self._name(), node.op_type

        def make(grid: Quantizer) -> Value:
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
        if self._option("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            self.refuse("auto_pad must be NOTSET: write the padding out")
        stride, dilation = (tuple(int(n) for n in self._option(key, (1, 1))) for key in ("strides", "dilations"))
        top, left, bottom, right = (int(n) for n in self._option("pads", (0, 0, 0, 0)))
        sizes: Any = (tuple(weight.shape[2:]), stride, 0, dilation, groups)
        layer = nn.Conv2d(channels, weight.shape[0], *sizes, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer, (left, right, top, bottom)

    # -- sums, means, maxima ----------------------------------------------------------------------------

    def _sum(self) -> Value:
        values = [self._value(at, real=True) for at in (0, 1)]
        return replace(values[0], makes=self._adds(*values))

    def _qlinear_add(self) -> Value:
        return self._adds(self._value(0, real=False), self._value(3, real=False))(self._grid_at(6))

    def _adds(self, first: Value, second: Value) -> Any:
        name, kind = self._name(), self.node.op_type
        assert first.grid is not None and second.grid is not None  # noqa: PT018
        if first.shape != second.shape:
            self.refuse(f"its values must have one shape, got {first.shape} and {second.shape}")
        grids = first.grid, second.grid
        return lambda grid: self._put(ops.AddedSingle(name, kind, grid, grids), (first.place, second.place))

    def _pool(self) -> Value:
        value = self._value(real=True)
        return replace(value, makes=self._means(value))

    def _qlinear_pool(self) -> Value:
        if self._option("channels_last", 0):
            self.refuse("channels_last must be 0")
        return self._means(self._value(real=False))(self._grid_at(3))

    def _means(self, value: Value) -> Any:
        name, kind, source = self._name(), self.node.op_type, value.grid
        assert source is not None
        if len(value.shape) != 3:
            self.refuse(f"it takes values [C, H, W], got {value.shape}")
        if any(self._option("pads", ())) or self._option("ceil_mode", 0):
            self.refuse("padding and ceil_mode are not supported")
        kernel, stride = (tuple(int(n) for n in self._option(k, (1, 1))) for k in ("kernel_shape", "strides"))
        if "Global" in kind or kernel == value.shape[1:]:  # which onnxruntime computes alike, behind convolutions
            count = prod(value.shape[1:])

            def over(grid: Quantizer) -> Value:
                factor = source.scale.float() / (grid.scale.float() * torch.tensor(float(count)))
                rounded = grid.changed(rule=SingleFloat(source.scale / count, factor))
                return self._put(ops.MeanOver(name, kind, rounded, source, (2, 3), True, count), (value.place,))

            return over
        pool: Any = nn.AvgPool2d(kernel, stride)  # type: ignore[arg-type]
        return lambda grid: self._put(ops.MeanSingle(name, kind, grid, source, pool), (value.place,))

    def _max_pool(self) -> Value:
        value = self._value()
        if self._option("ceil_mode", 0) or any(n != 1 for n in self._option("dilations", ())):
            self.refuse("ceil_mode and dilations are not supported")
        kernel, stride = (tuple(int(n) for n in self._option(k, (1, 1))) for k in ("kernel_shape", "strides"))
        top, left, bottom, right = (int(n) for n in self._option("pads", (0, 0, 0, 0)))
        assert value.grid is not None
        sides = (left, right, top, bottom)
        operation = ops.MaxPool(self._name(), self.node.op_type, value.grid, kernel, stride, sides, last=False)
        return replace(self._put(operation, (value.place,)), real=value.real)

    def _relu(self) -> Value:
        value = self.values[self.node.input[0]]
        if not isinstance(value, Value) or value.makes is None:
            self.refuse("a ReLU must follow a layer, before its QuantizeLinear")
        return replace(value, relu=True)

    def _concat(self) -> Value:
        values = [self._value(at, real=True) for at in range(len(self.node.input))]
        name, axis, rank = self._name(), int(self._option("axis", 1)), 1 + len(values[0].shape)
        if axis % rank == 0:
            self.refuse("values are joined along another axis than the batch")

        def make(grid: Quantizer) -> Value:
            if not all(value.grid is not None and value.grid.same_grid(grid) for value in values):
                raise UnsupportedLayerError(f"{name!r}: values that are joined must have the grid of the result")
            return self._put(ops.Joined(name, "Concat", grid, axis % rank), tuple(v.place for v in values))

        return replace(values[0], makes=make)

    # -- order and shape --------------------------------------------------------------------------------

    def _rearranged(self, layer: Reshape | Rearrange) -> Value:
        value = self.values[self.node.input[0]]
        if not isinstance(value, Value) or value.makes is not None:
            self.refuse("it must read codes, or the network's input")
        grid = value.grid if value.grid is not None else Quantizer(1.0, 0, 0, 255)
        kind = ops.Padded if isinstance(layer, Rearrange) and layer.operation == "pad" else ops.Rearranged
        if value.grid is None:
            self.refuse("the network's input must be quantised before it is rearranged")
        operation: Any = kind(self._name(), self.node.op_type, grid, layer.arguments if kind is ops.Padded else layer)  # type: ignore
        return replace(self._put(operation, (value.place,)), real=value.real)

    def _shape_of(self) -> tuple[int, ...]:
        value = self.values[self.node.input[0]]
        return value.shape if isinstance(value, Value) else self.refuse("it must read codes")

    def _flatten(self) -> Value:
        if int(self._option("axis", 1)) != 1:
            self.refuse("axis must be 1")
        return self._rearranged(Reshape((prod(self._shape_of()),)))

    def _reshape(self) -> Value:
        wanted = [int(n) for n in np.asarray(self._constant(1)).reshape(-1)]
        shape = self._shape_of()
        if not wanted or wanted[0] not in (-1, 0, 1) or sum(n == -1 for n in wanted) > 1:
            self.refuse(f"it must keep the batch axis, got {wanted}")
        rest = [shape[i - 1] if n == 0 and 0 < i <= len(shape) else n for i, n in enumerate(wanted)][1:]
        if -1 in rest:
            rest[rest.index(-1)] = prod(shape) // max(-prod(rest), 1)
        if prod(rest) != prod(shape):
            self.refuse(f"{wanted} does not hold the numbers of {shape}")
        return self._rearranged(Reshape(tuple(rest)))

    def _transpose(self) -> Value:
        order = [int(n) for n in self._option("perm", ())]
        if sorted(order) != list(range(1 + len(self._shape_of()))) or order[0] != 0:
            self.refuse(f"it must keep the batch axis, got {order}")
        return self._rearranged(Rearrange("permute", *order))

    def _pad(self) -> Value:
        sizes = [int(n) for n in np.asarray(self._constant(1)).reshape(-1)]
        rank = 1 + len(self._shape_of())
        filled = self.values.get(self.node.input[2]) if len(self.node.input) > 2 and self.node.input[2] else None
        number = self._filling(filled)
        if self._option("mode", b"constant") != b"constant" or number or len(sizes) != 2 * rank or min(sizes) < 0:
            self.refuse("it must pad with zeros")
        if sizes[0] or sizes[rank]:
            self.refuse("it must keep the batch axis")
        pairs = [n for axis in range(rank - 1, 0, -1) for n in (sizes[axis], sizes[rank + axis])]
        return self._rearranged(Rearrange("pad", *pairs))

    def _filling(self, filled: Any) -> float:
        """What a Pad fills in, as a number."""
        if isinstance(filled, Stored):
            return float(((filled.codes.astype(np.float64) - filled.zero) * filled.scale).reshape(-1)[0])
        name = self.node.input[2] if len(self.node.input) > 2 else ""
        if not name:
            return 0.0
        number = float(np.asarray(self._constant(2)).reshape(-1)[0])
        value = self.values[self.node.input[0]]
        codes = isinstance(value, Value) and not value.real and value.grid is not None
        return number - int(value.grid.zero_point) if codes else number  # type: ignore[union-attr]

    def _same(self) -> Value:
        value = self.values[self.node.input[0]]
        return value if isinstance(value, Value) else self.refuse("it must read codes")


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
    "Relu": CodesOperations._relu,
    "Concat": CodesOperations._concat,
    "Flatten": CodesOperations._flatten,
    "Reshape": CodesOperations._reshape,
    "Transpose": CodesOperations._transpose,
    "Pad": CodesOperations._pad,
    **dict.fromkeys(("Identity", "Dropout"), CodesOperations._same),
}
