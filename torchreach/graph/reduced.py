"""A network without the neurons whose sign is known on all input stars.

Where the sign of a neuron is known it is linear or zero, so every live pre-activation, and every output, is an
affine function of the input plus a sum over the live neurons before it:

    z_t = B_t x + c_t + sum_{live s before t} C_st relu(z_s)

The reduced network carries the partial sums of all live neurons and outputs as its features. Step 0 maps the
input to B x + c; the step after layer k consumes the features of its live neurons and adds their share
relu(z) C_k to the others, which pass by unsplit. It computes the same function as the network wherever the
signs are what they are said to be; composed weights are rounded like any sum of that many terms, and
`magnitude` bounds the terms, so that error bounds hold for it as for the network itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.graph.layers import MergedAffine
from torchreach.graph.steps import Step

Pair = tuple[Tensor, Tensor]
RULES = (Step.linear, Step.magnitude)


class _Entry(MergedAffine):
    """x -> B x: the steps with settled neurons made linear, live features of each collected on the way."""

    def __init__(self, steps: tuple[Step, ...], active: list[Tensor], live: list[Tensor]) -> None:
        super().__init__()
        self.steps, self.active, self.live = steps, active, live
        self.terms = sum(step.terms for step in steps)

    def linear_part(self, x: Tensor) -> Tensor:
        return _collect(self.steps, self.active, self.live, x.flatten(1), Step.linear)

    def magnitude_part(self, x: Tensor) -> Tensor:
        return _collect(self.steps, self.active, self.live, x.flatten(1), Step.magnitude)


class _Update(MergedAffine):
    """(z, rest) -> rest + z C."""

    C: Tensor
    size: Tensor

    def __init__(self, C: Tensor, size: Tensor) -> None:
        super().__init__()
        self.register_buffer("C", C)
        self.register_buffer("size", size)

    def linear_part(self, x: Tensor) -> Tensor:
        return torch.addmm(x[:, len(self.C) :], x[:, : len(self.C)], self.C)

    def magnitude_part(self, x: Tensor) -> Tensor:
        return torch.addmm(x[:, len(self.C) :], x[:, : len(self.C)], self.size)


def reduce(
    steps: tuple[Step, ...], signs: list[Tensor], bounds: list[Pair], clock: Clock = NO_LIMIT
) -> tuple[tuple[Step, ...], list[Tensor], list[Pair], list[int]] | None:
    """The reduced network of `steps`, or None where it would be the larger one, or the clock is over.

    Args:
        signs: [S, N] per step, +1 or -1 where the sign of a neuron is known on input star s, else 0.
        bounds: (lower, upper) [S, N] per step.

    Returns: steps, signs and bounds of the reduced network, and how many neurons of each layer it leaves out.
        A neuron is left out where its sign is known and the same on all S input stars.
    """
    active: list[Tensor] = []
    live: list[Tensor] = []
    left_out: list[int] = []
    for step, sign in zip(steps, signs, strict=True):
        if step.relu is None:
            live.append(torch.arange(step.features, device=sign.device))
            continue
        settled = (sign == sign[:1]).all(0) & (sign[0] != 0)
        live.append((step.relu & ~settled).nonzero().flatten())
        active.append(((sign[0] > 0) & settled) | ~step.relu)
        left_out.append(int(step.relu.sum()) - len(live[-1]))
    sizes = [len(index) for index in live]
    width = [sum(sizes[k:]) for k in range(len(sizes))]
    work = sum(size * wide for size, wide in zip(sizes, [*width[1:], 0], strict=True))
    before = sum(step.terms * step.features for step in steps[1:])
    if width[0] > max(step.features for step in steps) or work > before:
        return None
    result: list[Step] = []
    new_signs: list[Tensor] = []
    new_bounds: list[Pair] = []
    for k, step in enumerate(steps):
        if clock.over:
            return None
        relu = None
        if step.relu is not None:
            relu = torch.arange(width[k], device=step.bias.device) < sizes[k]
        if k == 0:
            layer: MergedAffine = _Entry(steps, active, live)
            terms = layer.terms
            zero = step.bias.new_zeros(1, prod(step.in_shape))
            bias = _collect(steps, active, live, zero, Step.linear, lambda step: step.bias)[0]
            magnitude = _collect(steps, active, live, zero, Step.magnitude, lambda step: step.bias_magnitude)[0]
            # Noise of settled neurons reaches the live features behind them; that of live ones is theirs.
            noise = None
            if any(step.noise is not None for step in steps):
                noise = _collect(steps, active, live, zero, Step.magnitude, _noise)[0]
        else:
            units = step.bias.new_zeros(sizes[k - 1], steps[k - 1].features)
            units[torch.arange(sizes[k - 1], device=units.device), live[k - 1]] = 1.0
            parts = (active[k:], live[k:], units)
            layer = _Update(*(_collect(steps[k:], *parts, rule) for rule in RULES))
            terms = sizes[k - 1] + sum(s.terms for s in steps[k:])
            bias = magnitude = step.bias.new_zeros(width[k])
            noise = None
        result.append(
            replace(
                step,
                block=nn.Sequential(layer),
                in_shape=step.in_shape if k == 0 else (width[k - 1],),
                bias=bias,
                bias_magnitude=magnitude,
                terms=terms,
                relu=relu,
                noise=noise,
            )
        )
        sign = signs[k].new_zeros(len(signs[k]), width[k])
        low = bounds[k][0].new_full((len(signs[k]), width[k]), -torch.inf)
        high = -low
        sign[:, : sizes[k]] = signs[k][:, live[k]]
        low[:, : sizes[k]], high[:, : sizes[k]] = (part[:, live[k]] for part in bounds[k])
        new_signs.append(sign)
        new_bounds.append((low, high))
    return tuple(result), new_signs, new_bounds, left_out


def _collect(
    steps: tuple[Step, ...],
    active: list[Tensor],
    live: list[Tensor],
    rows: Tensor,
    rule: Callable[[Step, Tensor], Tensor],
    constant: Callable[[Step], Tensor] | None = None,
) -> Tensor:
    """Rows [R, N_in] through `steps` by `rule`, with a constant added or without: the live features [R, T] of each."""
    parts: list[Tensor] = []
    for step, index, passes in zip(steps, live, [*active, None], strict=True):
        rows = rule(step, rows)
        if constant is not None:
            rows = rows + constant(step)
        parts.append(rows[:, index])
        if passes is not None:
            rows = rows * passes
    return torch.cat(parts, 1)


def _noise(step: Step) -> Tensor:
    return step.with_noise(torch.zeros_like(step.bias))
