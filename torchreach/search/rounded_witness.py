"""Witness search where activations are rounded: best responses, input by input, to the networks' gradients.

Near x the difference is about g1 . x - g2 . Q(x) for the gradients g1, g2 of the two networks, g2 taken straight
through the quantisers (Bengio, Leonard, Courville: Estimating or propagating gradients through stochastic neurons,
2013) with respect to the rounded input Q(x). What the input quantiser adds jumps at thresholds, where it has no
gradient; but for fixed g1, g2 each input has a best value at an end of one of its cells, found by looking at all of
them. Half of the inputs, chosen at random, move there; the gradients are taken anew; every start keeps its best
point. What no gradient sees, the pattern of roundings inside the network, is searched by chance (`wander`). Nothing
is certified here: the caller replays the points.

Axis letters: B points (a start of one objective each), K candidates, N features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count as count_from

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.domains.input_grid import InputGrid
from torchreach.graph.steps import Step

CODES = 4  # cells of an input that are looked at: the first and the last ones of its range
INSIDE = 4.0  # multiples of the rounding allowance kept from thresholds
NEAR = 0.05  # how far an input moves at most near a good point, in widths of the box
LEAST = 3  # rounds of chance at least
NUMBERS = 2**20  # in one intermediate tensor: some ten milliseconds of work


def climb(
    first: tuple[Step, ...],
    second: tuple[Step, ...],
    lower: Tensor,
    upper: Tensor,
    order: Tensor,
    *,
    starts: int = 8,
    steps: int = 30,
    seed: int = 0,
    clock: Clock = NO_LIMIT,
    numbers: int = NUMBERS,
) -> Iterator[Tensor]:
    """Inputs [B, N_in] of the box [N_in] at which objectives are large, batch after batch of objectives; seeded.

    order: the objectives in the order in which they are climbed: n for y1 - y2 of output n, N_out + n for y2 - y1.
    clock: ends it; but the first batch comes in any case, after one step. numbers: in one intermediate tensor.
    """
    n, inputs = first[-1].features, len(lower)
    generator = torch.Generator().manual_seed(seed)
    grids = [InputGrid.of(network[0]) for network in (first, second)]
    # of each network: what its input quantiser, if any, leaves
    inner = [network if grid is None else network[1:] for network, grid in zip((first, second), grids, strict=True)]
    candidates = _candidates(grids[1], lower, upper)  # [N, K]
    rounded = [_round(grid, candidates) for grid in grids]
    each = candidates.numel() + sum(step.features for step in (*first, *second))
    starts = max(min(starts, numbers // each), 1)
    for chosen in order.split(max(numbers // (each * starts), 1)):
        objective = chosen.repeat_interleave(starts)
        sign = 1.0 - 2.0 * (objective >= n).to(lower)
        output = (objective % n)[:, None]
        x = lower + (upper - lower) * _random(generator, lower, len(sign), inputs)
        best, at = x.new_full((len(x),), -torch.inf), x
        for step in range(steps + 1):
            gain, value = torch.zeros_like(candidates).expand(len(x), -1, -1), torch.zeros_like(best)
            for network, grid, side, images in zip(inner, grids, (1, -1), rounded, strict=True):
                with torch.enable_grad():
                    leaf = _round(grid, x[:, :, None])[:, :, 0].requires_grad_()
                    out = side * sign * straight_through(network, leaf).gather(1, output)[:, 0]
                    (gradient,) = torch.autograd.grad(out.sum(), leaf)
                value = value + out.detach()
                gain = gain + gradient[:, :, None] * images
            at = torch.where((value > best)[:, None], x, at)
            best = torch.maximum(best, value)
            if step and clock.over:
                break
            response = candidates.expand(len(x), -1, -1).gather(2, gain.argmax(2, keepdim=True))[:, :, 0]
            # all at once first: it is the answer where both networks are linear
            share = 1.0 if step == 0 else 0.5
            x = torch.where(_random(generator, lower, *x.shape) < share, response, x)
        yield at
        if clock.over:
            return


def wander(
    value: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    start: Tensor,
    count: int,
    *,
    rounds: int = 48,
    seed: int = 0,
    clock: Clock = NO_LIMIT,
    longer: bool = False,
) -> Iterator[Tensor]:
    """Inputs [O, M] of the box [M], ever better ones for each of O objectives, from `start` [O, M]; seeded.

    value: [B, O] at inputs [B, M]. count: of inputs looked at in a round, at least. clock: ends it after a few rounds.

    Random ones of the whole box first; then the best so far with some of their inputs, ever fewer, moved or drawn anew.
    longer: the last of these only, a few inputs of `start` at a time, until the clock ends it, if it is limited.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(count, len(start))
    best, at = start.new_full((len(start),), -torch.inf), start
    if longer:
        best = value(start).diagonal()
    for k in range(rounds) if not longer else count_from(rounds) if clock.limited else range(rounds, 2 * rounds):
        share = 1.0 if k < rounds // 4 else max(0.5 * (1 - k / rounds), 1.5 / max(len(lower), 1))
        parent = at[torch.arange(count, device=at.device) % len(at)]
        drawn = lower + (upper - lower) * _random(generator, lower, count, len(lower))
        near = torch.minimum(torch.maximum(parent + NEAR * (2 * drawn - lower - upper), lower), upper)
        drawn = torch.where(
            (torch.arange(count, device=at.device) < count // 2)[:, None] & (0 < k < rounds), near, drawn
        )
        x = torch.where(_random(generator, lower, count, len(lower)) < share, drawn, parent)
        found, row = value(x).max(0)
        at = torch.where((found > best)[:, None], x[row], at)
        best = torch.maximum(best, found)
        if clock.over and k >= LEAST:
            break
        if k % 8 == 7:
            yield at
    yield at


def _random(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """The same on every device."""
    return torch.rand(*shape, generator=generator, dtype=like.dtype).to(like.device)


def _candidates(grid: InputGrid | None, lower: Tensor, upper: Tensor) -> Tensor:
    """Values [N, K] that an input may take: ends of the box, and of its cells, away from thresholds."""
    ends = [lower, upper, (lower + upper) / 2]
    if grid is not None:
        first, last = grid.codes(lower, upper)
        for code in (*(first + k for k in range(CODES)), *(last - k for k in range(CODES))):
            low, high = grid.cell(torch.minimum(torch.maximum(code, first), last))
            margin = INSIDE * grid.error(torch.maximum(lower.abs(), upper.abs())) / grid.scale.abs()
            ends += [low + margin, high - margin]
    return torch.stack([torch.minimum(torch.maximum(end, lower), upper) for end in ends], 1)


def _round(grid: InputGrid | None, x: Tensor) -> Tensor:
    """What an input quantiser, if there is one, makes of inputs [..., N, K]."""
    if grid is None:
        return x.clone()
    return grid.quantizer(grid.scale[:, None] * x + grid.shift[:, None])


def straight_through(steps: tuple[Step, ...], x: Tensor) -> Tensor:
    """Outputs [B, N_out] in float64, differentiable as if rounding were the identity within the quantiser's range."""
    for step in steps:
        x = step.linear(x) + step.bias
        if step.quantizer is not None:
            ends = [
                step.quantizer.value(torch.as_tensor(code)) for code in (step.quantizer.lowest, step.quantizer.highest)
            ]
            inner = torch.minimum(torch.maximum(x, ends[0]), ends[1])
            x = inner + (step.quantizer(x) - inner).detach()
        elif step.relu is not None:
            x = torch.where(step.relu, x.relu(), x)
    return x
