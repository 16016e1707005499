"""Operators of ONNX files that have weights or windows: products, convolutions, pooling, batch normalisation.

`onnx_operations` holds the others, and says what a handler is.
"""

# Signatures are those that handlers of traced graphs ask for.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from torchreach.graph.layers import Reshape
from torchreach.graph.weights import linear_layer
from torchreach.read.builder import ChainBuilder
from torchreach.read.fx_operations import GraphOperations
from torchreach.read.joins import max_pool


@dataclass(frozen=True)
class OnnxValue:
    """A value computed from the network's input: its node in the builder, whether axis 0 is the batch, element type."""

    at: int
    batched: bool
    kind: int


@dataclass(frozen=True, eq=False)
class OnnxNode:
    """One node: its inputs as an `OnnxValue`, a constant, or ... where left out; attributes; number of outputs.

    alone: whether nothing but this node reads its first value.
    """

    name: str
    op: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any]
    outputs: int
    alone: bool

    @property
    def values(self) -> tuple[OnnxValue, ...]:
        return tuple(value for value in self.inputs if isinstance(value, OnnxValue))

    @property
    def constant(self) -> np.ndarray:
        """The other input of an operator of two, one of them a value."""
        return self.inputs[1] if isinstance(self.inputs[0], OnnxValue) else self.inputs[0]

    def given(self, k: int) -> Any:
        """Input k, or None where it is left out."""
        return None if k >= len(self.inputs) or self.inputs[k] is ... else self.inputs[k]

    def option(self, k: int, key: str, default: Any = None) -> Any:
        """Input k of newer opsets as a list, the attribute of older ones."""
        value = self.given(k)
        return self.attributes.get(key, default) if value is None else [int(n) for n in value.reshape(-1)]


