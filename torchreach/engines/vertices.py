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

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.masks import leading
from torchreach.core.memory import batch_size, size_of
from torchreach.core.roundoff import gamma
from torchreach.core.tolerances import Tolerances
from torchreach.engines import activation
from torchreach.engines.record import PointOf, RangeRecord
from torchreach.engines.tally import Tally
from torchreach.engines.vertex_pieces import Chunk, Pieces, Shelf
from torchreach.graph.steps import Step
from torchreach.sets.polytope import PolytopeBatch

# Batches that one call of `advance` looks at before it hands back what deeper layers may finish first.
ROUNDS = 64
# Pieces from which on one call of `advance` hands back, so that deeper layers go on with them.
PIECES = {"cpu": 1 << 15, "cuda": 1 << 22}
# Numbers at work in one batch: bounds the time between two looks at the clock.
NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 29}
# Bytes of room, of what may be handed back, for each of them.
NUMBER_BYTES = 12
# Pieces that are handed back as one chunk.
HANDED = {"cpu": 1024, "cuda": 1 << 18}
# Numbers in the affine maps that go through the activation at once: few enough to stay in cache.
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 27}


@dataclass(frozen=True)
class _Followed:
    """Stars of a chunk while they are cut: the planes that cross them, and what else is known of their range.

    Plane 0 is zero everywhere and crosses nothing.
    """

    planes: Tensor  # [1 + S C, 1 + M] h . (1, a)
    tolerance: Tensor  # [1 + S C]
    number: Tensor  # [S, C] planes of each star, 0 where it has no more
    feature: Tensor  # [S, C] the feature that a plane belongs to
    lower: Tensor  # [S, N] range on arrival; infinite on the settled side where root bounds settle the sign
    upper: Tensor  # [S, N]
    settled: Tensor  # [S] neurons settled by root bounds
    arrived: list[Pieces]


