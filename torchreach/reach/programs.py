"""Exact reach for high-dimensional input: half-space stars and batched linear programs.

Method: every star keeps its constraints, an interior point near its analytic centre and further known
points. Whether a neuron crosses zero on a star is asked cheapest test first: known points on both sides
(it does); the predicate box; a dual bound and a point from one factorisation at the centre, shared by all
neurons; its own linear program, which ends at the first point beyond zero or dual bound below it.
Property: sound and complete; every sign rests on a dual bound or on a point of the star. A program left
undecided leaves its certified excursion as slack. Requirement: none on the number of predicate variables.
Reference: Bak, Tran, Hobbs, Johnson: Improved geometric path enumeration for verifying ReLU neural networks,
CAV 2020 (what to prune before solving programs); Nesterov, Nemirovskii, Interior-Point Polynomial Algorithms,
SIAM 1994 (Newton directions from the analytic centre as dual points).

Axis letters: S stars, P constraints, M predicate variables, N features, L live neurons, W known points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchreach.lp.interior_point import centre, factor, interior, maximize
from torchreach.lp.problem import LPBatch, dual_bound
from torchreach.networks.steps import Step
from torchreach.reach import activation
from torchreach.reach.record import PointOf, RangeRecord
from torchreach.reach.tally import Tally
from torchreach.tolerances import UNIT_ROUNDOFF, Tolerances

KNOWN_POINTS = 12
CENTRE_STEPS = 4
# Numbers in the constraint matrices of one batch of programs: bounds its memory.
PROGRAM_NUMBERS = 1 << 23


@dataclass(frozen=True)
class Chunk:
    """A batch of stars waiting at the same layer, before its activation."""

    layer: int
    A: Tensor  # [S, P, M]
    b: Tensor  # [S, P] constraints A a <= b over |a| <= 1
    points: Tensor  # [S, W, M] points of the star; the first is strictly inside
    rows: Tensor  # [S, 1 + M, N] pre-activations as affine maps of the predicate
    slack: Tensor  # [S, N] certified error of the rows
    side: Tensor  # [S, N] +1 or -1 where the sign is settled, 0 where it is not
    over: Tensor  # [S, N] certified excursion beyond the settled side
    origin: Tensor  # [S] index of the input star

    @property
    def kind(self) -> int:
        """Chunks of one kind can be joined without much padding."""
        return (self.A.shape[1] + 7) // 8

    def __len__(self) -> int:
        return len(self.origin)

    def select(self, index: Tensor | slice) -> Chunk:
        return Chunk(self.layer, *(getattr(self, name)[index] for name in PER_STAR))

    def box(self) -> tuple[Tensor, Tensor]:
        """Predicate box [S, M] of each star (the unit box: constraints are not propagated)."""
        ones = torch.ones_like(self.points[:, 0])
        return -ones, ones

    def stars(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(rows, half-spaces [S, P, 1 + M] with h . (1, a) >= 0, origin) of groups of stars."""
        return [(self.rows, torch.cat((self.b[:, :, None], -self.A), 2), self.origin)]

    def programs(self, star: Tensor, objective: Tensor, constant: Tensor) -> LPBatch:
        return LPBatch(objective, constant, self.A[star], self.b[star])


PER_STAR = ("A", "b", "points", "rows", "slack", "side", "over", "origin")


