"""Operations of traced graphs that join values, bend them twice, or rearrange their features.

A handler takes the node and the arguments of the torch function it is named after; values are already at hand in the
builder. `_join_` handlers take several values. A node is whatever its reader walks over: traced graphs
(`read.fx`) and ONNX files (`read.onnx_operations`) share these handlers.
"""

# Handlers share the signatures of the torch functions they are named after.
# ruff: noqa: ARG002

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from torchreach.graph.layers import Rearrange
from torchreach.graph.lowering import ABSOLUTE, HARDSIGMOID, RELU, PiecewiseLinear
from torchreach.graph.weights import as_parameter
from torchreach.read.builder import ChainBuilder
from torchreach.read.joins import extremum, max_pool, prelu, product, slices


class GraphOperations:
    """The handlers; a reader says where a node is, refuses it and knows the features at hand."""

    builder: ChainBuilder

    def _place(self, node: Any) -> str:
        raise NotImplementedError

    def _refuse(self, node: Any, kind: str, reason: str = "") -> NoReturn:
        raise NotImplementedError

    def _features(self, node: Any) -> tuple[int, ...]:
        raise NotImplementedError

    def _arithmetic(self, node: Any, operation: str, operand: Any) -> None:
        raise NotImplementedError

    # Of several values.

    def _join_add(self, node: Any, a: Any, b: Any, alpha: Any = 1) -> None:
        self._sum(node, "add", a, b, alpha)

    def _join_sub(self, node: Any, a: Any, b: Any, alpha: Any = 1) -> None:
        self._sum(node, "sub", a, b, alpha)

    def _join_rsub(self, node: Any, a: Any, b: Any, alpha: Any = 1) -> None:
        self._sum(node, "sub", b, a, alpha)

    def _join_mul(self, node: Any, a: Any, b: Any) -> None:
        if not product(self.builder, a.at, b.at, self._place(node)):
            self._refuse(
                node,
                "mul",
                "mul combines two values that both depend on the input; known products are x * sigmoid(x), "
                "x * (1 + erf(x / sqrt(2))) and x * hardsigmoid(x)",
            )

    def _join_maximum(self, node: Any, a: Any, b: Any) -> None:
        self._two(node, a, b, largest=True)

    def _join_minimum(self, node: Any, a: Any, b: Any) -> None:
        self._two(node, a, b, largest=False)

    def _join_cat(self, node: Any, values: Sequence[Any], dim: int = 0) -> None:
        if any(isinstance(value, Tensor) for value in values):
            self._refuse(node, "cat", "all parts must depend on the input, got a constant")
        self.builder.join("cat", tuple(value.at for value in values), self._place(node), dim)

    def _join_max(self, node: Any, a: Any, b: Any = None) -> None:
        if not hasattr(b, "at"):
            self._refuse(node, "max", "torchreach supports the maximum of two values, and max pooling")
        self._two(node, a, b, largest=True)

    def _sum(self, node: Any, op: str, a: Any, b: Any, alpha: Any) -> None:
        if alpha != 1:
            self.builder.move(b.at, self._place(node))
            self._arithmetic(node, "mul", alpha)
            b = b.__class__(self.builder.at)
        self.builder.join(op, (a.at, b.at), self._place(node))

    def _two(self, node: Any, a: Any, b: Any, *, largest: bool) -> None:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            self._refuse(node, "maximum", "both of its values must depend on the input; with a constant use clamp")
        extremum(self.builder, a.at, b.at, self._place(node), largest=largest)

    # Functions of each feature.

    def _pointwise(self, node: Any, value: PiecewiseLinear) -> None:
        if value.plain:
            self.builder.append(nn.ReLU(), self._place(node))
        else:
            self.builder.pointwise(value, self._place(node))

    def _op_clamp(self, node: Any, x: Any, min: Any = None, max: Any = None) -> None:
        ends = [None if end is None else self._number(node, end) for end in (min, max)]
        if ends == [None, None] or (None not in ends and ends[0] > ends[1]):  # type: ignore[operator]
            self._refuse(node, "clamp", f"its ends must be numbers with min <= max, got {min} and {max}")
        self._pointwise(node, PiecewiseLinear.clamp(ends[0], ends[1]))

    def _op_clamp_min(self, node: Any, x: Any, min: Any) -> None:
        self._op_clamp(node, x, min)

    def _op_clamp_max(self, node: Any, x: Any, max: Any) -> None:
        self._op_clamp(node, x, None, max)

    def _op_hardtanh(self, node: Any, x: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> None:
        self._op_clamp(node, x, min_val, max_val)

    def _op_relu6(self, node: Any, x: Any, inplace: bool = False) -> None:
        self._op_clamp(node, x, 0.0, 6.0)

    def _op_leaky_relu(self, node: Any, x: Any, negative_slope: Any = 0.01, inplace: bool = False) -> None:
        self._pointwise(node, PiecewiseLinear.leaky(self._number(node, negative_slope)))

    def _op_prelu(self, node: Any, x: Any, weight: Any) -> None:
        if not isinstance(weight, Tensor):
            self._refuse(node, "prelu", "its slopes must be constant")
        axes = 1 if weight.numel() == 1 else len(self._features(node))
        self._pointwise(node, prelu(weight, axes))

    def _op_abs(self, node: Any, x: Any) -> None:
        self._pointwise(node, ABSOLUTE)

    def _op_hardsigmoid(self, node: Any, x: Any, inplace: bool = False) -> None:
        self._pointwise(node, HARDSIGMOID)

    def _op_relu(self, node: Any, x: Any, inplace: bool = False) -> None:
        self._pointwise(node, RELU)

    def _op_softmax(self, node: Any, x: Any, dim: Any = None, *_: Any, dtype: Any = None, **__: Any) -> None:
        self._last(node, nn.Softmax(dim), dtype)

    def _op_log_softmax(self, node: Any, x: Any, dim: Any = None, *_: Any, dtype: Any = None, **__: Any) -> None:
        self._last(node, nn.LogSoftmax(dim), dtype)

    def _last(self, node: Any, layer: nn.Module, dtype: Any) -> None:
        if dtype is not None:
            self._refuse(node, type(layer).__name__, "it must keep the dtype")
        self.builder.append(layer, self._place(node))

    def _number(self, node: Any, value: Any) -> float:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, int | float) or math.isnan(value):
            self._refuse(node, node.name, f"its parameters must be numbers, got {value!r}")
        return float(value)

    # Pooling, transposed convolution.

    def _op_max_pool1d(
        self, node: Any, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> None:  # fmt: skip
        if return_indices:
            self._refuse(node, "max_pool", "return_indices must be false")
        max_pool(self.builder, self._place(node), kernel_size, stride, padding, dilation, ceil_mode)

    _op_max_pool2d = _op_max_pool1d

    def _op_adaptive_avg_pool1d(self, node: Any, x: Any, output_size: Any) -> None:
        self.builder.append(nn.AdaptiveAvgPool1d(output_size), self._place(node))

    def _op_adaptive_avg_pool2d(self, node: Any, x: Any, output_size: Any) -> None:
        self.builder.append(nn.AdaptiveAvgPool2d(output_size), self._place(node))

    def _op_conv_transpose2d(
        self, node: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> None:  # fmt: skip
        if not isinstance(weight, Tensor):
            self._refuse(node, "transposed convolution", "its weight must be constant")
        kind: Any = nn.ConvTranspose1d if weight.ndim == 3 else nn.ConvTranspose2d
        fit = [v if isinstance(v, int) else tuple(v) for v in (stride, padding, output_padding, dilation)]
        layer = kind(
            weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), *fit[:3], groups, True, fit[3],
            device="meta",
        )  # fmt: skip
        layer.weight = as_parameter(weight)
        layer.bias = None if bias is None else as_parameter(bias)
        self.builder.append(layer, self._place(node))

    _op_conv_transpose1d = _op_conv_transpose2d

    # Selections, sums, means.

    def _op_mean(self, node: Any, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> None:
        self._reduce(node, "mean", dim, keepdim, dtype)

    def _op_sum(self, node: Any, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> None:
        self._reduce(node, "sum", dim, keepdim, dtype)

    def _reduce(self, node: Any, op: str, dim: Any, keepdim: bool, dtype: Any) -> None:
        shape = self._features(node)
        if dim is None or dtype is not None:
            self._refuse(node, op, "it must name the axes it goes over, and keep the dtype")
        axes = tuple(self._axis_of(node, d) for d in ([dim] if isinstance(dim, int) else dim))
        if not axes:
            self._refuse(node, op, "it must name the axes it goes over")
        terms = math.prod(shape[axis - 1] for axis in axes)
        self.builder.append(Rearrange(op, axes, keepdim, terms=terms + 1), self._place(node))

    def _op_permute(self, node: Any, x: Any, *dims: Any) -> None:
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        axes = tuple(d % (1 + len(self._features(node))) for d in order)
        if axes[0] != 0:
            self._refuse(node, "permute", "axis 0, the batch, must stay first")
        self.builder.append(Rearrange("permute", *axes), self._place(node))

    def _op_transpose(self, node: Any, x: Any, dim0: int, dim1: int) -> None:
        axes = list(range(1 + len(self._features(node))))
        one, other = self._axis_of(node, dim0), self._axis_of(node, dim1)
        axes[one], axes[other] = other, one
        self.builder.append(Rearrange("permute", *axes), self._place(node))

    def _op_slice(self, node: Any, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> None:
        if dim == 0 and start in (None, 0) and (end is None or end >= 2**31) and step == 1:
            return
        size = self._features(node)[self._axis_of(node, dim) - 1]
        if not all(n is None or isinstance(n, int) for n in (start, end, step)):
            self._refuse(node, "slice", "its ends must be constant")
        start, stop, step = slice(start, end, step).indices(size)
        self.builder.append(Rearrange("slice", self._axis_of(node, dim), start, stop, step), self._place(node))

    def _op_select(self, node: Any, x: Any, dim: int, index: int) -> None:
        axis = self._axis_of(node, dim)
        self.builder.append(Rearrange("select", axis, index), self._place(node))

    def _op_index_select(self, node: Any, x: Any, dim: int, index: Any) -> None:
        if not isinstance(index, Tensor):
            self._refuse(node, "index_select", "its index must be constant")
        self.builder.append(Rearrange("index_select", self._axis_of(node, dim), index), self._place(node))

    def _op_flip(self, node: Any, x: Any, *dims: Any) -> None:
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        self.builder.append(Rearrange("flip", *(self._axis_of(node, d) for d in order)), self._place(node))

    def _op_pixel_shuffle(self, node: Any, x: Any, upscale_factor: int) -> None:
        self.builder.append(nn.PixelShuffle(upscale_factor), self._place(node))

    def _op_pixel_unshuffle(self, node: Any, x: Any, downscale_factor: int) -> None:
        self.builder.append(nn.PixelUnshuffle(downscale_factor), self._place(node))

    def _op_channel_shuffle(self, node: Any, x: Any, groups: int) -> None:
        self.builder.append(nn.ChannelShuffle(groups), self._place(node))

    def _op_getitem(self, node: Any, x: Any, index: Any) -> None:
        parts = list(index) if isinstance(index, tuple) else [index]
        rank = 1 + len(self._features(node))
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (rank - len(parts) + 1)
        if not parts or parts[0] != slice(None) or len(parts) > rank:
            self._refuse(node, "indexing", "it must keep the batch axis, x[:, ...]")
        for axis in range(len(parts) - 1, 0, -1):
            part = parts[axis]
            if isinstance(part, slice):
                if part != slice(None):
                    self._op_slice(node, x, axis, part.start, part.stop, 1 if part.step is None else part.step)
            elif type(part) is int:
                self._op_select(node, x, axis, part)
            else:
                self._refuse(node, "indexing", f"torchreach supports integers and slices, got {part!r}")

    def _op_chunk(self, node: Any, x: Any, chunks: int, dim: int = 0) -> list[int]:
        size = self._features(node)[self._axis_of(node, dim) - 1]
        return self._op_split(node, x, math.ceil(size / chunks), dim)

    def _op_split(self, node: Any, x: Any, split_size: Any, dim: int = 0) -> list[int]:
        axis = self._axis_of(node, dim)
        size = self._features(node)[axis - 1]
        if isinstance(split_size, int):
            split_size = [min(split_size, size - start) for start in range(0, size, split_size)]
        return slices(self.builder, x.at, axis, list(split_size), self._place(node))

    _op_split_with_sizes = _op_split

    def _op_pad(self, node: Any, x: Any, pad: Any, mode: str = "constant", value: Any = 0) -> None:
        rank = len(self._features(node))
        if mode != "constant" or value not in (None, 0) or len(pad) > 2 * rank:
            self._refuse(node, "pad", "torchreach supports padding of features by zeros")
        self.builder.append(Rearrange("pad", *pad), self._place(node))

    _op_constant_pad_nd = _op_pad

    def _op_expand(self, node: Any, x: Any, *sizes: Any) -> None:
        self._refuse(node, "expand", "sums broadcast by themselves; leave it out")

    def _axis_of(self, node: Any, dim: Any) -> int:
        rank = 1 + len(self._features(node))
        if not isinstance(dim, int) or not -rank <= dim < rank:
            self._refuse(node, node.name, f"its axis must be an integer below {rank}, got {dim!r}")
        if dim % rank == 0:
            self._refuse(node, node.name, "axis 0 is the batch")
        return dim % rank
