"""The affine blocks of two networks side by side as the layers they are: no matrix, each layer's transpose backward.

A block of several layers is a graph of pairs of layers, each in difference coordinates (see `twins`), so that no
difference is ever taken of two results, and what the networks have in common need not cancel:

    D of g after f  =  (W_g - V_g) W_f + V_g (W_f - V_f)

Rounding: what is computed is a sum over paths of products of coefficients, each path rounded once per operation, so
that a number is off by at most gamma times the same sum of magnitudes (`Blocks.size`), gamma counting `Blocks.terms`.
The difference of two layers' coefficients is itself rounded, by its own roundoff where they are weights; where they are
results (batch norm's scales) by that of both, and both then count (`fuzzy`).

Axis letters: R rows, N features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchreach.graph.affine_graph import AffineGraph
from torchreach.graph.layers import (
    PASS_THROUGH,
    ElementwiseAffine,
    MergedAffine,
    Rearrange,
    Reshape,
    alike,
    fan_in,
    fan_out,
    linear,
    magnitude,
    transpose,
)
from torchreach.graph.steps import Step

# Layers whose difference is a layer with the difference of their weights.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
Shape = tuple[int, ...]
Side = Tensor | None  # None: zero


@dataclass(frozen=True, eq=False)
class _Node:
    """One value of both blocks. kind: "input", "layer", "add", "sub", "cat" (along axis `axis`, the batch counted).

    delta: the layers' difference, None where they are one function. fuzzy: its coefficients are rounded by more than
    their own roundoff, by that of both layers' coefficients.
    """

    kind: str
    inputs: tuple[int, ...]
    shape: Shape
    first: nn.Module | None = None
    second: nn.Module | None = None
    delta: nn.Module | None = None
    fuzzy: bool = False
    axis: int = 1


class Blocks:
    """Two blocks of layers as they are: nothing is stored as a matrix, and backward goes by each layer's transpose."""

    def __init__(self, nodes: Sequence[_Node], dtype: torch.dtype) -> None:
        self.nodes, self.dtype = tuple(nodes), dtype
        self.shape = prod(nodes[-1].shape), prod(nodes[0].shape)
        self.widest = max(prod(node.shape) for node in nodes)
        self.terms = sum(_terms(node) for node in nodes)
        # Whether all differences are layers of their own.
        self.matched = not any(isinstance(node.delta, _Apart) for node in nodes)
        # Nodes on the way to which the networks already differ.
        self.differ: list[bool] = []
        for node in nodes:
            self.differ.append(node.delta is not None or any(self.differ[i] for i in node.inputs))

    @staticmethod
    def identity(shape: Shape, dtype: torch.dtype) -> Blocks:
        """Of two networks that leave values as they are."""
        return Blocks([_Node("input", (), shape)], dtype)

    def forth(self, a: Tensor, e: Side = None) -> tuple[Tensor, Tensor]:
        return self._walk(a, e, linear, torch.sub, fuzzy=False)

    def spread(self, a: Tensor) -> Tensor:
        return self._walk(a, None, magnitude, torch.add, fuzzy=False)[1]

    def size(self, a: Tensor) -> Tensor:
        return self._walk(a, None, magnitude, torch.add, fuzzy=True)[1]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = F.one_hot(index, self.shape[0]).to(self.dtype)
        D, V = self.back(None, unit)
        assert V is not None
        return self.transpose(unit), V, D

    def own_rows(self, index: Tensor) -> Tensor:
        return self.transpose(F.one_hot(index, self.shape[0]).to(self.dtype))

    def transpose(self, y: Tensor) -> Tensor:
        found, _ = self._back(y.flatten(0, -2), None)
        assert found is not None
        return found.reshape(*y.shape[:-1], self.shape[1])

    def back(self, p: Side, q: Tensor, *, beta: bool = True) -> tuple[Tensor, Side]:
        shape = (*q.shape[:-1], self.shape[1])
        p, q = None if p is None else p.expand(q.shape).flatten(0, -2), q.flatten(0, -2)
        both = self._back(p, q, beta=beta)
        alpha, own = (None if part is None else part.reshape(shape) for part in both)
        return q.new_zeros(shape) if alpha is None else alpha, own

    def influence(self, y: Tensor) -> Tensor:
        found, _ = self._back(y, None, magnitude=True)
        assert found is not None
        return found

    def part(self, rows: Tensor, columns: Tensor | None) -> _Part:
        return _Part(self, rows, columns)

    def _walk(
        self,
        a: Tensor,
        e: Side,
        rule: Callable[[nn.Module, Tensor], Tensor],
        subtract: Callable[[Tensor, Tensor], Tensor],
        *,
        fuzzy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Both coordinates of the last value, from those of the input."""
        values: list[tuple[Tensor, Side]] = []
        for node in self.nodes:
            inputs = [values[i] for i in node.inputs]
            if node.kind == "input":
                z, d = (None if part is None else part.reshape(len(part), *node.shape) for part in (a, e))
            elif node.kind == "layer":
                assert node.first is not None
                assert node.second is not None
                ((x, y),) = inputs
                z, d = rule(node.first, x), None if y is None else rule(node.second, y)
                if node.delta is not None:
                    d = _sum(d, rule(node.delta, x))
                    d = _sum(d, z + rule(node.second, x)) if fuzzy and node.fuzzy else d
            elif node.kind == "cat":
                z = torch.cat([x for x, _ in inputs], node.axis)
                d = None
                if any(y is not None for _, y in inputs):
                    d = torch.cat([torch.zeros_like(x) if y is None else y for x, y in inputs], node.axis)
            else:
                (x, y), (x2, y2) = inputs
                join = torch.add if node.kind == "add" else subtract
                z = join(x, x2)
                d = None if y is None and y2 is None else join(_or_zero(y, x), _or_zero(y2, x2))
            assert z is not None
            values.append((z, d))
        z, d = values[-1]
        return z.flatten(1), _or_zero(d, z).flatten(1)

    def _back(self, p: Side, q: Side, *, beta: bool = True, magnitude: bool = False) -> tuple[Side, Side]:
        """Coefficients [R, N_in] on both coordinates of the input, from those [R, N_out] on the last value's.

        beta: whether those on the second are wanted; else they go only as far as they matter for the first.
        """
        sums: list[tuple[Side, Side]] = [(None, None)] * len(self.nodes)
        sums[-1] = p, q
        for i in range(len(self.nodes) - 1, 0, -1):
            node, both = self.nodes[i], sums[i]
            p, q = (None if part is None else part.reshape(len(part), *node.shape) for part in both)
            shapes = [self.nodes[j].shape for j in node.inputs]
            if node.kind == "layer":
                assert node.first is not None
                assert node.second is not None
                alpha = None if p is None else transpose(node.first, p, shapes[0], magnitude=magnitude)
                wanted = q is not None and (beta or self.differ[node.inputs[0]])
                own = transpose(node.second, q, shapes[0]) if q is not None and wanted else None
                if q is not None and node.delta is not None:
                    alpha = _sum(alpha, transpose(node.delta, q, shapes[0]))
                passed = [(alpha, own)]
            elif node.kind == "cat":
                sizes = [shape[node.axis - 1] for shape in shapes]
                passed = list(zip(*(_pieces(part, sizes, node.axis) for part in (p, q)), strict=True))
            else:
                sign = -1 if node.kind == "sub" and not magnitude else 1
                passed = [(_reduced(p, shapes[0]), _reduced(q, shapes[0]))]
                passed.append((_reduced(p, shapes[1], sign), _reduced(q, shapes[1], sign)))
            for j, part in zip(node.inputs, passed, strict=True):
                sums[j] = _sum(sums[j][0], part[0]), _sum(sums[j][1], part[1])
        p, q = (None if part is None else part.flatten(1) for part in sums[0])
        return p, q


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows and columns of blocks; values elsewhere are zero."""

    whole: Blocks
    kept: Tensor
    columns: Tensor | None

    def forth(self, a: Tensor, e: Side = None) -> tuple[Tensor, Tensor]:
        z, d = self.whole.forth(self._in(a), None if e is None else self._in(e))
        return z[:, self.kept], d[:, self.kept]

    def back(self, p: Side, q: Tensor, *, beta: bool = True) -> tuple[Tensor, Side]:
        size = self.whole.shape[0]
        p, q = None if p is None else _scattered(p, self.kept, size), _scattered(q, self.kept, size)
        alpha, own = self.whole.back(p, q, beta=beta)
        if self.columns is None:
            return alpha, own
        return alpha[..., self.columns], None if own is None else own[..., self.columns]

    def _in(self, x: Tensor) -> Tensor:
        return x if self.columns is None else _scattered(x, self.columns, self.whole.shape[1])


def blocks(first: Step, second: Step) -> Blocks:
    """The layers of two steps with equal numbers of inputs and of outputs, paired as far as their structures match."""
    shape = first.in_shape
    nodes = [_Node("input", (), shape)]
    if shape != second.in_shape or not _grow(nodes, *(_kept(step.block) for step in (first, second))):
        flat = [nn.Sequential(Reshape(step.in_shape), step.block, nn.Flatten()) for step in (first, second)]
        shape = (prod(shape),)
        nodes = [_Node("input", (), shape)]
        nodes.append(_Node("layer", (0,), (first.features,), flat[0], flat[1], _Apart(*flat)))
    if len(nodes) == 1:  # the identity
        nodes.append(_Node("layer", (0,), shape, nn.Identity(), nn.Identity()))
    return Blocks(nodes, first.bias.dtype)


class _Apart(MergedAffine):
    """x -> W x - V x of two layers that are not of one kind."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def linear_part(self, x: Tensor) -> Tensor:
        return linear(self.first, x) - linear(self.second, x)

    def magnitude_part(self, x: Tensor) -> Tensor:
        return magnitude(self.first, x) + magnitude(self.second, x)


def _kept(block: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in block if not isinstance(layer, PASS_THROUGH)]


def _grow(nodes: list[_Node], first: list[nn.Module], second: list[nn.Module]) -> bool:
    """Append the layers of two chains behind the last node; False, with useless nodes, where they do not match."""
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if isinstance(one, AffineGraph) and isinstance(other, AffineGraph) and one.extra_repr() == other.extra_repr():
            if not _graph(nodes, one, other):
                return False
        elif not _layer(nodes, len(nodes) - 1, one, other):
            return False
    return True


def _layer(nodes: list[_Node], at: int, first: nn.Module, second: nn.Module) -> bool:
    """Append one layer of both networks, applied to node `at`; False where the results differ in shape."""
    zero = _zero(nodes[at].shape, first, second)
    shapes = [tuple(linear(layer, zero).shape[1:]) for layer in (first, second)]
    if shapes[0] != shapes[1]:
        return False
    delta, fuzzy = _delta(first, second, nodes[at].shape)
    nodes.append(_Node("layer", (at,), shapes[0], first, second, delta, fuzzy))
    return True


def _graph(nodes: list[_Node], first: AffineGraph, second: AffineGraph) -> bool:
    """Append the terms of two graphs of one structure, applied to the last node; False where shapes differ."""
    at, start = len(nodes) - 1, 0
    where: list[int] = []
    parts: list[int] = []
    for shape in first.parts:
        stop = start + prod(shape)
        own = Reshape(shape)
        cut = own if len(first.parts) == 1 else nn.Sequential(Rearrange("slice", 1, start, stop, None), own)
        nodes.append(_Node("layer", (at,), shape, cut, cut))
        parts.append(len(nodes) - 1)
        start = stop
    for term in first.terms:
        inputs = tuple(where[i] for i in term.inputs)
        shapes = [nodes[i].shape for i in inputs]
        if term.kind == "part":
            where.append(parts[term.index])
            continue
        if term.kind == "layer":
            one, other = first.layers[term.index], second.layers[term.index]
            if not _layer(nodes, inputs[0], one, other):
                return False
        elif term.kind == "cat":
            axis = term.index
            wide = sum(shape[axis - 1] for shape in shapes)
            shape = (*shapes[0][: axis - 1], wide, *shapes[0][axis:])
            nodes.append(_Node("cat", inputs, shape, axis=axis))
        else:
            nodes.append(_Node(term.kind, inputs, cast(Shape, tuple(cast(Any, torch).broadcast_shapes(*shapes)))))
        where.append(len(nodes) - 1)
    ends = [where[i] for i in first.outputs]
    if len(ends) > 1:
        flat = nn.Flatten()
        for i, end in enumerate(ends):
            nodes.append(_Node("layer", (end,), (prod(nodes[end].shape),), flat, flat))
            ends[i] = len(nodes) - 1
        nodes.append(_Node("cat", tuple(ends), (sum(prod(nodes[end].shape) for end in ends),)))
    elif ends[0] != len(nodes) - 1:
        nodes.append(_Node("layer", (ends[0],), nodes[ends[0]].shape, nn.Identity(), nn.Identity()))
    return True


def _delta(first: nn.Module, second: nn.Module, shape: Shape) -> tuple[nn.Module | None, bool]:
    """The difference of two layers on inputs of `shape`, None where they are one function; whether it is fuzzy."""
    if alike(first, second):
        return None, False
    if type(first) is type(second) and isinstance(first, nn.BatchNorm1d | nn.BatchNorm2d | ElementwiseAffine):
        ones = torch.ones_like(_zero(shape, first, second))
        scale = (linear(first, ones) - linear(second, ones))[0]
        if scale.shape == shape:
            return ElementwiseAffine(scale, torch.zeros_like(scale)), True
    elif type(first) is type(second) and isinstance(first, WEIGHTED) and _geometry(first) == _geometry(second):
        delta = copy.copy(first)
        weights = [layer.weight.detach() for layer in (first, second)]  # type: ignore[union-attr]
        vars(delta).update(_parameters={}, _buffers={"weight": weights[0] - weights[1], "bias": None})
        return delta, False
    return _Apart(first, second), False


def _geometry(layer: nn.Module) -> tuple[object, ...]:
    """What two layers of one type with weights have to share for their difference to be such a layer."""
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (tuple(weight.shape), *(getattr(layer, name, None) for name in names))


def _zero(shape: Shape, *layers: nn.Module) -> Tensor:
    like = [v for layer in layers for v in (*layer.parameters(), *layer.buffers())]
    device = like[0].device if like else None
    dtype = next((v.dtype for v in like if v.is_floating_point()), torch.float64)
    return torch.zeros(1, *shape, dtype=dtype, device=device)


def _terms(node: _Node) -> int:
    if node.first is None or node.second is None:
        return 4
    size = prod(node.shape)
    return sum(fan_in(layer) + fan_out(layer, size) for layer in (node.first, node.second)) + 4


def _sum(a: Side, b: Side) -> Side:
    return b if a is None else a if b is None else a + b


def _pieces(part: Side, sizes: list[int], axis: int) -> list[Side]:
    return [None] * len(sizes) if part is None else list(torch.split(part, sizes, axis))


def _or_zero(part: Side, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if part is None else part


def _reduced(part: Side, shape: Shape, sign: int = 1) -> Side:
    """Coefficients of a value that was broadcast, and added or subtracted."""
    return None if part is None else sign * part.sum_to_size(len(part), *shape)


def _scattered(part: Tensor, index: Tensor, size: int) -> Tensor:
    return part.new_zeros(*part.shape[:-1], size).index_copy(-1, index, part)
