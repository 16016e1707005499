"""What few neighbouring features of a convolutional network depend on: a window of every layer before.

The channels at one place of a layer depend, through convolutions, on windows of the layers before, of one size for all
places. Where a window reaches over the edge of a layer it sees zeros, as the convolutions do.

Axis letters: P places, R rows (one objective each), W features of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchreach.graph.layers import PASS_THROUGH, ElementwiseAffine, Rearrange, Reshape, transpose
from torchreach.graph.twin_blocks import Blocks

# A window is worth its trouble where it has at most this share of the features of its layers.
SHARE = 0.7


@dataclass(frozen=True)
class Span:
    """Along one axis: place i sees [stride i + start, stride i + start + count)."""

    stride: int
    start: int
    count: int

    def before(self, stride: int, padding: int, reach: int) -> Span:
        """Of the input of an operation that slides over it."""
        return Span(self.stride * stride, self.start * stride - padding, (self.count - 1) * stride + reach)

    def reaches_out(self, size: int, places: int) -> bool:
        return self.start < 0 or self.stride * (places - 1) + self.start + self.count > size


class Part(NamedTuple):
    """Features [offset, offset + prod(shape)) of a flat value; shape: channels, then axes of places.

    last: whether the value has its channels last.
    """

    offset: int
    shape: tuple[int, ...]
    last: bool = False


Area = tuple[Span, ...]


class Window(NamedTuple):
    """What is seen of a part, which is this node of its step."""

    part: Part
    node: int
    area: Area

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape[0], *(span.count for span in self.area)


@dataclass(frozen=True, eq=False)
class WindowMap:
    """One step on windows.

    areas: of its nodes, None where nothing is wanted of one. ends, inputs: what is wanted of its output and input, in
    order. grid: places of the layer in question.
    """

    blocks: Blocks
    areas: list[Area | None]
    ends: list[Window]
    inputs: list[Window]
    grid: tuple[int, ...]

    def transpose(self, rows: Tensor, places: Tensor) -> Tensor:
        """W^T rows: [P, R, W_out] -> [P, R, W_in], of windows at places [P, axes]."""
        nodes, count = self.blocks.nodes, rows.shape[:2]
        sums: list[Tensor | None] = [None] * len(nodes)
        parts = torch.split(rows.flatten(0, 1), [prod(end.shape) for end in self.ends], 1)
        for end, part in zip(self.ends, parts, strict=True):
            whole = self.areas[end.node]
            assert whole is not None
            sums[end.node] = _sum(sums[end.node], _embedded(part.reshape(-1, *end.shape), end.area, whole))
        stop = {window.node for window in self.inputs}
        for i in range(len(nodes) - 1, 0, -1):
            node, y, area = nodes[i], sums[i], self.areas[i]
            if y is None or area is None or i in stop:
                continue
            y = self._inside(y, area, node.shape[1:], places, count[1])
            if node.kind == "layer":
                assert node.first is not None
                passed = [_back(node.first, y, area)]
            elif node.kind == "cat":
                passed = [(p, area) for p in torch.split(y, [nodes[j].shape[0] for j in node.inputs], 1)]
            else:
                passed = [(y, area), (-y if node.kind == "sub" else y, area)]
            for j, (part, own) in zip(node.inputs, passed, strict=True):
                whole = self.areas[j]
                assert whole is not None
                sums[j] = _sum(sums[j], _embedded(part, own, whole))
        result: list[Tensor] = []
        for window in self.inputs:
            found = sums[window.node]
            assert found is not None
            result.append(found.flatten(1))
        return torch.cat(result, 1).reshape(*count, -1)

    def seen(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Features [P, W_in] of the step's input, and whether they are in it at all."""
        indices: list[Tensor] = []
        insides: list[Tensor] = []
        for part, _, area in self.inputs:
            # How far neighbours are apart: features of one channel after the other, or the channels of a place.
            strides = [prod(part.shape[axis + 1 :]) for axis in range(len(part.shape))]
            if part.last:
                strides = [1, *(by * part.shape[0] for by in strides[1:])]
            index = strides[0] * torch.arange(part.shape[0], device=places.device)[None]
            inside = torch.ones_like(index, dtype=torch.bool)
            for axis, (span, size, by) in enumerate(zip(area, part.shape[1:], strides[1:], strict=True)):
                at, there = _along(span, places[:, axis], size)
                index = index[..., None] + by * at.clamp(0, size - 1).reshape(len(at), *[1] * axis, 1, -1)
                inside = inside[..., None] & there.reshape(len(at), *[1] * axis, 1, -1)
            indices.append((part.offset + index).flatten(1))
            insides.append(inside.flatten(1))
        return torch.cat(indices, 1), torch.cat(insides, 1)

    def _inside(self, y: Tensor, area: Area, sizes: tuple[int, ...], places: Tensor, rows: int) -> Tensor:
        for axis, (span, size, grid) in enumerate(zip(area, sizes, self.grid, strict=True)):
            if span.reaches_out(size, grid):
                inside = _along(span, places[:, axis], size)[1].repeat_interleave(rows, 0)
                y = y * inside.reshape(len(inside), *[1] * (axis + 1), -1, *[1] * (len(area) - axis - 1))
        return y


