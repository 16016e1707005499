"""Operations that make a graph of a chain: sums, stacks, maxima, pooling by maxima, and functions that bend twice.

Readers of traced graphs and of ONNX files share these; each adds nodes to a builder (`read.builder`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from torchreach.graph.layers import ElementwiseAffine, Rearrange, Reshape
from torchreach.graph.lowering import HARDSIGMOID, RELU, Node, PiecewiseLinear
from torchreach.graph.smooth import Smooth

POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid)
POOLING = (nn.MaxPool1d, nn.MaxPool2d)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


class Builder(Protocol):
    """What is needed of `read.builder.ChainBuilder`: the graph so far, and the node `at` that the next layer takes."""

    nodes: list[Node]
    at: int
    shape: tuple[int, ...] | None

    def append(self, layer: nn.Module, name: str) -> None: ...
    def join(self, op: str, inputs: tuple[int, ...], name: str, axis: int = 0) -> None: ...
    def move(self, at: int, name: str) -> None: ...
    def refuse(self, name: str, kind: str, reason: str = "") -> NoReturn: ...


def piecewise(layer: nn.Module, axes: int) -> PiecewiseLinear:
    """What one of the `POINTWISE` layers computes of each feature, on values of so many axes (batch not counted)."""
    if isinstance(layer, nn.ReLU):
        return RELU
    if isinstance(layer, nn.LeakyReLU):
        return PiecewiseLinear.leaky(float(layer.negative_slope))
    if isinstance(layer, nn.PReLU):
        return prelu(layer.weight, axes)
    if isinstance(layer, nn.Hardtanh):
        return PiecewiseLinear.clamp(float(layer.min_val), float(layer.max_val))
    assert isinstance(layer, nn.Hardsigmoid)
    return HARDSIGMOID


def prelu(weight: Tensor, axes: int) -> PiecewiseLinear:
    """PReLU with one slope, or one for each channel; the slopes are taken as they are now."""
    slope = weight.detach().double()  # where 1 - slope is not rounded to the network's dtype
    if slope.numel() == 1:
        return PiecewiseLinear.leaky(slope.reshape(()).clone())
    return PiecewiseLinear.leaky(slope.reshape(-1, *[1] * (axes - 1)))


def extremum(builder: Builder, first: int, second: int, name: str, *, largest: bool = True) -> None:
    """max of two values, node by node; min(a, b) = -max(-a, -b)."""
    if largest:
        builder.join("maximum", (first, second), name)
        return
    negated = []
    for value in (first, second):
        builder.move(value, name)
        builder.append(_scaled(-1.0), name)
        negated.append(builder.at)
    builder.join("maximum", (negated[0], negated[1]), name)
    builder.append(_scaled(-1.0), name)


def product(builder: Builder, first: int, second: int, name: str) -> bool:
    """A product of two values that is a smooth activation of one; False where it is none that torchreach knows.

        x s(k x) = silu(k x) / k,    x (1 + erf(k x)) = 2 gelu(w) / w',    x clamp(k x + 1/2, 0, 1) = hardswish(w) / w'

    with w = w' x, w' = sqrt(2) k and 6 k: so exporters write SiLU, GELU and Hardswish. Both may carry factors.
    """
    for at, other in ((first, second), (second, first)):
        root, height, shift = _factors(builder, other)
        gate = builder.nodes[root]
        if gate.op != "pointwise" or not height:
            continue
        base, pace, offset = _factors(builder, gate.inputs[0])
        own, scale, rest = _factors(builder, at)
        if own != base or offset or rest or not scale or not pace:
            continue
        f = gate.value
        if isinstance(f, Smooth) and f.name == "Sigmoid()" and shift == 0:
            layer, inner, outer = nn.SiLU(), pace, height
        elif isinstance(f, Smooth) and f.name == "Erf()" and shift == height:
            layer, inner, outer = nn.GELU(), pace * math.sqrt(2), 2 * height
        elif isinstance(f, PiecewiseLinear) and shift == 0 and (slope := _ramp(f)):
            layer, inner, outer = nn.Hardswish(), 6 * pace * slope, height
        else:
            continue
        builder.move(base, name)
        for part in (_scaled(inner), layer, _scaled(scale * outer / inner)):
            if not isinstance(part, ElementwiseAffine) or float(part.scale) != 1:
                builder.append(part, name)
        return True
    return False


def _factors(builder: Builder, at: int) -> tuple[int, float, float]:
    """A value as scale * root + shift: the node of the root, before arithmetic with single numbers; scale, shift."""
    scale, shift = 1.0, 0.0
    while isinstance(layer := builder.nodes[at].value, ElementwiseAffine):
        if layer.scale.numel() != 1 or layer.shift.numel() != 1:
            break
        scale, shift = scale * float(layer.scale.double()), scale * float(layer.shift.double()) + shift
        at = builder.nodes[at].inputs[0]
    return at, scale, shift


def _ramp(f: PiecewiseLinear) -> float:
    """k where f(z) = clamp(k z + 1/2, 0, 1), else 0."""
    if isinstance(f.slope, Tensor) or f.slope or f.shift or len(f.pieces) != 2:
        return 0.0
    (h1, s1, o1), (h2, s2, o2) = f.pieces
    return s1 if not isinstance(h1, Tensor) and (h1, h2, o1, o2, s1) == (1, -1, 0.5, -0.5, s2) else 0.0


def max_pool(
    builder: Builder, name: str, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> None:
    """Largest value of each window, as a tournament of maxima of two over the window's places.

    padding: one number per axis, or those before and behind.

    A place outside the picture is replaced by one of the window's that is inside, which changes no maximum.
    """
    shape = builder.shape
    if shape is None:
        builder.refuse(name, "MaxPool", "input_shape=(...) is required to know its windows")
    spatial = shape[1:]
    rank = len(spatial)
    sizes = [_pair(v, rank) for v in (kernel, stride or kernel, padding, dilation)]
    sizes[2] = [(p, p) if isinstance(p, int) else p for p in sizes[2]]
    places = [
        _places(n, part, ceil_mode) for n, part in zip(spatial, zip(*sizes, strict=True), strict=True)
    ]  # [out, kernel] per axis
    out = tuple(len(place) for place in places)
    index = places[0]
    if rank == 2:
        index = places[0][:, None, :, None] * spatial[1] + places[1][None, :, None, :]
    index = index.reshape(out[0] * out[-1] if rank == 2 else out[0], -1)
    builder.append(Reshape((shape[0], index.new_tensor(spatial).prod().item())), name)  # type: ignore[arg-type]
    flat = builder.at
    values = []
    for column in index.unbind(1):
        builder.move(flat, name)
        builder.append(Rearrange("index_select", 2, column.clone()), name)
        values.append(builder.at)
    while len(values) > 1:
        winners = []
        for first, second in zip(values[::2], values[1::2], strict=False):
            builder.join("maximum", (first, second), name)
            winners.append(builder.at)
        values = winners + values[len(values) - len(values) % 2 :]
    builder.move(values[0], name)
    builder.append(Reshape((shape[0], *out)), name)


def _places(size: int, window: tuple[Any, ...], ceil_mode: bool) -> Tensor:
    """[windows, kernel] positions of each window along one axis, all inside.

    window: kernel, stride, padding (before, behind), dilation.
    """
    kernel, stride, (before, behind), dilation = window
    reach = dilation * (kernel - 1) + 1
    windows = (size + before + behind - reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (windows - 1) * stride >= size + before:
        windows -= 1
    start = torch.arange(windows)[:, None] * stride - before
    place = start + dilation * torch.arange(kernel)
    inside = (place >= 0) & (place < size)
    first = torch.where(inside, place, size).amin(1, keepdim=True)
    return torch.where(inside, place, first)


def slices(builder: Builder, base: int, axis: int, sizes: Sequence[int], name: str) -> list[int]:
    """Neighbouring parts of a value along an axis (batch counted)."""
    result, start = [], 0
    for size in sizes:
        builder.move(base, name)
        builder.append(Rearrange("slice", axis, start, start + size, 1), name)
        result.append(builder.at)
        start += size
    return result


def _pair(value: Any, rank: int) -> list[Any]:
    values = [value] * rank if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _scaled(scale: float) -> ElementwiseAffine:
    return ElementwiseAffine(torch.tensor(scale, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
