"""The last layer of a compressed network as a program: y2 = W h + b is linear in (W, b) at every point.

    low_ij - s_i t_j <= W_j h_i + b_j <= high_ij + s_i t_j      at points i, for outputs j
    least:      the least t_j, a linear program
    gentlest:   with t_j given, the least mean_k |W_j h_k + b_j - y_k|^2 over kept points k, plus a ridge |change|^2

with s_i = 1 where a point's limits may give way (stars) and 0 where they may not (what is kept). Outputs are programs
of their own. Entries of (W, b) that are not free stay as they are.

Method: constraint generation. All points stay where they are, as tensors; of those that the present layer violates the
    worst become rows, until none does. Dual simplex (HiGHS), interior point (Clarabel, through cvxpy).
Property: the slack is a lower bound for every layer with these free entries, up to the solver's tolerance; its
    multipliers prove it (`core.repaired.Conflict`).

Axis letters: P points, N outputs, F features of the last layer's input (the last one is 1, for the bias).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from torchreach.core.clock import Clock
from torchreach.core.tolerances import COMPUTE_DTYPE
from torchreach.lp.least_slack import Array, LeastSlack

T = TypeVar("T")

# Violated points that become rows in one round, per output and side.
MOST = 100
# Violation that counts, relative to the size of the limits: more than what solvers leave.
FEASIBLE = 1e-9
# Weight of the change beside the kept residuals, as a share of their mean square feature.
RIDGE = 1e-6
CLARABEL = {"tol_feas": 1e-9, "tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9}


@dataclass(frozen=True)
class Points:
    """Where the layer is held: y2 in [low, high], or wider by the slack.

    Attributes:
        x: [P, *shape] inputs.
        features: [P, F] the last layer's input there, and 1.
        low, high: [P, N].
        soft: [P] 1 where the slack widens the limits, 0 where it does not.
    """

    x: Tensor
    features: Tensor
    low: Tensor
    high: Tensor
    soft: Tensor

    @staticmethod
    def cat(parts: list[Points]) -> Points:
        names = ("x", "features", "low", "high", "soft")
        return Points(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def softened(self) -> Points:
        """With limits that may all give way."""
        return replace(self, soft=torch.ones_like(self.soft))

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Fit:
    """Mean squares over kept points: G [F, F] = mean h h^T and g [F, N] = mean h (y - W0 h)."""

    gram: Tensor
    pull: Tensor

    @staticmethod
    def nothing(like: Points) -> Fit:
        """No kept points: the change alone counts, each weight by the size of its feature over the points."""
        size = like.features.square().mean(0).clamp(min=1e-12)
        return Fit(torch.diag(size), like.features.new_zeros(len(size), like.low.shape[1]))

    @staticmethod
    def of(features: Tensor, wanted: Tensor, start: Tensor) -> Fit:
        """features [K, F], wanted [K, N], start [N, F]."""
        share = 1 / max(1, len(features))
        return Fit(share * features.T @ features, share * features.T @ (wanted - features @ start.T))


@dataclass(frozen=True)
class Least:
    """The layer [N, F] of least slack [N] (infinite where rigid limits contradict), and what proves it.

    proof: per output, indices [C] of points and signed multipliers [C]: positive where y2 may not be lower.
    """

    layer: Tensor
    slack: Tensor
    proof: tuple[tuple[Tensor, Tensor], ...]


class LayerProgram:
    """The program over points, from the layer `start` [N, F] with entries `free` [N, F]."""

    def __init__(self, points: Points, start: Tensor, free: Tensor, threads: int = 1) -> None:
        self.points, self.free, self.threads = points, free, threads
        self.start = start.to(COMPUTE_DTYPE)
        self.outputs = [_Output(points, self.start[j], free[j], j) for j in range(len(start))]
        bound = torch.maximum(points.low.abs(), points.high.abs())
        self.tolerance = FEASIBLE * (1 + bound.amax(0)) if len(points) else torch.ones_like(self.start[:, 0])

    def least(self, clock: Clock) -> Least:
        """The least slack of each output. Raises OutOfTime."""
        layer, slack = self.start.clone(), torch.zeros_like(self.start[:, 0])
        for output in self.outputs:
            output.begin()
        left = list(range(len(self.outputs)))
        while left:
            clock.check()
            work = [(j, *rows, clock) for j, rows in zip(left, self._violated(layer, slack, left), strict=True)]
            work = [one for one in work if len(one[1])]
            for (j, *_), (w, t) in zip(work, self._each(self._least, work), strict=True):
                layer[j], slack[j] = w.to(layer), t
            left = [j for j, *_ in work if bool(slack[j].isfinite())]
        return Least(layer, slack, tuple(output.proof() for output in self.outputs))

    def gentlest(self, slack: Tensor, fit: Fit, clock: Clock) -> Tensor:
        """The layer [N, F] within limits widened by slack [N] that changes least where `fit` looks.

        Raises: OutOfTime.
        """
        layer = self.start.clone()
        left, first = list(range(len(self.outputs))), True
        while left:
            clock.check()
            violated = zip(left, self._violated(layer, slack, left), strict=True)
            work = [(j, *rows, float(slack[j]), fit, clock) for j, rows in violated if first or len(rows[0])]
            for (j, *_), w in zip(work, self._each(self._gentlest, work), strict=True):
                layer[j] = w.to(layer)
            left, first = [j for j, *_ in work], False
        return layer

    def rounded(self, step: Tensor, codes: tuple[Tensor, Tensor], clock: Clock) -> Tensor:
        """A layer [N, F] on a grid, of small slack: weights go to codes one by one, the rest is solved again each time.

        step: [N, F] of the grid, 0 for numbers that lie on none. codes: lowest and highest [N, F] to choose from.

        Raises: OutOfTime.
        """
        work = [(j, step[j], codes[0][j], codes[1][j], clock) for j in range(len(self.outputs))]
        return torch.stack(self._each(self._rounded, work)).to(self.start)

    def excess(self, layer: Tensor) -> Tensor:
        """[N] by how much `layer` exceeds its limits."""
        points = self.points
        y = points.features @ layer.to(COMPUTE_DTYPE).T
        return torch.maximum(y - points.high, points.low - y).amax(0)

    def _rounded(self, j: int, step: Tensor, lowest: Tensor, highest: Tensor, clock: Clock) -> Tensor:
        return self.outputs[j].rounded(step, lowest, highest, clock)

    def _least(self, j: int, at: Tensor, sides: Tensor, clock: Clock) -> tuple[Tensor, float]:
        return self.outputs[j].least(at, sides, clock)

    def _gentlest(self, j: int, at: Tensor, sides: Tensor, slack: float, fit: Fit, clock: Clock) -> Tensor:
        return self.outputs[j].gentlest(at, sides, slack, fit, clock)

    def _violated(self, layer: Tensor, slack: Tensor, outputs: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Per output the worst violated points [R], and their sides [R]: 1 above `high`, -1 below `low`."""
        points = self.points
        if not len(points):
            return [(points.soft[:0].long(), points.soft[:0]) for _ in outputs]
        y = points.features @ layer[outputs].T
        give = points.soft[:, None] * slack[outputs]
        over = torch.cat((y - points.high[:, outputs] - give, points.low[:, outputs] - give - y))
        sides = torch.ones_like(over[:, 0])
        sides[len(points) :] = -1
        result = []
        for j, column, tolerance in zip(outputs, over.T, self.tolerance[outputs], strict=True):
            worst, at = column.topk(min(2 * MOST, len(column)))
            at = at[worst > tolerance]
            result.append(self.outputs[j].new(at % len(points), sides[at]))
        return result

    def _each(self, solve: Callable[..., T], work: list[Any]) -> list[T]:
        """`solve` of each piece of work, side by side where there are threads."""
        if self.threads == 1 or len(work) < 2:
            return [solve(*one) for one in work]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda one: solve(*one), work))


