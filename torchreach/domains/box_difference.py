"""Certified bounds of y1 - y2 over many small boxes in difference coordinates, on top of `joint_bounds`.

Where two networks of one architecture are close and few neurons of a box are undecided, z - z2 is small and its bounds
are tighter, by as much as the networks are close, than any bounds of either network. Both networks' neurons are as
bounded there; z - z2 is bounded by intervals, and by rows of its own for neurons that these leave undecided, each box
with its own list; closed-form planes all the way (`difference.Backward.closed`). Rounding as in `difference`.

Axis letters: B boxes, R rows, N features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.masks import leading
from torchreach.domains.crown import WAYS, Inputs, influence, tightened
from torchreach.domains.difference import (
    CHUNK,
    SPREAD,
    Backward,
    checked_boxes,
    difference_bounds,
    finite,
    forward_difference,
)
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.joint import Both, JointBounds, joint_bounds
from torchreach.domains.pair import Pair
from torchreach.domains.zonotope import interval_bounds


@torch.no_grad()
def quick_bounds(
    both: Both, lower: Tensor, upper: Tensor, known: JointBounds | None = None, *, clock: Clock = NO_LIMIT
) -> JointBounds:
    """`known`, with the bounds, coefficients and influence of difference coordinates.

    Args: both: of a pair. lower, upper: [B, N_in] as `checked_boxes` returns them. known: `joint_bounds` of these,
            where they are at hand.
    Guarantee: as `joint_bounds`, if it was given signs too. Bounds can be looser than the known ones.
    Raises: OutOfTime: the clock is over.
    """
    pair, known = both.pair, known or joint_bounds(both, lower, upper, clock=clock)
    assert pair is not None
    work, _ = _hidden(pair, lower, upper, known, clock, NO_LIMIT)
    work.scores = {}
    value, x = _output(work)
    shape = (len(lower), 2, pair.outputs)
    x = x.expand(len(lower), -1, -1).reshape(*shape, -1)
    layers = known.neurons[0]
    scores = [
        torch.zeros_like(layer.low).index_copy(1, on, work.scores[k])
        for k, (layer, on) in enumerate(zip(layers, work.on, strict=True))
    ]
    moved = influence(both.first, layers, scores, Inputs.of(lower, upper)) + x.abs().amax((1, 2))
    return replace(known, upper=value, x=x, influence=moved)


@dataclass(frozen=True, eq=False)
class FirstBounds:
    """hexagons: bounds of every layer as `difference_bounds` gives them, the outputs' the best there are; none for two
    architectures. joint: None for a pair of few inputs that vary."""

    hexagons: tuple[Hexagon, ...]
    joint: JointBounds | None

    @property
    def upper(self) -> Tensor:
        """[B, 2, N_out] above y1 - y2 and y2 - y1."""
        if self.hexagons:
            return self.hexagons[-1].sides
        assert self.joint is not None
        return self.joint.upper

    def select(self, index: Tensor) -> FirstBounds:
        """Of some boxes."""
        hexagons = tuple(hexagon.map(lambda part: part[index]) for hexagon in self.hexagons)
        return FirstBounds(hexagons, None if self.joint is None else self.joint.select(index))


@torch.no_grad()
def first_bounds(
    both: Both,
    lower: Tensor,
    upper: Tensor,
    take: Callable[[Tensor], object] = lambda _: None,
    *,
    clock: Clock = NO_LIMIT,
    memory: float = math.inf,
) -> FirstBounds:
    """Bounds before any split.

    Those of the outputs are the better of `difference_bounds` and, for many inputs that vary, of `joint_bounds`.
    Layers of convolutions over many inputs, whose zonotopes would be large, are bounded from joint bounds alone, by
    windows and in difference coordinates on top of that; both within the clock's time, if with looser bounds.

    Args: take: gets certified bounds [B, 2, N_out] above y1 - y2 and y2 - y1, as soon as there are any.
    Raises: as `difference_bounds`.
    """
    pair, (lower, upper) = both.pair, checked_boxes(both, lower, upper)
    many, known = int((lower < upper).any(0).sum()) > WAYS, None
    if pair is None or many:
        known = joint_bounds(both, lower, upper, anytime=True, clock=clock)
        take(known.upper)
    if pair is None:
        return FirstBounds((), known)
    if known is not None and both.first.windowed:
        hexagons = _hexagons(pair, lower, upper, known, clock)
    else:
        hexagons = difference_bounds(pair, lower, upper, clock=clock, memory=memory)
    *hidden, output = hexagons
    if known is not None:
        du, dl = torch.minimum(output.sides, known.upper).unbind(1)
        output = output.with_difference(-dl, du)
    take(output.sides)
    return FirstBounds((*hidden, output), known)


def _hexagons(pair: Pair, lower: Tensor, upper: Tensor, known: JointBounds, clock: Clock) -> tuple[Hexagon, ...]:
    """Half of the clock's time goes to z - z2 of hidden neurons; those whose turn comes later keep intervals."""
    patience = clock.part(clock.left / 2) if clock.limited else NO_LIMIT
    work, layers = _hidden(pair, lower, upper, known, clock, patience)
    du, dl = _output(work)[0].unbind(1)
    (l1, u1), (l2, u2) = (
        interval_bounds(
            network[-1:], torch.stack(((least + most) / 2, (most - least) / 2), 1), torch.zeros_like(least)
        )[0]
        for network, (least, most) in zip((pair.first, pair.second), known.ends(lower, upper), strict=True)
    )
    return finite([*layers, Hexagon(l1, u1, l2, u2, -dl, du).tightened()])


def _hidden(
    pair: Pair, lower: Tensor, upper: Tensor, known: JointBounds, clock: Clock, patience: Clock
) -> tuple[Backward, list[Hexagon]]:
    """Bounds of the hidden layers; z - z2 of neurons whose turn comes when `patience` is over, by intervals."""
    work, layers = Backward(pair, lower, upper, clock=clock), []
    limit = max(CHUNK // (SPREAD * len(lower) * pair.widest), 1)
    for k, (one, other) in enumerate(zip(*known.neurons, strict=True)):
        before = layers[-1] if layers else (work.middle, work.radius)
        dl, du = forward_difference(pair, k, before, work.errors[k][1])
        hexagon = Hexagon(one.low, one.high, other.low, other.high, dl, du).tightened()
        undecided = one.open | other.open
        count = int(undecided.sum(1).max()) if k and k >= pair.shared and undecided.numel() else 0
        for index in leading(undecided, count).split(limit, 1) if count else ():
            if patience.over:
                break
            value = work.difference(work.closed, index)[0]
            hexagon = hexagon.with_difference(*tightened(hexagon.dl, hexagon.du, index, value))
        layers.append(hexagon.tightened())
        work.add(layers[-1])
    return work, layers


def _output(work: Backward) -> tuple[Tensor, Tensor]:
    """[B, 2, N_out] bounds above y1 - y2 and y2 - y1, and their coefficients [B or 1, 2 N_out, N_in] on the input."""
    value, x = work.difference(work.closed)
    value = value.expand(len(work.lower), -1).reshape(len(work.lower), 2, -1)
    return torch.zeros_like(value) if work.pair.shared == work.pair.depth else value, x
