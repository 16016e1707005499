"""What floating-point execution does to a network that is no chain: the bounds of `domains.execution`, node by node.

The lowered network of sums, maxima and activations that bend more than once has layers that nobody executes; the graph
it was read from (`graph.lowering.Graph`) has what torch does. Every layer rounds as in `domains.execution`, and

    a sum               rounds once
    a slope (LeakyReLU) multiplies once, by a constant in float32, and rounds once, where its input may be negative
    a clamp             takes its ends as numbers of the format; else it rounds nothing, nor do maxima and selections

Method: the real values and the difference (executed) - (real) are a zonotope each. What a layer rounds becomes new
    generators of the difference, so that what later layers and sums cancel is cancelled. A function with slopes in
    [s, t] where it is evaluated makes of the difference d something in [s, t] d.
Property: sound. Refuses a layer where the format may overflow, and what is executed in ways that are not known.

Axis letters: S boxes, G generators, N features.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import UnsupportedLayerError
from torchreach.core.roundoff import SINGLE, allowance
from torchreach.domains.execution import KNOWN, MAX_NUMBERS, UNDERFLOW, Format, Zonotope, settled, unrounded
from torchreach.domains.zonotope import box_rows
from torchreach.graph.layers import RESHAPING, Rearrange
from torchreach.graph.lowering import Graph, Node, PiecewiseLinear
from torchreach.graph.smooth import Smooth

SELECTIONS = ("permute", "slice", "select", "index_select", "flip", "pad", "expand")
Ends = tuple[Tensor, Tensor]


@torch.no_grad()
def graph_rounding(
    graph: Graph, lower: Tensor, upper: Tensor, kind: Format, *, rounded: bool = False, clock: Clock = NO_LIMIT
) -> tuple[Tensor, Tensor]:
    """Bounds (low, high) [S, N_out] on (real output) - (executed output) of a graph over boxes [S, N_in], in float64.

    rounded: whether inputs are numbers of the format already. clock: once it is over, intervals take the place of
        zonotopes.

    Guarantee: for every real x in box s, executed on x rounded to the format.
    Raises: InvalidNetworkError: a layer may overflow. UnsupportedLayerError: layers of unknown kernels.
    """
    nodes = [_checked(node, lower) for node in graph.nodes]
    off = torch.zeros_like(lower) if rounded else kind.input_error(lower, upper)
    widest = max(max(torch.Size(node.shape or ()).numel() for node in nodes), lower.shape[1])
    size = max(1, MAX_NUMBERS // (widest * (1 + lower.shape[1])))
    result: list[Ends] = []
    for low, high, part in zip(lower.split(size), upper.split(size), off.split(size), strict=True):
        work = _Forward(nodes, kind, clock)
        result.append(work.run(low, high, part))
    return torch.cat([-high for _, high in result]), torch.cat([-low for low, _ in result])


def _checked(node: Node, like: Tensor) -> Node:
    """The node with its layer in float64, where it is known how torch executes it."""
    value = node.value
    known = node.op not in ("layer", "pointwise") or isinstance(value, KNOWN)
    if isinstance(value, Rearrange):
        known = value.operation in SELECTIONS
    if isinstance(value, PiecewiseLinear):
        known = _clamps(value) or _slopes(value)
    if not known:
        what = value.operation if isinstance(value, Rearrange) else getattr(value, "name", type(value).__name__)
        raise UnsupportedLayerError(
            f"{what} ({node.name!r}): how it is executed is not known; ask for the real-valued reading "
            "(arithmetic='real')"
        )
    if isinstance(value, nn.Module) and not isinstance(value, Smooth):
        return replace(node, value=copy.deepcopy(value).to(like.device, like.dtype).eval())
    return node


def _clamps(f: PiecewiseLinear) -> bool:
    """Whether it is min(max(x, low), high), of which one may be missing."""
    if isinstance(f.slope, Tensor) or f.slope or any(isinstance(height, Tensor) for height, *_ in f.pieces):
        return False
    ends = [-offset / scale for _, scale, offset in f.pieces]
    kinds = [piece[:2] for piece in f.pieces]
    return kinds in ([(1, 1)], [(-1, -1)], [(1, 1), (-1, 1)]) and f.shift == ends[0] and ends == sorted(ends)


def _slopes(f: PiecewiseLinear) -> bool:
    """Whether it is x where x >= 0, and a multiple of x elsewhere."""
    return len(f.pieces) == 1 and f.pieces[0][1:] == (1.0, 0.0) and f.shift == 0


@dataclass(frozen=True)
class _Part:
    """A zonotope whose generators are those of the nodes in `blocks`: (node, how many), in this order."""

    value: Zonotope
    blocks: tuple[tuple[int, int], ...]

    @property
    def ends(self) -> Ends:
        return self.value.ends

    def through(self, layer: nn.Module, *, biased: bool = True) -> _Part:
        return _Part(self.value.through(layer, biased=biased), self.blocks)

    def scaled(self, by: Tensor | float, error: Tensor | None = None) -> _Part:
        """by x + error, |error| <= `error`, for numbers `by` [S, *shape]."""
        by = torch.as_tensor(by, dtype=self.value.slack.dtype, device=self.value.slack.device)
        rows = self.value.rows * (by[:, None] if by.ndim else by)
        slack = self.value.slack * by.abs() + allowance(rows.abs().sum(1))
        return _Part(Zonotope(rows, slack if error is None else slack + error), self.blocks)

    def plus(self, other: _Part) -> _Part:
        """The sum, which broadcasts."""
        blocks = tuple(sorted({*self.blocks, *other.blocks}))
        rows = self._on(blocks) + other._on(blocks)
        slack = self.value.slack + other.value.slack + allowance(rows.abs().sum(1))
        return _Part(Zonotope(rows, slack), blocks)

    def _on(self, blocks: tuple[tuple[int, int], ...]) -> Tensor:
        rows = self.value.rows
        own = dict(zip(self.blocks, rows[:, 1:].split([n for _, n in self.blocks], 1), strict=True))
        zero = lambda n: rows.new_zeros(len(rows), n, *rows.shape[2:])  # noqa: E731
        return torch.cat((rows[:, :1], *(own[b] if b in own else zero(b[1]) for b in blocks)), 1)

    def spread(self, node: int, middle: Tensor, radius: Tensor, *, boxed: bool) -> _Part:
        """With a number within `radius` of `middle` added to each feature: new generators, or slack where `boxed`."""
        value = self.value.moved(middle, torch.zeros_like(radius))
        flat = radius.flatten(1)
        columns = (flat > 0).any(0).nonzero().flatten()
        if boxed or value.rows.numel() + len(columns) * flat.numel() > MAX_NUMBERS:
            rows = value.rows.abs()[:, 1:].sum(1) if not boxed else 0.0
            kept = value.rows if boxed else value.rows[:, :1]
            return _Part(Zonotope(kept, value.slack + radius + rows), self.blocks if boxed else ())
        fresh = flat.new_zeros(len(flat), len(columns), flat.shape[1])
        fresh[:, torch.arange(len(columns), device=flat.device), columns] = flat[:, columns]
        rows = torch.cat((value.rows, fresh.reshape(*fresh.shape[:2], *radius.shape[1:])), 1)
        return _Part(Zonotope(rows, value.slack), (*self.blocks, (node, len(columns))))


@dataclass(frozen=True)
class _Value:
    """The real value, and (executed) - (real)."""

    real: _Part
    gap: _Part

    @property
    def run(self) -> Ends:
        """Of the executed value."""
        (low, high), (below, above) = self.real.ends, self.gap.ends
        return low + below, high + above

    @property
    def both(self) -> Ends:
        """Of the real value and the executed one."""
        (low, high), (below, above) = self.real.ends, self.gap.ends
        return low + below.clamp(max=0), high + above.clamp(min=0)


class _Forward:
    """One pass over a batch of boxes."""

    def __init__(self, nodes: list[Node], kind: Format, clock: Clock) -> None:
        self.nodes, self.kind, self.clock = nodes, kind, clock

    def run(self, low: Tensor, high: Tensor, off: Tensor) -> Ends:
        shape = self.nodes[0].shape
        assert shape is not None
        rows, slack = box_rows(low, high)
        rows, slack, off = rows.reshape(*rows.shape[:2], *shape), slack.reshape(-1, *shape), off.reshape(-1, *shape)
        exact = _Part(Zonotope(torch.zeros_like(rows[:, :1]), torch.zeros_like(off)), ())
        first = _Value(
            _Part(Zonotope(rows, slack), ((0, rows.shape[1] - 1),)),
            exact.spread(0, torch.zeros_like(off), off, boxed=self.clock.over),
        )
        values, last = {0: first}, {j: i for i, node in enumerate(self.nodes) for j in node.inputs}
        for i, node in enumerate(self.nodes[1:], 1):
            values[i] = self._value(i, node, [values[j] for j in node.inputs])
            for j in {j for j in node.inputs if last[j] == i}:  # they are large
                del values[j]
        below, above = values[len(self.nodes) - 1].gap.ends
        return below.flatten(1), above.flatten(1)

    def _value(self, i: int, node: Node, inputs: list[_Value]) -> _Value:
        if node.op == "layer":
            assert isinstance(node.value, nn.Module)
            return self._layer(i, node, node.value, inputs[0])
        if node.op == "pointwise":
            assert isinstance(node.value, PiecewiseLinear)
            return self._bent(i, node, node.value, inputs[0])
        if node.op == "maximum":
            return self._maximum(i, inputs[0], inputs[1])
        if node.op == "cat":
            assert isinstance(node.value, int)
            return _Value(_stacked([v.real for v in inputs], node.value), _stacked([v.gap for v in inputs], node.value))
        sign = 1.0 if node.op == "add" else -1.0
        a, b = inputs
        total = _Value(a.real.plus(b.real.scaled(sign)), a.gap.plus(b.gap.scaled(sign)))
        size = torch.maximum(*(end.abs() for end in total.run))
        noise = self.kind.sloppy * self.kind.sum_unit * (1 + 1e-3) * size + UNDERFLOW
        return self._rounded(i, node, total, noise)

    def _rounded(self, i: int, node: Node, value: _Value, noise: Tensor) -> _Value:
        """A value that is off by `noise` and then rounded to the format."""
        middle, radius = settled(*value.run, noise, self.kind, f"{node.op} ({node.name!r})")
        return replace(value, gap=value.gap.spread(i, middle, radius, boxed=self.clock.over))

    def _layer(self, i: int, node: Node, layer: nn.Module, x: _Value) -> _Value:
        result = _Value(x.real.through(layer), x.gap.through(layer, biased=False))
        if isinstance(layer, (*RESHAPING, Rearrange)):
            return result
        plain = _Value(x.real.through(layer, biased=False), result.gap)
        inputs, product = (torch.maximum(*(end.abs() for end in value.run)) for value in (x, plain))
        name = f"{type(layer).__name__} ({node.name!r})"
        middle, radius = settled(*result.run, unrounded(layer, inputs, product, self.kind, name), self.kind, name)
        return replace(result, gap=result.gap.spread(i, middle, radius, boxed=self.clock.over))

    def _bent(self, i: int, node: Node, f: PiecewiseLinear, x: _Value) -> _Value:
        low, high = x.both
        value = _Value(self._band(i, f, x.real), _between(f, x.gap, low, high))
        if _clamps(f):
            ends = low.new_tensor([-offset / scale for _, scale, offset in f.pieces])
            passed = ends.float().to(ends) if self.kind.unit >= SINGLE else ends
            error = torch.stack([ends - self.kind.rounded(each) for each in (ends, passed)]).abs().max()
            return replace(value, gap=value.gap.scaled(1.0, error.expand_as(low)))
        slope = torch.as_tensor(f.slope, dtype=low.dtype, device=low.device)
        part = x.run[0].clamp(max=0) * slope  # what the slope makes of negative inputs
        size = torch.where(x.run[0] < 0, part.abs(), 0.0)
        noise = torch.where(size > 0, 2 * self.kind.sum_unit * (1 + 1e-3) * size + UNDERFLOW, 0.0)
        self.kind.check(size + noise, f"{node.op} ({node.name!r})")
        error = torch.where(size > 0, noise + self.kind.half_spacing(size + noise), 0.0)
        # The slope above 0 is 1 as executed; as it is read it is a sum of two numbers, and may be rounded.
        error = error + (slope + f.pieces[0][0] - 1).abs() * x.run[1].clamp(min=0)
        return replace(value, gap=value.gap.spread(i, torch.zeros_like(error), error, boxed=self.clock.over))

    def _band(self, i: int, f: PiecewiseLinear, z: _Part) -> _Part:
        """f(z) as its chord and new generators: f - chord is extreme at the ends and where f bends."""
        low, high = z.ends
        slope = torch.nan_to_num((f(high) - f(low)) / (high - low), 0.0, 0.0, 0.0)
        places = [low, high]
        places += [low.clone().fill_(-o / s).clamp(min=low, max=high) for _, s, o in f.pieces]
        rest = torch.stack([f(at) - slope * at for at in places])
        top, bottom = rest.amax(0), rest.amin(0)
        size = torch.maximum(low.abs(), high.abs())
        factors = sum(torch.as_tensor(h, dtype=low.dtype, device=low.device).abs() * abs(s) for h, s, _ in f.pieces)
        spread = factors + abs(f.slope) + slope.abs()
        offsets = sum(torch.as_tensor(h, dtype=low.dtype, device=low.device).abs() * abs(o) for h, _, o in f.pieces)
        error = allowance(spread * size + offsets + abs(f.shift), 32)
        middle, radius = (top + bottom) / 2, (top - bottom) / 2
        radius = torch.where(radius > error, radius, 0.0)
        return z.scaled(slope, 2 * error).spread(i, middle, radius, boxed=self.clock.over)

    def _maximum(self, i: int, a: _Value, b: _Value) -> _Value:
        """max(a, b) = a + relu(b - a); its difference is one of theirs, or between them."""
        apart = _Value(b.real.plus(a.real.scaled(-1.0)), b.gap.plus(a.gap.scaled(-1.0)))
        relu = PiecewiseLinear(((1.0, 1.0, 0.0),))
        real = a.real.plus(self._band(i, relu, apart.real))
        low, high = apart.both
        return _Value(real, a.gap.plus(_between(relu, apart.gap, low, high)))


def _between(f: PiecewiseLinear, gap: _Part, low: Tensor, high: Tensor) -> _Part:
    """f(z + d) - f(z) for z and z + d in [low, high]: d by f's slopes there."""
    bends = sorted(-offset / scale for _, scale, offset in f.pieces)
    inside = [bends[0] - 1, *((a + b) / 2 for a, b in zip(bends, bends[1:], strict=False)), bends[-1] + 1]
    limits = [-torch.inf, *bends, torch.inf]
    least, most = torch.full_like(low, torch.inf), torch.full_like(low, -torch.inf)
    for k, at in enumerate(inside):
        slope: Tensor | float = f.slope
        for height, scale, offset in f.pieces:
            slope = slope + height * scale * (scale * at + offset > 0)
        there = (high >= limits[k]) & (low <= limits[k + 1])
        slope = torch.as_tensor(slope, dtype=low.dtype, device=low.device).expand_as(low)
        least, most = torch.where(there, least.minimum(slope), least), torch.where(there, most.maximum(slope), most)
    below, above = gap.ends
    half = (most - least) / 2 * torch.maximum(below.abs(), above.abs())
    return gap.scaled((least + most) / 2, half + allowance(half, 8))


def _stacked(parts: list[_Part], axis: int) -> _Part:
    blocks = tuple(sorted({block for part in parts for block in part.blocks}))
    rank = parts[0].value.slack.ndim
    at = axis % rank
    rows = torch.cat([part._on(blocks) for part in parts], at + 1)
    return _Part(Zonotope(rows, torch.cat([part.value.slack for part in parts], at)), blocks)
