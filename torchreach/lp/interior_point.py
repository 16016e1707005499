"""Batched primal-dual interior-point method, on any device.

Method: Mehrotra's predictor-corrector from a strictly feasible primal point; one Cholesky factorisation of
the M x M matrix A^T E A + D per program and iteration, or of the P x P Schur complement
E^-1 + A D^-1 A^T where there are fewer constraints than variables.
Property: `lower` and `upper` are certified at every iteration (feasible point, dual bound); stopping early
costs tightness, never soundness. A batch never fails because of one program.
Requirement: a strictly feasible start (`interior` finds one).
Reference: S. Wright, Primal-Dual Interior-Point Methods, SIAM 1997, ch. 10.

Axis letters: B programs, M variables, P constraints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.lp.halfspaces import Halfspaces, Sets
from torchreach.lp.problem import LPBatch, LPSolution, for_each

START = 0.1
TO_BOUNDARY = 0.9995
REGULARISATION = 1e-14


def maximize(
    problem: LPBatch,
    start: Tensor,
    *,
    gap: float,
    relative: float = 0.0,
    above: Tensor | float = torch.inf,
    below: Tensor | float = -torch.inf,
    iterations: int = 60,
    clock: Clock = NO_LIMIT,
) -> LPSolution:
    """Certified intervals around the optima, each program stopping as soon as its question is answered.

    Args:
        start: [B, M] strictly feasible points.
        gap, relative: a program ends when upper - lower <= gap + relative * |lower|.
        above, below: [B] or number; a program also ends when lower > above or when upper <= below.
        iterations: limit; what is left then keeps its (valid, wider) interval.

    Raises: OutOfTime, between two iterations.
    """
    size, dim = problem.objective.shape
    lower = problem.value(start)
    point = start.clone()
    dual = torch.zeros_like(problem.sets.b)
    upper = problem.bound(dual)
    if problem.sets.constraints == 0:  # a box: the dual bound is exact and its corner attains it
        corner = torch.where(problem.objective >= 0, 1.0, -1.0).to(start.dtype)
        return LPSolution(problem.value(corner), upper, corner, dual, 0)

    above = for_each(above, start)
    below = for_each(below, start)
    todo = torch.arange(size, device=start.device)
    work, state = problem, _State.start(problem, start)
    used = 0
    for used in range(1, iterations + 1):
        clock.check()
        done = upper[todo] - lower[todo] <= gap + relative * lower[todo].abs()
        done |= (lower[todo] > above[todo]) | (upper[todo] <= below[todo])
        left = (~done).nonzero().flatten()
        if len(left) == 0:
            break
        if len(left) < len(todo):
            todo, work, state = todo[left], work.select(left), state.select(left)
        state.step(work)
        value = work.value(state.a)
        # The iterate stays strictly feasible up to rounding; a point that is not is not taken.
        better = (value > lower[todo]) & state.feasible(work)
        lower[todo] = torch.where(better, value, lower[todo])
        point[todo] = torch.where(better[:, None], state.a, point[todo])
        bound = work.bound(state.y)
        tighter = bound < upper[todo]
        upper[todo] = torch.where(tighter, bound, upper[todo])
        dual[todo] = torch.where(tighter[:, None], state.y, dual[todo])
    return LPSolution(lower, upper, point, dual, used)


class _State:
    """Primal point a, slacks s, p = 1 - a, q = 1 + a, and their multipliers y, u, v; updated in place."""

    def __init__(self, a: Tensor, s: Tensor, y: Tensor, u: Tensor, v: Tensor) -> None:
        self.a, self.s, self.y, self.u, self.v = a, s, y, u, v

    @staticmethod
    def start(problem: LPBatch, a: Tensor) -> _State:
        s = problem.sets.room(a).clamp(min=1e-14)
        # mu such that multipliers are of the size of the objective
        scale = problem.objective.abs().amax(1, keepdim=True).clamp(min=1e-12)
        p, q = 1 - a, 1 + a
        mu = START * scale
        y = mu / s
        # multipliers of the box that leave no dual residual, with p u q v = mu^2
        left = problem.objective - problem.sets.mix(y[:, None])[:, 0]
        product = mu * mu / (p * q)
        large = (left.abs() + (left * left + 4 * product).sqrt()) / 2
        small = product / large
        return _State(a, s, y, torch.where(left > 0, large, small), torch.where(left > 0, small, large))

    def select(self, index: Tensor) -> _State:
        return _State(self.a[index], self.s[index], self.y[index], self.u[index], self.v[index])

    def feasible(self, problem: LPBatch) -> Tensor:
        return (problem.sets.room(self.a).amin(1) >= 0) & (self.a.abs().amax(1) <= 1)

    def step(self, problem: LPBatch) -> None:
        sets, g = problem.sets, problem.objective
        a, s, y, u, v = self.a, self.s, self.y, self.u, self.v
        p, q = 1 - a, 1 + a
        slots = s.shape[1] + 2 * a.shape[1]
        dots = torch.linalg.vecdot
        held = dots(s, y), dots(p, u), dots(q, v)
        mu = (held[0] + held[1] + held[2]) / slots
        up, vq = u / p, v / q
        solve = factor(sets, y / s, up + vq)
        # predictor: right side g - A^T y - u + v, plus what aiming at complementarity zero adds, is g itself
        da, w = (part[:, 0] for part in solve(g[:, None]))
        ds = -sets.dot(da[:, None])[:, 0]
        dy, du, dv = w - y, up * da - u, -vq * da - v
        primal = _shortest(_growth(ds, s), _growth(-da, p), _growth(da, q))
        dual = _shortest(_growth(dy, y), _growth(du, u), _growth(dv, v))
        after = torch.zeros_like(mu)
        # (s + t ds) (y + r dy) summed, where s dy + y ds = -s y
        for dot, delta, multiplier, change in zip(held, (ds, -da, da), (y, u, v), (dy, du, dv), strict=True):
            part = dots(delta, multiplier)
            after += dot + primal * part - dual * (dot + part) + primal * dual * dots(delta, change)
        centre = (mu * (after / slots / mu).clamp(0, 1) ** 3)[:, None]
        # corrector: aim at the centre, with the predictor's second-order terms
        ty, tu, tv = (centre - ds * dy) / s, (centre + da * du) / p, (centre - da * dv) / q
        da, w = (part[:, 0] for part in solve((g - sets.mix(ty[:, None])[:, 0] - tu + tv)[:, None]))
        ds = -sets.dot(da[:, None])[:, 0]
        dy, du, dv = ty + w - y, tu + up * da - u, tv - vq * da - v
        primal = TO_BOUNDARY * _shortest(_growth(ds, s), _growth(-da, p), _growth(da, q))
        dual = TO_BOUNDARY * _shortest(_growth(dy, y), _growth(du, u), _growth(dv, v))
        # a program that met NaN or infinity stays where it is
        ok = torch.isfinite(da.sum(1)) & torch.isfinite(dy.sum(1)) & torch.isfinite(primal) & torch.isfinite(dual)
        if not ok.all():
            da, dy, du, dv = (torch.where(ok[:, None], part, 0.0) for part in (da, dy, du, dv))
            primal, dual = torch.where(ok, primal, 0.0), torch.where(ok, dual, 0.0)
        primal, dual = primal[:, None], dual[:, None]
        self.a = torch.addcmul(a, primal, da)
        self.s = sets.room(self.a).clamp(min=1e-15)
        self.y, self.u, self.v = (torch.addcmul(m, dual, change) for m, change in ((y, dy), (u, du), (v, dv)))


def _growth(delta: Tensor, value: Tensor) -> Tensor:
    """[B] the most negative relative change of any value."""
    if value.shape[1] == 0:
        return value.new_zeros(len(value))
    return (delta / value).amin(1)


def _shortest(*growth: Tensor) -> Tensor:
    """[B] longest step in [0, 1] that keeps every value nonnegative."""
    return (-1 / torch.stack(growth).amin(0).clamp(max=-1e-300)).clamp(max=1.0)


def factor(
    sets: Sets, weights: Tensor, diagonal: Tensor, refinements: int = 1
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Solver r -> (x, w) of D x + A^T w = r, w = E A x, with E = diag(weights), D = diag(diagonal).

    weights [B, P] > 0, diagonal [B, M] > 0; r and x [B, R, M], w [B, R, P]: one factorisation serves R
    right-hand sides.
    """
    D, E = diagonal[:, None], weights[:, None]
    if sets.constraints < sets.variables:  # fewer constraints than variables: eliminate x, factor P x P
        eliminated = _Scaled(sets.over_constraints(1 / diagonal) + torch.diag_embed(1 / weights))

        def reduced(r1: Tensor, r2: Tensor | None) -> tuple[Tensor, Tensor]:
            right = sets.dot(r1 / D)
            w = eliminated.solve(right if r2 is None else right - r2)
            return (r1 - sets.mix(w)) / D, w

    else:  # eliminate w, factor M x M
        eliminated = _Scaled(sets.over_variables(weights) + torch.diag_embed(diagonal))

        def reduced(r1: Tensor, r2: Tensor | None) -> tuple[Tensor, Tensor]:
            x = eliminated.solve(r1 if r2 is None else r1 + sets.mix(E * r2))
            return x, E * (sets.dot(x) if r2 is None else sets.dot(x) - r2)

    def solve(r: Tensor) -> tuple[Tensor, Tensor]:
        x, w = reduced(r, None)
        # Near the optimum D or 1 / E vanish and digits are lost in the elimination; refining the unreduced
        # system, where neither 1 / D nor E appears, restores them.
        for _ in range(refinements):
            dx, dw = reduced(r - D * x - sets.mix(w), w / E - sets.dot(x))
            x, w = x + dx, w + dw
        return x, w

    return solve