class _Output:
    """The rows found so far for one output: side * a . d <= bound + soft * t, d the change of free entries."""

    def __init__(self, points: Points, start: Tensor, free: Tensor, number: int) -> None:
        self.points, self.start, self.number = points, start, number
        self.free = free.nonzero()[:, 0]
        self.at: list[Tensor] = []
        self.sides: list[Tensor] = []
        self.seen: set[tuple[int, float]] = set()
        width = len(self.free)
        self.rows, self.bounds, self.soft = np.zeros((0, width)), np.zeros(0), np.zeros(0)
        self.program: LeastSlack | None = None
        self.multipliers = np.zeros(0)

    def begin(self) -> None:
        """A program of the rows known so far."""
        self.program = LeastSlack(len(self.free))
        self.program.add(self.rows, self.bounds, self.soft)

    def new(self, at: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Those that are no rows yet: a row that solvers leave violated by a little stays as it is."""
        keys = zip(at.tolist(), sides.tolist(), strict=True)
        new = torch.tensor([key not in self.seen for key in keys], dtype=torch.bool, device=at.device)
        return at[new], sides[new]

    def least(self, at: Tensor, sides: Tensor, clock: Clock) -> tuple[Tensor, float]:
        assert self.program is not None
        known = len(self.bounds)
        self._add(at, sides)
        self.program.add(self.rows[known:], self.bounds[known:], self.soft[known:])
        found = self.program.solve(clock)
        self.multipliers = found.multipliers
        return self._layer(found.point), found.value

    def rounded(self, step: Tensor, lowest: Tensor, highest: Tensor, clock: Clock) -> Tensor:
        """On the rows known so far; what others exceed, the certificate shows."""
        program, start = LeastSlack(len(self.free)), self.start[self.free].tolist()
        program.add(self.rows, self.bounds, self.soft)
        step, lowest, highest = step[self.free], lowest[self.free], highest[self.free]
        size, low, high = step.tolist(), (step * lowest).tolist(), (step * highest).tolist()
        on_grid = [k for k, one in enumerate(size) if one > 0]
        for k in on_grid:
            program.limit(k, low[k] - start[k], high[k] - start[k])
        # Those that matter most first, so that many others can still make up for their rounding.
        spread = self.points.features[:, self.free].abs().amax(0) * step
        for k in sorted(on_grid, key=lambda k: -float(spread[k])):
            change = float(program.solve(clock).point[k])
            code = min(max(round((start[k] + change) / size[k]), round(low[k] / size[k])), round(high[k] / size[k]))
            program.limit(k, code * size[k] - start[k], code * size[k] - start[k])
        return self._layer(program.solve(clock).point)

    def gentlest(self, at: Tensor, sides: Tensor, slack: float, fit: Fit, clock: Clock) -> Tensor:
        import cvxpy as cp

        self._add(at, sides)
        free = self.free
        gram = fit.gram[free][:, free]
        ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
        root = torch.linalg.cholesky(gram + ridge * torch.eye(len(free), dtype=gram.dtype, device=gram.device))
        aim = torch.linalg.solve_triangular(root, fit.pull[free, self.number][:, None], upper=False)[:, 0]
        d: Any = cp.Variable(len(free))
        limits: list[Any] = [self.rows @ d <= self.bounds + self.soft * slack] if len(self.bounds) else []
        problem = cp.Problem(cp.Minimize(cp.sum_squares(root.T.cpu().numpy() @ d - aim.cpu().numpy())), limits)
        clock.check()
        limit = {"time_limit": max(clock.left, 1e-3)} if clock.limited else {}
        try:
            with warnings.catch_warnings():  # what is not accurate enough, the certificate shows
                warnings.simplefilter("ignore", UserWarning)
                problem.solve(solver=cp.CLARABEL, **CLARABEL, **limit)
        except cp.SolverError as error:
            clock.check()
            raise RuntimeError(f"Clarabel failed on a program of {len(self.bounds)} rows: {error}") from error
        if d.value is None:
            clock.check()
            raise RuntimeError(f"Clarabel did not finish a program of {len(self.bounds)} rows: {problem.status}")
        return self._layer(d.value)

    def proof(self) -> tuple[Tensor, Tensor]:
        """Points and signed multipliers of the last `least`."""
        device = self.points.features.device
        if not len(self.multipliers):
            return torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, dtype=COMPUTE_DTYPE, device=device)
        m = torch.from_numpy(self.multipliers).to(device)
        at, sides = torch.cat(self.at), torch.cat(self.sides)
        active = m > 0
        return at[active], -(m * sides)[active]

    def _add(self, at: Tensor, sides: Tensor) -> None:
        self.seen.update(zip(at.tolist(), sides.tolist(), strict=True))
        self.at.append(at)
        self.sides.append(sides)
        points, j = self.points, self.number
        h = points.features[at]
        limit = torch.where(sides > 0, points.high[at, j], -points.low[at, j])
        rows, bounds = sides[:, None] * h[:, self.free], limit - sides * (h @ self.start)
        self.rows = np.concatenate((self.rows, _array(rows)))
        self.bounds = np.concatenate((self.bounds, _array(bounds)))
        self.soft = np.concatenate((self.soft, _array(points.soft[at])))

    def _layer(self, change: Array) -> Tensor:
        layer = self.start.clone()
        layer[self.free] += torch.from_numpy(np.asarray(change)).to(layer)
        return layer


def _array(value: Tensor) -> Array:
    return value.to("cpu", COMPUTE_DTYPE).numpy()
