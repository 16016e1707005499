"""Certified bounds of y1 - y2 over many small boxes in difference coordinates, on top of `joint_bounds`.

Where two networks of one architecture are close and few neurons of a box are undecided, z - z2 is small and its bounds
are tighter, by as much as the networks are close, than any bounds of either network. Both networks' neurons are as
bounded there; z - z2 is bounded by intervals, and by rows of its own for neurons that these leave undecided, each box
with its own list; closed-form planes all the way (`difference.Backward.closed`). Rounding as in `difference`.

Axis letters: B boxes, R rows, N features.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.masks import leading
from torchreach.domains.difference import CHUNK, SPREAD, Backward, forward_difference
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.joint import Both, Inputs, JointBounds, influence, joint_bounds, tightened


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
    work = Backward(pair, lower, upper, clock=clock)
    inputs = Inputs.of(lower, upper)
    limit = max(CHUNK // (SPREAD * len(lower) * pair.widest), 1)
    hexagon: Hexagon | None = None
    for k, (one, other) in enumerate(zip(*known.neurons, strict=True)):
        if hexagon is not None:
            dl, du = forward_difference(pair, k, hexagon, work.errors[k][1])
        else:
            middle, spread = pair.maps[0].forth(work.middle)[1] + pair.db[0], pair.maps[0].spread(work.radius)
            spread = spread + work.errors[0][1]
            dl, du = middle - spread, middle + spread
        hexagon = Hexagon(one.low, one.high, other.low, other.high, dl, du).tightened()
        undecided = one.open | other.open
        count = int(undecided.sum(1).max()) if k and k >= pair.shared and undecided.numel() else 0
        for index in leading(undecided, count).split(limit, 1) if count else ():
            value = work.difference(work.closed, index)[0]
            hexagon = hexagon.with_difference(*tightened(hexagon.dl, hexagon.du, index, value))
        hexagon = hexagon.tightened()
        work.add(hexagon)
    work.scores = {}
    value, x = work.difference(work.closed)
    if pair.shared == pair.depth:
        value = torch.zeros_like(value)
    shape = (len(lower), 2, pair.outputs)
    x = x.expand(len(lower), -1, -1).reshape(*shape, -1)
    layers = known.neurons[0]
    scores = [
        torch.zeros_like(layer.low).index_copy(1, on, work.scores[k])
        for k, (layer, on) in enumerate(zip(layers, work.on, strict=True))
    ]
    moved = influence(both.first, layers, scores, inputs) + x.abs().amax((1, 2))
    return replace(known, upper=value.expand(len(lower), -1).reshape(shape), x=x, influence=moved)