class _Scaled:
    """Cholesky factor of a positive definite batch, scaled to a unit diagonal and kept off singularity.

    Entries span twenty orders of magnitude near an optimum where many constraints meet; without the scaling
    the factorisation breaks down there.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.scale = matrix.diagonal(dim1=1, dim2=2).rsqrt()[:, None]
        unit = self.scale * matrix * self.scale.transpose(1, 2)
        unit.diagonal(dim1=1, dim2=2).add_(REGULARISATION)
        self.factor = torch.linalg.cholesky_ex(unit).L

    def solve(self, right: Tensor) -> Tensor:
        """[B, R, K] -> [B, R, K]."""
        scaled = (self.scale * right).transpose(1, 2)
        return self.scale * torch.cholesky_solve(scaled, self.factor).transpose(1, 2)


def interior(sets: Halfspaces, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Deep points of the sets {A a <= b, |a| <= 1}, or proof that there are none.

    Maximises the margin t with A a + |A_p| t <= b by `maximize`, from a = 0.

    Args: sets: their rows may be zero. tolerance: margin below which a set counts as flat.

    Returns: (point [B, M], depth [B], empty [B]). depth is the margin of `point`: positive for sets with
        interior. `empty` is certified: the margin of every point of the box is below -tolerance.
    """
    A, b = sets.A, sets.b
    size, constraints, dim = A.shape
    if constraints == 0:
        ones = torch.ones(size, dtype=A.dtype, device=A.device)
        return torch.zeros(size, dim, dtype=A.dtype, device=A.device), ones, ones < 0
    norm = A.norm(dim=2, keepdim=True)
    # A zero row 0 . a <= b is either void or impossible; as 0 . a + t <= b / 1e-300 it stays what it is.
    A = A / norm.clamp(min=1e-300)
    b = (b / norm[:, :, 0].clamp(min=1e-300)).clamp(-1e6, 1e6)
    low = b.amin(1).clamp(max=0) - 1.0
    middle, radius = (low + 1) / 2, (1 - low) / 2  # t = middle + radius * last variable, in [low, 1]
    ones = torch.ones(size, constraints, 1, dtype=A.dtype, device=A.device)
    problem = LPBatch(
        torch.cat((torch.zeros(size, dim, dtype=A.dtype, device=A.device), radius[:, None]), 1),
        middle,
        Halfspaces(torch.cat((A, ones * radius[:, None, None]), 2), b - middle[:, None]),
    )
    start = torch.zeros(size, dim + 1, dtype=A.dtype, device=A.device)
    # strictly below the smallest margin at a = 0
    start[:, -1] = ((b.amin(1).clamp(max=1) - low) / 2 + low - middle) / radius
    # Answered when the margin is known to a factor of two, or certainly negative.
    solution = maximize(
        problem,
        start,
        gap=tolerance / 4,
        relative=0.5,
    )
    point = solution.point[:, :-1]
    depth = (b - (A @ point[:, :, None])[:, :, 0]).amin(1).minimum((1 - point.abs()).amin(1))
    empty = solution.upper < -tolerance
    return point, depth, empty


def centre(sets: Sets, start: Tensor, steps: int, clock: Clock = NO_LIMIT) -> Tensor:
    """Points [B, M] nearer the analytic centre: damped Newton steps on -sum log of all slacks.

    start: [B, M] strictly interior; every step stays strictly interior. Raises OutOfTime, between two steps.
    """
    a = start
    for _ in range(steps if start.shape[1] else 0):
        clock.check()
        s, p, q = sets.room(a), 1 - a, 1 + a
        gradient = sets.mix((1 / s)[:, None])[:, 0] + 1 / p - 1 / q
        da = torch.nan_to_num(factor(sets, s**-2, p**-2 + q**-2, 0)(-gradient[:, None])[0][:, 0])
        decrement = (-gradient * da).sum(1).clamp(min=0).sqrt()
        # the damped step of self-concordant analysis, or most of the way to the boundary if that is longer
        ds = -sets.dot(da[:, None])[:, 0]
        furthest = 0.9 * _shortest(_growth(ds, s), _growth(-da, p), _growth(da, q))
        length = torch.where(decrement < 0.25, torch.ones_like(decrement), furthest).minimum(furthest)
        a = torch.addcmul(a, length[:, None], da)
    return a
