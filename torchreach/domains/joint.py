"""Certified bounds of y1 - y2 of any two networks on one input, over many boxes, backward through both at once.

The objectives +-(y1 - y2) go backward through either network as in `crown`, and their coefficients on the shared input
are added up before the box bounds them: what both networks do alike as functions of x cancels there, whatever their
shapes are.

Reference: several networks on one input: the differential verifiers named in `hexagon`.

Axis letters: B boxes, R rows (one objective each), N features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.roundoff import allowance, ball
from torchreach.domains.crown import Inputs, Network, Neurons, back, bounded, influence
from torchreach.domains.pair import Activate, Pair, difference_of
from torchreach.domains.zonotope import zonotope_bounds
from torchreach.graph.steps import Step


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
            middle, radius = ball(low, high)
            value = value + sign * middle
            error = error + radius + allowance(middle.abs() + radius)
        return value, error

    def values(self, x: Tensor, activate: Activate) -> Tensor:
        """y1 - y2 [B, N_out], differentiable, with another function in place of each step's activation."""
        return difference_of([network.steps for network in self.networks], x, activate)


@dataclass(frozen=True, eq=False)
class JointBounds:
    """upper: [B, 2, N_out] above y1 - y2 and y2 - y1. x: [B, 2, N_out, N_in] coefficients of these on the input.
    influence: [B, N_in] how much of the gap between the bounds and the networks a unit of each input's width makes.
    gaps: [B, H] how much of it each hidden neuron of undecided sign makes. neurons: of the hidden layers of either
    network."""

    upper: Tensor
    x: Tensor
    influence: Tensor
    gaps: Tensor
    neurons: tuple[list[Neurons], ...]

    @property
    def signs(self) -> Tensor:
        """[B, H] int8 of all hidden neurons, network by network, layer by layer (`Neurons.signs`)."""
        layers = [layer.signs for network in self.neurons for layer in network]
        return torch.cat(layers, 1) if layers else self.x.new_zeros(len(self.x), 0, dtype=torch.int8)

    def select(self, index: Tensor) -> JointBounds:
        """Of some boxes."""
        neurons = tuple([layer.select(index) for layer in network] for network in self.neurons)
        return JointBounds(self.upper[index], self.x[index], self.influence[index], self.gaps[index], neurons)

    def ends(self, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Bounds [B, N] of what each network's last layer gets; low, high: of the input, if that is it."""
        return [(layers[-1].least, layers[-1].most) if layers else (low, high) for layers in self.neurons]

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
    both: Both,
    low: Tensor,
    high: Tensor,
    signs: Tensor | None = None,
    *,
    anytime: bool = False,
    clock: Clock = NO_LIMIT,
) -> JointBounds:
    """Certified bounds above y1 - y2 and y2 - y1 over B boxes.

    Args:
        low, high: [B, N_in] in float64; finite, low <= high.
        signs: [B, H] as of `JointBounds.signs`, what is known of the neurons on each box, or asked of its inputs: the
            bounds then hold for those inputs of the box at which the pre-activations have these signs; -inf where
            there are none.
        anytime: whether some neurons are to have looser bounds rather than that `clock` ends it: each network gets a
            third of its time.
        clock: looked at in every layer; OutOfTime when it is over.
    """
    inputs = Inputs.of(low, high)
    known = None if signs is None else signs.split([sum(network.sizes) for network in both.networks], 1)
    rows = torch.eye(both.outputs, dtype=low.dtype, device=low.device)
    rows = torch.cat((rows, -rows))
    x, total = low.new_zeros(()), low.new_zeros(())
    moved, layers, gaps = torch.zeros_like(low), [], [low.new_zeros(len(low), 0)]
    for i, (sign, network) in enumerate(zip((1, -1), both.networks, strict=False)):
        share = 0.8 if both.second is None else 1 / (3 - i)
        patience = clock.part(share * clock.left) if anytime and clock.limited else NO_LIMIT
        neurons = bounded(network, inputs, None if known is None else known[i], clock, patience)
        layers.append(neurons)
        k, A = len(neurons), neurons[-1].size if neurons else inputs.size
        error, bias = network.error(k, A), network.steps[k].bias
        scores: list[Tensor] = []
        start = network.maps[k].transpose(sign * rows).expand(len(low), -1, -1)
        own, constant = back(network, neurons, start, clock, scores)
        x, total = x + own, total + constant + (sign * rows) @ bias + error.repeat(1, 2)
        moved = moved + influence(network, neurons, scores[::-1], inputs)
        gaps += [layer.undecided * score for layer, score in zip(neurons, scores[::-1], strict=True)]
    value = inputs.largest(x, total)
    for network in layers:
        for layer in network:
            if layer.empty is not None:
                value[layer.empty] = -torch.inf
    shape = (len(low), 2, both.outputs)
    moved = moved + x.abs().amax(1)
    return JointBounds(value.reshape(shape), x.reshape(*shape, -1), moved, torch.cat(gaps, 1), tuple(layers))
