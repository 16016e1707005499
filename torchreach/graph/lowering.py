"""Any acyclic graph of affine and piecewise linear operations as a chain of affine layers and ReLUs.

A piecewise linear function of one number is a sum of ReLUs, and a maximum is one ReLU of a difference:

    f(z) = c + a z + sum_k s_k relu(t_k z + o_k)            max(a, b) = a + relu(b - a)

so a network becomes layers of ReLUs between affine graphs. A value that is needed after a layer of ReLUs, a skip
connection say, is carried past it: it becomes a part of the state that the layer leaves alone. Every engine and every
bound that knows affine layers and ReLUs on some of the features then knows the network, exactly.

    level(v) = 0 for the input; of an affine operation, the largest level of its inputs; of a piecewise linear one,
    one more: ReLU layer number l computes everything of level l

A network of integer codes is lowered likewise, with roundings in place of ReLUs (`graph.roundings`).

Property: lower(graph)(x) == graph(x), up to rounding. A ReLU of the chain stands for one breakpoint of one feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from torchreach.graph.affine_graph import AffineGraph, Term
from torchreach.graph.deployed import Operation
from torchreach.graph.layers import ElementwiseAffine, MaskedReLU
from torchreach.graph.quantizer import Quantizer
from torchreach.graph.roundings import Operands, Part, Roundings
from torchreach.graph.smooth import Activations, Smooth

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PiecewiseLinear:
    """f(z) = shift + slope z + sum over k of height relu(scale z + offset); numbers or tensors that broadcast.

    pieces: (height, scale, offset) of each ReLU.
    """

    pieces: tuple[tuple[float | Tensor, float, float], ...]
    slope: float | Tensor = 0.0
    shift: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether it is relu(z) itself."""
        return self is RELU

    def __call__(self, z: Tensor) -> Tensor:
        return self.slope * z + self.shift + sum(h * (s * z + o).relu() for h, s, o in self.pieces)

    @staticmethod
    def leaky(slope: float | Tensor) -> PiecewiseLinear:
        """z where z >= 0, slope z where z < 0."""
        return PiecewiseLinear(((1 - slope, 1.0, 0.0),), slope)

    @staticmethod
    def clamp(low: float | None, high: float | None) -> PiecewiseLinear:
        """min(max(z, low), high), for low <= high."""
        if low is None:
            assert high is not None
            return PiecewiseLinear(((-1.0, -1.0, high),), shift=high)
        if high is None:
            return RELU if low == 0 else PiecewiseLinear(((1.0, 1.0, -low),), shift=low)
        return PiecewiseLinear(((1.0, 1.0, -low), (-1.0, 1.0, -high)), shift=low)


RELU = PiecewiseLinear(((1.0, 1.0, 0.0),))
ABSOLUTE = PiecewiseLinear(((2.0, 1.0, 0.0),), -1.0)
HARDSIGMOID = PiecewiseLinear(((1.0, 1 / 6, 0.5), (-1.0, 1 / 6, -0.5)))


@dataclass(frozen=True, eq=False)
class Rounding:
    """A value on a grid. on_grid: whether it is there already, and only clamped.

    operation: what gives its codes from those of the operands, where they are no function of the value; constants:
    of each operand, its codes where they are fixed.
    """

    grid: Quantizer
    on_grid: bool = False
    operation: Operation | None = None
    constants: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Node:
    """One value of a network: op "input", "layer", "add", "sub", "cat", "pointwise", "maximum" or "round" of earlier
    values.

    inputs: of a "round", the value that it rounds and then the operands of its operation.
    shape: of one value, without batch axis; None where it is unknown, which a chain may leave open.
    value: the affine layer, the axis of a "cat" (batch counted), or the function of a "pointwise" or "round".
    """

    op: str
    inputs: tuple[int, ...]
    shape: Shape | None
    name: str
    value: nn.Module | PiecewiseLinear | Smooth | Rounding | int | None = None

    @property
    def bends(self) -> bool:
        """Whether it takes ReLUs, or a rounding."""
        return self.op in ("pointwise", "maximum", "round")

    @property
    def stays(self) -> bool:
        """Whether it is an activation that a chain has layers for."""
        return self.op == "pointwise" and (self.value is RELU or isinstance(self.value, Smooth))


