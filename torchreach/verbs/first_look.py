"""A first look at a comparison: inputs that attain something, in milliseconds, before anything can spend a budget.

Gradient ascent on y1 - y2 and y2 - y1 of every output, for all stars at once. Nothing is certified here: what the
inputs attain is replayed by whoever asked.

Axis letters: S stars, B points, M coordinates, N features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.roundoff import allowance
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.domains.zonotope import BUFFERS, box_rows, zonotope_bounds
from torchreach.graph.steps import Step
from torchreach.lp.halfspaces import Halfspaces
from torchreach.lp.interior_point import centre, interior
from torchreach.sets.star import StarBatch

# Starts per objective, steps, and numbers that the layers of all points of a pass may have together.
STARTS, STEPS, NUMBERS = 8, 16, 2**22
# Length of the first step and of the last ones, in half widths of the star.
FIRST, STRIDES = 2.0, (0.5, 0.02)


@dataclass(frozen=True)
class Places:
    """Points of stars by coordinates t [S, B, M] in [-1, 1]: of the box's features where all stars are boxes, else of
    their predicates, pulled towards `inside` [S, M] until they satisfy the constraints A t <= b."""

    stars: StarBatch
    low: Tensor  # [S, N]
    high: Tensor
    box: bool
    inside: Tensor
    A: Tensor
    b: Tensor

    @staticmethod
    def of(stars: StarBatch, low: Tensor, high: Tensor, plain: Tensor) -> Places:
        """low, high, plain: `stars.bounding_box()`."""
        box = bool(plain.all())
        dim = low.shape[1] if box else stars.dim
        inside, A, b = low.new_zeros(len(low), dim), low.new_zeros(len(low), 0, dim), low.new_zeros(len(low), 0)
        if stars.A.shape[1]:
            _, A, b = stars.normalised()
            point, depth, _ = interior(Halfspaces(A, b), Tolerances().sign)
            inside = torch.where((depth > 0)[:, None], centre(Halfspaces(A, b), point, 5), point)
        return Places(stars, low, high, box, inside, A, b)

    def select(self, index: Tensor) -> Places:
        parts = (part[index] for part in (self.low, self.high, self.inside, self.A, self.b))
        low, high, inside, A, b = parts
        return Places(self.stars.select(index), low, high, self.box, inside, A, b)

    def pull(self, t: Tensor) -> Tensor:
        """Coordinates, moved into the star."""
        t = t.clamp(-1, 1)
        if not self.A.shape[1]:
            return t
        inside = self.inside[:, None]
        pace = (t - inside) @ self.A.transpose(1, 2)
        room = (self.b - (self.A @ self.inside[..., None])[..., 0]).clamp(min=0)[:, None]
        return inside + torch.where(pace > room, room / pace, 1.0).amin(2, keepdim=True) * (t - inside)

    def holds(self, t: Tensor) -> Tensor:
        """[S, B] whether coordinates satisfy the constraints, up to the rounding of this test."""
        sides, A = self.b[:, None], self.A.transpose(1, 2)
        slack = allowance(t.abs() @ A.abs() + sides.abs(), 4 * (t.shape[2] + 4))
        return (t.abs() <= 1).all(2) & (t @ A <= sides + slack).all(2)

    def points(self, t: Tensor) -> Tensor:
        """Inputs [S, B, *shape] in float64."""
        if not self.box:
            return self.stars.point(t)
        low, high = self.low[:, None], self.high[:, None]
        x = torch.minimum(torch.maximum(low + (high - low) * ((t + 1) / 2), low), high)
        return x.reshape(*t.shape[:2], *self.stars.shape)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """[S, count, *shape] random points of each star, in its dtype."""
        if not self.box:
            return self.stars.sample(count, seed)
        g = torch.Generator().manual_seed(seed)
        t = torch.rand(len(self.low), count, self.low.shape[1], generator=g, dtype=self.low.dtype)
        return self.points(2 * t.to(self.low.device) - 1).to(self.stars.dtype)


def first_look(network: tuple[Step, ...], places: Places, clock: Clock, *, seed: int = 0) -> Tensor:
    """Inputs [S, 1 + 2 N_out, *shape] of each star, in its dtype: the middle, and the best for each output and sign.

    Steps along the sign of the network's own gradient, of which the first goes to the end of the star: a network that
    is linear on a box attains its extrema there. Milliseconds, so that a budget of any size ends with something
    attained; `clock` ends it after one step at least.
    """
    size, dim = places.inside.shape
    n = network[-1].features
    numbers = dim + sum(step.features for step in network)
    starts = min(max(NUMBERS // (2 * n * numbers), 1), STARTS)
    chunk = max(NUMBERS // (2 * n * numbers * starts), 1)
    steps = STEPS if len(network) > 1 else 1  # a linear network's extrema are where the first step ends
    parts = []
    for index in torch.arange(size, device=places.low.device).split(chunk):
        some = places.select(index)
        t = ascend(some, lambda x: evaluate(network, x), n, starts, clock, steps=steps, seed=seed)
        parts.append(some.points(t))
    return torch.cat(parts).to(places.stars.dtype)


def ascend(
    places: Places,
    value: Callable[[Tensor], Tensor],
    outputs: int,
    starts: int,
    clock: Clock,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Coordinates [S, 1 + 2 N_out, M] in each star: `inside`, and the best for each output of `value` and sign; seeded.

    value: [S, B, N_out] at inputs [S, B, *shape], differentiable. starts: for each of them. clock: ends it after one
    step at least.
    """
    (size, dim), n, like = places.inside.shape, outputs, places.low
    g = torch.Generator().manual_seed(seed)
    t = 2 * torch.rand(size, 2 * n, starts, dim, generator=g, dtype=like.dtype).to(like.device) - 1
    t[:, :, 0] = places.inside[:, None]
    t = places.pull(t.flatten(1, 2))
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    sign = torch.cat((eye, -eye)).repeat_interleave(starts, 0)
    best, at = t.new_full(t.shape[:-1], -torch.inf), t
    for step in range(steps + 1):
        with torch.enable_grad():
            leaf = t.detach().requires_grad_()
            found = (value(places.points(leaf)) * sign).sum(-1)
            (gradient,) = torch.autograd.grad(found.sum(), leaf) if step < steps else (leaf,)
        better = found.detach() > best
        best, at = torch.where(better, found.detach(), best), torch.where(better[..., None], t, at)
        if step > 0 and clock.over:
            break
        done = step / steps
        stride = FIRST if step == 0 else STRIDES[0] * (1 - done) + STRIDES[1]
        t = places.pull(t + stride * gradient.sign())
    rows = best.reshape(size, 2 * n, starts).argmax(2)
    at = at.reshape(size, 2 * n, starts, dim)[
        torch.arange(size, device=like.device)[:, None], torch.arange(2 * n), rows
    ]
    return torch.cat((places.inside[:, None], at), 1)


