"""Certified bounds of one network over many boxes, backward from its neurons to the input (CROWN).

Each hidden neuron gets bounds [l, u] over the box, and for them lines above and below its activation. A linear
objective on a layer then goes backward to the input, a coefficient taking the line above where it is positive and the
one below where it is negative.

Only neurons that intervals, and the signs known of a box that contains this one, leave open are bounded backward: few
of them, and other ones in every box, so that each box brings its own list of rows. Convolutions over many inputs bound
the channels of a place together, on the windows that they depend on (`graph.windows`).

Rounding, as in `difference`: computed coefficients are taken as exact numbers, and every layer adds

    |rows| . 2 gamma (|W| A + |b|),   |a| <= A over the box,   gamma of `core.roundoff`

for what its products and sums lose, those of slopes and biases too; lines are raised by 8 u max(|l|, |u|), more than
their slope and offset lose; and the box's radius by 4 (N_in + 16) u |x|, for its middle, its radius, the sum of two
networks' coefficients, and the last products. For the network as a real-valued function of its weights.
Quantisers are activations too: the lines of their ReLU, or of the identity, off by what rounding adds.

Reference: CROWN (Zhang et al.: NeurIPS 2018); ReluVal (Wang et al.: USENIX Security 2018) for signs that halves of a
box inherit.

Axis letters: B boxes, R rows (one objective each), N features, P places, W features of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.masks import leading, lengths
from torchreach.core.memory import batch_size
from torchreach.core.roundoff import allowance, ball, gamma
from torchreach.domains.rounding import excess, saturation
from torchreach.domains.smooth import Cells
from torchreach.graph.steps import Step
from torchreach.graph.twin_blocks import Blocks
from torchreach.graph.twins import Twins, twins
from torchreach.graph.windows import Part, WindowMap, windows

TINY = 1e-300
# Numbers in one intermediate tensor of rows: few enough to stay near the processor.
NUMBERS = {"cpu": 2**19, "cuda": 2**24}
WAYS = 16  # inputs that vary, up to which it is noted how much each hidden neuron depends on them

Line = tuple[Tensor, Tensor]  # slope, offset


class Chain(Protocol):
    """Layers to go back through, their biases [N] or [B, N]."""

    def bias(self, k: int) -> Tensor: ...
    def transpose(self, k: int, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Network:
    """A network, and its affine maps for the way back: `maps[k].transpose`."""

    steps: tuple[Step, ...]
    maps: Sequence[Twins]

    @staticmethod
    def of(steps: tuple[Step, ...], clock: Clock = NO_LIMIT) -> Network:
        """OutOfTime: between two layers."""
        maps = [
            twins(step, step, clock=clock) if len(step.block) else Blocks.identity(step.in_shape, step.bias.dtype)
            for step in steps
        ]
        return Network(steps, maps)

    def bias(self, k: int) -> Tensor:
        return self.steps[k].bias

    def transpose(self, k: int, rows: Tensor) -> Tensor:
        return self.maps[k].transpose(rows)

    @cached_property
    def seen(self) -> list[list[tuple[Part, list[WindowMap]]]]:
        """`windows` of each layer."""
        return [windows(self.maps[: k + 1]) for k in range(len(self.maps))]

    @property
    def windowed(self) -> bool:
        """Whether its second layer sees windows of the first."""
        return len(self.maps) > 1 and bool(self.seen[1])

    @property
    def sizes(self) -> list[int]:
        """Features of the hidden layers."""
        return [step.features for step in self.steps[:-1]]

    @property
    def widest(self) -> int:
        return max(maps.widest for maps in self.maps)

    def error(self, k: int, A: Tensor) -> Tensor:
        """2 gamma (|W| A + |b|) and the noise of layer k, [B, N_out]: what it loses per unit of a coefficient."""
        step, (n_out, n_in) = self.steps[k], self.maps[k].shape
        terms = 2 * (n_out + n_in) + 2 * step.terms + self.maps[k].terms + 8 * len(self.steps) + 56
        return step.with_noise(2 * gamma(terms) * (step.magnitude(A) + step.bias_magnitude))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Boxes [B, N_in]: middle and radius, the latter with the allowance for rounding; size: largest magnitudes."""

    middle: Tensor
    radius: Tensor
    size: Tensor
    vary: Tensor  # inputs that have a width in some box

    @staticmethod
    def of(low: Tensor, high: Tensor) -> Inputs:
        middle = low + (high - low) / 2
        radius, size = torch.maximum(high - middle, middle - low), torch.maximum(low.abs(), high.abs())
        rounded = radius + 4 * gamma(low.shape[1] + 8) * size
        return Inputs(middle, rounded, size, (radius > 0).any(0).nonzero().flatten())

    def at(self, boxes: Tensor, index: Tensor, inside: Tensor) -> Inputs:
        """Features `index` [P, W] of these boxes [P]; zero where not `inside`."""
        parts = (self.middle, self.radius, self.size)
        middle, radius, size = (_at(part, boxes, index, inside) for part in parts)
        return replace(self, middle=middle, radius=radius, size=size)

    def largest(self, x: Tensor, constant: Tensor) -> Tensor:
        """[B, R] of x . input + constant over the boxes; x: [B, R, N_in]. An overflow says nothing."""
        value = constant + dot(x, self.middle) + dot(x.abs(), self.radius)
        return torch.nan_to_num(value, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


@dataclass(frozen=True, eq=False)
class Neurons:
    """A hidden layer over B boxes, [B, N] each.

    low, high: bounds of the pre-activations. above, below: lines above and below the activations.
    least, most: bounds of the activations. error: `Network.error`. open: whether the activation is not linear.
    undecided: whether it is because its sign is not known.
    ways: [B, N, W] half the difference of the coefficients, on the inputs that vary, of the rows that bounded an open
    neuron from either side; None where there are too many inputs, or no such rows.
    empty: [B] where no input has the signs that were asked for.
    """

    low: Tensor
    high: Tensor
    above: Line
    below: Line
    least: Tensor
    most: Tensor
    error: Tensor
    open: Tensor
    undecided: Tensor
    ways: Tensor | None
    empty: Tensor | None = None

    @staticmethod
    def of(step: Step, low: Tensor, high: Tensor, error: Tensor, ways: Tensor | None) -> Neurons:
        relu = _bends(step)
        on, off = (low >= 0) | ~relu, (high <= 0) & relu
        undecided = open_ = ~(on | off)
        share = torch.where(open_, high / (high - low).clamp(min=TINY), on.to(low))
        rise = -share * low + allowance(torch.maximum(low.abs(), high.abs()), 8)
        above = share, torch.where(open_, rise, 0.0)
        below = torch.where(open_, (high > -low).to(low), share), torch.zeros_like(low)
        least = torch.where(relu, low.clamp(min=0), low)
        most = torch.where(relu, high.clamp(min=0), high)
        if step.quantizer is not None:  # between these lines, and off by what rounding adds
            middle, radius = excess(step.quantizer, least, most)
            codes = step.quantizer.code_range(low, high)
            least, most = (step.quantizer.value(code) for code in codes)
            fixed = codes[0] == codes[1]
            (s1, t1), (s2, t2) = above, below
            above = torch.where(fixed, 0.0, s1), torch.where(fixed, least, t1 + middle + radius)
            below = torch.where(fixed, 0.0, s2), torch.where(fixed, least, t2 + middle - radius)
            undecided = undecided & ~fixed
            open_ = ~fixed
        for function, index in step.curves:
            ends = low[:, index], high[:, index]
            cells = Cells.of(function, *ends)
            lost = allowance(torch.maximum(*(end.abs() for end in ends)), 8)
            (s1, t1), (s2, t2) = cells.above(), cells.below()
            above = _put(above, index, (s1, t1 + lost * s1.abs()))
            below = _put(below, index, (s2, t2 - lost * s2.abs()))
            least, most = _put((least, most), index, cells.range())
            open_ = open_.index_fill(1, index, True)
            undecided = undecided.index_fill(1, index, False)
        return Neurons(low, high, above, below, least, most, error, open_, undecided, ways)

    def map(self, change: Callable[[Tensor], Tensor]) -> Neurons:
        (s1, t1), (s2, t2) = self.above, self.below
        ways = None if self.ways is None else change(self.ways)
        parts = (self.low, self.high, s1, t1, s2, t2, self.least, self.most, self.error, self.open, self.undecided)
        low, high, s1, t1, s2, t2, least, most, error, open_, undecided = map(change, parts)
        return Neurons(low, high, (s1, t1), (s2, t2), least, most, error, open_, undecided, ways)

    def select(self, index: Tensor) -> Neurons:
        """Of some boxes."""
        return self.map(lambda part: part[index])

    def at(self, boxes: Tensor, index: Tensor, inside: Tensor) -> Neurons:
        """Features `index` [P, W] of these boxes [P], without `ways`; zero where not `inside`."""
        return replace(self, ways=None).map(lambda part: _at(part, boxes, index, inside))

    @property
    def size(self) -> Tensor:
        """Of the activations."""
        return torch.maximum(self.least.abs(), self.most.abs())

    @property
    def signs(self) -> Tensor:
        """[B, N] int8: 1 where the pre-activation is >= 0 over the box, -1 where it is <= 0, else 0."""
        return (self.low >= 0).to(torch.int8) - (self.high <= 0).to(torch.int8)


def _bends(step: Step) -> Tensor:
    """[N] where a neuron is a ReLU, rounded or not."""
    if step.quantizer is None:
        assert step.relu is not None
        return step.relu
    return step.quantizer.rectifies.expand_as(step.bias)


def bounded(
    network: Network, inputs: Inputs, signs: Tensor | None, clock: Clock, patience: Clock = NO_LIMIT
) -> list[Neurons]:
    """The hidden layers over the boxes; signs: [B, H] of this network's, see `joint_bounds`.

    patience: neurons whose turn comes when it is over keep the bounds that intervals give them. OutOfTime with `clock`.
    """
    layers: list[Neurons] = []
    known = None if signs is None else signs.split(network.sizes, 1)
    middle, radius, A = inputs.middle, inputs.radius, inputs.size
    for k, step in enumerate(network.steps[:-1]):
        clock.check()
        error = network.error(k, A)
        lost = saturation(step, middle - radius, middle + radius)
        if lost is not None:
            error = error + torch.maximum(lost[0].abs(), lost[1].abs())
        z, spread = step.linear(middle) + step.bias, step.magnitude(radius) + 2 * error
        low, high = z - spread, z + spread
        ways = None
        relu = _bends(step)
        if k:
            undecided = (low < 0) & (high > 0) & relu
            if known is not None:
                undecided &= known[k] == 0
            for _, index in step.curves:
                undecided[:, index] = True
            low, high, ways = _by_rows(network, layers, inputs, undecided, (low, high, error), clock, patience)
        empty = None
        if known is not None:
            low = torch.where((known[k] > 0) & relu, low.clamp(min=0), low)
            high = torch.where((known[k] < 0) & relu, high.clamp(max=0), high)
            empty = (low > high).any(1)  # no input of the box has these signs: any interval will do
            low, high = torch.minimum(low, high), torch.maximum(low, high)
        layers.append(replace(Neurons.of(step, low, high, error, ways), empty=empty))
        least, most, A = layers[-1].least, layers[-1].most, layers[-1].size
        middle, radius = ball(least, most)
    return layers


def _by_rows(
    network: Network,
    layers: list[Neurons],
    inputs: Inputs,
    undecided: Tensor,
    ends: tuple[Tensor, Tensor, Tensor],
    clock: Clock,
    patience: Clock,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bounds (low, high) [B, N] of the next layer, backward where `undecided`, and its `Neurons.ways`.

    ends: low, high by intervals, and the error of the layer.
    """
    low, high, error = ends
    k, few = len(layers), len(inputs.vary) <= WAYS
    count = int(undecided.sum(1).max()) if undecided.numel() else 0
    if not count:
        return low, high, None
    if not few and network.seen[k]:
        return (*_by_windows(network, layers, inputs, undecided, ends, clock, patience), None)
    ways = low.new_zeros(*low.shape, len(inputs.vary)) if few else None
    limit = max(batch_size(NUMBERS, low.device) // (2 * len(low) * network.widest), 1)
    for index in leading(undecided, count).split(limit, 1):
        if patience.over:
            break
        rows = network.maps[k].own_rows(index)
        x, total = back(network, layers, torch.cat((rows, -rows), 1), clock)
        size = index.shape[1]
        bias = network.steps[k].bias[index]
        value = inputs.largest(x, total) + torch.cat((bias, -bias), 1) + error.gather(1, index).repeat(1, 2)
        low, high = tightened(low, high, index, value)
        if ways is not None:
            half = (x[:, :size] - x[:, size:])[..., inputs.vary].abs() / 2
            ways.scatter_(1, index[..., None].expand_as(half), half)
    return low, high, ways


def _by_windows(
    network: Network,
    layers: list[Neurons],
    inputs: Inputs,
    undecided: Tensor,
    ends: tuple[Tensor, Tensor, Tensor],
    clock: Clock,
    patience: Clock,
) -> tuple[Tensor, Tensor]:
    """`_by_rows` of a layer whose places see windows."""
    low, high, error = ends
    k, (size, n) = len(layers), low.shape
    for part, maps in network.seen[k]:
        channels, grid = part.shape[0], part.shape[1:]
        mine = undecided[:, part.offset : part.offset + prod(part.shape)].reshape(size, channels, -1).mT.flatten(0, 1)
        count, order = mine.sum(1).sort()
        none = int((count == 0).sum())
        widest = max(prod(window.shape) for map_ in maps for window in map_.inputs)
        numbers = batch_size(NUMBERS, low.device) // (2 * widest)
        for some in order[none:].split(lengths(count[none:].tolist(), numbers)):
            if patience.over:
                return low, high
            boxes, place = some // prod(grid), some % prod(grid)
            local = _Local.of(network.steps[: k + 1], maps, place)
            index = leading(mine[some], int(mine[some[-1]].sum()))
            rows = F.one_hot(index, channels).to(low)
            rows = local.transpose(k, torch.cat((rows, -rows), 1))
            own = [layer.at(boxes, *local.seen[j + 1]) for j, layer in enumerate(layers)]
            x, total = back(local, own, rows, clock)
            at = part.offset + index * prod(grid) + place[:, None]
            bias, lost = network.steps[k].bias[at], error[boxes[:, None], at]
            value = inputs.at(boxes, *local.seen[0]).largest(x, total) + torch.cat((bias, -bias), 1) + lost.repeat(1, 2)
            flat = (boxes[:, None] * n + at).reshape(1, -1)
            value = torch.cat([side.reshape(1, -1) for side in value.chunk(2, 1)], 1)
            low, high = (
                end.reshape(size, n) for end in tightened(low.reshape(1, -1), high.reshape(1, -1), flat, value)
            )
    return low, high


@dataclass(frozen=True, eq=False)
class _Local:
    """Layers on the windows that P places depend on. seen: of each layer's input, `WindowMap.seen`."""

    steps: tuple[Step, ...]
    maps: list[WindowMap]
    places: Tensor
    seen: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(steps: tuple[Step, ...], maps: list[WindowMap], place: Tensor) -> _Local:
        places = torch.stack(torch.unravel_index(place, maps[0].grid), 1)
        return _Local(steps, maps, places, [map_.seen(places) for map_ in maps])

    def bias(self, k: int) -> Tensor:
        index, inside = self.seen[k + 1]
        return self.steps[k].bias[index] * inside

    def transpose(self, k: int, rows: Tensor) -> Tensor:
        return self.maps[k].transpose(rows, self.places)


def tightened(low: Tensor, high: Tensor, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds [B, N] with others [B, 2 C] above the features `index` [B, C] of each box, and above their negatives.

    What only fills up a list bounds its feature, too.
    """
    above, below = value.chunk(2, 1)
    high = high.scatter(1, index, torch.minimum(above, high.gather(1, index)))
    return low.scatter(1, index, torch.maximum(-below, low.gather(1, index))), high


def back(
    network: Chain, layers: list[Neurons], rows: Tensor, clock: Clock, scores: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients [B, R, N_in] on the input and constants [B, R] above rows . a, a the last of `layers` activated.

    rows: [B, R, N], or of the input where there are no layers. scores: takes, from the last layer on, [B, N] the
    largest coefficients' magnitudes times the heights of the gaps between the lines above and below.
    """
    total = rows.new_zeros(())
    for k in range(len(layers) - 1, -1, -1):
        clock.check()
        layer, bias = layers[k], network.bias(k)
        (s1, t1), (s2, t2) = layer.above, layer.below
        if scores is not None:
            scores.append(rows.abs().amax(1) * (t1 - t2))
        up = rows.clamp(min=0)
        down = rows - up
        # What the lines, the biases and the errors add per unit of a coefficient of either sign.
        total = total + dot(up, t1 + s1 * bias + s1.abs() * layer.error)
        total = total + dot(down, t2 + s2 * bias - s2.abs() * layer.error)
        rows = network.transpose(k, up.mul_(s1[:, None]).addcmul_(down, s2[:, None]))
    return rows, total.expand(rows.shape[:2])


def influence(network: Network, layers: list[Neurons], scores: list[Tensor], inputs: Inputs) -> Tensor:
    """[B, N_in] sum over open neurons of their share of the gap, by how much each input moves them."""
    result = torch.zeros_like(inputs.middle)
    for k, (layer, score) in enumerate(zip(layers, scores, strict=True)):
        weight = score / (layer.high - layer.low).clamp(min=TINY)
        weight = torch.where(layer.open, weight, 0.0)
        if k == 0:
            result = result + network.maps[0].influence(weight)
        elif layer.ways is not None:
            result = result.index_add(1, inputs.vary, (weight[:, None] @ layer.ways)[:, 0])
    return result


def dot(rows: Tensor, column: Tensor) -> Tensor:
    """[B, R] products of rows [B, R, N] and column [B, N]."""
    return (rows @ column[..., None])[..., 0]


def _put(line: Line, index: Tensor, values: Line) -> Line:
    first, second = (part.index_copy(1, index, value) for part, value in zip(line, values, strict=True))
    return first, second


def _at(part: Tensor, boxes: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """[P, W] of part [B, N]; zero where not `inside`."""
    return part[boxes[:, None], index] * inside