def windows(maps: Sequence[object]) -> list[tuple[Part, list[WindowMap]]]:
    """Of every part of the last map's output: what its places depend on, map by map from the first on.

    Empty where a layer has no windows, or they are hardly smaller than the layers.
    """
    found: list[tuple[Part, list[WindowMap]]] = []
    blocks = [map_ for map_ in maps if isinstance(map_, Blocks)]
    if len(blocks) < len(maps):
        return []
    for part, _ in _ends(blocks[-1]) or ():
        if len(part.shape) < 2:
            return []
        grid = part.shape[1:]
        wanted = {part: tuple(Span(1, 0, 1) for _ in grid)}
        own: list[WindowMap] = []
        for map_ in reversed(blocks):
            step = _step(map_, wanted, grid)
            if step is None:
                return []
            own.append(step)
            wanted = {window.part: window.area for window in step.inputs}
        own.reverse()
        seen = sum(prod(window.shape) for step in own for window in step.inputs)
        if seen > SHARE * sum(map_.shape[1] for map_ in blocks):
            return []
        found.append((part, own))
    return found


def _step(blocks: Blocks, wanted: dict[Part, Area], grid: tuple[int, ...]) -> WindowMap | None:
    if len(blocks.nodes) == 1 and len(wanted) == 1:  # the identity
        ((part, area),) = wanted.items()
        whole = [Window(part, 0, area)]
        return WindowMap(blocks, [area], whole, whole, grid) if prod(part.shape) == blocks.shape[1] else None
    ends = _ends(blocks)
    if ends is None or not wanted.keys() <= {part for part, _ in ends}:
        return None
    areas: list[Area | None] = [None] * len(blocks.nodes)
    inside = [Window(part, i, wanted[part]) for part, i in ends if part in wanted]
    for _, i, area in inside:  # one node can be several parts
        areas[i] = _union(areas[i], area)
        if areas[i] is None:
            return None
    inputs: list[Window] = []
    for i in range(len(blocks.nodes) - 1, 0, -1):
        node, area = blocks.nodes[i], areas[i]
        if area is None:
            continue
        if len(node.shape) != 1 + len(area):
            return None
        cut = _cut(blocks, i)
        if cut is not None:
            inputs.append(Window(cut, i, area))
            continue
        if node.kind == "layer":
            assert node.first is not None
            before = _before(node.first, area)
            if before is None:
                return None
        elif (node.kind == "cat" and node.axis == 1) or all(blocks.nodes[j].shape == node.shape for j in node.inputs):
            before = area
        else:
            return None
        for j in node.inputs:
            joined = _union(areas[j], before)
            if joined is None:
                return None
            areas[j] = joined
    if areas[0] is not None:
        if len(blocks.nodes[0].shape) != 1 + len(areas[0]):
            return None
        inputs.append(Window(Part(0, blocks.nodes[0].shape), 0, areas[0]))
    inputs.sort()
    return WindowMap(blocks, areas, inside, inputs, grid) if inputs else None


def _ends(blocks: Blocks) -> list[tuple[Part, int]] | None:
    """(part, node) of the parts that a step's output is flattened from."""
    at = len(blocks.nodes) - 1
    node = blocks.nodes[at]
    if node.kind != "cat" or len(node.shape) > 1:
        at = _unflattened(blocks, at)
        return [(Part(0, blocks.nodes[at].shape), at)]
    result: list[tuple[Part, int]] = []
    offset = 0
    for i in node.inputs:
        at = _unflattened(blocks, i)
        result.append((Part(offset, blocks.nodes[at].shape), at))
        offset += prod(blocks.nodes[i].shape)
    return result


def _unflattened(blocks: Blocks, at: int) -> int:
    while at and isinstance(blocks.nodes[at].first, (nn.Flatten, *PASS_THROUGH)):
        at = blocks.nodes[at].inputs[0]
    return at


