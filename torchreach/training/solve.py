"""Repair by construction: the last layer that keeps y1 - y2 within limits on whole sets, as a program.

Method: On a joint linear region y1 and the last layer's input h are affine, so that lower <= y1 - (W h + b) <= upper on
    the region iff it holds at its vertices. The vertices of all regions over the stars (`verbs.corners`) are the points
    of a linear program in (W, b) (`training.program`). First the least |y1 - y2| of each output; then, within the
    limits asked for or, where no layer keeps them, those that can be kept, the layer that changes least elsewhere.
    Where there are too many vertices: sampled points and witnesses of certificates, in rounds (`rounds`).
Property: what is solved is certified afterwards by whoever calls this; the least value is a lower bound for every layer
    with the same zeros, and the conflict that proves it can be checked (`core.repaired.Conflict`).

Axis letters: S stars, N outputs, P points, F features of the last layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchreach.compress.constraints import Constraints
from torchreach.core.clock import Clock
from torchreach.core.options import Budget
from torchreach.core.repaired import Conflict
from torchreach.core.roundoff import unit_roundoff
from torchreach.core.tolerances import COMPUTE_DTYPE, Tolerances
from torchreach.read.steps import steps
from torchreach.sets.star import StarBatch
from torchreach.training.fit import Data
from torchreach.training.keep import Keep, kept_data
from torchreach.training.last_layer import LastLayer, evaluated, in_float64
from torchreach.training.program import Fit, LayerProgram, Points
from torchreach.verbs.corners import region_corners

# Points of a star that stand in for its vertices until witnesses come.
SAMPLED = 64
# Room left to solvers within limits, relative to their size.
ROOM = 1e-9
# Steps by which a weight on a grid may move: few, so that the network stays near what it was elsewhere.
CODES = 1

Limits = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Outcome:
    """A solved last layer.

    Attributes:
        matrix: [N, F] the layer; None where what is to be kept contradicts itself.
        least: [N] certified lower bound of the |y1 - y2| that any such layer reaches.
        conflicts: what shows that the limits are not to be kept; empty where they are.
    """

    matrix: Tensor | None
    least: Tensor
    conflicts: tuple[Conflict, ...]


class LayerSolver:
    """The points of one pair of networks, and the programs over them.

    Args:
        original: in evaluation mode. student: the compressed network, whose last layer is to be solved.
        stars: the sets. keep, data: what matters beside them.
        budget: of the enumeration: stars and memory.

    Raises: as `LastLayer`, `merge` and `reach`.
    """

    @torch.no_grad()
    def __init__(
        self,
        original: nn.Module,
        student: nn.Module,
        stars: StarBatch,
        constraints: Constraints,
        *,
        keep: tuple[Keep, ...] = (),
        data: Data | None = None,
        budget: Budget,
        tolerances: Tolerances,
        clock: Clock,
        seed: int = 0,
    ) -> None:
        device = stars.device
        self.stars = stars
        self.layer = LastLayer(student, stars.shape, constraints, device)
        self.original = in_float64(original, stars)
        self.steps = steps(self.original, stars.shape, dtype=COMPUTE_DTYPE, device=device, smooth=True)
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        options = {"budget": budget, "tolerances": tolerances, "clock": clock}
        found = region_corners(original, student, stars, **options)
        self.complete = found.complete
        x, star = found.x, found.star
        if not found.complete:
            more = stars.sample(SAMPLED, seed).to(COMPUTE_DTYPE)
            x = torch.cat((x, more.flatten(0, 1)))
            star = torch.cat((star, torch.arange(len(stars), device=device).repeat_interleave(SAMPLED)))
        self.x, self.star = x, star
        self.features, self.wanted = self.layer.features(x), evaluated(self.original, x)
        rigid, kept = [], kept_data(data, self.original, device)
        for part in keep:
            inputs = part.inputs
            if isinstance(inputs, StarBatch):
                corners = region_corners(original, student, inputs.to(device), **options)
                more = inputs.to(device).sample(1 if corners.complete else SAMPLED, seed).flatten(0, 1)
                inputs = torch.cat((corners.x, more.to(COMPUTE_DTYPE)))
            inputs = inputs.to(device, COMPUTE_DTYPE)
            if part.tolerance is None:
                kept.append((inputs, evaluated(self.original, inputs)))
            else:
                h, y = self.layer.features(inputs), evaluated(self.original, inputs)
                hard = torch.zeros_like(h[:, 0])
                rigid.append(Points(inputs, h, y - part.tolerance, y + part.tolerance, hard))
        self.rigid = rigid
        self.kept = [(self.layer.features(inputs), y) for inputs, y in kept]

    @torch.no_grad()
    def witness(self, x: Tensor) -> None:
        """Takes inputs [S, B, *shape] of each star among the points."""
        star = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
        x = x.flatten(0, 1).to(COMPUTE_DTYPE)
        self.x, self.star = torch.cat((self.x, x)), torch.cat((self.star, star))
        self.features = torch.cat((self.features, self.layer.features(x)))
        self.wanted = torch.cat((self.wanted, evaluated(self.original, x)))

    def points(self, limits: Limits | None) -> Points:
        """The points of the stars with `limits` [S, N] of y1 - y2; None: 0."""
        zero = torch.zeros_like(self.wanted)
        low, high = (zero, zero) if limits is None else (limit.to(zero)[self.star] for limit in limits)
        soft = torch.ones_like(self.features[:, 0])
        return Points(self.x, self.features, self.wanted - high, self.wanted - low, soft)

    @torch.no_grad()
    def solve(self, limits: Limits | None, clock: Clock) -> Outcome:
        """The layer within `limits` [S, N] of y1 - y2, or as close to them as any is; None: of the least |y1 - y2|.

        Raises: OutOfTime.
        """
        zero = torch.zeros_like(self.wanted[:1])
        program, points = self._program((zero, zero))
        found = program.least(clock)
        rigid = not bool(found.slack.isfinite().all())
        if rigid:
            program, points = self._program((zero, zero), soft=True)
            found = program.least(clock)
        proofs = self._conflicts(points, (zero, zero), found.proof)
        # Where what is to be kept is kept by no layer, nothing follows for the stars alone.
        values = [0.0 if rigid or one is None else max(one.excess, 0.0) for one in proofs]
        least = torch.tensor(values, dtype=COMPUTE_DTYPE, device=zero.device)
        if rigid:
            return Outcome(None, least, _proven(proofs))
        conflicts: tuple[Conflict, ...] = ()
        closest = program
        slack, give = found.slack, ROOM * (1 + self.wanted.abs().amax(0))
        if limits is not None and not bool((limits[0] == 0).all() and (limits[1] == 0).all()):
            asked = limits[0].to(zero)[self.star], limits[1].to(zero)[self.star]
            # Room for the solver, and for the rounding of weights to their dtype.
            size = (self.features.abs() @ found.layer.abs().T).amax(0)
            room = 4 * unit_roundoff(self.layer.weight.dtype) * size + 4 * give
            room = torch.minimum(room, (asked[1] - asked[0]).amin(0) / 4)
            program, points = self._program((asked[0] + room, asked[1] - room))
            found = program.least(clock)
            slack = found.slack
            impossible = slack > room
            if bool(impossible.any()):
                proofs = self._conflicts(points, asked, found.proof)
                conflicts = _proven(proofs)
        elif limits is not None:  # the least one is what was asked for
            conflicts = _proven(proofs)
        if self.layer.grid is None:
            matrix = program.gentlest(slack + give, self._fit(points, program.start), clock)
        else:
            matrix = self._on_grid(closest, program, points, give, clock)
        return Outcome(matrix, least, conflicts)

    def _on_grid(
        self, closest: LayerProgram, program: LayerProgram, points: Points, give: Tensor, clock: Clock
    ) -> Tensor:
        """The layer, weights on their grid: by the bias alone where that keeps the limits, else by other codes.

        closest: the program of the least |y1 - y2|, by which codes are chosen: wide limits would say nothing of most.
        """
        matrix = self.layer.matrix
        biases = LayerProgram(points, matrix, self.layer.off_grid, self.threads)
        if bool(self.layer.off_grid.any(1).all()):
            found = biases.least(clock)
            matrix = biases.gentlest(found.slack + give, self._fit(points, biases.start), clock)
            if bool((found.slack <= give).all()):
                return matrix
        rounded = closest.rounded(*self.layer.codes(CODES), clock)
        better = program.excess(rounded) < program.excess(matrix)
        return torch.where(better[:, None], rounded, matrix)

    def _program(self, limits: Limits, soft: bool = False) -> tuple[LayerProgram, Points]:
        low, high = self.wanted - limits[1], self.wanted - limits[0]
        parts = [Points(self.x, self.features, low, high, torch.ones_like(self.features[:, 0])), *self.rigid]
        points = Points.cat(parts)
        points = points.softened() if soft else points
        return LayerProgram(points, self.layer.matrix, self.layer.free, self.threads), points

    def _fit(self, points: Points, start: Tensor) -> Fit:
        if not self.kept:
            return Fit.nothing(points)
        features, wanted = (torch.cat(part) for part in zip(*self.kept, strict=True))
        return Fit.of(features, wanted, start)

    def _conflicts(
        self, points: Points, limits: Limits, proofs: tuple[tuple[Tensor, Tensor], ...]
    ) -> list[Conflict | None]:
        """What the multipliers of each output prove; None where there are none."""
        stars = len(self.x)
        result: list[Conflict | None] = []
        for n, proof in enumerate(proofs):
            if not len(proof[0]):
                result.append(None)
                continue
            # Limits of y1 - y2: those asked for on the stars, the tolerances on what is kept.
            own = tuple(limit.expand(stars, -1)[:, n] for limit in limits)
            rest = slice(stars, len(points))
            middle = (points.low[rest, n] + points.high[rest, n]) / 2
            wide = points.high[rest, n] - middle
            both = torch.cat((own[0], -wide)), torch.cat((own[1], wide))
            result.append(self.layer.conflict(self.steps, points, both, n, proof))
        return result


def _proven(conflicts: list[Conflict | None]) -> tuple[Conflict, ...]:
    return tuple(one for one in conflicts if one is not None and one.excess > 0)
