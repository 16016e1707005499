"""Exact reach for high-dimensional input: half-space stars and batched linear programs.

Method: every piece of a star keeps its half-spaces, an interior point near its analytic centre and further
known points. Whether a neuron crosses zero on a piece is asked cheapest test first: known points on both sides
(it does); a point and dual bounds from one factorisation at the centre, shared by all neurons; its own linear
program, which ends at the first point beyond zero or dual bound below it. Pieces share the affine map of the
star they were cut from until the layer is done.
Property: sound and complete; every sign rests on a dual bound or on a point of the star. A program left
undecided leaves its certified excursion as slack. Requirement: none on the number of predicate variables.
Reference: Bak, Tran, Hobbs, Johnson: Improved geometric path enumeration for verifying ReLU neural networks,
CAV 2020 (what to prune before solving programs).

Axis letters: S stars as they came to a layer, Q pieces of them, C their live neurons, P constraints,
M predicate variables, N features, W known points, R questions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.masks import leading
from torchreach.core.roundoff import allowance, gamma
from torchreach.core.tolerances import Tolerances
from torchreach.engines import activation
from torchreach.engines.output_programs import output_range
from torchreach.engines.pieces import KNOWN_POINTS, Arrivals, Chunk, padded, remember, with_points
from torchreach.engines.record import RangeRecord
from torchreach.engines.tally import Tally
from torchreach.graph.steps import Step
from torchreach.lp.halfspaces import Halfspaces, Rows, Sets, SharedHalfspaces
from torchreach.lp.interior_point import centre, interior
from torchreach.lp.problem import LPBatch
from torchreach.lp.questions import look, solve

CENTRE_STEPS = 4
# Live neurons up to which the pieces of a single star share one matrix of half-spaces.
SHARED_ROWS = 64


class ProgramEngine:
    """Rules for one run: how chunks start, advance one split or one layer, and end."""

    name = "programs"
    load = 4

    def __init__(
        self,
        steps: tuple[Step, ...],
        signs: list[Tensor],
        tolerances: Tolerances,
        tally: Tally,
        *,
        keep_facets: bool,  # noqa: ARG002  (half-spaces are kept anyway)
    ) -> None:
        self.steps = steps
        self.signs = signs
        self.tolerances = tolerances
        self.tally = tally
        self.somewhere = torch.empty(0)
        # While there is one star, its pieces can share the matrix of its live planes.
        self.whole, self.shared_layer = False, -1
        # Per layer: the features live at the root, and their weights into the next layer.
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def state(self) -> list[Any]:
        """What it knows beside the chunks, as plain data."""
        return [self.whole, self.shared_layer]

    @state.setter
    def state(self, state: list[Any]) -> None:
        self.whole, self.shared_layer = state

    # -- life of a chunk ------------------------------------------------------------------------------

    def start(
        self, rows: Tensor, slack: Tensor, planes: Tensor, origin: Tensor, clock: Clock = NO_LIMIT
    ) -> list[Chunk]:
        """Chunks of stars given by input rows [S, 1 + M, N_in] over [-1, 1]^M and half-spaces [S, P, 1 + M].

        Raises OutOfTime; `somewhere` is set even then.
        """
        size = planes[:, :, 1:].norm(dim=2, keepdim=True).clamp(min=1e-300)
        sets = Halfspaces(-planes[:, :, 1:] / size, (planes[:, :, :1] / size)[:, :, 0].clamp(max=1e6))
        point, _, _ = interior(sets, self.tolerances.sign)
        point = centre(sets, point, CENTRE_STEPS)
        self.somewhere = point
        self.whole = len(rows) == 1
        rows, slack = activation.affine(self.steps[0], rows, slack, clock)
        return [self._enter(0, sets, point[:, None], rows, slack, origin)]

    def join(self, chunks: list[Chunk]) -> Chunk:
        """One chunk of several of one kind and layer."""
        if len(chunks) == 1:
            return chunks[0]
        first = chunks[0]
        arrivals, stars = first.arrivals, [c.star for c in chunks]
        if any(c.arrivals is not arrivals for c in chunks):
            sizes = torch.tensor([0, *(len(c.arrivals) for c in chunks[:-1])]).cumsum(0).tolist()
            arrivals = Arrivals.cat([c.arrivals for c in chunks])
            stars = [star + size for star, size in zip(stars, sizes, strict=True)]
        width, known = arrivals.column.shape[1], max(c.points.shape[1] for c in chunks)
        parts = [padded(c, width, known) for c in chunks]
        points, values, side, over = (torch.cat(column) for column in zip(*parts, strict=True))
        sets = type(first.sets).cat([c.sets for c in chunks])  # type: ignore[arg-type]
        return Chunk(first.layer, arrivals, torch.cat(stars), sets, points, values, side, over)

    def advance(self, chunk: Chunk, clock: Clock = NO_LIMIT, room: float = math.inf) -> list[Chunk]:  # noqa: ARG002
        """Settle the neurons of each piece; cut it once where one crosses, else send it through the layer.

        A piece becomes two at most, so there is room for them. Raises OutOfTime.
        """
        chunk, low, high = self._settle(chunk, clock)  # chunk.points now holds every point found
        balance = torch.where(chunk.side == 0, torch.minimum(high, -low), 0.0)
        if balance.shape[1] == 0:
            return [self._activate(chunk, clock)]
        depth, column = balance.max(1)
        cut = depth > self.tolerances.sign
        number = int(cut.sum())
        chunks: list[Chunk] = []
        if number < len(cut):
            chunks.append(self._activate(chunk if number == 0 else chunk.select((~cut).nonzero().flatten()), clock))
        if number:
            if number < len(cut):
                index = cut.nonzero().flatten()
                chunk, column = chunk.select(index), column[index]
            chunks.append(self._split(chunk, column, clock))
            self.tally.count(chunk.layer, splits=number)
        return chunks

    def finish(self, chunk: Chunk, record: RangeRecord, clock: Clock = NO_LIMIT, room: float = math.inf) -> None:  # noqa: ARG002
        """Take the output range of pieces at the last layer into the record, by linear programs. Raises OutOfTime."""
        rows = chunk.rows.transpose(1, 2)
        args = (rows, chunk.slack, chunk.sets, chunk.points, chunk.origin, record, self.tolerances.gap, clock)
        programs = output_range(*args)
        self.tally.count(-1, programs=programs)

    # -- signs ----------------------------------------------------------------------------------------

    def _enter(self, layer: int, sets: Sets, points: Tensor, rows: Tensor, slack: Tensor, origin: Tensor) -> Chunk:
        """Stars at the door of a layer, with the signs that root bounds and the predicate box settle."""
        relu = self.steps[layer].relu
        if relu is None:
            relu = torch.zeros_like(slack[0], dtype=torch.bool)
        sign = self.signs[layer][origin]
        spread = rows[:, 1:].abs().sum(1)
        margin = gamma(rows.shape[1]) * (spread + rows[:, 0].abs())
        low, high = rows[:, 0] - spread - margin, rows[:, 0] + spread + margin
        unknown = (sign == 0) & relu
        boxed = unknown & ((low >= 0) | (high + slack <= 0))
        self.tally.settle(layer, "box", boxed)
        live = unknown & ~boxed
        fixed = ~live & (~relu | (sign > 0) | (boxed & (low >= 0)))
        width = int(live.sum(1).max())
        column = leading(live, width)
        present = live.gather(1, column)
        planes = rows.transpose(1, 2).gather(1, column[:, :, None].expand(-1, -1, rows.shape[1])) * present[:, :, None]
        arrivals = Arrivals(rows, slack, origin, fixed.to(rows.dtype), column, present, planes)
        if self.whole and 0 < width <= SHARED_ROWS:
            sets, self.shared_layer = _share(sets.own(), planes[0]), layer
        side = torch.where(present, 0, 1)
        chunk = Chunk(
            layer,
            arrivals,
            torch.arange(len(rows), device=rows.device),
            sets,
            points,
            points.new_zeros(*points.shape[:2], width),
            side,
            torch.zeros_like(side, dtype=rows.dtype),
        )
        return replace(chunk, values=chunk.at(points))

    def _settle(self, chunk: Chunk, clock: Clock) -> tuple[Chunk, Tensor, Tensor]:
        """Ask every open sign. Returns the chunk and the range [Q, C] met at points where a neuron crosses."""
        tolerance = self.tolerances.sign
        low, high = torch.aminmax(chunk.values, dim=1)
        # One side of zero may not be known either: then the second round asks for it.
        for _ in range(2):
            asked = (chunk.side == 0) & ~((low < -tolerance) & (high > tolerance))
            width = int(asked.sum(1).max()) if asked.numel() else 0
            if width == 0:
                break
            chunk, low, high = self._ask(chunk, asked, width, low, high, clock)
        return chunk, low, high

    def _ask(
        self, chunk: Chunk, asked: Tensor, width: int, low: Tensor, high: Tensor, clock: Clock
    ) -> tuple[Chunk, Tensor, Tensor]:
        """Settle the neurons `asked` [Q, C] or meet a point on the side of zero they are not known to reach."""
        tolerance = self.tolerances.sign
        column = leading(asked, width)  # [Q, R]
        asked, low_here, high_here = (part.gather(1, column) for part in (asked, low, high))
        # max of -h where the piece reaches h > 0 (or neither side is known and the points lean there)
        downward = torch.where(
            (high_here > tolerance) | (low_here < -tolerance), high_here > tolerance, high_here > -low_here
        )
        away = torch.where(downward, -1.0, 1.0).to(low.dtype)
        rows = chunk.plane(column) * away[:, :, None]  # [Q, R, 1 + M]
        answer = look(rows, asked, chunk.sets, chunk.points[:, 0], tolerance, clock)
        self.tally.settle(chunk.layer, "dual", asked & (answer.upper <= tolerance))
        star, question = (asked & (answer.upper > tolerance) & (answer.value <= tolerance)).nonzero(as_tuple=True)
        upper, value, found = answer.upper, answer.value, answer.point
        stable = asked & (upper <= tolerance)
        if len(star):
            self.tally.count(chunk.layer, programs=len(star))
            row = rows[star, question]
            problem = LPBatch(row[:, 1:], row[:, 0], chunk.sets.select(star))
            solution = solve(
                problem, chunk.points[star, 0], above=tolerance, below=tolerance, gap=tolerance / 4, clock=clock
            )
            upper[star, question] = torch.minimum(upper[star, question], solution.upper)
            value[star, question] = solution.lower
            found[star, question] = solution.point
            # A program that ended undecided settles the sign too: its excursion is certified and counted.
            decided = torch.zeros_like(asked)
            decided[star, question] = solution.lower <= tolerance
            self.tally.settle(chunk.layer, "program", decided)
            stable |= decided
        # On the flat piece the real pre-activation may stick out further, by the slack of the rows.
        slack = chunk.slack.gather(1, chunk.arrivals.column[chunk.star].gather(1, column))
        out = (upper + torch.where(away > 0, slack, 0.0)).clamp(min=0)
        side, over = chunk.side.gather(1, column), chunk.over.gather(1, column)
        side = chunk.side.scatter(1, column, torch.where(stable, -away.to(side.dtype), side))
        over = chunk.over.scatter(1, column, torch.where(stable, out, over))
        crossed = asked & ~stable
        points, values = with_points(chunk, found, crossed)
        low = low.minimum(values.amin(1))
        high = high.maximum(values.amax(1))
        return replace(chunk, side=side, over=over, points=points, values=values), low, high

    # -- cut and activate -----------------------------------------------------------------------------

    def _split(self, chunk: Chunk, column: Tensor, clock: Clock) -> Chunk:
        """Both sides of each piece cut by the plane of its live neuron column [Q]: first all above, then all below."""
        self.whole = False
        if chunk.layer != self.shared_layer:
            chunk = replace(chunk, sets=chunk.sets.own())
        number = torch.arange(len(chunk), device=column.device)
        plane = chunk.plane(column[:, None])[:, 0]  # [Q, 1 + M]
        norm = plane[:, 1:].norm(dim=1, keepdim=True)
        values = chunk.values[number, :, column] / norm  # [Q, W]
        # The child's half-space is the neuron's up to the rounding of its normalised coefficients.
        over = chunk.over.index_put((number, column), allowance(plane.abs().sum(1), 8))
        unit = plane / norm
        sets, starts, side = [], [], []
        for sign in (1.0, -1.0):
            mine = sign * values
            sets.append(_cut(chunk, column, unit, sign))
            # An interior point of the child lies on the way from the centre to the point furthest in it.
            best, slot = mine.max(1)
            share = ((0.5 * best - mine[:, 0]) / (best - mine[:, 0])).nan_to_num(0.0).clamp(0, 1)
            starts.append(torch.lerp(chunk.points[:, 0], chunk.points[number, slot], share[:, None]))
            side.append(chunk.side.index_put((number, column), torch.full_like(column, int(sign))))
        both = type(sets[0]).cat(sets)
        inside = centre(both, torch.cat(starts), CENTRE_STEPS, clock)
        signed = torch.cat((values, -values))
        twice = replace(chunk, star=chunk.star.repeat(2), sets=both)
        points, known = remember(chunk, signed >= 0)
        return replace(
            twice,
            points=torch.cat((inside[:, None], points), 1),
            values=torch.cat((twice.at(inside[:, None]), known), 1),
            side=torch.cat(side),
            over=over.repeat(2, 1),
        )

    def _activate(self, chunk: Chunk, clock: Clock) -> Chunk:
        """Pieces at the next layer, as stars of their own. Raises OutOfTime."""
        arrivals, star = chunk.arrivals, chunk.star
        step, layer = self.steps[chunk.layer + 1], chunk.layer
        mapped = step.map_rows(arrivals.rows * arrivals.fixed[:, None], clock)
        self.tally.count(layer, stars=len(chunk))
        relu = self.steps[layer].relu
        assert relu is not None
        settled = ((self.signs[layer] != 0) & relu).sum(1)  # per input star
        self.tally.settle(layer, "root", settled[chunk.origin])
        live, active = arrivals.live[star], (chunk.side > 0) & arrivals.live[star]
        size = arrivals.rows.abs().sum(1)
        column = arrivals.column[star]

        def spread(fixed: Tensor, own: Tensor) -> Tensor:
            """Features [Q, N] of which the live ones are the pieces' own [Q, C]."""
            return (fixed * arrivals.fixed)[star].scatter_add(1, column, own)

        # Maps are laid out feature by feature: [Q, N, 1 + M] in memory.
        rows = mapped.transpose(1, 2).contiguous()[star]
        if column.shape[1]:
            place, weights = self._live_weights(layer)
            share = arrivals.planes[star] * active[:, :, None]  # [Q, C, 1 + M]
            weights = weights[place[arrivals.column[:1] if len(arrivals) == 1 else column]]
            rows += weights.transpose(1, 2) @ share
        rows = rows.transpose(1, 2)
        # Where root bounds or the predicate box settled the sign of the real network, nothing sticks out. A sign
        # that is still open (a program met NaN) has an unbounded excursion.
        own = chunk.slack.gather(1, column)
        excess = torch.where(active, own + chunk.over, torch.where(chunk.over > 0, chunk.over + own, 0.0))
        excess = torch.where(live, torch.where(chunk.side == 0, torch.inf, excess), 0.0)
        slack = spread(arrivals.slack, excess)
        reached = spread(size, torch.where(active, size[star].gather(1, column), 0.0))
        slack = activation.affine_slack(step, rows, slack, reached)
        points = chunk.points[:, :KNOWN_POINTS]
        return self._enter(layer + 1, chunk.sets, points, rows, slack, chunk.origin)

    def _live_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """Place [N] of each feature that is live at the root among them, and their weights into the next layer."""
        if layer not in self._weights:
            relu = self.steps[layer].relu
            assert relu is not None
            live = ((self.signs[layer] == 0).any(0) & relu).nonzero().flatten()
            place = torch.zeros_like(relu, dtype=torch.long)
            place[live] = torch.arange(len(live), device=live.device)
            bias = self.steps[layer].bias
            units = bias.new_zeros(len(live), len(bias))
            units[torch.arange(len(live), device=live.device), live] = 1.0
            self._weights[layer] = place, self.steps[layer + 1].linear(units)
        return self._weights[layer]


def _share(sets: Halfspaces, planes: Tensor) -> SharedHalfspaces:
    """One set with its own rows present and planes [C, 1 + M] absent."""
    unit = planes[:, 1:] / planes[:, 1:].norm(dim=1, keepdim=True).clamp(min=1e-300)
    absent = sets.b.new_zeros(1, len(planes))
    return SharedHalfspaces(
        Rows(torch.cat((sets.A[0], unit))),
        torch.cat((torch.ones_like(sets.b), absent), 1),
        torch.cat((sets.b, absent + 1), 1),
    )


def _cut(chunk: Chunk, column: Tensor, unit: Tensor, sign: float) -> Sets:
    """Sets of the children on one side of planes unit [Q, 1 + M], of live neurons column [Q]."""
    sets, bound = chunk.sets, sign * unit[:, 0]
    if isinstance(sets, SharedHalfspaces):
        return sets.put(sets.constraints - chunk.side.shape[1] + column, torch.full_like(bound, -sign), bound)
    return sets.add(-sign * unit[:, 1:], bound)
