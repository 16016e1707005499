"""What an enumeration has found so far: the certified output range and the points that attain it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# point(star, output): predicate points [E, M] where the given stars attain the value of the given outputs
PointOf = Callable[[Tensor, Tensor], Tensor]


class RangeRecord:
    """Running union over output stars, per input star (axis S) and output (axis N).

    `certified` [2, S, N] encloses f (row 0) and -f (row 1) from above; `attained` [2, S, N] is the best value of each
    met at a point, `point` [2, S, N, M] the predicate point. Only maxima are kept: the minimum of f is minus the
    maximum of -f. Unlike `core.evidence`, whose bounds are all of one set, it is of a set in parts.
    """

    def __init__(self, stars: int, outputs: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.certified = torch.full((2, stars, outputs), -torch.inf, dtype=dtype, device=device)
        self.attained = self.certified.clone()
        self.point = torch.zeros(2, stars, outputs, dim, dtype=dtype, device=device)

    def attain(self, direction: int, origin: Tensor, value: Tensor, point: PointOf) -> None:
        """Take values [S', N] met on stars of input stars `origin` [S'], in direction 0 (f) or 1 (-f)."""
        best = self.attained[direction]
        better = best.scatter_reduce(0, origin[:, None].expand_as(value), value, "amax")
        star, output = ((value == better[origin]) & (value > best[origin])).nonzero(as_tuple=True)
        self.point[direction, origin[star], output] = point(star, output)
        self.attained[direction] = better

    def certify(self, origin: Tensor, low: Tensor, high: Tensor) -> None:
        """Take certified ranges [S', N] of f on stars of input stars `origin`."""
        ends = torch.stack((high, -low))
        self.certified.scatter_reduce_(1, origin[:, None].expand_as(ends), ends, "amax")

    def take(self, certified: Tensor, attained: Tensor, point: Tensor) -> None:
        """Take in another record of the same input stars."""
        better = attained > self.attained
        self.point = torch.where(better[..., None], point, self.point)
        self.attained = torch.where(better, attained, self.attained)
        self.certified = torch.maximum(certified, self.certified)


@dataclass(frozen=True)
class Kept:
    """What is kept of finished chunks, in groups: (rows, half-spaces, origin), as `Chunk.stars` gives them, or
    (points, origin), as `Chunk.corners` does.
    """

    groups: list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sink:
    """Where finished stars go: ranges, number per input star, and what is wanted of the stars themselves.

    part: what is kept of a chunk, by the name of its method: "stars" or "corners".
    """

    record: RangeRecord
    count: Tensor
    keep: Callable[[Kept], None] | None
    part: str = "stars"

    def take(self, chunk: Any) -> Kept | None:
        """What is kept of a finished chunk."""
        return None if self.keep is None else Kept(getattr(chunk, self.part)())