class VertexEngine:
    """Rules for one run: how chunks start, advance one split or one layer, and end."""

    name = "vertices"
    load = 1

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
        self.state: list[Any] = []  # nothing but the chunks
        self.somewhere = torch.empty(0)  # [S_in, M] a predicate point of each input star, set by `start`
        # signs[l] [S_in, N]: +1 or -1 where root bounds settle the neuron, 0 where it is live
        self.signs = signs
        self.live = [
            ((sign == 0).any(0) & step.relu).nonzero().flatten() if step.relu is not None else None
            for sign, step in zip(signs, steps, strict=True)
        ]

    def start(
        self, rows: Tensor, slack: Tensor, planes: Tensor, origin: Tensor, clock: Clock = NO_LIMIT
    ) -> list[Chunk]:
        """Chunks of stars given by input rows [S, 1 + M, N_in] over [-1, 1]^M and half-spaces [S, P, 1 + M].

        Raises OutOfTime; `somewhere` is set even then.
        """
        size, dim = len(rows), rows.shape[1] - 1
        body = PolytopeBatch.from_cube(size, dim, facets=self.keep_facets, dtype=rows.dtype, device=rows.device)
        self.somewhere = torch.zeros(size, dim, dtype=rows.dtype, device=rows.device)
        rows, slack = activation.affine(self.steps[0], rows, slack, clock)
        numbers = torch.arange(size, device=rows.device)
        shelf = Shelf((Pieces(body, numbers, torch.zeros_like(numbers), numbers.new_empty(size, 0)),))
        for p in range(planes.shape[1]):
            cut = Shelf()
            for part in shelf.all():
                plane = planes[part.star, p]
                values = (part.body.vertices @ plane[:, :, None])[:, :, 0]
                groups, child = part.body.cut(values, plane, self.tolerances.sign)
                for (side, _), own in zip(groups, child.split([len(side) for side, _ in groups]), strict=True):
                    inside = (own < len(part)).nonzero().flatten()
                    parent = own[inside]
                    cut.add(Pieces(side.select(inside), part.star[parent], part.cuts[parent] + 1, part.open[parent]))
            shelf = cut
        for part in shelf.all():  # any vertex is a point of the star
            self.somewhere[part.star] = part.body.vertices[:, 0, 1:]
        return [Chunk(0, rows, slack, origin, shelf.all())]

    def join(self, chunks: list[Chunk]) -> Chunk:
        """One chunk of several of one layer."""
        if len(chunks) == 1:
            return chunks[0]
        pieces, first = [], 0
        for chunk in chunks:
            pieces += [part.numbered(part.star + first) for part in chunk.pieces]
            first += len(chunk)
        rows, slack, origin = (torch.cat([getattr(c, name) for c in chunks]) for name in ("rows", "slack", "origin"))
        return Chunk(chunks[0].layer, rows, slack, origin, tuple(pieces))

    def advance(self, chunk: Chunk, clock: Clock = NO_LIMIT, room: float = math.inf) -> list[Chunk]:
        """Cut stars by every neuron that crosses them, and send the pieces through the activation.

        Only the planes of neurons that cross a star when it arrives are followed while it is cut, and a piece
        is held against those only that crossed the piece it was cut from. Pieces share the star's affine map
        until the layer is done. Work left after a while, when the clock is over, or when the pieces would take
        more than `room` bytes as stars of their own, is handed back, uncut.
        """
        numbers = self._numbers(chunk, room)
        followed = self._follow(chunk, numbers)
        waiting, done = Shelf(), Shelf()
        for part in followed.arrived:
            (waiting if part.open.shape[1] else done).add(part)
        most = min(room / self._bytes(chunk), batch_size(PIECES, chunk.rows.device))
        for _ in range(ROUNDS):
            if not waiting.groups or clock.over or len(waiting) + len(done) > most:
                break
            part = waiting.take(numbers)
            size, width = part.open.shape
            values = followed.planes.index_select(0, part.open.flatten()).view(size, width, -1)
            values = values @ part.body.vertices.mT  # [S', C, K]
            depth = torch.minimum(values.amax(2), -values.amin(2))
            near = followed.tolerance.index_select(0, part.open.flatten()).view(size, width)
            depth = depth * (depth > near)
            # the deepest cut first: halves of like size keep few vertices and finish early
            order = depth.argsort(1, descending=True)
            part = replace(part, open=part.open.gather(1, order))
            left = (depth > 0).sum(1)  # planes that cross
            number, most_left = torch.stack(((left > 0).sum(), left.max())).tolist()
            which = torch.arange(size, device=left.device) * width + order[:, 0]
            if number < size:
                # those that planes cross, in their order, then the others
                cut, rest = leading(left > 0, size).split([number, size - number])
                done.add(part.select(rest).closed())
                if not number:
                    continue
                part, left, which = part.select(cut), left.index_select(0, cut), which.index_select(0, cut)
            plane = part.open[:, 0]
            groups, child = part.body.cut(
                values.flatten(0, 1).index_select(0, which),
                followed.planes.index_select(0, plane) if self.keep_facets else None,
                followed.tolerance.index_select(0, plane)[:, None],
                left == 1,
            )
            parent = child % number
            open = part.open[:, 1:most_left].index_select(0, parent)
            star, cuts = part.star.index_select(0, parent), part.cuts.index_select(0, parent) + 1
            first = 0
            for body, finished in groups:
                own = slice(first, first + len(body))
                first += len(body)
                piece = Pieces(body, star[own], cuts[own], open[own])
                if finished:
                    done.add(piece.closed())
                else:
                    waiting.add(piece)
            self.tally.count(chunk.layer, splits=number)

        chunks = self._handed_back(chunk, waiting)
        size = max(32, batch_size(BLOCK, chunk.rows.device) // chunk.rows[0].numel())
        while done.groups:
            if clock.over:
                return chunks + self._handed_back(chunk, done)
            chunks += [self._activate(chunk, block, followed) for block in done.take(numbers).blocks(size)]
        return chunks

    def _handed_back(self, chunk: Chunk, pieces: Shelf) -> list[Chunk]:
        """Pieces as stars that wait at the layer they are at."""
        size = batch_size(HANDED, chunk.rows.device)
        return [chunk.split([block.closed()]) for part in pieces.all() for block in part.blocks(size)]

    @staticmethod
    def _numbers(chunk: Chunk, room: float) -> int:
        """Numbers that may be at work at once."""
        return int(max(1, min(room / NUMBER_BYTES, batch_size(NUMBERS, chunk.rows.device))))

    def _bytes(self, chunk: Chunk) -> float:
        """Bytes of a piece of the chunk as a star of its own, at this layer or the next."""
        variables, here = chunk.rows.shape[1:]
        features = max(here, self.steps[chunk.layer + 1].features)
        body = sum(map(size_of, chunk.pieces)) / max(1, len(chunk))
        return chunk.rows.element_size() * (variables + 1) * features + body

    def _follow(self, chunk: Chunk, numbers: int) -> _Followed:
        """What to follow of stars that arrive at a layer."""
        step, live = self.steps[chunk.layer], self.live[chunk.layer]
        assert step.relu is not None
        assert live is not None
        sign = self.signs[chunk.layer].index_select(0, chunk.origin)
        size, variables, _ = chunk.rows.shape
        arrived = chunk.rows.mT.contiguous().index_select(1, live)  # [S, L, 1 + M]
        # A vertex on a cut is known to be on it only up to rounding, which grows with the pre-activation.
        rounding = 16 * gamma(variables) * chunk.rows.abs().sum(1).index_select(1, live)
        tolerance = rounding.clamp(min=self.tolerances.sign)  # [S, L]
        lower, upper = (arrived.new_empty(size, len(live)) for _ in range(2))
        pieces = chunk.parts(len(live), numbers)
        for part in pieces:
            values = arrived.index_select(0, part.star) @ part.body.vertices.mT  # [S', L, K]
            lower.index_copy_(0, part.star, values.amin(2))
            upper.index_copy_(0, part.star, values.amax(2))
        settled = sign.index_select(1, live) != 0
        crosses = (upper > tolerance) & (lower < -tolerance) & ~settled
        width = int(crosses.sum(1).max()) if crosses.numel() else 0
        column = leading(crosses, width)  # [S, C]
        place = torch.arange(size, device=live.device)[:, None]
        planes = arrived.flatten(0, 1).index_select(0, (place * len(live) + column).flatten())
        number = 1 + place * width + torch.arange(width, device=live.device)
        number = torch.where(crosses.gather(1, column), number, 0)
        low = torch.where(sign > 0, torch.inf, torch.where(sign < 0, -torch.inf, 0.0)).to(lower.dtype)
        high = low.index_copy(1, live, torch.where(settled, low.index_select(1, live), upper))
        low = low.index_copy(1, live, torch.where(settled, low.index_select(1, live), lower))
        return _Followed(
            planes=torch.cat((torch.zeros_like(planes[:1]), planes)) if width else planes,
            tolerance=pad(tolerance.gather(1, column).flatten(), (1, 0), value=1.0),
            number=number,
            feature=live[column],
            lower=low,
            upper=high,
            settled=(sign[:, step.relu] != 0).sum(1),
            arrived=[replace(part, open=number.index_select(0, part.star)) for part in pieces],
        )

    def _activate(self, chunk: Chunk, part: Pieces, followed: _Followed) -> Chunk:
        """Pieces of stars, cut by every neuron, as stars at the next layer."""
        step, star = self.steps[chunk.layer], part.star
        assert step.relu is not None
        low, high = followed.lower.index_select(0, star), followed.upper.index_select(0, star)  # [S', N]
        number = followed.number.index_select(0, star)  # [S', C]
        if number.shape[1]:
            # Neurons that did not cross the arriving star keep its range; the others have one of their own.
            planes = followed.planes.index_select(0, number.flatten()).view(*number.shape, -1)
            values = planes @ part.body.vertices.mT  # [S', C, K]
            feature = followed.feature.index_select(0, star)
            low.scatter_(1, feature, torch.where(number > 0, values.amin(2), low.gather(1, feature)))
            high.scatter_(1, feature, torch.where(number > 0, values.amax(2), high.gather(1, feature)))
        settled = followed.settled.index_select(0, star)
        self.tally.settle(chunk.layer, "root", settled)
        self.tally.settle(chunk.layer, "vertices", step.relu.sum() - settled)
        self.tally.count(chunk.layer, stars=len(part))
        rows, slack = chunk.rows.index_select(0, star), chunk.slack.index_select(0, star)
        rows, slack = activation.relu(rows, slack, low, high, step.relu, part.drift)
        rows, slack = activation.affine(self.steps[chunk.layer + 1], rows, slack)
        numbered = part.numbered(torch.arange(len(part), device=star.device))
        return Chunk(chunk.layer + 1, rows, slack, chunk.origin.index_select(0, star), (numbered,))

    def finish(self, chunk: Chunk, record: RangeRecord, clock: Clock = NO_LIMIT, room: float = math.inf) -> None:
        """Take the output range of stars at the last layer into the record. Raises OutOfTime."""
        numbers = self._numbers(chunk, room) // chunk.rows.shape[2]
        for part in (block for whole in chunk.pieces for block in whole.blocks(max(1, numbers // whole.slots))):
            clock.check()
            rows, origin = chunk.rows.index_select(0, part.star), chunk.origin.index_select(0, part.star)
            values = rows.mT.contiguous() @ part.body.vertices.mT  # [S', N, K]
            slack = chunk.slack.index_select(0, part.star) + part.drift * rows[:, 1:].abs().sum(1)
            points = part.body.vertices[:, :, 1:]
            low, high = values.amin(2), values.amax(2)
            record.attain(0, origin, high, _extreme(points, values, 1))
            record.attain(1, origin, -low, _extreme(points, values, -1))
            record.certify(origin, low - slack, high + slack)


def _extreme(points: Tensor, values: Tensor, sign: int) -> PointOf:
    """Where sign * values [S, N, K] is largest, among points [S, K, M]."""
    return lambda star, output: points[star, (sign * values[star, output]).argmax(1)]