class ProgramEngine:
    """Rules for one run: how chunks start, advance one split or one layer, and end."""

    name = "programs"

    def __init__(
        self,
        steps: tuple[Step, ...],
        signs: list[Tensor],
        tolerances: Tolerances,
        tally: Tally,
        *,
        keep_facets: bool,  # noqa: ARG002  (constraints are kept anyway)
    ) -> None:
        self.steps = steps
        self.signs = signs
        self.tolerances = tolerances
        self.tally = tally
        self.somewhere = torch.empty(0)

    # -- life of a chunk ------------------------------------------------------------------------------

    def start(self, rows: Tensor, slack: Tensor, planes: Tensor, origin: Tensor) -> list[Chunk]:
        """Chunks of stars given by input rows [S, 1 + M, N_in] over [-1, 1]^M and half-spaces [S, P, 1 + M]."""
        size = planes[:, :, 1:].norm(dim=2, keepdim=True).clamp(min=1e-300)
        A, b = -planes[:, :, 1:] / size, (planes[:, :, :1] / size)[:, :, 0].clamp(max=1e6)
        point, _, _ = interior(A, b, self.tolerances.sign)
        point = centre(A, b, point, CENTRE_STEPS)
        self.somewhere = point
        rows, slack = activation.affine(self.steps[0], rows, slack)
        return [self._enter(0, A, b, point[:, None], rows, slack, origin)]

    def join(self, chunks: list[Chunk]) -> Chunk:
        """One chunk of several of one kind and layer; constraints are padded with 0 . a <= 1."""
        if len(chunks) == 1:
            return chunks[0]
        width = max(c.A.shape[1] for c in chunks)
        known = max(c.points.shape[1] for c in chunks)
        padded = [
            replace(
                c,
                A=_pad(c.A, width, c.A.new_zeros(len(c), 1, c.A.shape[2])),
                b=_pad(c.b, width, c.b.new_ones(len(c), 1)),
                points=_pad(c.points, known, c.points[:, :1]),
            )
            for c in chunks
        ]
        return Chunk(chunks[0].layer, *(torch.cat([getattr(c, name) for c in padded]) for name in PER_STAR))

    def advance(self, chunk: Chunk) -> list[Chunk]:
        """Settle the neurons of each star; cut it once where one crosses, else send it through the layer."""
        step = self.steps[chunk.layer]
        assert step.relu is not None
        chunk, low, high = self._settle(chunk, step.relu)  # chunk.points now holds every point found
        balance = torch.where((chunk.side == 0) & step.relu, torch.minimum(high, -low), torch.zeros_like(low))
        depth, neuron = balance.max(1)
        cut = depth > self.tolerances.sign
        chunks: list[Chunk] = []
        if not cut.all():
            chunks.append(self._activate(chunk.select(~cut), step))
        if cut.any():
            chunks += self._split(chunk.select(cut), neuron[cut])
            self.tally.count(chunk.layer, splits=int(cut.sum()))
        return chunks

    def finish(self, chunk: Chunk, record: RangeRecord) -> None:
        """Take the output range of stars at the last layer into the record, by linear programs.

        Only stars whose bound exceeds what is already attained can matter. The best candidate of each output
        is solved first: its optimum rules out many others, and so do its multipliers (see `_echo`).
        """
        outputs = chunk.rows.shape[2]
        rows = torch.cat((-chunk.rows, chunk.rows), 2)  # columns: -f of every output, then f
        values = rows[:, :1] + chunk.points @ rows[:, 1:]  # [S, W, 2 N]
        best, slot = values.max(1)
        upper, value, reach = self._from_centre(chunk, rows)
        attained = _Attained(record, chunk.origin, outputs)
        attained.take(best, lambda s, n: chunk.points[s, slot[s, n]])
        attained.take(value, lambda s, n: reach[s, :, n])
        solved = torch.zeros_like(upper, dtype=torch.bool)
        inputs = int(chunk.origin.max()) + 1
        while True:
            excess = torch.where(solved, -torch.inf, upper - attained.floor() - self.tolerances.gap)
            top = excess.new_full((inputs, 2 * outputs), -torch.inf)
            top.scatter_reduce_(0, chunk.origin[:, None].expand_as(excess), excess, "amax")
            star, output = ((excess > 0) & (excess == top[chunk.origin])).nonzero(as_tuple=True)
            if len(star) == 0:
                break
            solved[star, output] = True
            self.tally.count(-1, programs=len(star))
            floor = attained.floor()[star, output]
            lower, bound, points, dual = self._solve(chunk, rows, star, output, below=floor)
            upper[star, output] = torch.minimum(upper[star, output], bound)
            found = torch.full_like(upper, -torch.inf)
            found[star, output] = lower
            number = torch.full_like(upper, -1, dtype=torch.long)
            number[star, output] = torch.arange(len(star), device=star.device)
            attained.take(found, lambda s, n, p=points, k=number: p[k[s, n]])
            box = rows[star, 1:, output] - (dual[:, None] @ chunk.A[star])[:, 0]  # [B, M]
            shadow = rows.new_zeros(inputs, 2 * outputs, rows.shape[1] - 1)
            shadow[chunk.origin[star], output] = box
            known = torch.zeros_like(top, dtype=torch.bool)
            known[chunk.origin[star], output] = True
            self._echo(chunk, rows, shadow, known, upper, attained.floor())
        upper = upper + chunk.slack.repeat(1, 2)
        for direction, part in enumerate(upper.split(outputs, 1)):
            record.certify(direction, chunk.origin, part)

    def _echo(self, chunk: Chunk, rows: Tensor, shadow: Tensor, known: Tensor, upper: Tensor, floor: Tensor) -> None:
        """Tighten `upper` [S, L] by multipliers that leave the box the gradient it had at a solved optimum."""
        star, output = (known[chunk.origin] & (upper > floor + self.tolerances.gap)).nonzero(as_tuple=True)
        if len(star) == 0:
            return
        g, constant, A, b = rows[star, 1:, output], rows[star, 0, output], chunk.A[star], chunk.b[star]
        problem = LPBatch(g, constant, A, b)
        right = g - shadow[chunk.origin[star], output]
        gram = A @ A.transpose(1, 2)
        along = (A @ right[:, :, None])[:, :, 0]
        free = torch.ones_like(b)
        for _ in range(3):
            system = gram * free[:, :, None] * free[:, None, :]
            system.diagonal(dim1=1, dim2=2).add_(1e-9 + (1 - free))
            y = torch.linalg.solve_ex(system, along * free)[0] * free
            free = free * (y > 0)
            y = y.clamp(min=0).nan_to_num()
            bound = problem.bound(y)
            upper[star, output] = torch.minimum(upper[star, output], bound)

    # -- signs ----------------------------------------------------------------------------------------

    def _enter(
        self, layer: int, A: Tensor, b: Tensor, points: Tensor, rows: Tensor, slack: Tensor, origin: Tensor
    ) -> Chunk:
        """Stars at the door of a layer, with the signs that root bounds and the predicate box settle."""
        step = self.steps[layer]
        side, over = self.signs[layer][origin], torch.zeros_like(slack)
        if step.relu is not None:
            self.tally.settle(layer, "root", (side != 0)[:, step.relu])
            spread = rows[:, 1:].abs().sum(1)
            margin = (rows.shape[1] + 4) * UNIT_ROUNDOFF * (spread + rows[:, 0].abs())
            low, high = rows[:, 0] - spread - margin, rows[:, 0] + spread + margin
            unknown = (side == 0) & step.relu
            boxed = unknown & ((low >= 0) | (high + slack <= 0))
            side = torch.where(boxed, torch.where(low >= 0, 1, -1), side)
            self.tally.settle(layer, "box", boxed)
        return Chunk(layer, A, b, points, rows, slack, side, over, origin)

    def _settle(self, chunk: Chunk, relu: Tensor) -> tuple[Chunk, Tensor, Tensor]:
        """Ask every open sign. Returns the chunk and the range [S, N] met at points where a neuron crosses."""
        tolerance = self.tolerances.sign
        values = chunk.rows[:, :1] + chunk.points @ chunk.rows[:, 1:]
        low, high = values.amin(1), values.amax(1)
        # One side of zero may not be known either: then the second round asks for it.
        for _ in range(2):
            asked = (chunk.side == 0) & relu & ~((low < -tolerance) & (high > tolerance))
            if not asked.any():
                break
            chunk, low, high = self._ask(chunk, asked, low, high)
        return chunk, low, high

    def _ask(self, chunk: Chunk, asked: Tensor, low: Tensor, high: Tensor) -> tuple[Chunk, Tensor, Tensor]:
        """Settle the neurons `asked` [S, N] or meet a point on the side of zero they are not known to reach."""
        tolerance = self.tolerances.sign
        live = asked.any(0).nonzero().flatten()
        asked, low_live, high_live = asked[:, live], low[:, live], high[:, live]
        # max of -h where the star reaches h > 0 (or neither side is known and the points lean there)
        downward = torch.where(
            (high_live > tolerance) | (low_live < -tolerance), high_live > tolerance, high_live > -low_live
        )
        away = torch.where(downward, -1.0, 1.0).to(low.dtype)
        rows = chunk.rows[:, :, live] * away[:, None, :]
        upper, value, reach = self._from_centre(chunk, rows)
        stable = asked & (upper <= tolerance)
        self.tally.settle(chunk.layer, "dual", stable)
        star, column = (asked & ~stable & (value <= tolerance)).nonzero(as_tuple=True)
        if len(star):
            self.tally.count(chunk.layer, programs=len(star))
            lower, bound, point, _ = self._solve(
                chunk, rows, star, column, above=tolerance, below=tolerance, gap=tolerance / 4
            )
            upper[star, column] = torch.minimum(upper[star, column], bound)
            value[star, column] = lower
            reach[star, :, column] = point
            # A program that ended undecided settles the sign too: its excursion is certified and counted.
            decided = torch.zeros_like(asked)
            decided[star, column] = lower <= tolerance
            self.tally.settle(chunk.layer, "program", decided)
            stable |= decided
        side, over = chunk.side.clone(), chunk.over.clone()
        side[:, live] = torch.where(stable, -away.to(side.dtype), side[:, live])
        # On the flat piece the real pre-activation may stick out further, by the slack of the rows.
        out = (upper + torch.where(away > 0, chunk.slack[:, live], 0.0)).clamp(min=0)
        over[:, live] = torch.where(stable, out, over[:, live])
        crossed = asked & ~stable
        low[:, live] = torch.where(crossed & (away < 0), torch.minimum(low_live, -value), low_live)
        high[:, live] = torch.where(crossed & (away > 0), torch.maximum(high_live, value), high_live)
        found = torch.where(crossed[:, :, None], reach.transpose(1, 2), chunk.points[:, :1])
        points = torch.cat((chunk.points, found), 1)
        return replace(chunk, side=side, over=over, points=points), low, high

    def _from_centre(self, chunk: Chunk, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Certified bound, value and point of max rows[:, :, l], all from one factorisation per star.

        At the analytic centre the barrier's gradient vanishes, so for the Newton direction x = H^-1 g both
        centre + t x (a point, while inside) and y = (mu + t' A x / s) / s (a dual point, where y >= 0) come
        without further solves.

        Args: rows [S, 1 + M, L]. Returns upper [S, L], value [S, L], point [S, M, L].
        """
        a = chunk.points[:, 0]
        g, constant = rows[:, 1:], rows[:, 0]
        objective = g.transpose(1, 2)  # [S, L, M]
        none = chunk.b.new_zeros(len(chunk), rows.shape[2], chunk.b.shape[1])
        upper = dual_bound(objective, constant, chunk.A, chunk.b, none)
        p, q = 1 - a, 1 + a
        s = (chunk.b - (chunk.A @ a[:, :, None])[:, :, 0]).clamp(min=1e-15)
        x, w = factor(chunk.A, s**-2, p**-2 + q**-2)(g)
        x, w = torch.nan_to_num(x), torch.nan_to_num(w)
        if s.shape[1]:
            # the smallest mu for which mu / s + w is nonnegative, and no mu at all with negatives cut off
            mu = (-w * s[:, :, None]).amax(1, keepdim=True).clamp(min=0)
            trials = [w + share * mu / s[:, :, None] for share in (0.0, 0.3, 1.0)]
            # Nearly equal networks cut twice along nearly one plane: the best single constraint alone.
            along = chunk.A @ g  # rows of A have unit length (or are zero)
            trials.append(torch.where(along == along.amax(1, keepdim=True), along, 0.0))
            for trial in trials:
                y = trial.clamp(min=0).transpose(1, 2)
                upper = torch.minimum(upper, dual_bound(objective, constant, chunk.A, chunk.b, y))
        room = torch.cat((s, p, q), 1)[:, :, None]
        pace = torch.cat((chunk.A @ x, x, -x), 1)
        length = 0.99 * torch.where(pace > 0, room / pace, torch.inf).amin(1, keepdim=True).clamp(max=1e12)
        point = a[:, :, None] + length * x
        return upper, constant + (g * point).sum(1), point

    def _solve(
        self,
        chunk: Chunk,
        rows: Tensor,
        star: Tensor,
        column: Tensor,
        *,
        above: float = torch.inf,
        below: Tensor | float,
        gap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Programs max rows[s, :, l] over star s, in batches of bounded memory: lower, upper, point, dual."""
        below = torch.as_tensor(below, dtype=rows.dtype, device=rows.device).expand(len(star))
        size = max(1, PROGRAM_NUMBERS // max(1, chunk.A.shape[1] * chunk.A.shape[2]))
        parts = []
        for i in range(0, len(star), size):
            s, c = star[i : i + size], column[i : i + size]
            parts.append(
                maximize(
                    chunk.programs(s, rows[s, 1:, c], rows[s, 0, c]),
                    chunk.points[s, 0],
                    gap=gap or self.tolerances.gap,
                    above=above,
                    below=below[i : i + size],
                )
            )
        lower, upper = torch.cat([p.lower for p in parts]), torch.cat([p.upper for p in parts])
        return lower, upper, torch.cat([p.point for p in parts]), torch.cat([p.dual for p in parts])

    # -- cut and activate -----------------------------------------------------------------------------

    def _split(self, chunk: Chunk, neuron: Tensor) -> list[Chunk]:
        number = torch.arange(len(chunk), device=neuron.device)
        plane = chunk.rows[number, :, neuron]  # [S, 1 + M]
        plane = plane / plane[:, 1:].norm(dim=1, keepdim=True)
        values = plane[:, :1] + (chunk.points @ plane[:, 1:, None])[:, :, 0]  # [S, W]
        side, over = chunk.side.clone(), chunk.over.clone()
        # The child's half-space is the neuron's up to the rounding of its normalised coefficients.
        over[number, neuron] = 8 * UNIT_ROUNDOFF * chunk.rows[number, :, neuron].abs().sum(1)
        children = []
        for sign in (1.0, -1.0):
            mine = sign * values
            A = torch.cat((chunk.A, -sign * plane[:, None, 1:]), 1)
            b = torch.cat((chunk.b, sign * plane[:, :1]), 1)
            # An interior point of the child lies on the way from the centre to the point furthest in it.
            best, slot = mine.max(1)
            target = chunk.points[number, slot]
            middle = chunk.points[:, 0]
            share = ((0.5 * best - mine[:, 0]) / (best - mine[:, 0])).nan_to_num(0.0).clamp(0, 1)
            start = middle + share[:, None] * (target - middle)
            inside = centre(A, b, start, CENTRE_STEPS)
            side[number, neuron] = int(sign)
            children.append(
                replace(
                    chunk,
                    A=A,
                    b=b,
                    points=_remember(inside, chunk.points, mine >= 0),
                    side=side.clone(),
                    over=over,
                )
            )
        return children

    def _activate(self, chunk: Chunk, step: Step) -> Chunk:
        assert step.relu is not None
        self.tally.count(chunk.layer, stars=len(chunk))
        free = torch.full_like(chunk.over, torch.inf)
        low = torch.where(chunk.side > 0, -chunk.over, -free)
        # a sign that is still open (a program met NaN) has an unbounded excursion
        high = torch.where(chunk.side > 0, free, torch.where(chunk.side < 0, chunk.over, free))
        # Where root bounds or the predicate box settled the sign of the real network, nothing sticks out.
        low = torch.where((chunk.side > 0) & (chunk.over == 0), free, low)
        high = torch.where((chunk.side < 0) & (chunk.over == 0), -free, high)
        rows, slack = activation.relu(chunk.rows, chunk.slack, low, high, step.relu, 0.0)
        rows, slack = activation.affine(self.steps[chunk.layer + 1], rows, slack)
        points = chunk.points[:, :KNOWN_POINTS]
        return self._enter(chunk.layer + 1, chunk.A, chunk.b, points, rows, slack, chunk.origin)


class _Attained:
    """What the record has attained, both directions side by side, as stars of its input stars see it."""

    def __init__(self, record: RangeRecord, origin: Tensor, outputs: int) -> None:
        self.record, self.origin, self.outputs = record, origin, outputs

    def floor(self) -> Tensor:
        """[S, 2 N] best value met for -f and f of every output."""
        return self.record.attained[:, self.origin].transpose(0, 1).flatten(1)

    def take(self, value: Tensor, point: PointOf) -> None:
        """Values [S, 2 N] and the points where they are met."""
        for direction, part in enumerate(value.split(self.outputs, 1)):
            first = direction * self.outputs
            self.record.attain(direction, self.origin, part, lambda s, n, first=first: point(s, n + first))


def _pad(tensor: Tensor, width: int, fill: Tensor) -> Tensor:
    """`tensor` [S, X, ...] widened along axis 1 by copies of `fill` [S, 1, ...]."""
    missing = width - tensor.shape[1]
    return tensor if missing == 0 else torch.cat((tensor, fill.expand(-1, missing, *tensor.shape[2:])), 1)


def _remember(inside: Tensor, points: Tensor, valid: Tensor) -> Tensor:
    """Interior points [S, M], then the newest of `points` [S, W, M] that `valid` [S, W] admits, a few per star."""
    points, valid = points.flip(1), valid.flip(1)
    order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : KNOWN_POINTS - 1]
    picked = points.gather(1, order[:, :, None].expand(-1, -1, points.shape[2]))
    picked = torch.where(valid.gather(1, order)[:, :, None], picked, inside[:, None])
    return torch.cat((inside[:, None], picked), 1)