@dataclass(frozen=True, eq=False)
class Graph:
    """A network of one input (node 0), in evaluation order; its output is the last node."""

    nodes: tuple[Node, ...]

    @staticmethod
    def to(nodes: Sequence[Node], output: int) -> Graph:
        """The graph of those nodes that `output` depends on, and of the input."""
        used = {0, output}
        for i in range(output, 0, -1):
            if i in used:
                used.update(nodes[i].inputs)
        kept = sorted(used)
        place = {i: k for k, i in enumerate(kept)}
        return Graph(tuple(replace(nodes[i], inputs=tuple(place[j] for j in nodes[i].inputs)) for i in kept))

    @torch.no_grad()
    def values(self, x: Tensor) -> list[Tensor]:
        """Every node's value at inputs x [B, *shape]."""
        result = [x]
        for node in self.nodes[1:]:
            inputs = [result[i] for i in node.inputs]
            if node.op in ("layer", "pointwise"):
                function = node.value.value if isinstance(node.value, Smooth) else node.value
                assert callable(function)
                result.append(function(inputs[0]))
            elif isinstance(node.value, Rounding):
                result.append(node.value.grid(inputs[0]))
            elif node.op == "cat":
                assert isinstance(node.value, int)
                result.append(torch.cat(inputs, node.value))
            elif node.op == "maximum":
                result.append(torch.maximum(*inputs))
            else:
                result.append(inputs[0] + inputs[1] if node.op == "add" else inputs[0] - inputs[1])
        return result

    def shaped(self, x: Tensor) -> Graph:
        """The same with the shapes that values have at inputs x [B, *shape]."""
        values = zip(self.nodes, self.values(x), strict=True)
        return Graph(tuple(replace(node, shape=tuple(value.shape[1:])) for node, value in values))

    def is_chain(self) -> bool:
        """Whether it is one layer after the other, with no activation but ReLU."""
        return all(
            node.inputs == (i - 1,) and (node.op == "layer" or _is_relu(node)) for i, node in enumerate(self.nodes) if i
        )

    def levels(self) -> list[int]:
        """Of each node: how many layers of ReLUs are before it, its own included."""
        result: list[int] = []
        for node in self.nodes:
            below = max((result[i] for i in node.inputs), default=0)
            result.append(below + node.bends)
        return result


def _is_relu(node: Node) -> bool:
    return node.op == "pointwise" and isinstance(node.value, PiecewiseLinear) and node.value.plain


def lower(graph: Graph) -> nn.Sequential:
    """The graph as a chain of affine layers, `AffineGraph`s, `nn.ReLU` and `MaskedReLU`; layers are shared.

    A graph with roundings has `Quantizer` and `Roundings` instead of the last two.
    """
    if graph.is_chain():
        return nn.Sequential(
            *(nn.ReLU() if node.op == "pointwise" else node.value for node in graph.nodes[1:])  # type: ignore[misc]
        )
    return _Lowering(graph).run()


