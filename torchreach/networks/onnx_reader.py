"""Reads an ONNX file of a feedforward ReLU network as a chain of layers.

A direct reader, because the networks torchreach supports need a dozen operators and names that lead back to
the file. Of the libraries tried on torch 2.15, onnx2torch 1.5.15 has no converter for the ACAS Xu files'
opset; onnx2pytorch 0.6.0 reads them, but as an interpreter of the ONNX graph that would have to be traced
again to see its layers, and it fails where the constant is the left factor of a product.
"""

# Handlers share one signature.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from torchreach.errors import FileFormatError, InvalidNetworkError, UnsupportedLayerError
from torchreach.networks.arithmetic import Arithmetic
from torchreach.networks.builder import ChainBuilder, check_finite
from torchreach.networks.layers import Reshape
from torchreach.networks.weights import linear_layer

_ARITHMETIC = {"Add": ("add", "add"), "Sub": ("sub", "rsub"), "Mul": ("mul", "mul"), "Div": ("div", None)}
_FOLDED = {
    *("Constant", "ConstantOfShape", "Shape", "Identity", "Cast", "Concat", "Gather", "Slice", "Expand"),
    *("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose"),
    *("Add", "Sub", "Mul", "Div", "Neg", "MatMul"),
}
# Bits of the significand and of the exponent; of a whole number, what keeping it takes.
_T = onnx.TensorProto
_FLOATS: dict[int, tuple[int, int]] = {_T.FLOAT16: (11, 5), _T.BFLOAT16: (8, 8), _T.FLOAT: (24, 8), _T.DOUBLE: (53, 11)}
_DIGITS: dict[int, tuple[int, int]] = {
    **_FLOATS,
    _T.UINT8: (8, 4),
    _T.INT8: (8, 4),
    _T.UINT16: (16, 5),
    _T.INT16: (16, 5),
    _T.INT32: (32, 6),
}