def evaluate(network: tuple[Step, ...], x: Tensor) -> Tensor:
    """[S, B, N_out] in float64 at inputs [S, B, *shape], differentiable; nothing bounds its rounding."""
    x = x.to(COMPUTE_DTYPE).flatten(2)
    for step in network:
        x = step.activate(step.linear(x) + step.bias)
    return x


def regions_apart(network: tuple[Step, ...], points: Tensor) -> Tensor:
    """[S] share of points [S, B, *shape] that lie in a linear region of their own."""
    x = points.flatten(2).to(COMPUTE_DTYPE)
    g = torch.Generator().manual_seed(0)
    key = torch.zeros_like(x[..., 0])
    for step in network[:-1]:
        assert step.relu is not None
        x = step.linear(x) + step.bias
        on = (x > 0) & step.relu
        key = key + on.to(x) @ torch.rand(step.features, generator=g, dtype=x.dtype).to(x.device)
        x = torch.where(on | ~step.relu, x, 0.0)
    key = key.sort(1).values
    return (key[:, 1:] != key[:, :-1]).double().mean(1)


def undecided(network: tuple[Step, ...], low: Tensor, high: Tensor, clock: Clock, memory: float) -> Tensor:
    """[S] number of neurons whose signs zonotopes leave open over boxes [S, N_in]; 0 where there is no room for any."""
    result = torch.zeros(len(low), dtype=torch.long, device=low.device)
    if BUFFERS * low.element_size() * low.numel() * low.shape[1] > memory:
        return result
    bounds = zonotope_bounds(network, *box_rows(low, high), clock=clock, memory=memory)
    for step, (lower, upper) in zip(network[:-1], bounds, strict=False):
        assert step.relu is not None
        result += ((lower < 0) & (upper > 0) & step.relu).sum(1)
    return result
