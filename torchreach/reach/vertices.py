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


@dataclass(frozen=True)
class Chunk:
    """A batch of stars waiting at the same layer, before its activation."""

    layer: int
    body: PolytopeBatch
    rows: Tensor  # [S, 1 + M, N] pre-activations as affine maps of the predicate
    slack: Tensor  # [S, N] certified error of the rows
    origin: Tensor  # [S] index of the input star
    cuts: Tensor  # [S] cuts so far, which bounds how far vertices may have drifted

    @property
    def kind(self) -> int:
        """Chunks of one kind can be joined."""
        return self.body.vertices.shape[1]

    def __len__(self) -> int:
        return len(self.origin)

    def select(self, index: Tensor | slice) -> Chunk:
        return Chunk(
            self.layer,
            self.body.select(index),
            self.rows[index],
            self.slack[index],
            self.origin[index],
            self.cuts[index],
        )

    @property
    def drift(self) -> Tensor:
        """[S, 1] distance, in each predicate variable, within which a star may miss points."""
        return (4 * UNIT_ROUNDOFF * self.cuts)[:, None]

    def box(self) -> tuple[Tensor, Tensor]:
        """Predicate box [S, M] of each star."""
        points = self.body.vertices[:, :, 1:]
        return points.amin(1) - self.drift, points.amax(1) + self.drift

    def halfspaces(self) -> Tensor:
        """[S, F, 1 + M] half-spaces h . (1, a) >= 0 of each star."""
        assert self.body.facets is not None
        return self.body.facets


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
        chunks = [Chunk(0, body, rows, slack, origin, torch.zeros_like(origin))]
        numbers = torch.arange(size, device=rows.device)
        pieces = [(body, numbers)]
        for p in range(planes.shape[1]):
            cut: list[tuple[PolytopeBatch, Tensor]] = []
            for piece, star in pieces:
                plane = planes[star, p]
                values = (piece.vertices @ plane[:, :, None])[:, :, 0]
                for part, child in piece.cut(values, plane, self.tolerances.sign):
                    inside = child < len(star)
                    if inside.any():
                        cut.append((part.select(inside), star[child[inside]]))
            pieces = cut
        if planes.shape[1]:
            chunks = [
                Chunk(0, piece, rows[star], slack[star], origin[star], torch.full_like(star, planes.shape[1]))
                for piece, star in pieces
            ]
            for piece, star in pieces:  # any vertex is a point of the star
                self.somewhere[star] = piece.vertices[:, 0, 1:]
        return chunks

    def join(self, chunks: list[Chunk]) -> Chunk:
        """One chunk of several of one kind and layer."""
        if len(chunks) == 1:
            return chunks[0]
        return Chunk(
            chunks[0].layer,
            polytope.merge([c.body for c in chunks]),
            *(torch.cat([getattr(c, name) for c in chunks]) for name in ("rows", "slack", "origin", "cuts")),
        )

    def advance(self, chunk: Chunk) -> list[Chunk]:
        """Cut each star that a neuron crosses, once; send the others through the activation."""
        step, live, tolerance = self.steps[chunk.layer], self.live[chunk.layer], self.tolerances.sign
        assert step.relu is not None
        assert live is not None
        values = chunk.body.vertices @ chunk.rows[:, :, live]  # [S, K, L]
        upper, lower = values.amax(1), values.amin(1)
        crosses = (upper > tolerance) & (lower < -tolerance)
        cut = crosses.any(1)
        index = cut.nonzero().flatten()
        chunks: list[Chunk] = []
        if len(index) < len(chunk):
            done = ~cut
            passed = chunk if len(index) == 0 else chunk.select(done)
            chunks.append(self._activate(passed, step, live, lower[done], upper[done]))
        if len(index):
            neuron = crosses[index].to(torch.uint8).argmax(1)
            values = values[index, :, neuron]
            open_chunk = chunk if len(index) == len(chunk) else chunk.select(index)
            plane = open_chunk.rows[torch.arange(len(index), device=index.device), :, live[neuron]]
            for body, child in open_chunk.body.cut(values, plane, tolerance):
                parent = child % len(index)
                chunks.append(
                    Chunk(
                        chunk.layer,
                        body,
                        open_chunk.rows[parent],
                        open_chunk.slack[parent],
                        open_chunk.origin[parent],
                        open_chunk.cuts[parent] + 1,
                    )
                )
            self.tally.splits[chunk.layer] += len(index)
        return chunks

    def _activate(self, chunk: Chunk, step: Step, live: Tensor, lower: Tensor, upper: Tensor) -> Chunk:
        assert step.relu is not None
        sign = self.signs[chunk.layer][chunk.origin]
        low = torch.where(sign > 0, torch.inf, torch.where(sign < 0, -torch.inf, 0.0)).to(lower.dtype)
        high = low.clone()
        settled = sign[:, live] != 0
        low[:, live] = torch.where(settled, low[:, live], lower)
        high[:, live] = torch.where(settled, high[:, live], upper)
        self.tally.settle(chunk.layer, "root", sign[:, step.relu] != 0)
        self.tally.settle(chunk.layer, "vertices", sign[:, step.relu] == 0)
        self.tally.stars[chunk.layer] += len(chunk)
        rows, slack = activation.relu(chunk.rows, chunk.slack, low, high, step.relu, chunk.drift)
        rows, slack = activation.affine(self.steps[chunk.layer + 1], rows, slack)
        return replace(chunk, layer=chunk.layer + 1, rows=rows, slack=slack)

    def finish(self, chunk: Chunk, record: RangeRecord) -> None:
        """Take the output range of stars at the last layer into the record."""
        values = chunk.body.vertices @ chunk.rows  # [S, K, N]
        slack = chunk.slack + chunk.drift * chunk.rows[:, 1:].abs().sum(1)
        points = chunk.body.vertices[:, :, 1:]
        for direction, signed in enumerate((-values, values)):
            best, slot = signed.max(dim=1)
            record.attain(direction, chunk.origin, best, lambda s, n, slot=slot: points[s, slot[s, n]])
            record.certify(direction, chunk.origin, best + slack)
