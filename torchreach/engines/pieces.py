"""Pieces of stars as the programs engine keeps them: half-spaces, known points, and the star they were cut from.

Axis letters: S stars as they came to a layer, Q pieces of them, C their live neurons, P constraints,
M predicate variables, N features, W known points, R questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchreach.core.masks import leading
from torchreach.lp.halfspaces import Sets, SharedHalfspaces

KNOWN_POINTS = 12


@dataclass(frozen=True)
class Arrivals:
    """Stars as they came to a layer; their pieces refer to them."""

    rows: Tensor  # [S, 1 + M, N] pre-activations as affine maps of the predicate
    slack: Tensor  # [S, N] certified error of the rows
    origin: Tensor  # [S] index of the input star
    fixed: Tensor  # [S, N] 1 where the feature passes on all of the star, 0 where it is off or live
    column: Tensor  # [S, C] features that may cross zero on the star
    live: Tensor  # [S, C] whether they may; stars with fewer live features are padded
    planes: Tensor  # [S, C, 1 + M] rows of those features, zero where padded

    def __len__(self) -> int:
        return len(self.origin)

    def select(self, index: Tensor) -> Arrivals:
        return Arrivals(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @staticmethod
    def cat(batches: list[Arrivals]) -> Arrivals:
        width = max(a.column.shape[1] for a in batches)
        wide = []
        for a in batches:
            missing = width - a.column.shape[1]
            wide.append(
                replace(
                    a,
                    column=pad(a.column, (0, missing)),
                    live=pad(a.live, (0, missing)),
                    planes=pad(a.planes, (0, 0, 0, missing)),
                )
            )
        return Arrivals(*(torch.cat([getattr(a, name) for a in wide]) for name in Arrivals.__dataclass_fields__))


@dataclass(frozen=True)
class Chunk:
    """A batch of pieces waiting at the same layer, before its activation."""

    layer: int
    arrivals: Arrivals
    star: Tensor  # [Q] which of them
    sets: Sets
    points: Tensor  # [Q, W, M] points of the piece; the first is strictly inside
    values: Tensor  # [Q, W, C] live features at those points
    side: Tensor  # [Q, C] +1 or -1 where the sign is settled, 0 where it is not
    over: Tensor  # [Q, C] certified excursion beyond the settled side

    @property
    def kind(self) -> int:
        """Chunks of one kind can be joined without much padding."""
        return -1 if isinstance(self.sets, SharedHalfspaces) else (self.sets.constraints + 7) // 8

    @property
    def rows(self) -> Tensor:
        return self.arrivals.rows[self.star]

    @property
    def slack(self) -> Tensor:
        return self.arrivals.slack[self.star]

    @property
    def origin(self) -> Tensor:
        return self.arrivals.origin[self.star]

    def __len__(self) -> int:
        return len(self.star)

    def select(self, index: Tensor | slice) -> Chunk:
        arrivals, star = self.arrivals, self.star[index]
        if 2 * len(star) < len(arrivals):  # let go of stars that no piece refers to
            used, star = star.unique(return_inverse=True)
            arrivals = arrivals.select(used)
        parts = (getattr(self, name)[index] for name in ("points", "values", "side", "over"))
        return Chunk(self.layer, arrivals, star, self.sets.select(index), *parts)

    def plane(self, column: Tensor) -> Tensor:
        """Rows [Q, R, 1 + M] of live features column [Q, R]."""
        if len(self.arrivals) == 1:
            return self.arrivals.planes[0][column]
        return self.arrivals.planes[self.star[:, None], column]

    def at(self, points: Tensor) -> Tensor:
        """Live features at points [Q, W, M]: [Q, W, C]."""
        planes = self.arrivals.planes
        if len(planes) == 1:
            return torch.addmm(planes[0, :, 0], points.flatten(0, 1), planes[0, :, 1:].T).unflatten(0, points.shape[:2])
        planes = planes[self.star]
        return planes[:, None, :, 0] + points @ planes[:, :, 1:].transpose(1, 2)

    def box(self) -> tuple[Tensor, Tensor]:
        """Predicate box [Q, M] of each piece (the unit box: constraints are not propagated)."""
        ones = torch.ones_like(self.points[:, 0])
        return -ones, ones

    def stars(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(rows, half-spaces [Q, P, 1 + M] with h . (1, a) >= 0, origin) of groups of pieces."""
        sets = self.sets.own()
        return [(self.rows, torch.cat((sets.b[:, :, None], -sets.A), 2), self.origin)]


def padded(chunk: Chunk, width: int, known: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, values, side and over with as many known points and live neurons as asked."""
    more, columns = known - chunk.points.shape[1], width - chunk.side.shape[1]
    points, values = chunk.points, chunk.values
    if more:
        points = torch.cat((points, points[:, :1].expand(-1, more, -1)), 1)
        values = torch.cat((values, values[:, :1].expand(-1, more, -1)), 1)
    return points, pad(values, (0, columns)), pad(chunk.side, (0, columns), value=1), pad(chunk.over, (0, columns))


def with_points(chunk: Chunk, found: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Points and values of the chunk with those of found [Q, R, M] that `which` [Q, R] admits."""
    width = int(which.sum(1).max())
    if width == 0:
        return chunk.points, chunk.values
    order = leading(which, width)
    picked = found.gather(1, order[:, :, None].expand(-1, -1, found.shape[2]))
    picked = torch.where(which.gather(1, order)[:, :, None], picked, chunk.points[:, :1])
    return torch.cat((chunk.points, picked), 1), torch.cat((chunk.values, chunk.at(picked)), 1)


def remember(chunk: Chunk, valid: Tensor) -> tuple[Tensor, Tensor]:
    """For both children of each piece, the newest of its points that `valid` [2 Q, W] admits, and their values.

    Where a child has fewer than the others, any of those it has is repeated.
    """
    count = int(valid.sum(1).max().clamp(max=KNOWN_POINTS - 1))
    order = leading(valid.flip(1), count)
    order = valid.shape[1] - 1 - order
    order = torch.where(valid.gather(1, order), order, order[:, :1])
    piece = torch.arange(len(chunk), device=valid.device).repeat(2)[:, None]
    return chunk.points[piece, order], chunk.values[piece, order]
