"""Certified bounds of y1 - y2 over a box where one network or both round, by relaxations in difference coordinates.

Each network that rounds becomes a ReLU network with noise and inputs of its own for the errors of its input quantiser
(`rounding.relax`), the other one gets the same inputs and ignores them; then they are a pair for `difference_bounds`
and for a search. What a quantiser clamps at the outputs is put back last.

Axis letters: M inputs of the box, N features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.errors import ShapeError, UnsupportedLayerError
from torchreach.core.roundoff import SINGLE, above
from torchreach.domains.difference import difference_bounds
from torchreach.domains.hexagon import Hexagon
from torchreach.domains.input_grid import InputGrid
from torchreach.domains.joint import Both, joint_bounds
from torchreach.domains.pair import Pair
from torchreach.domains.rounding import Relaxed, is_identity, relax, with_inputs
from torchreach.domains.stairs import StairPair, Stairs, without_noise
from torchreach.domains.zonotope import box_rows, zonotope_bounds
from torchreach.graph.layers import Reshape, fan_in
from torchreach.graph.steps import Step
from torchreach.graph.twins import twin_numbers, twins
from torchreach.graph.weights import linear_layer


@dataclass(frozen=True, eq=False)
class RelaxedDifference:
    """A relaxation over one box; `upper` [2, N_out] bounds y1 - y2 and y2 - y1.

    pair: both networks on the box [low, high] of the inputs and of the errors of input quantisers, and `root` its
    bounds; None where the architectures differ, and each network is bounded by itself. saturable: of each network, as
    `relax` says.
    """

    pair: Pair | None
    low: Tensor
    high: Tensor
    root: tuple[Hexagon, ...]
    bottom: Tensor  # [2, N_out] ranges of both outputs before the clamps
    top: Tensor
    lowest: Tensor  # [2, N_out] the clamps
    highest: Tensor
    upper: Tensor
    saturable: tuple[tuple[str, ...], tuple[str, ...]]
    rounded: tuple[tuple[Stairs | None, ...], tuple[Stairs | None, ...]]  # of each network's layers
    after: tuple[Tensor | None, Tensor | None]  # [N_out] noise of outputs that are rounded

    @staticmethod
    def of(
        first: tuple[Step, ...],
        second: tuple[Step, ...],
        low: Tensor,
        high: Tensor,
        grid: InputGrid | None,
        *,
        rows: Tensor | None = None,
        clock: Clock = NO_LIMIT,
    ) -> RelaxedDifference:
        """Of the steps of both networks over the box [M]; `second` rounds. grid: part of the codes of its input.

        rows: [P, N_out]; bounds are then of these sums of the outputs, such as the leads of some over others.

        Raises: UnsupportedLayerError: an affine step too large to be a matrix. OutOfTime: the clock is over.
        """
        clock.check()
        relaxed2 = relax(second, low, high, InputGrid.of(second[0]) if grid is None else grid, clock=clock)
        rounds = any(step.quantizer is not None for step in first)
        relaxed1 = relax(first, low, high, InputGrid.of(first[0]), clock=clock) if rounds else None
        clock.check()
        own = 0 if relaxed1 is None else relaxed1.extra
        size = torch.maximum(low.abs(), high.abs())
        ones = size.new_ones(own + relaxed2.extra)
        steps1 = first if relaxed1 is None else relaxed1.steps
        if rows is not None:
            steps1 = with_rows(first, rows) if relaxed1 is None else _unclamped(relaxed1, rows, low, high, clock)
            relaxed2 = replace(relaxed2, steps=_unclamped(relaxed2, rows, low, high, clock))
        steps1 = with_inputs(steps1, len(size) + own, relaxed2.extra, torch.cat((size, ones[:own])))
        steps2 = with_inputs(relaxed2.steps, len(size), own, torch.cat((size, ones[own:])))
        low, high = torch.cat((low, -ones)), torch.cat((high, ones))
        free = rows is not None  # the clamps are part of the noise
        infinite = low.new_full((steps2[-1].features,), torch.inf)
        ends = [(-infinite, infinite) if free or r is None else (r.lowest, r.highest) for r in (relaxed1, relaxed2)]
        lowest, highest = (torch.stack(part) for part in zip(*ends, strict=True))
        clock.check()
        try:
            pair = Pair.of(steps1, steps2)
        except (ShapeError, UnsupportedLayerError):
            # Different architectures: each network by itself.
            box = box_rows(low[None], high[None])
            ranges = [zonotope_bounds(network, *box, clock=clock)[-1] for network in (steps1, steps2)]
            bottom, top = (torch.cat(part) for part in zip(*ranges, strict=True))
            pair, root, upper = None, (), top - bottom.flip(0)
        else:
            root = difference_bounds(pair, low[None], high[None], clock=clock)
            output = root[-1]
            bottom, top = torch.cat((output.l1, output.l2)), torch.cat((output.u1, output.u2))
            upper = output.sides[0]
        return RelaxedDifference(
            pair,
            low,
            high,
            root,
            bottom,
            top,
            lowest,
            highest,
            _clamped(upper, bottom, top, lowest, highest),
            (() if relaxed1 is None else relaxed1.saturable, relaxed2.saturable),
            tuple(_stairs(relaxed, len(relaxed2.stairs), rows is None) for relaxed in (relaxed1, relaxed2)),  # type: ignore
            (None if relaxed1 is None else relaxed1.after, relaxed2.after),
        )

    def staircases(self) -> tuple[Pair, tuple[Hexagon, ...], tuple[StairPair | None, ...]]:
        """The pair, its bounds and the stairs of its hidden layers: staircases in place of the noise of rounding.

        Outputs that are rounded become one more hidden layer, shifted so that relu is the identity on them.
        """
        assert self.pair is not None
        pair, networks = self.pair, (self.pair.first, self.pair.second)
        networks = [
            [
                step if part is None else replace(step, noise=above(step.with_noise(-part.spare)))
                for step, part in zip(steps, stairs, strict=True)
            ]
            for steps, stairs in zip(networks, self.rounded, strict=True)
        ]
        bounds = [without_noise(*each) for each in zip(self.root, *self.rounded, strict=True)]
        pairs = [StairPair.of(*each, like=h.l1[0]) for *each, h in zip(*self.rounded, self.root, strict=True)]
        rounded = pairs.pop()
        if rounded is None:
            first, second = map(tuple, networks)
            return replace(pair, first=first, second=second), (*bounds[:-1], self.root[-1]), tuple(pairs)
        # Away from zero, whatever the numbers, by more than they are rounded.
        low = torch.minimum(bounds[-1].l1, bounds[-1].l2)[0] - rounded.first.radius - rounded.second.radius
        shift = above((-low).clamp(min=0) + 1e-6 * (1 + low.abs()))
        ends = [_identity(shift, off) for off in self.after]
        for steps, end in zip(networks, ends, strict=True):
            last = steps[-1]
            steps[-1] = replace(
                last,
                bias=last.bias + shift,
                bias_magnitude=last.bias_magnitude + shift,
                relu=torch.ones_like(shift, dtype=torch.bool),
            )
            steps.append(end)
        first, second = map(tuple, networks)
        biases = [step.bias for step in first]
        changed = replace(
            pair,
            first=first,
            second=second,
            maps=[*pair.maps, twins(*ends)],
            b=biases,
            db=[*pair.db, torch.zeros_like(shift)],
            exact=[*pair.exact, True],
        )
        bounds[-1] = bounds[-1].moved(shift)
        return changed, (*bounds, self.root[-1]), (*pairs, rounded.moved(shift))

    def clamped(self, upper: Tensor) -> Tensor:
        """Bounds [2, N_out] on y1 - y2 and y2 - y1 from those of the pair."""
        return _clamped(upper, self.bottom, self.top, self.lowest, self.highest)


@torch.no_grad()
def rounded_bounds(
    first: tuple[Step, ...], second: tuple[Step, ...], low: Tensor, high: Tensor, clock: Clock
) -> Tensor | None:
    """Bounds [2, N_out] on y1 - y2 and y2 - y1 over the box [M], backward through both as they are: `joint_bounds`.

    For networks too large for `RelaxedDifference`; rows whose turn comes too late have looser bounds. None where
    kernels are not known to the bit, whose errors depend on each sum. Raises as `joint_bounds`.
    """
    networks: list[tuple[Step, ...]] = []
    for steps in (first, second):
        *hidden, last = steps
        if all(step.quantizer is None for step in steps):
            networks.append(steps)
            continue
        grid, quantizer = InputGrid.of(steps[0]), hidden[-1].quantizer
        exact = all(step.quantizer is not None and step.quantizer.exact for step in hidden[1:])
        if grid is None or quantizer is None or not exact or not is_identity(last):
            return None
        entry = replace(steps[0], noise=steps[0].with_noise(grid.error(torch.maximum(low.abs(), high.abs()))))
        ends = [quantizer.value(torch.as_tensor(end).to(low)) for end in (quantizer.lowest, quantizer.highest)]
        product = 4 * SINGLE * torch.maximum(*(end.abs() for end in ends)).expand_as(last.bias)
        networks.append((entry, *hidden[1:], replace(last, noise=last.with_noise(product))))
    both = Both.of(networks[0], networks[1], clock=clock)
    return joint_bounds(both, low[None], high[None], anytime=True, clock=clock).upper[0]


def with_rows(steps: tuple[Step, ...], rows: Tensor, noise: Tensor | None = None) -> tuple[Step, ...]:
    """The network `rows` y for a network y: [P, N_out] more layer. noise: [N_out] by which y is off."""
    last = steps[-1]
    off = last.noise if noise is None else last.with_noise(noise)
    layer, size = linear_layer(rows, None), rows.abs()
    changed = replace(
        last,
        block=nn.Sequential(*last.block, Reshape((last.features,)), layer),
        bias=rows @ last.bias,
        bias_magnitude=size @ last.bias_magnitude,
        terms=last.terms + fan_in(layer),
        noise=None if off is None else above(size @ off),
    )
    return (*steps[:-1], changed)


def _identity(like: Tensor, noise: Tensor | None) -> Step:
    """A last step that changes none of its features, of which there are as many as in `like` [N_out]."""
    layer, zero = linear_layer(torch.diag_embed(torch.ones_like(like)), None), torch.zeros_like(like)
    return Step("rounded outputs", nn.Sequential(layer), tuple(like.shape), zero, zero, 1, None, noise=noise)


def _stairs(relaxed: Relaxed | None, count: int, outputs: bool) -> tuple[Stairs | None, ...]:
    """Of each of so many layers, the last one only if `outputs`."""
    stairs = (None,) * count if relaxed is None else relaxed.stairs
    return stairs if outputs else (*stairs[:-1], None)


def _unclamped(relaxed: Relaxed, rows: Tensor, low: Tensor, high: Tensor, clock: Clock) -> tuple[Step, ...]:
    """`with_rows` of a relaxation over the box [M], what the clamps at its outputs may add made part of its noise."""
    steps = relaxed.steps
    if not bool(relaxed.lowest.isfinite().all() & relaxed.highest.isfinite().all()):
        return with_rows(steps, rows)
    ones = low.new_ones(relaxed.extra)
    box = box_rows(torch.cat((low, -ones))[None], torch.cat((high, ones))[None])
    bottom, top = zonotope_bounds(steps, *box, clock=clock)[-1]
    off = torch.maximum(top[0] - relaxed.highest, relaxed.lowest - bottom[0]).clamp(min=0)
    # The ends of a clamp are products in float32 too.
    ends = 4 * SINGLE * torch.maximum(relaxed.lowest.abs(), relaxed.highest.abs())
    return with_rows(steps, rows, above(off + ends))


def relaxation_bytes(first: tuple[Step, ...], second: tuple[Step, ...], numbers: int) -> int:
    """About how much memory `RelaxedDifference.of` takes: matrices, zonotopes, and rows of backward passes.

    The first layers become matrices on the inputs and on the errors of their quantisers; the others as `twins` says.
    numbers: in one intermediate tensor of the backward passes.
    """
    networks, rounding = [], 0
    for steps in (first, second):
        grid = InputGrid.of(steps[0])
        networks.append(steps if grid is None else steps[1:])
        rounding += any(step.quantizer is not None for step in steps)
    inputs, features = prod(first[0].in_shape), [[step.features for step in steps] for steps in networks]
    heads = max(sizes[0] for sizes in features) * inputs * (3 * (1 + rounding) + 4 * rounding)
    rest = list(zip(*(steps[1:] for steps in networks), strict=False))
    matrices = sum(twin_numbers(s, t) for s, t in rest if (s.in_shape, s.features) == (t.in_shape, t.features))
    # Every neuron may be a generator of the layers after it.
    zonotopes = 0
    for sizes in features:
        generators, before = 1 + 2 * inputs, inputs
        for size in sizes:
            generators += size
            zonotopes, before = max(zonotopes, 3 * generators * max(before, size)), size
    widest = max(inputs, *map(max, features))
    return 8 * (heads + matrices + zonotopes + 24 * min(widest**2, widest + numbers))


def _clamped(upper: Tensor, low: Tensor, high: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Bounds [2, N_out] on y1 - y2 and y2 - y1 after the clamps, from those before them.

    low, high: [2, N_out] ranges of both outputs before the clamps to [lowest, highest], of these sizes too. With c the
    clamp, c1(a) - c2(b) <= max(a - b, lowest1 - b, c1(a) - highest2), the last two only where the clamps can act; and
    it is at most what the ranges of c1(a) and c2(b) say.
    """
    last, first = torch.minimum(high, highest), torch.maximum(low, lowest)
    last, first = torch.maximum(last, lowest), torch.minimum(first, highest)
    raised = torch.where(low < lowest, lowest - low.flip(0), -torch.inf)
    cut = torch.where(high.flip(0) > highest.flip(0), last - highest.flip(0), -torch.inf)
    # The ends of a clamp are products in float32 too.
    rounded = torch.cat((lowest, highest)).abs()
    loss = (4 * SINGLE * torch.where(rounded.isfinite(), rounded, 0.0)).sum(0)
    return torch.minimum(torch.maximum(upper, torch.maximum(raised, cut)), last - first.flip(0)) + loss