# One part of the state: a value that is carried, or relu number k of a node that bends.
_Part = tuple[int, int | None]


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.nodes, self.levels = graph.nodes, graph.levels()
        self.rounded = any(node.op == "round" for node in self.nodes)
        self.depth = self.levels[-1]
        self.layers: list[nn.Module] = []
        self.state: list[_Part] = [(0, None)]
        self.shapes: list[Shape] = [self._shape(0)]

    def run(self) -> nn.Sequential:
        for level in range(self.depth):
            carried = self._carried(level)
            bending = [i for i in self._at(level + 1) if self.nodes[i].bends]
            # Values that a bending node also adds unbent are carried too.
            pieces: list[_Part] = [(i, k) for i in bending for k in range(_count(self.nodes[i]))]
            self._step([(i, None) for i in carried] + pieces)
        self._affine([(len(self.nodes) - 1, None)])
        return nn.Sequential(*self.layers)

    def _shape(self, i: int) -> Shape:
        shape = self.nodes[i].shape
        assert shape is not None, "a graph that is no chain has known shapes"
        return shape

    def _at(self, level: int) -> list[int]:
        return [i for i, own in enumerate(self.levels) if own == level]

    def _carried(self, level: int) -> list[int]:
        """Values known at this level that something later reads, other than ReLUs of the next level alone."""
        result: list[int] = []
        for i, own in enumerate(self.levels):
            if own > level:
                continue
            readers = [j for j, other in enumerate(self.nodes) if i in other.inputs]
            later = [j for j in readers if self.levels[j] > level]
            if any(self.levels[j] > level + 1 or not self.nodes[j].bends or self._reads_unbent(j, i) for j in later):
                result.append(i)
        return result

    def _reads_unbent(self, reader: int, i: int) -> bool:
        """Whether a bending node adds its input i to what its ReLUs give."""
        node = self.nodes[reader]
        if node.op == "maximum":
            return node.inputs[0] == i
        if isinstance(node.value, Smooth | Rounding):
            return False
        assert isinstance(node.value, PiecewiseLinear)
        return isinstance(node.value.slope, Tensor) or node.value.slope != 0

    def _step(self, parts: list[_Part]) -> None:
        """An affine layer that computes the parts, and ReLUs, or roundings, on those that have any."""
        if self.rounded:
            rounding = self._roundings(parts)  # what its operands are made of is the state before it
            self._affine(parts)
            self.layers.append(rounding)
            return
        self._affine(parts)
        functions = [self.nodes[i].value if k is not None else None for i, k in parts]
        curves = {f.name: f for f in functions if isinstance(f, Smooth)}
        bent = [k is not None and not isinstance(f, Smooth) for (_, k), f in zip(parts, functions, strict=True)]
        if all(bent):
            self.layers.append(nn.ReLU())
        elif not curves:
            self.layers.append(MaskedReLU(self._mask(bent)))
        else:
            masks = [self._mask([getattr(f, "name", "") == name for f in functions]) for name in curves]
            self.layers.append(Activations(self._mask(bent), list(zip(curves.values(), masks, strict=True))))

    def _roundings(self, parts: list[_Part]) -> Quantizer:
        """One quantiser, or several side by side."""
        found: list[Part] = []
        operands: dict[int, Operands] = {}
        for k, (i, piece) in enumerate(parts):
            node, shape = self.nodes[i], self._shape(i)
            if piece is None or node.op == "maximum":
                grid = self._grid(i)
                if piece is not None:  # how much larger the second is, or nothing
                    grid = Quantizer(grid.scale, 0, 0, grid.highest - grid.lowest)
                found.append(Part(grid, prod(shape), passing=True, carried=piece is None))
                continue
            rounding = node.value
            assert isinstance(rounding, Rounding)
            before = self._before(node.inputs[0]) if rounding.grid.layer is not None else None
            found.append(Part(rounding.grid.flat(shape), prod(shape), passing=rounding.on_grid, before=before))
            if rounding.operation is not None:
                builder = _Terms(self)
                outputs = tuple(map(builder.value, node.inputs[1:]))
                layer = AffineGraph(tuple(self.shapes), tuple(builder.terms), tuple(builder.layers), outputs)
                shapes = [self._shape(j) for j in node.inputs[1:]]
                operands[k] = Operands(layer, shapes, rounding.operation, rounding.constants)
        if len(found) == 1 and not operands and not found[0].passing and found[0].before is None:
            value = self.nodes[parts[0][0]].value
            assert isinstance(value, Rounding)
            return value.grid
        return Roundings(found, operands)

    def _before(self, i: int) -> nn.Module:
        """What the int8 layer that gives value i reads, of the state."""
        builder = _Terms(self)
        output = builder.value(self.nodes[i].inputs[0])
        return AffineGraph(tuple(self.shapes), tuple(builder.terms), tuple(builder.layers), (output,))

    def _grid(self, i: int) -> Quantizer:
        """The grid that the codes of a value are on, without the rule that gave them."""
        node = self.nodes[i]
        if isinstance(node.value, Rounding):
            return node.value.grid.changed(rule=None, layer=None)
        grids = [self._grid(j) for j in node.inputs]
        lowest, highest = min(grid.lowest for grid in grids), max(grid.highest for grid in grids)
        return grids[0].changed(lowest=lowest, highest=highest)

    def _mask(self, on: Sequence[bool]) -> Tensor:
        """[N] mask of the features of those parts of the state for which `on` is true."""
        return torch.cat([torch.full((prod(shape),), part) for shape, part in zip(self.shapes, on, strict=True)])

    def _affine(self, parts: list[_Part]) -> None:
        """An affine layer from the state to the parts."""
        builder = _Terms(self)
        outputs = tuple(builder.bent(i, k) if k is not None else builder.value(i) for i, k in parts)
        self.layers.extend(builder.layer(outputs))
        self.state, self.shapes = parts, [self._shape(i) for i, _ in parts]


