"""Zonotope bounds of every pre-activation, over a batch of boxes of predicates.

Each unstable ReLU is replaced by the band  s z + [0, -s l],  s = u / (u - l),  whose height becomes one new
generator. Sound for every point of the boxes; needs nothing but torch.

Reference: Singh, Gehr, Mirman, Pueschel, Vechev: Fast and effective robustness certification, NeurIPS 2018.

Axis letters: S stars, G generators, N features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock, OutOfTime
from torchreach.core.roundoff import allowance, ball, gamma
from torchreach.domains.smooth import Cells
from torchreach.graph.steps import Step

Bounds = list[tuple[Tensor, Tensor]]
# Copies of the generators that are in memory at once.
BUFFERS = 3


def zonotope_bounds(
    steps: tuple[Step, ...],
    rows: Tensor,
    slack: Tensor,
    start: int = 0,
    clock: Clock = NO_LIMIT,
    memory: float = math.inf,
) -> Bounds:
    """Certified (lower, upper) [S, N] of every step's output from step `start` on, the network's output last.

    Args:
        rows: [S, 1 + M, N] as an affine map over [-1, 1]^M: the input of step `start`.
        slack: [S, N] error bound of the rows, which is carried as an interval.
        clock, memory: once it is over, or the generators would take more bytes than this, the remaining steps
            are bounded by intervals.
    """
    result: Bounds = []
    last = len(steps) - 1
    for index in range(start, len(steps)):
        step = steps[index]
        if BUFFERS * rows.element_size() * len(rows) * rows.shape[1] * step.features > memory:
            return result + interval_bounds(steps[index:], rows, slack)
        try:
            image = step.map_rows(rows, clock)
        except OutOfTime:
            return result + interval_bounds(steps[index:], rows, slack)
        share = gamma(step.terms + rows.shape[1])
        size = rows.abs().sum(1)
        slack = step.with_noise(step.magnitude(slack + share * size) + share * step.bias_magnitude)
        rows = image
        spread = rows[:, 1:].abs().sum(1)
        error = slack + share * (spread + rows[:, 0].abs())
        lower, upper = rows[:, 0] - spread - error, rows[:, 0] + spread + error
        result.append((lower, upper))
        if step.relu is not None and index < last:
            unstable = int(((lower < 0) & (upper > 0) & step.relu).any(0).sum()) + sum(len(i) for _, i in step.curves)
            numbers = len(rows) * (rows.shape[1] + unstable) * max(step.features, steps[index + 1].features)
            if clock.over or BUFFERS * rows.element_size() * numbers > memory:
                return result + _intervals(steps[index + 1 :], *_range(step, lower, upper))
            rows, slack = bent(step, rows, slack, lower, upper)
    return result


def interval_bounds(steps: tuple[Step, ...], rows: Tensor, slack: Tensor) -> Bounds:
    """The same by interval arithmetic: looser, and too cheap to need a clock."""
    spread = rows[:, 1:].abs().sum(1)
    return _intervals(steps, rows[:, 0], spread + slack + allowance(rows.abs().sum(1)))


def _intervals(steps: tuple[Step, ...], middle: Tensor, radius: Tensor) -> Bounds:
    """Bounds of every step's output, from inputs [S, N] within `radius` of `middle`."""
    result: Bounds = []
    for step in steps:
        share = gamma(step.terms)
        radius = step.magnitude(radius + share * (middle.abs() + radius)) + share * step.bias_magnitude
        radius = step.with_noise(radius)
        middle = step.linear(middle) + step.bias
        lower, upper = middle - radius, middle + radius
        result.append((lower, upper))
        if step.relu is not None:
            middle, radius = _range(step, lower, upper)
    return result


def _range(step: Step, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and radius of the activations' range on intervals."""
    assert step.relu is not None
    low = torch.where(step.relu, lower.clamp(min=0), lower)
    high = torch.where(step.relu, upper.clamp(min=0), upper)
    for function, index in step.curves:
        least, most = Cells.of(function, lower[..., index], upper[..., index]).range()
        low, high = low.index_copy(-1, index, least), high.index_copy(-1, index, most)
    return ball(low, high)


def box_rows(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [S, M] as rows [S, 1 + M, M] over [-1, 1]^M and their rounding [S, M]."""
    middle, radius = (low + high) / 2, (high - low) / 2
    slack = allowance(middle.abs() + radius)
    return torch.cat((middle[:, None], torch.diag_embed(radius)), 1), slack


def bent(step: Step, rows: Tensor, slack: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of zonotopes whose points lie in [lower, upper] [S, N], by bands: rows gain generators.

    A smooth function becomes  s z + [bottom, top]  with s the slope of its chord, z being within `slack` of the rows.
    """
    assert step.relu is not None
    rows, slack = relu_band(rows, slack, lower, upper, step.relu)
    for function, index in step.curves:
        slope, middle, height = Cells.of(function, lower[:, index], upper[:, index]).band()
        part = rows[..., index] * slope[:, None]
        part[:, 0] += middle
        rows = rows.index_copy(-1, index, part)
        slack = slack.index_copy(-1, index, slack[:, index] * slope.abs())
        fresh = rows.new_zeros(len(rows), len(index), rows.shape[2])
        fresh[:, torch.arange(len(index), device=rows.device), index] = height
        rows = torch.cat((rows, fresh), 1)
    return rows, slack


def relu_band(rows: Tensor, slack: Tensor, lower: Tensor, upper: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU of zonotopes by the band above: rows [S, 1 + G, N] gain generators, slack [S, N] shrinks."""
    off = (upper <= 0) & mask
    unstable = (lower < 0) & (upper > 0) & mask
    slope = torch.where(unstable, upper / (upper - lower).clamp(min=1e-300), 1.0)
    slope = torch.where(off, 0.0, slope)
    height = torch.where(unstable, -slope * lower / 2 * (1 + allowance(1.0)), 0.0)
    rows = rows * slope[:, None, :]
    rows[:, 0] += height
    # The band holds for z inside [lower, upper], which already includes the slack of z.
    slack = slack * slope
    columns = unstable.any(0).nonzero().flatten()
    fresh = rows.new_zeros(rows.shape[0], len(columns), rows.shape[2])
    fresh[:, torch.arange(len(columns), device=rows.device), columns] = height[:, columns]
    return torch.cat((rows, fresh), 1), slack
