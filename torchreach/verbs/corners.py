"""Vertices of the joint linear regions of two networks, as inputs.

On a joint linear region y1 and every layer of y2 are affine, so that what is linear in them and holds at its vertices
holds on all of it. Which regions there are does not depend on the last layer.

Method: the vertex engine hands over the vertices of every finished output star.
Property: the regions cover the set but for slivers that the engine's certificates account for; whoever builds on these
    points certifies the outcome again.
Requirement: piecewise linear networks, few predicate variables.

Axis letters: S stars, P points, K vertex slots, M predicate variables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchreach.core.clock import Clock
from torchreach.core.options import Budget, Exact
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.read.steps import steps
from torchreach.sets.star import StarBatch
from torchreach.verbs.merge import merge
from torchreach.verbs.reach import VERTEX_DIM, reach_within

# Vertices of neighbouring regions that are this close, in the predicate cube, are one.
SAME = 2.0**-30
# Points that wait to be told apart.
WAITING = 1 << 20


@dataclass(frozen=True)
class Corners:
    """Vertices of the joint regions, each once.

    Attributes:
        x: [P, *shape] inputs, float64.
        star: [P] the input star of each.
        complete: whether they are the vertices of all regions of all stars.
    """

    x: Tensor
    star: Tensor
    complete: bool


def region_corners(
    original: nn.Module,
    compressed: nn.Module,
    stars: StarBatch,
    *,
    budget: Budget,
    tolerances: Tolerances,
    clock: Clock,
) -> Corners:
    """Vertices of the joint linear regions over `stars`, as many as there is time, memory and `budget.stars` for.

    None where the regions have too many vertices (more than `VERTEX_DIM` predicate variables) or are not polytopes
    (smooth activations).

    Raises: as `merge` and `reach`.
    """
    found = _Found(stars)
    merged = merge(original, compressed, stars.shape)
    walked = steps(merged, stars.shape, dtype=COMPUTE_DTYPE, device=stars.device, smooth=True)
    complete = stars.dim <= VERTEX_DIM and not any(step.curves for step in walked)
    if complete:
        result = reach_within(
            clock,
            merged,
            stars,
            Exact("vertices", "zonotope"),
            budget=budget,
            tolerances=tolerances,
            keep_stars=False,
            corners=found.add,
        )
        # Done, whatever the status says of witnesses in the stars' dtype.
        complete = not (clock.over or (budget.stars is not None and int(result.count.sum()) >= budget.stars))
    return found.corners(complete)


class _Found:
    """Vertices handed over so far, each once."""

    def __init__(self, stars: StarBatch) -> None:
        self.stars = stars
        self.keys: list[Tensor] = []
        self.points: list[Tensor] = []
        self.origins: list[Tensor] = []
        self.waiting = 0
        mix = torch.randint(1 << 62, (1 + stars.dim,), generator=torch.Generator().manual_seed(0))
        self.mix = mix.to(stars.device) | 1

    def add(self, points: Tensor, origin: Tensor) -> None:
        flat = points.flatten(0, 1)
        star = origin.repeat_interleave(points.shape[1])
        # Equal keys of other points (one pair in 2^64) would lose a point, which certification shows.
        numbers = torch.cat((star[:, None], (flat / SAME).round().long()), 1)
        keys = (numbers * self.mix).sum(1)
        self.keys.append(keys)
        self.points.append(flat)
        self.origins.append(star)
        self.waiting += len(keys)
        if self.waiting > WAITING:
            self._compact()

    def _compact(self) -> None:
        keys, points, origins = torch.cat(self.keys), torch.cat(self.points), torch.cat(self.origins)
        keys, order = keys.sort(stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        order = order[first]
        self.keys, self.points, self.origins = [keys[first]], [points[order]], [origins[order]]
        self.waiting = 0

    def corners(self, complete: bool) -> Corners:
        stars = self.stars
        if not self.points:
            nothing = torch.zeros(0, dtype=torch.long, device=stars.device)
            return Corners(torch.zeros(0, *stars.shape, dtype=COMPUTE_DTYPE, device=stars.device), nothing, complete)
        self._compact()
        (points,), (origins,) = self.points, self.origins
        # In the order of their stars, so that the set does not depend on which worker found what.
        order = torch.argsort(origins, stable=True)
        points, origins = points[order], origins[order]
        x = torch.empty(len(points), *stars.shape, dtype=COMPUTE_DTYPE, device=stars.device)
        numbers = torch.bincount(origins, minlength=len(stars)).tolist()
        for s, (part, own) in enumerate(zip(points.split(numbers), x.split(numbers), strict=True)):
            own.copy_(stars.select(torch.tensor([s], device=stars.device)).point(part[None])[0])
        return Corners(x, origins, complete)