class OnnxLayers(GraphOperations):
    """Handlers by lower-case name of the operator."""

    builder: ChainBuilder
    batch: int
    batched: bool  # of the value at hand
    product: tuple[int, nn.Linear] | None  # a product without bias, waiting for its Add; its node in the builder

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.builder.shape is not None
        return self.builder.shape

    def _sizes(self) -> list[int]:
        """Shape of the value at hand as the file sees it."""
        return [self.batch, *self.shape] if self.batched else list(self.shape)

    # What the handlers of traced graphs ask for.

    def _place(self, node: Any) -> str:
        return node.name

    def _refuse(self, node: Any, kind: str, reason: str = "") -> NoReturn:
        self.builder.refuse(node.name, node.op, reason)

    def _features(self, node: Any) -> tuple[int, ...]:
        return self.shape

    def _pad(self, node: OnnxNode, before: Sequence[int], after: Sequence[int]) -> None:
        """Zeros around the last axes."""
        sizes = [n for ends in zip(reversed(before), reversed(after), strict=True) for n in ends]
        if any(sizes):
            self._op_pad(node, None, sizes)

    def _onnx_matmul(self, node: OnnxNode) -> None:
        if len(node.values) > 1:
            self._refuse(node, node.op, "one of its factors must be constant")
        constant = tensor(node.constant)
        if constant.ndim != 2:
            self._refuse(node, node.op, f"its constant factor must be a matrix, got {constant.ndim} axes")
        if isinstance(node.inputs[0], OnnxValue):
            layer = linear_layer(nn.Parameter(constant.t().contiguous()), None)
            self.builder.append(layer, node.name)
            self.product = self.builder.at, layer
            return
        column = len(self.shape) == 2 and self.shape[1] == 1
        if not column and (self.batched or len(self.shape) != 1):
            self._refuse(node, node.op, f"a constant left factor needs a column, got features {self.shape}")
        layer = linear_layer(nn.Parameter(constant), None)
        if column:
            self.builder.append(nn.Flatten(), node.name)
        self.builder.append(layer, node.name)
        if column:
            self.builder.append(Reshape((constant.shape[0], 1)), node.name)
        self.product = self.builder.at, layer

    def _onnx_gemm(self, node: OnnxNode) -> None:
        attributes = node.attributes
        if len(node.values) > 1 or not isinstance(node.inputs[0], OnnxValue) or attributes.get("transA"):
            self._refuse(node, node.op, "its first factor alone must be the value, not transposed")
        weight = tensor(node.inputs[1]) * attributes.get("alpha", 1.0)
        weight = weight if attributes.get("transB") else weight.t().contiguous()
        layer = linear_layer(nn.Parameter(weight), None)
        if node.given(2) is not None:
            bias = tensor(node.inputs[2]) * attributes.get("beta", 1.0)
            rows = (1, layer.out_features)
            if bias.ndim > 2 or np.broadcast_shapes(rows, tuple(bias.shape)) != rows:
                self._refuse(node, node.op, f"its bias must have shape {list(rows)}, got {list(bias.shape)}")
            layer.bias = nn.Parameter(bias.expand(rows)[0].clone())
        self.builder.append(layer, node.name)

    def _onnx_conv(self, node: OnnxNode) -> None:
        weight, bias, attributes = *self._weights(node), node.attributes
        rank, groups = weight.ndim - 2, attributes.get("group", 1)
        before, after = self._ends(node, tuple(weight.shape[2:]))
        if before != after:
            self._pad(node, before, after)
            before = (0,) * rank
        layer = (nn.Conv1d, nn.Conv2d)[rank - 1](
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            tuple(attributes.get("strides", [1] * rank)),  # type: ignore[arg-type]
            before,  # type: ignore[arg-type]
            tuple(attributes.get("dilations", [1] * rank)),  # type: ignore[arg-type]
            groups,
            device="meta",
        )
        layer.weight = nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
        self.builder.append(layer, node.name)

    def _onnx_convtranspose(self, node: OnnxNode) -> None:
        weight, bias, attributes = *self._weights(node), node.attributes
        ones = [1] * (weight.ndim - 2)
        if attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in attributes:
            self._refuse(node, node.op, "its padding must be given as numbers")
        before, after = self._ends(node, tuple(weight.shape[2:]))
        if before != after:
            self._refuse(node, node.op, "padding must be equal on both sides")
        self._op_conv_transpose2d(
            node, None, weight, bias, attributes.get("strides", ones), before,
            attributes.get("output_padding", [0] * len(ones)), attributes.get("group", 1),
            attributes.get("dilations", ones),
        )  # fmt: skip

    def _weights(self, node: OnnxNode) -> tuple[Tensor, Tensor | None]:
        if len(node.values) > 1 or not isinstance(node.inputs[0], OnnxValue):
            self._refuse(node, node.op, "its weight must be constant")
        weight = tensor(node.inputs[1])
        if weight.ndim not in (3, 4):
            self._refuse(node, node.op, f"torchreach supports 1 and 2 axes, got {weight.ndim - 2}")
        return weight, None if node.given(2) is None else tensor(node.inputs[2])

    def _onnx_averagepool(self, node: OnnxNode) -> None:
        kernel, attributes = tuple(node.attributes["kernel_shape"]), node.attributes
        rank = len(kernel)
        if rank not in (1, 2) or any(n != 1 for n in attributes.get("dilations", ())):
            self._refuse(node, node.op, "torchreach supports 1 and 2 axes without dilation")
        if attributes.get("ceil_mode"):
            self._refuse(node, node.op, "ceil_mode is read differently by different runtimes")
        before, after = self._ends(node, kernel)
        padded = bool(attributes.get("count_include_pad", 0))
        if before != after:
            if not padded:
                self._refuse(node, node.op, "padding that does not count must be equal on both sides")
            self._pad(node, before, after)
            before = (0,) * rank
        layer = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1](
            kernel,  # type: ignore[arg-type]
            tuple(attributes.get("strides", [1] * rank)),  # type: ignore[arg-type]
            before,  # type: ignore[arg-type]
            False,
            padded,
        )
        self.builder.append(layer, node.name)

    def _onnx_maxpool(self, node: OnnxNode) -> None:
        kernel, attributes = tuple(node.attributes["kernel_shape"]), node.attributes
        ones = [1] * len(kernel)
        strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
        if len(kernel) not in (1, 2):
            self._refuse(node, node.op, f"torchreach supports 1 and 2 axes, got {len(kernel)}")
        ends = list(zip(*self._ends(node, kernel), strict=True))
        rounded = bool(attributes.get("ceil_mode"))
        for n, (low, high), k, step, apart in zip(self.shape[1:], ends, kernel, strides, dilations, strict=True):
            windows = -(-(n + low + high - apart * (k - 1) - 1) // step) + 1
            if rounded and (windows - 1) * step >= n + low:
                self._refuse(node, node.op, "a window behind the end is read differently by different runtimes")
        max_pool(self.builder, node.name, kernel, strides, ends, dilations, rounded)

    def _onnx_globalaveragepool(self, node: OnnxNode) -> None:
        kind = (nn.AvgPool1d, nn.AvgPool2d)[self._places(node) - 1]
        self.builder.append(kind(self.shape[1:]), node.name)  # type: ignore[arg-type]

    def _onnx_globalmaxpool(self, node: OnnxNode) -> None:
        self._places(node)
        max_pool(self.builder, node.name, self.shape[1:], None, 0, 1, False)

    def _places(self, node: OnnxNode) -> int:
        if len(self.shape) not in (2, 3):
            self._refuse(node, node.op, f"torchreach supports 1 and 2 axes, got {self.shape}")
        return len(self.shape) - 1

    def _onnx_batchnormalization(self, node: OnnxNode) -> None:
        if len(node.values) > 1 or node.attributes.get("training_mode"):
            self._refuse(node, node.op, "it must be in inference mode, with constant statistics")
        scale, bias, mean, var = (tensor(v) for v in node.inputs[1:5])
        kind = nn.BatchNorm2d if len(self.shape) == 3 else nn.BatchNorm1d
        layer = kind(len(scale), eps=node.attributes.get("epsilon", 1e-5), dtype=scale.dtype).eval()
        layer.weight, layer.bias = nn.Parameter(scale), nn.Parameter(bias)
        layer.running_mean, layer.running_var = mean, var
        self.builder.append(layer, node.name)

    def _ends(self, node: OnnxNode, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Padding before and behind each place axis."""
        rank, attributes = len(kernel), node.attributes
        how = attributes.get("auto_pad", b"NOTSET")
        pads = tuple(attributes.get("pads", [0] * 2 * rank))
        if how in (b"SAME_UPPER", b"SAME_LOWER"):
            ones = [1] * rank
            steps, spread = attributes.get("strides", ones), attributes.get("dilations", ones)
            sizes = zip(self.shape[1:], kernel, steps, spread, strict=True)
            total = [max(0, ((n - 1) // step) * step + (k - 1) * apart + 1 - n) for n, k, step, apart in sizes]
            small, large = tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)
            return (small, large) if how == b"SAME_UPPER" else (large, small)
        if how not in (b"NOTSET", b"VALID"):
            self._refuse(node, node.op, f"torchreach knows no padding {how!r}")
        return pads[:rank], pads[rank:]


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))  # a writable copy: onnx's arrays may be views on the file's bytes
