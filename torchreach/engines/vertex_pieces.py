"""Pieces of stars as the vertex engine keeps them: polytopes by number of vertex slots, and chunks of stars.

Axis letters: S stars, S' pieces, K vertex slots, C planes that may cut a piece, M predicate variables, N features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchreach.core.memory import batch_size
from torchreach.core.roundoff import allowance
from torchreach.sets import polytope
from torchreach.sets.polytope import PolytopeBatch

# Vertex slots that may be wasted to cut polytopes of different sizes in one call.
SPARE = {"cpu": 1 << 12, "cuda": 1 << 20}


@dataclass(frozen=True)
class Pieces:
    """Polytopes with equally many vertex slots, each a piece of a star of a chunk."""

    body: PolytopeBatch
    star: Tensor  # [S'] which star of the chunk
    cuts: Tensor  # [S'] cuts so far, which bounds how far vertices may have drifted
    open: Tensor  # [S', C] planes that may still cut, by number in `_Followed`; none outside of `advance`

    @property
    def slots(self) -> int:
        return self.body.vertices.shape[1]

    @property
    def drift(self) -> Tensor:
        """[S', 1] distance, in each predicate variable, within which a piece may miss points."""
        return allowance(self.cuts)[:, None]

    @property
    def work(self) -> int:
        """Numbers that one piece takes while it is cut: its values at planes and vertices, and pairs of vertices."""
        return self.open.shape[1] * (self.slots + self.body.dim + 1) + self.slots**2 // 2 * self.body.incidence.shape[2]

    def __len__(self) -> int:
        return len(self.star)

    def select(self, index: Tensor) -> Pieces:
        if len(index) == len(self.star):
            return self
        parts = (part.index_select(0, index) for part in (self.star, self.cuts, self.open))
        return Pieces(self.body.select(index), *parts)

    def blocks(self, size: int) -> list[Pieces]:
        """The same pieces, at most `size` at a time."""
        if len(self) <= size:
            return [self]
        bodies = self.body.split(size)
        parts = (part.split(size) for part in (self.star, self.cuts, self.open))
        return [Pieces(*block) for block in zip(bodies, *parts, strict=True)]

    def numbered(self, star: Tensor) -> Pieces:
        return replace(self, star=star)

    def closed(self) -> Pieces:
        """Without open planes."""
        return replace(self, open=self.open[:, :0])


def _join(pieces: list[Pieces]) -> Pieces:
    if len(pieces) == 1:
        return pieces[0]
    pieces = sorted(pieces, key=lambda p: p.slots)
    width = max(p.open.shape[1] for p in pieces)
    return Pieces(
        polytope.merge([p.body for p in pieces]),
        torch.cat([p.star for p in pieces]),
        torch.cat([p.cuts for p in pieces]),
        torch.cat([p.open if (n := width - p.open.shape[1]) == 0 else pad(p.open, (0, n)) for p in pieces]),
    )


class Shelf:
    """Pieces grouped by number of vertex slots."""

    def __init__(self, pieces: tuple[Pieces, ...] = ()) -> None:
        self.groups: dict[int, list[Pieces]] = {}
        for part in pieces:
            self.add(part)

    def __len__(self) -> int:
        return sum(len(part) for group in self.groups.values() for part in group)

    def add(self, pieces: Pieces) -> None:
        if len(pieces):
            self.groups.setdefault(pieces.slots, []).append(pieces)

    def take(self, numbers: int) -> Pieces:
        """Take as many pieces as fit together: groups of fewer slots join a group where few are wasted.

        The last ones come first, and no more than so many numbers can be worked on at once.
        """
        sizes = {slots: sum(map(len, group)) for slots, group in self.groups.items()}
        spare = batch_size(SPARE, next(iter(self.groups.values()))[0].star.device)

        def fitting(slots: int) -> list[int]:
            return [k for k, number in sizes.items() if 0 <= (slots - k) * number <= spare]

        joined = max(map(fitting, sizes), key=lambda group: sum(sizes[k] for k in group))
        taken: list[Pieces] = []
        for k in joined:
            group = self.groups[k]
            while group and numbers > 0:
                part = group.pop()
                most = max(1, numbers // part.work)
                if len(part) > most:
                    part, *rest = part.blocks(most)
                    group += rest
                numbers -= len(part) * part.work
                taken.append(part)
            if not group:
                del self.groups[k]
        return _join(taken)

    def all(self) -> tuple[Pieces, ...]:
        return tuple(_join(group) for group in self.groups.values())


@dataclass(frozen=True)
class Chunk:
    """A batch of stars waiting at the same layer, before its activation."""

    layer: int
    rows: Tensor  # [S, 1 + M, N] pre-activations as affine maps of the predicate
    slack: Tensor  # [S, N] certified error of the rows
    origin: Tensor  # [S] index of the input star
    pieces: tuple[Pieces, ...]  # one piece per star, in groups of equal size

    kind = 0  # any two chunks of one layer can be joined

    def __len__(self) -> int:
        return len(self.origin)

    def select(self, index: slice) -> Chunk:
        start, stop, _ = index.indices(len(self))
        pieces = []
        for part in self.pieces:
            inside = ((part.star >= start) & (part.star < stop)).nonzero().flatten()
            if len(inside):
                chosen = part.select(inside)
                pieces.append(chosen.numbered(chosen.star - start))
        return Chunk(self.layer, self.rows[index], self.slack[index], self.origin[index], tuple(pieces))

    def split(self, pieces: list[Pieces]) -> Chunk:
        """Pieces of these stars as stars of their own."""
        star = torch.cat([p.star for p in pieces])
        return Chunk(self.layer, self.rows[star], self.slack[star], self.origin[star], _renumber(pieces))

    def box(self) -> tuple[Tensor, Tensor]:
        """Predicate box [S, M] of each star."""
        low = self.rows.new_empty(len(self), self.rows.shape[1] - 1)
        high = low.clone()
        for part in self.pieces:
            points = part.body.vertices[:, :, 1:]
            low[part.star], high[part.star] = points.amin(1) - part.drift, points.amax(1) + part.drift
        return low, high

    def parts(self, wide: int, numbers: int) -> list[Pieces]:
        """The pieces in parts of which `wide` values at each vertex are at most so many numbers."""
        shelf, parts = Shelf(self.pieces), []
        while shelf.groups:
            part = shelf.take(numbers)
            parts += part.blocks(max(1, numbers // max(1, wide * part.slots)))
        return parts

    def stars(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(rows, half-spaces [S', F, 1 + M] with h . (1, a) >= 0, origin) of groups of stars."""
        return [(self.rows[p.star], _facets(p), self.origin[p.star]) for p in self.pieces]

    def corners(self) -> list[tuple[Tensor, Tensor]]:
        """(vertices [S', K, M], origin [S']) of groups of stars, unused slots repeating the first vertex."""
        return [(p.body.vertices[:, :, 1:], self.origin[p.star]) for p in self.pieces]


def _facets(pieces: Pieces) -> Tensor:
    assert pieces.body.facets is not None
    return pieces.body.facets


def _renumber(pieces: list[Pieces]) -> tuple[Pieces, ...]:
    """The same pieces as pieces of stars 0, 1, 2 ... in their order."""
    result, first = [], 0
    for part in pieces:
        result.append(part.numbered(torch.arange(first, first + len(part), device=part.star.device)))
        first += len(part)
    return tuple(result)