def read_onnx(path: Path) -> nn.Sequential:
    """The network in `path`; every weight as stored. Raises as `load`."""
    model = _read(path)
    reader = _Reader(model, path)
    for node in model.graph.node:
        reader.add(node)
    return reader.finish()


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
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Reader:
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
        self.head, self.kind = inputs[0].name, inputs[0].type.tensor_type.elem_type  # of the value computed last
        if self.kind not in _DIGITS:
            raise UnsupportedLayerError(f"{path}: input {self.head!r} must hold numbers, got {_kind(self.kind)}")
        self.output = graph.output[0].name
        sizes = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim]
        # One axis alone, or a column, holds features; otherwise the first axis is the batch.
        self.batched = len(sizes) > 1 and not (len(sizes) == 2 and sizes[1] == 1 and (sizes[0] or 1) > 1)
        self.batch = (sizes[0] or 1) if self.batched else 1
        features = sizes[1:] if self.batched else sizes
        if not features or None in features:
            raise UnsupportedLayerError(f"{path}: input {self.head!r} must have fixed feature sizes, got {sizes}")
        self.features: tuple[int, ...] = tuple(int(n) for n in features if n is not None)
        self.builder = ChainBuilder(self.features)
        self.product: nn.Linear | None = None  # a product without bias just added, waiting for its Add

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.builder.shape is not None
        return self.builder.shape

    def add(self, node: onnx.NodeProto) -> None:
        name = node.name or (node.output[0] if node.output else "")
        names = [n for n in node.input if n]
        if all(n in self.constants for n in names):
            self._fold(node, name)
            return
        unknown = [n for n in names if n not in self.constants and n != self.head]
        if unknown or names.count(self.head) != 1 or len([n for n in node.output if n]) != 1:
            raise UnsupportedLayerError(
                f"layer {self.builder.position} ({name!r}, {node.op_type}): torchreach needs a chain of "
                "layers, one value through all of them (no residual connections, no branches)"
            )
        if node.op_type == "Shape":
            ends = {a.name: a.i for a in node.attribute}
            sizes = np.array((self.batch, *self.shape) if self.batched else self.shape)
            self.constants[node.output[0]] = sizes[ends.get("start", 0) : ends.get("end")]
            return
        handler: Callable[..., None] | None = getattr(self, f"_{node.op_type.lower()}", None)
        if node.op_type in _ARITHMETIC:
            handler = self._elementwise
        if node.domain not in ("", "ai.onnx") or handler is None:
            self.builder.refuse(name, node.op_type)
        try:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            # None stands for the value computed last, ... for an input that is left out.
            values = [None if n == self.head else self.constants[n] if n else ... for n in node.input]
        except Exception as error:
            raise FileFormatError(f"{self.path}: node {name!r} is damaged: {_first_line(error)}") from None
        waiting, self.product = self.product, None
        if not (node.op_type in ("Add", "Sub") and waiting and self._bias(node.op_type, values, waiting)):
            handler(node, name, values, attributes)
        self.head = node.output[0]

    def finish(self) -> nn.Sequential:
        if self.head != self.output:
            raise UnsupportedLayerError(
                f"{self.path}: output {self.output!r} is not the last value of a chain of layers"
            )
        network = nn.Sequential(*_with_shape(self.builder.layers, self.features))
        kinds = {value.dtype for value in network.parameters()}
        if len(kinds) > 1:  # after a Cast to more digits: exact in the widest
            network = network.to(max(kinds, key=lambda kind: torch.finfo(kind).bits))
        try:
            check_finite(network)
        except InvalidNetworkError as error:
            raise InvalidNetworkError(f"{self.path}: {error}") from None
        return network

    def _fold(self, node: onnx.NodeProto, name: str) -> None:
        """A node of constants alone: its value, by onnx's own reference implementation."""
        if node.op_type not in _FOLDED:
            self.builder.refuse(name, node.op_type, "torchreach does not evaluate it on constants")
        from onnx.reference import ReferenceEvaluator

        try:
            feeds = {n: self.constants[n] for n in node.input if n}
            outputs: Any = ReferenceEvaluator(self._alone(node)).run(None, feeds)
        except Exception as error:
            raise FileFormatError(f"{self.path}: node {name!r} is damaged: {_first_line(error)}") from None
        self.constants.update(zip(node.output, outputs, strict=False))

    def _alone(self, node: onnx.NodeProto) -> onnx.ModelProto:
        """`node` as a model of the file's opset, which says where its arguments stand (as inputs or attributes)."""
        inputs, outputs = ([onnx.ValueInfoProto(name=n) for n in names if n] for names in (node.input, node.output))
        graph = onnx.helper.make_graph([node], "node", inputs, outputs)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets)

    def _bias(self, operation: str, values: list, product: nn.Linear) -> bool:
        """Folds `x W + b` into one layer; whether that was possible."""
        constant = values[1] if values[0] is None else values[0]
        rows = (1, *self.shape)
        if constant.size != product.out_features or prod(rows) != product.out_features:
            return False
        if np.broadcast_shapes(rows, constant.shape) != rows:  # [m, 1] + [m] is a matrix
            return False
        if operation == "Sub" and values[0] is not None:
            return False
        bias = _tensor(constant).reshape(-1)
        product.bias = nn.Parameter(-bias if operation == "Sub" else bias)
        product.bias_apart = True  # type: ignore[assignment]  # two operations, each of which rounds in half precision
        return True

    def _elementwise(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        if "axis" in attributes:
            self.builder.refuse(name, node.op_type, "broadcasting along an axis (opset 6 and older) is not supported")
        operation = _ARITHMETIC[node.op_type][0 if values[0] is None else 1]
        if operation is None:
            self.builder.refuse(name, node.op_type, "division by a value that depends on the input")
        operand = values[1] if values[0] is None else values[0]
        if operation in ("add", "sub") and not operand.any():
            return
        self.builder.arithmetic(operation, _tensor(operand), name)

    def _relu(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        self.builder.append(nn.ReLU(), name)

    def _clip(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        low, high = (*(v for v in values[1:]), ..., ...)[:2]
        low = attributes.get("min", None if low is ... else float(low))
        if low != 0 or high is not ... or "max" in attributes:
            self.builder.refuse(name, "Clip", "only Clip(min=0) is a ReLU")
        self.builder.append(nn.ReLU(), name)

    def _identity(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        self.builder.append(nn.Identity(), name)

    def _cast(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        to = attributes["to"]
        if not _keeps_values(self.kind, to):
            self.builder.refuse(name, "Cast", f"from {_kind(self.kind)} to {_kind(to)} it rounds")
        self.kind = to
        self.builder.append(nn.Identity(), name)

    def _dropout(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        if len(values) > 2 and values[2] is not ... and bool(values[2]):
            self.builder.refuse(name, "Dropout", "training_mode must be false")
        self.builder.append(nn.Dropout(), name)

    def _flatten(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        axis = attributes.get("axis", 1)
        axis += len(self.shape) + 1 if axis < 0 else 0
        if axis != (1 if self.batched else 0):
            self.builder.refuse(name, "Flatten", f"axis must keep the batch alone, got {axis}")
        self.batched = True
        self.builder.append(nn.Flatten(), name)

    def _reshape(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        if values[0] is not None:
            self.builder.refuse(name, "Reshape", "its shape must be constant")
        old = (self.batch, *self.shape) if self.batched else self.shape
        sizes = [int(n) for n in values[1].reshape(-1)]
        if attributes.get("allowzero") and 0 in sizes and 0 not in old:
            self.builder.refuse(name, "Reshape", f"{list(old)} does not fit into {sizes} with allowzero")
        new = [old[i] if n == 0 and i < len(old) else n for i, n in enumerate(sizes)]
        if new.count(-1) == 1:
            new[new.index(-1)] = prod(old) // max(1, -prod(new))
        if self.batched or (len(new) > 1 and new[0] == 1):
            if not new or new[0] != self.batch or len(new) < 2:
                self.builder.refuse(name, "Reshape", f"it must keep the batch axis of {list(old)}, got {new}")
            self.batched, new = True, new[1:]
        if prod(new) != prod(self.shape):
            self.builder.refuse(name, "Reshape", f"{list(old)} does not fit into {values[1].tolist()}")
        self.builder.append(nn.Flatten() if len(new) == 1 else Reshape(tuple(new)), name)

    def _squeeze(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        axes = self._axes(values, attributes)
        old = self._sizes()
        at = [i for i, n in enumerate(old) if n == 1] if axes is None else sorted(a % len(old) for a in axes)
        if self.batched and 0 in at:
            self.builder.refuse(name, "Squeeze", "it must keep axis 0, the batch: give its axes")
        if any(old[i] != 1 for i in at):
            self.builder.refuse(name, "Squeeze", f"axes {at} of {old} must have size 1")
        self._become([n for i, n in enumerate(old) if i not in at], name)

    def _unsqueeze(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        new = self._sizes()
        axes = self._axes(values, attributes) or []
        for axis in sorted(a % (len(new) + len(axes)) for a in axes):
            if axis == 0 and self.batched:
                self.builder.refuse(name, "Unsqueeze", "axis 0 is the batch")
            self.batched |= axis == 0
            new.insert(axis, 1)
        self._become(new, name)

    def _axes(self, values: list, attributes: dict[str, Any]) -> list[int] | None:
        """An attribute up to opset 12, an input after it."""
        if len(values) > 1 and values[1] is not ...:
            return [int(a) for a in values[1].reshape(-1)]
        return attributes.get("axes")

    def _sizes(self) -> list[int]:
        return [self.batch, *self.shape] if self.batched else list(self.shape)

    def _become(self, sizes: list[int], name: str) -> None:
        self.builder.append(Reshape(tuple(sizes[1:] if self.batched else sizes)), name)

    def _matmul(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        constant = _tensor(values[1] if values[0] is None else values[0])
        if constant.ndim != 2:
            self.builder.refuse(name, "MatMul", f"its constant factor must be a matrix, got {constant.ndim} axes")
        if values[0] is None:
            self.product = linear_layer(nn.Parameter(constant.t().contiguous()), None)
            self.builder.append(self.product, name)
            return
        column = len(self.shape) == 2 and self.shape[1] == 1
        if not column and (self.batched or len(self.shape) != 1):
            self.builder.refuse(name, "MatMul", f"a constant left factor needs a column, got features {self.shape}")
        self.product = linear_layer(nn.Parameter(constant), None)
        if column:
            self.builder.append(nn.Flatten(), name)
        self.builder.append(self.product, name)
        if column:
            self.builder.append(Reshape((constant.shape[0], 1)), name)

    def _gemm(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        if values[0] is not None or attributes.get("transA"):
            self.builder.refuse(name, "Gemm", "its first factor must be the value, not transposed")
        weight = _tensor(values[1]) * attributes.get("alpha", 1.0)
        weight = weight if attributes.get("transB") else weight.t().contiguous()
        layer = linear_layer(nn.Parameter(weight), None)
        if len(values) > 2 and values[2] is not ...:
            bias = _tensor(values[2]) * attributes.get("beta", 1.0)
            rows = (1, layer.out_features)
            if bias.ndim > 2 or np.broadcast_shapes(rows, tuple(bias.shape)) != rows:
                self.builder.refuse(name, "Gemm", f"its bias must have shape {list(rows)}, got {list(bias.shape)}")
            layer.bias = nn.Parameter(bias.expand(rows)[0].clone())
        self.builder.append(layer, name)

    def _conv(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        if values[0] is not None:
            self.builder.refuse(name, "Conv", "its weight must be constant")
        weight = _tensor(values[1])
        rank = weight.ndim - 2
        if rank not in (1, 2):
            self.builder.refuse(name, "Conv", f"torchreach supports 1 and 2 axes, got {rank}")
        groups = attributes.get("group", 1)
        bias = _tensor(values[2]) if len(values) > 2 and values[2] is not ... else None
        layer = (nn.Conv1d, nn.Conv2d)[rank - 1](
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            tuple(attributes.get("strides", [1] * rank)),  # type: ignore[arg-type]
            self._padding(name, "Conv", attributes, tuple(weight.shape[2:])),  # type: ignore[arg-type]
            tuple(attributes.get("dilations", [1] * rank)),  # type: ignore[arg-type]
            groups,
            device="meta",
        )
        layer.weight = nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
        self.builder.append(layer, name)

    def _averagepool(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        kernel = tuple(attributes["kernel_shape"])
        rank = len(kernel)
        if rank not in (1, 2) or any(n != 1 for n in attributes.get("dilations", ())):
            self.builder.refuse(name, "AveragePool", "torchreach supports 1 and 2 axes without dilation")
        if attributes.get("ceil_mode"):
            self.builder.refuse(name, "AveragePool", "ceil_mode is read differently by different runtimes")
        layer = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1](
            kernel,  # type: ignore[arg-type]
            tuple(attributes.get("strides", [1] * rank)),  # type: ignore[arg-type]
            self._padding(name, "AveragePool", attributes, kernel),  # type: ignore[arg-type]
            False,
            bool(attributes.get("count_include_pad", 0)),
        )
        self.builder.append(layer, name)

    def _globalaveragepool(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        if len(self.shape) not in (2, 3):
            self.builder.refuse(name, "GlobalAveragePool", f"torchreach supports 1 and 2 axes, got {self.shape}")
        kind = (nn.AvgPool1d, nn.AvgPool2d)[len(self.shape) - 2]
        self.builder.append(kind(self.shape[1:]), name)  # type: ignore[arg-type]

    def _reducemean(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        axes = {a % (len(self.shape) + 1) for a in self._axes(values, attributes) or ()}
        if not self.batched or axes != set(range(2, len(self.shape) + 1)):
            self.builder.refuse(name, "ReduceMean", "only the mean over all places of each channel is average pooling")
        self._globalaveragepool(node, name, values, attributes)
        if not attributes.get("keepdims", 1):
            self.builder.append(nn.Flatten(), name)

    def _batchnormalization(self, node: onnx.NodeProto, name: str, values: list, attributes: dict[str, Any]) -> None:
        if values[0] is not None or attributes.get("training_mode"):
            self.builder.refuse(name, "BatchNormalization", "it must be in inference mode, with constant statistics")
        scale, bias, mean, var = (_tensor(v) for v in values[1:5])
        kind = nn.BatchNorm2d if len(self.shape) == 3 else nn.BatchNorm1d
        layer = kind(len(scale), eps=attributes.get("epsilon", 1e-5), dtype=scale.dtype).eval()
        layer.weight, layer.bias = nn.Parameter(scale), nn.Parameter(bias)
        layer.running_mean, layer.running_var = mean, var
        self.builder.append(layer, name)

    def _padding(self, name: str, kind: str, attributes: dict[str, Any], kernel: tuple[int, ...]) -> tuple[int, ...]:
        rank = len(kernel)
        how = attributes.get("auto_pad", b"NOTSET")
        pads = list(attributes.get("pads", [0] * 2 * rank))
        if how in (b"SAME_UPPER", b"SAME_LOWER"):
            ones = [1] * rank
            steps, spread = attributes.get("strides", ones), attributes.get("dilations", ones)
            sizes = zip(self.shape[1:], kernel, steps, spread, strict=True)
            total = [max(0, ((n - 1) // step) * step + (k - 1) * apart + 1 - n) for n, k, step, apart in sizes]
            pads = [*(n // 2 for n in total), *(n - n // 2 for n in total)]
        elif how not in (b"NOTSET", b"VALID"):
            self._refuse_padding(name, kind)
        if pads[:rank] != pads[rank:]:
            self._refuse_padding(name, kind)
        return tuple(pads[:rank])

    def _refuse_padding(self, name: str, kind: str) -> NoReturn:
        self.builder.refuse(name, kind, "padding must be equal on both sides")


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


def _keeps_values(kind: int, to: int) -> bool:
    """Whether every number of one ONNX element type is one of the other."""
    if kind == to:
        return True
    return kind in _DIGITS and to in _FLOATS and all(a <= b for a, b in zip(_DIGITS[kind], _FLOATS[to], strict=True))


def _kind(kind: int) -> str:
    return onnx.TensorProto.DataType.Name(kind)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))  # a writable copy: onnx's arrays may be views on the file's bytes