def _cut(blocks: Blocks, at: int) -> Part | None:
    """The part of the input that a node is, where it is one."""
    node = blocks.nodes[at]
    if isinstance(node.first, Rearrange) and node.first.operation == "permute" and len(node.inputs) == 1:
        before = node.inputs[0]
        whole = before == 0 or _cut(blocks, before) == Part(0, blocks.nodes[before].shape)
        moved = node.first.arguments == (0, len(node.shape), *range(1, len(node.shape)))
        return Part(0, node.shape, last=True) if whole and moved else None
    if node.inputs != (0,):
        return None
    layers = list(node.first) if isinstance(node.first, nn.Sequential) else [node.first]
    offset = 0
    if len(layers) == 2 and isinstance(layers[0], Rearrange) and layers[0].operation == "slice":
        offset = layers[0].arguments[1]
        layers = layers[1:]
    reshapes = len(layers) == 1 and isinstance(layers[0], Reshape | nn.Unflatten)
    return Part(offset, node.shape) if reshapes else None


def _before(layer: nn.Module, area: Area) -> Area | None:
    """What an area of a layer's output sees of its input."""
    axes = range(len(area))
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and not isinstance(layer.padding, str):
        kernel, sizes = layer.kernel_size, zip(area, layer.stride, layer.padding, strict=True)
        return tuple(
            span.before(stride, padding, (kernel[k] - 1) * layer.dilation[k] + 1)
            for k, (span, stride, padding) in enumerate(sizes)
        )
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        kernel, stride, padding = _sizes(layer, len(area))
        plain = not layer.ceil_mode and not any(padding) and getattr(layer, "divisor_override", None) is None
        sizes = zip(area, kernel, stride, strict=True)
        return tuple(span.before(by, 0, reach) for span, reach, by in sizes) if plain else None
    if isinstance(layer, Rearrange) and layer.operation == "pad":
        pads = [*layer.arguments, *[0] * (2 * len(area))]  # the last axis first
        low = [pads[2 * (len(area) - 1 - k)] for k in axes]
        return tuple(Span(s.stride, s.start - by, s.count) for s, by in zip(area, low, strict=True))
    by_channel = isinstance(layer, ElementwiseAffine) and all(size == 1 for size in layer.scale.shape[1:])
    return area if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, *PASS_THROUGH)) or by_channel else None


def _back(layer: nn.Module, y: Tensor, area: Area) -> tuple[Tensor, Area]:
    """W^T y of a layer on a window, and the window of its input; y: [R, C, ...]."""
    before = _before(layer, area)
    assert before is not None
    convolve = F.conv_transpose1d if len(area) == 1 else F.conv_transpose2d
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        y = convolve(y, layer.weight, None, layer.stride, 0, 0, layer.groups, layer.dilation)  # type: ignore[arg-type]
    elif isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        kernel, stride, _ = _sizes(layer, len(area))
        share = y.new_full((y.shape[1], 1, *kernel), 1 / prod(kernel))
        y = convolve(y, share, None, stride, 0, 0, y.shape[1])  # type: ignore[arg-type]
    elif not isinstance(layer, Rearrange):
        y = transpose(layer, y, tuple(y.shape[1:]))
    return y, before


def _sizes(layer: nn.AvgPool1d | nn.AvgPool2d, axes: int) -> tuple[tuple[int, ...], ...]:
    """Kernel, stride and padding along each axis."""
    sizes = (layer.kernel_size, layer.stride, layer.padding)
    return tuple((size,) * axes if isinstance(size, int) else tuple(size) for size in sizes)


def _union(one: Area | None, other: Area) -> Area | None:
    """The smallest area with both in it; None where their places move apart."""
    if one is None:
        return other
    if any(a.stride != b.stride for a, b in zip(one, other, strict=True)):
        return None
    starts = [min(a.start, b.start) for a, b in zip(one, other, strict=True)]
    stops = [max(a.start + a.count, b.start + b.count) for a, b in zip(one, other, strict=True)]
    return tuple(Span(a.stride, start, stop - start) for a, start, stop in zip(one, starts, stops, strict=True))


def _embedded(y: Tensor, own: Area, whole: Area) -> Tensor:
    """[R, C, ...] on area `own` as one on area `whole`, zero elsewhere."""
    pads: list[int] = []
    for a, b in zip(own, whole, strict=True):
        pads = [a.start - b.start, b.start + b.count - a.start - a.count, *pads]
    return F.pad(y, pads) if any(pads) else y


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def _along(span: Span, places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[P, count] positions along one axis, and whether they lie within its size."""
    at = span.stride * places[:, None] + span.start + torch.arange(span.count, device=places.device)
    return at, (at >= 0) & (at < size)
