"""Exact reach for low-dimensional input: facet-vertex batches, no linear program.

Method: every star keeps its polytope in predicate space as vertices and its affine map to the current
layer's features; a neuron crosses zero iff its values at the vertices have both signs.
Property: sound and complete; a region is kept iff its pre-activations exceed the sign tolerance on both
sides of each of its cuts. Requirement: few predicate variables (vertices grow exponentially with them).
Reference: Tran et al., Star-based reachability analysis of deep neural networks, FM 2019 (star sets);
Yang et al., HSCC 2021 (facet-vertex incidence).

Axis letters: S stars, K vertex slots, M predicate variables, N features, L live neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchreach.networks.steps import Step
from torchreach.reach import activation
from torchreach.reach.record import RangeRecord
from torchreach.reach.tally import Tally
from torchreach.sets import polytope
from torchreach.sets.polytope import PolytopeBatch
from torchreach.tolerances import UNIT_ROUNDOFF, Tolerances

# Batches that one call of `advance` looks at before it hands back: bounds the time between budget checks.
ROUNDS = 64


@dataclass(frozen=True)
class Pieces:
    """Polytopes with equally many vertex slots, each a piece of a star of a chunk."""

    body: PolytopeBatch
    star: Tensor  # [S'] which star of the chunk
    cuts: Tensor  # [S'] cuts so far, which bounds how far vertices may have drifted

    @property
    def slots(self) -> int:
        return self.body.vertices.shape[1]

    @property
    def drift(self) -> Tensor:
        """[S', 1] distance, in each predicate variable, within which a piece may miss points."""
        return (4 * UNIT_ROUNDOFF * self.cuts)[:, None]

    def __len__(self) -> int:
        return len(self.star)

    def select(self, index: Tensor) -> Pieces:
        if len(index) == len(self.star):
            return self
        return Pieces(self.body.select(index), self.star[index], self.cuts[index])

    def numbered(self, star: Tensor) -> Pieces:
        return Pieces(self.body, star, self.cuts)


def _join(pieces: list[Pieces]) -> Pieces:
    if len(pieces) == 1:
        return pieces[0]
    return Pieces(
        polytope.merge([p.body for p in pieces]),
        torch.cat([p.star for p in pieces]),
        torch.cat([p.cuts for p in pieces]),
    )


class Shelf:
    """Pieces grouped by number of vertex slots."""

    def __init__(self, pieces: tuple[Pieces, ...] = ()) -> None:
        self.groups: dict[int, list[Pieces]] = {}
        for part in pieces:
            self.add(part)

    def add(self, pieces: Pieces) -> None:
        if len(pieces):
            self.groups.setdefault(pieces.slots, []).append(pieces)

    def largest(self) -> Pieces:
        """Take the group of most pieces."""
        sizes = {slots: sum(map(len, group)) for slots, group in self.groups.items()}
        return _join(self.groups.pop(max(sizes, key=lambda slots: sizes[slots])))

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

    def stars(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(rows, half-spaces [S', F, 1 + M] with h . (1, a) >= 0, origin) of groups of stars."""
        return [(self.rows[p.star], _facets(p), self.origin[p.star]) for p in self.pieces]


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


class VertexEngine:
    """Rules for one run: how chunks start, advance one split or one layer, and end."""

    name = "vertices"

    def __init__(
        self,
        steps: tuple[Step, ...],
        signs: list[Tensor],
        tolerances: Tolerances,
        tally: Tally,
        *,
        keep_facets: bool,
    ) -> None:
        self.steps = steps
        self.tolerances = tolerances
        self.tally = tally
        self.keep_facets = keep_facets
        self.somewhere = torch.empty(0)  # [S_in, M] a predicate point of each input star, set by `start`
        # signs[l] [S_in, N]: +1 or -1 where root bounds settle the neuron, 0 where it is live
        self.signs = signs
        self.live = [
            ((sign == 0).any(0) & step.relu).nonzero().flatten() if step.relu is not None else None
            for sign, step in zip(signs, steps, strict=True)
        ]

    def start(self, rows: Tensor, slack: Tensor, planes: Tensor, origin: Tensor) -> list[Chunk]:
        """Chunks of stars given by input rows [S, 1 + M, N_in] over [-1, 1]^M and half-spaces [S, P, 1 + M]."""
        size, dim = len(rows), rows.shape[1] - 1
        body = PolytopeBatch.from_cube(size, dim, facets=self.keep_facets, dtype=rows.dtype, device=rows.device)
        self.somewhere = torch.zeros(size, dim, dtype=rows.dtype, device=rows.device)
        rows, slack = activation.affine(self.steps[0], rows, slack)
        numbers = torch.arange(size, device=rows.device)
        shelf = Shelf((Pieces(body, numbers, torch.zeros_like(numbers)),))
        for p in range(planes.shape[1]):
            cut = Shelf()
            for part in shelf.all():
                plane = planes[part.star, p]
                values = (part.body.vertices @ plane[:, :, None])[:, :, 0]
                for side, child in part.body.cut(values, plane, self.tolerances.sign):
                    inside = (child < len(part)).nonzero().flatten()
                    parent = child[inside]
                    cut.add(Pieces(side.select(inside), part.star[parent], part.cuts[parent] + 1))
            shelf = cut
        for part in shelf.all():  # any vertex is a point of the star
            self.somewhere[part.star] = part.body.vertices[:, 0, 1:]
        return [Chunk(0, rows, slack, origin, shelf.all())]

    def join(self, chunks: list[Chunk]) -> Chunk:
        """One chunk of several of one layer."""
        if len(chunks) == 1:
            return chunks[0]
        shelf, first = Shelf(), 0
        for chunk in chunks:
            for part in chunk.pieces:
                shelf.add(part.numbered(part.star + first))
            first += len(chunk)
        rows, slack, origin = (torch.cat([getattr(c, name) for c in chunks]) for name in ("rows", "slack", "origin"))
        return Chunk(chunks[0].layer, rows, slack, origin, shelf.all())

    def advance(self, chunk: Chunk) -> list[Chunk]:
        """Cut stars by every neuron that crosses them, and send the pieces through the activation.

        Only the columns of neurons that cross a star when it arrives are followed while it is cut, and its
        pieces share its affine map until the layer is done. Work left after a while is handed back, uncut.
        """
        step, live = self.steps[chunk.layer], self.live[chunk.layer]
        assert step.relu is not None
        assert live is not None
        arrived = chunk.rows[:, :, live]
        # A vertex on a cut is known to be on it only up to rounding, which grows with the pre-activation.
        rounding = 16 * arrived.shape[1] * UNIT_ROUNDOFF * arrived.abs().sum(1)
        tolerance = rounding.clamp(min=self.tolerances.sign)  # [S, L]
        lower, upper = (arrived.new_empty(len(chunk), len(live)) for _ in range(2))
        for part in chunk.pieces:
            values = part.body.vertices @ arrived[part.star]  # [S', K, L]
            lower[part.star], upper[part.star] = values.amin(1), values.amax(1)
        crosses = (upper > tolerance) & (lower < -tolerance)
        width = int(crosses.sum(1).max()) if crosses.numel() else 0
        column = crosses.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]  # [S, C]
        followed = crosses.gather(1, column)
        tolerance = tolerance.gather(1, column)  # [S, C]
        planes = arrived.gather(2, column[:, None, :].expand(-1, arrived.shape[1], -1))
        planes = planes * followed[:, None, :]  # a zero column crosses nothing

        waiting = Shelf(chunk.pieces)
        done: list[Pieces] = []
        lows, highs = [], []
        for _ in range(ROUNDS):
            if not waiting.groups:
                break
            part = waiting.largest()
            values = part.body.vertices @ planes[part.star]  # [S', K, C]
            low, high = torch.aminmax(values, dim=1)
            near = tolerance[part.star]
            crosses = (high > near) & (low < -near)
            cut = crosses.any(1)
            index, rest = cut.nonzero().flatten(), (~cut).nonzero().flatten()
            if len(rest):
                done.append(part.select(rest))
                lows.append(low[rest])
                highs.append(high[rest])
            if len(index):
                # the deepest cut: halves of like size keep few vertices and finish early
                which = torch.where(crosses, torch.minimum(high, -low), -torch.inf)[index].argmax(1)
                part = part.select(index)
                plane, near = planes[part.star, :, which], tolerance[part.star, which][:, None]
                for body, child in part.body.cut(values[index, :, which], plane, near):
                    parent = child % len(index)
                    waiting.add(Pieces(body, part.star[parent], part.cuts[parent] + 1))
                self.tally.count(chunk.layer, splits=len(index))

        chunks = [chunk.split(list(waiting.all()))] if waiting.groups else []
        if done:
            star = torch.cat([p.star for p in done])
            # Neurons that did not cross the arriving star keep its range; the others have one of their own.
            ranges = []
            for bound, own in ((lower[star], torch.cat(lows)), (upper[star], torch.cat(highs))):
                kept = bound.gather(1, column[star])
                ranges.append(bound.scatter(1, column[star], torch.where(followed[star], own, kept)))
            chunks.append(self._activate(chunk.split(done), step, live, *ranges))
        return chunks

    def _activate(self, chunk: Chunk, step: Step, live: Tensor, lower: Tensor, upper: Tensor) -> Chunk:
        """Stars at the next layer, from their range [S, L] over live neurons."""
        assert step.relu is not None
        sign = self.signs[chunk.layer][chunk.origin]
        low = torch.where(sign > 0, torch.inf, torch.where(sign < 0, -torch.inf, 0.0)).to(lower.dtype)
        high = low.clone()
        settled = sign[:, live] != 0
        low[:, live] = torch.where(settled, low[:, live], lower)
        high[:, live] = torch.where(settled, high[:, live], upper)
        self.tally.settle(chunk.layer, "root", sign[:, step.relu] != 0)
        self.tally.settle(chunk.layer, "vertices", sign[:, step.relu] == 0)
        self.tally.count(chunk.layer, stars=len(chunk))
        drift = torch.cat([p.drift for p in chunk.pieces])  # pieces are in the order of the stars here
        rows, slack = activation.relu(chunk.rows, chunk.slack, low, high, step.relu, drift)
        rows, slack = activation.affine(self.steps[chunk.layer + 1], rows, slack)
        return replace(chunk, layer=chunk.layer + 1, rows=rows, slack=slack)

    def finish(self, chunk: Chunk, record: RangeRecord) -> None:
        """Take the output range of stars at the last layer into the record."""
        for part in chunk.pieces:
            rows, origin = chunk.rows[part.star], chunk.origin[part.star]
            values = part.body.vertices @ rows  # [S', K, N]
            slack = chunk.slack[part.star] + part.drift * rows[:, 1:].abs().sum(1)
            points = part.body.vertices[:, :, 1:]
            for direction, signed in enumerate((-values, values)):
                best, slot = signed.max(dim=1)
                record.attain(direction, origin, best, lambda s, n, p=points, k=slot: p[s, k[s, n]])
                record.certify(direction, origin, best + slack)