def _count(node: Node) -> int:
    if node.op == "maximum" or isinstance(node.value, Smooth | Rounding):
        return 1
    assert isinstance(node.value, PiecewiseLinear)
    return len(node.value.pieces)


class _Terms:
    """Terms of one affine layer on the current state."""

    def __init__(self, work: _Lowering) -> None:
        self.work = work
        self.terms: list[Term] = []
        self.layers: list[nn.Module] = []
        self.known: dict[_Part, int] = {}

    def layer(self, outputs: tuple[int, ...]) -> list[nn.Module]:
        """What computes the outputs: plain layers where one follows the other, else one `AffineGraph`."""
        chain = [term.kind for term in self.terms] == ["part", *["layer"] * (len(self.terms) - 1)]
        chain = chain and all(term.inputs == (i - 1,) for i, term in enumerate(self.terms) if i)
        if chain and len(self.work.shapes) == 1 and outputs == (len(self.terms) - 1,):
            return list(self.layers)
        return [AffineGraph(tuple(self.work.shapes), tuple(self.terms), tuple(self.layers), outputs)]

    def value(self, i: int) -> int:
        """Position of node i's value."""
        key = (i, None)
        if key not in self.known:
            self.known[key] = self._part(key) if key in self.work.state else self._computed(i)
        return self.known[key]

    def bent(self, i: int, k: int) -> int:
        """Position of what goes into ReLU number k of node i."""
        node = self.work.nodes[i]
        if node.op == "maximum":
            return self._add(Term("sub", (self.value(node.inputs[1]), self.value(node.inputs[0]))))
        if isinstance(node.value, Smooth | Rounding):
            return self.value(node.inputs[0])
        assert isinstance(node.value, PiecewiseLinear)
        _, scale, offset = node.value.pieces[k]
        return self._scaled(self.value(node.inputs[0]), scale, offset)

    def _computed(self, i: int) -> int:
        node = self.work.nodes[i]
        if node.bends:
            return self._unbent(i, node)
        inputs = tuple(self.value(j) for j in node.inputs)
        if node.op == "layer":
            assert isinstance(node.value, nn.Module)
            return self._layer(node.value, inputs[0])
        axis = node.value if node.op == "cat" else 0
        assert isinstance(axis, int)
        return self._add(Term(node.op, inputs, axis))

    def _unbent(self, i: int, node: Node) -> int:
        """The value of a node that bends, from its ReLUs, which are parts of the state."""
        pieces = [self._part((i, k)) for k in range(_count(node))]
        if node.op == "maximum":
            return self._add(Term("add", (self.value(node.inputs[0]), pieces[0])))
        f = node.value
        if isinstance(f, Smooth | Rounding):
            return pieces[0]
        assert isinstance(f, PiecewiseLinear)
        total: int | None = None
        if isinstance(f.slope, Tensor) or f.slope != 0:
            total = self._scaled(self.value(node.inputs[0]), f.slope, f.shift)
        for (height, _, _), piece in zip(f.pieces, pieces, strict=True):
            piece = self._scaled(piece, height, f.shift if total is None else 0.0)
            total = piece if total is None else self._add(Term("add", (total, piece)))
        assert total is not None
        return total

    def _part(self, part: _Part) -> int:
        if part not in self.known:
            self.known[part] = self._add(Term("part", (), self.work.state.index(part)))
        return self.known[part]

    def _scaled(self, at: int, scale: float | Tensor, shift: float) -> int:
        if not isinstance(scale, Tensor) and (scale, shift) == (1.0, 0.0):
            return at
        factor = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        return self._layer(ElementwiseAffine(factor, torch.tensor(shift, dtype=torch.float64)), at)

    def _layer(self, layer: nn.Module, at: int) -> int:
        self.layers.append(layer)
        return self._add(Term("layer", (at,), len(self.layers) - 1))

    def _add(self, term: Term) -> int:
        self.terms.append(term)
        return len(self.terms) - 1
