"""Certified bounds of y1 - y2 of any two networks on one input, over many boxes, backward through both at once.

Each hidden neuron gets bounds [l, u] over the box, and for them lines above and below its activation (CROWN). A linear
objective on a network's output then goes backward to the input as in one network, a coefficient taking the line above
where it is positive and the one below where it is negative. The objectives +-(y1 - y2) go backward through either
network, and their coefficients on the shared input are added up before the box bounds them: what both networks do alike
as functions of x cancels there, whatever their shapes are.

Only neurons that intervals, and the signs known of a box that contains this one, leave open are bounded backward:
few of them, and other ones in every box, so that each box brings its own list of rows.

Rounding, as in `difference`: computed coefficients are taken as exact numbers, and every layer adds

    |rows| . gamma (|W| A + |b|),   |a| <= A over the box,   gamma = 2 (terms) u

for what its products and sums lose; lines are raised by 8 u max(|l|, |u|), more than their slope and offset lose; and
the box's radius by 4 (N_in + 16) u |x|, for its middle, its radius, the sum of both networks' coefficients, and the
last products. For the networks as real-valued functions of their weights.

Reference: CROWN (Zhang et al.: NeurIPS 2018); several networks on one input: the differential verifiers named in
`hexagon`, and ReluVal (Wang et al.: USENIX Security 2018) for signs that halves of a box inherit.

Axis letters: B boxes, R rows (one objective each), N features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.masks import leading
from torchreach.core.tolerances import UNIT_ROUNDOFF
from torchreach.domains.pair import Activate, Pair, difference_of
from torchreach.domains.smooth import Cells
from torchreach.domains.zonotope import zonotope_bounds
from torchreach.graph.steps import Step
from torchreach.graph.twins import Twins, twins

TINY = 1e-300
# Numbers in one intermediate tensor of rows: few enough to stay near the processor.
NUMBERS = 2**19
WAYS = 16  # inputs that vary, up to which it is noted how much each hidden neuron depends on them

Line = tuple[Tensor, Tensor]  # slope, offset


@dataclass(frozen=True, eq=False)
class Network:
    """A network, and its affine maps for the way back: `maps[k].transpose`."""

    steps: tuple[Step, ...]
    maps: Sequence[Twins]

    @staticmethod
    def of(steps: tuple[Step, ...], clock: Clock = NO_LIMIT) -> Network:
        """OutOfTime: between two layers."""
        return Network(steps, [twins(step, step, clock=clock) for step in steps])

    @property
    def sizes(self) -> list[int]:
        """Features of the hidden layers."""
        return [step.features for step in self.steps[:-1]]

    @property
    def widest(self) -> int:
        return max(maps.widest for maps in self.maps)

    def error(self, k: int, A: Tensor) -> Tensor:
        """gamma (|W| A + |b|) and the noise of layer k, [B, N_out]: what it loses per unit of a coefficient."""
        step, (n_out, n_in) = self.steps[k], self.maps[k].shape
        terms = 2 * (n_out + n_in) + 2 * step.terms + self.maps[k].terms + 8 * len(self.steps) + 64
        return step.with_noise(2 * terms * UNIT_ROUNDOFF * (step.magnitude(A) + step.bias_magnitude))


@dataclass(frozen=True, eq=False)
class Both:
    """What two networks are compared by. pair: in difference coordinates, where they are of one architecture.

    second: None stands for a network that is zero.
    """

    first: Network
    second: Network | None
    pair: Pair | None

    @staticmethod
    def of(
        first: tuple[Step, ...], second: tuple[Step, ...] | None, pair: Pair | None = None, clock: Clock = NO_LIMIT
    ) -> Both:
        """pair: of these steps; its own, which may be shifted, take their place. OutOfTime: between two layers."""
        if pair is not None:
            return Both(Network(pair.first, pair.maps), Network.of(pair.second, clock), pair)
        return Both(Network.of(first, clock), None if second is None else Network.of(second, clock), None)

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def inputs(self) -> int:
        return self.first.maps[0].shape[1]

    @property
    def outputs(self) -> int:
        return self.first.maps[-1].shape[0]

    @property
    def features(self) -> int:
        """Of all values of the networks together."""
        return self.hidden + self.outputs

    @property
    def hidden(self) -> int:
        """Features of all hidden layers together."""
        return sum(sum(network.sizes) for network in self.networks)

    @property
    def widest(self) -> int:
        return max(network.widest for network in self.networks)

    @property
    def device(self) -> torch.device:
        return self.first.steps[0].bias.device

    @property
    def curved(self) -> bool:
        """Whether some activations are smooth."""
        return any(step.curves for network in self.networks for step in network.steps)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y1 - y2 [B, N_out] at inputs x [B, N_in], and a bound on what rounding did to it."""
        if self.pair is not None:
            return self.pair.evaluate(x)
        value, error = x.new_zeros(()), x.new_zeros(())
        for sign, network in zip((1, -1), self.networks, strict=False):
            low, high = zonotope_bounds(network.steps, x[:, None], torch.zeros_like(x))[-1]
            middle, radius = (low + high) / 2, (high - low) / 2
            value = value + sign * middle
            error = error + radius + 4 * UNIT_ROUNDOFF * (middle.abs() + radius)
        return value, error

    def values(self, x: Tensor, activate: Activate) -> Tensor:
        """y1 - y2 [B, N_out], differentiable, with another function in place of each step's activation."""
        return difference_of([network.steps for network in self.networks], x, activate)


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
        rounded = radius + 4 * (low.shape[1] + 16) * UNIT_ROUNDOFF * size
        return Inputs(middle, rounded, size, (radius > 0).any(0).nonzero().flatten())

    def largest(self, x: Tensor, constant: Tensor) -> Tensor:
        """[B, R] of x . input + constant over the boxes; x: [B, R, N_in]. An overflow says nothing."""
        value = constant + _dot(x, self.middle) + _dot(x.abs(), self.radius)
        return torch.nan_to_num(value, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


@dataclass(frozen=True, eq=False)
class Neurons:
    """A hidden layer over B boxes, [B, N] each.

    low, high: bounds of the pre-activations. above, below: lines above and below the activations.
    least, most: bounds of the activations. error: `Network.error`. open: whether the activation is not linear.
    ways: [B, N, W] half the difference of the coefficients, on the inputs that vary, of the rows that bounded an open
    neuron from either side; None where there are too many inputs, or no such rows.
    """

    low: Tensor
    high: Tensor
    above: Line
    below: Line
    least: Tensor
    most: Tensor
    error: Tensor
    open: Tensor
    ways: Tensor | None

    @staticmethod
    def of(step: Step, low: Tensor, high: Tensor, error: Tensor, ways: Tensor | None) -> Neurons:
        assert step.relu is not None
        on, off = (low >= 0) | ~step.relu, (high <= 0) & step.relu
        open_ = ~(on | off)
        share = torch.where(open_, high / (high - low).clamp(min=TINY), on.to(low))
        rise = -share * low + 8 * UNIT_ROUNDOFF * torch.maximum(low.abs(), high.abs())
        above = share, torch.where(open_, rise, 0.0)
        below = torch.where(open_, (high > -low).to(low), share), torch.zeros_like(low)
        least = torch.where(step.relu, low.clamp(min=0), low)
        most = torch.where(step.relu, high.clamp(min=0), high)
        for function, index in step.curves:
            ends = low[:, index], high[:, index]
            cells = Cells.of(function, *ends)
            lost = 8 * UNIT_ROUNDOFF * torch.maximum(*(end.abs() for end in ends))
            (s1, t1), (s2, t2) = cells.above(), cells.below()
            above = _put(above, index, (s1, t1 + lost * s1.abs()))
            below = _put(below, index, (s2, t2 - lost * s2.abs()))
            least, most = _put((least, most), index, cells.range())
            open_ = open_.index_fill(1, index, True)
        return Neurons(low, high, above, below, least, most, error, open_, ways)

    def select(self, index: Tensor) -> Neurons:
        """Of some boxes."""
        (s1, t1), (s2, t2) = self.above, self.below
        ways = None if self.ways is None else self.ways[index]
        parts = (self.low, self.high, s1, t1, s2, t2, self.least, self.most, self.error, self.open)
        low, high, s1, t1, s2, t2, least, most, error, open_ = (part[index] for part in parts)
        return Neurons(low, high, (s1, t1), (s2, t2), least, most, error, open_, ways)

    @property
    def size(self) -> Tensor:
        """Of the activations."""
        return torch.maximum(self.least.abs(), self.most.abs())

    @property
    def signs(self) -> Tensor:
        """[B, N] int8: 1 where the pre-activation is >= 0 over the box, -1 where it is <= 0, else 0."""
        return (self.low >= 0).to(torch.int8) - (self.high <= 0).to(torch.int8)


@dataclass(frozen=True, eq=False)
class JointBounds:
    """upper: [B, 2, N_out] above y1 - y2 and y2 - y1. x: [B, 2, N_out, N_in] coefficients of these on the input.
    influence: [B, N_in] how much of the gap between the bounds and the networks a unit of each input's width makes.
    neurons: of the hidden layers of either network."""

    upper: Tensor
    x: Tensor
    influence: Tensor
    neurons: tuple[list[Neurons], ...]

    @property
    def signs(self) -> Tensor:
        """[B, H] int8 of all hidden neurons, network by network, layer by layer (`Neurons.signs`)."""
        layers = [layer.signs for network in self.neurons for layer in network]
        return torch.cat(layers, 1) if layers else self.x.new_zeros(len(self.x), 0, dtype=torch.int8)

    def select(self, index: Tensor) -> JointBounds:
        """Of some boxes."""
        neurons = tuple([layer.select(index) for layer in network] for network in self.neurons)
        return JointBounds(self.upper[index], self.x[index], self.influence[index], neurons)

    @property
    def open(self) -> Tensor:
        """[B] mean number of neurons of a network that are not linear."""
        count = torch.zeros(len(self.x), dtype=torch.long, device=self.x.device)
        for network in self.neurons:
            for layer in network:
                count = count + layer.open.sum(1)
        return count / len(self.neurons)


@torch.no_grad()
def joint_bounds(
    both: Both, low: Tensor, high: Tensor, signs: Tensor | None = None, *, clock: Clock = NO_LIMIT
) -> JointBounds:
    """Certified bounds above y1 - y2 and y2 - y1 over B boxes.

    Args:
        low, high: [B, N_in] in float64; finite, low <= high.
        signs: [B, H] as of `JointBounds.signs`, what is known of the neurons on each box, or asked of its inputs: the
            bounds then hold for those inputs of the box at which the pre-activations have these signs.
        clock: looked at in every layer; OutOfTime when it is over.
    """
    inputs = Inputs.of(low, high)
    known = None if signs is None else signs.split([sum(network.sizes) for network in both.networks], 1)
    rows = torch.eye(both.outputs, dtype=low.dtype, device=low.device)
    rows = torch.cat((rows, -rows))
    x, total = low.new_zeros(()), low.new_zeros(())
    moved, layers = torch.zeros_like(low), []
    for i, (sign, network) in enumerate(zip((1, -1), both.networks, strict=False)):
        neurons = bounded(network, inputs, None if known is None else known[i], clock)
        layers.append(neurons)
        k, A = len(neurons), neurons[-1].size if neurons else inputs.size
        error, bias = network.error(k, A), network.steps[k].bias
        scores: list[Tensor] = []
        start = network.maps[k].transpose(sign * rows).expand(len(low), -1, -1)
        own, constant = back(network, neurons, start, clock, scores)
        x, total = x + own, total + constant + (sign * rows) @ bias + error.repeat(1, 2)
        moved = moved + influence(network, neurons, scores[::-1], inputs)
    value = inputs.largest(x, total)
    shape = (len(low), 2, both.outputs)
    return JointBounds(value.reshape(shape), x.reshape(*shape, -1), moved + x.abs().amax(1), tuple(layers))


def bounded(network: Network, inputs: Inputs, signs: Tensor | None, clock: Clock) -> list[Neurons]:
    """The hidden layers over the boxes; signs: [B, H] of this network's, see `joint_bounds`."""
    layers: list[Neurons] = []
    known = None if signs is None else signs.split(network.sizes, 1)
    middle, radius, A = inputs.middle, inputs.radius, inputs.size
    for k, step in enumerate(network.steps[:-1]):
        clock.check()
        assert step.relu is not None
        error = network.error(k, A)
        z, spread = step.linear(middle) + step.bias, step.magnitude(radius) + 2 * error
        low, high = z - spread, z + spread
        ways = None
        if k:
            undecided = (low < 0) & (high > 0) & step.relu
            if known is not None:
                undecided &= known[k] == 0
            for _, index in step.curves:
                undecided[:, index] = True
            low, high, ways = _by_rows(network, layers, inputs, undecided, (low, high, error), clock)
        if known is not None:
            low = torch.where((known[k] > 0) & step.relu, low.clamp(min=0), low)
            high = torch.where((known[k] < 0) & step.relu, high.clamp(max=0), high)
        # They cross only where no input of the box has these signs: any interval will do.
        layers.append(Neurons.of(step, torch.minimum(low, high), torch.maximum(low, high), error, ways))
        least, most, A = layers[-1].least, layers[-1].most, layers[-1].size
        middle = (least + most) / 2
        radius = (most - least) / 2 * (1 + 4 * UNIT_ROUNDOFF) + 2 * UNIT_ROUNDOFF * middle.abs()
    return layers


def _by_rows(
    network: Network,
    layers: list[Neurons],
    inputs: Inputs,
    undecided: Tensor,
    ends: tuple[Tensor, Tensor, Tensor],
    clock: Clock,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bounds (low, high) [B, N] of the next layer, backward where `undecided`, and its `Neurons.ways`.

    ends: low, high by intervals, and the error of the layer.
    """
    low, high, error = ends
    k, few = len(layers), len(inputs.vary) <= WAYS
    count = int(undecided.sum(1).max()) if undecided.numel() else 0
    if not count:
        return low, high, None
    ways = low.new_zeros(*low.shape, len(inputs.vary)) if few else None
    limit = max(NUMBERS // (2 * len(low) * network.widest), 1)
    for index in leading(undecided, count).split(limit, 1):
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


def tightened(low: Tensor, high: Tensor, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds [B, N] with others [B, 2 C] above the features `index` [B, C] of each box, and above their negatives.

    What only fills up a list bounds its feature, too.
    """
    above, below = value.chunk(2, 1)
    high = high.scatter(1, index, torch.minimum(above, high.gather(1, index)))
    return low.scatter(1, index, torch.maximum(-below, low.gather(1, index))), high


def back(
    network: Network, layers: list[Neurons], rows: Tensor, clock: Clock, scores: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients [B, R, N_in] on the input and constants [B, R] above rows . a, a the last of `layers` activated.

    rows: [B, R, N], or of the input where there are no layers. scores: takes, from the last layer on, [B, N] the
    largest coefficients' magnitudes times the heights of the gaps between the lines above and below.
    """
    total = rows.new_zeros(())
    for k in range(len(layers) - 1, -1, -1):
        clock.check()
        layer, step = layers[k], network.steps[k]
        (s1, t1), (s2, t2) = layer.above, layer.below
        up = rows.clamp(min=0)
        total = total + _dot(up, t1)
        if step.curves:
            total = total + _dot(rows - up, t2)
        if scores is not None:
            scores.append(rows.abs().amax(1) * (t1 - t2))
        rows = rows * torch.where(rows >= 0, s1[:, None], s2[:, None])
        total = total + rows @ step.bias + _dot(rows.abs(), layer.error)
        rows = network.maps[k].transpose(rows)
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


def _dot(rows: Tensor, column: Tensor) -> Tensor:
    """[B, R] products of rows [B, R, N] and column [B, N]."""
    return (rows @ column[..., None])[..., 0]


def _put(line: Line, index: Tensor, values: Line) -> Line:
    first, second = (part.index_copy(1, index, value) for part, value in zip(line, values, strict=True))
    return first, second
