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

from torchreach.lp.problem import LPBatch, LPSolution

TO_BOUNDARY = 0.995
REFINEMENTS = 1
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
) -> LPSolution:
    """Certified intervals around the optima, each program stopping as soon as its question is answered.

    Args:
        start: [B, M] strictly feasible points.
        gap, relative: a program ends when upper - lower <= gap + relative * |lower|.
        above, below: [B] or number; a program also ends when lower > above or when upper <= below.
        iterations: limit; what is left then keeps its (valid, wider) interval.
    """
    size, dim = problem.objective.shape
    lower = (problem.objective * start).sum(1) + problem.constant
    point = start.clone()
    dual = torch.zeros_like(problem.b)
    upper = problem.bound(dual)
    if problem.b.shape[1] == 0:  # a box: the dual bound is exact and its corner attains it
        corner = torch.where(problem.objective >= 0, 1.0, -1.0).to(start.dtype)
        return LPSolution((problem.objective * corner).sum(1) + problem.constant, upper, corner, dual, 0)

    above = torch.as_tensor(above, dtype=start.dtype, device=start.device).expand(size)
    below = torch.as_tensor(below, dtype=start.dtype, device=start.device).expand(size)
    todo = torch.arange(size, device=start.device)
    work, state = problem, _State.start(problem, start)
    used = 0
    for used in range(1, iterations + 1):
        done = upper[todo] - lower[todo] <= gap + relative * lower[todo].abs()
        done |= (lower[todo] > above[todo]) | (upper[todo] <= below[todo])
        left = (~done).nonzero().flatten()
        if len(left) == 0:
            break
        if len(left) < len(todo):
            todo, work, state = todo[left], work.select(left), state.select(left)
        state.step(work)
        value = (work.objective * state.a).sum(1) + work.constant
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
        s = (problem.b - (problem.A @ a[:, :, None])[:, :, 0]).clamp(min=1e-14)
        # mu such that multipliers are of the size of the objective
        scale = problem.objective.abs().amax(1, keepdim=True).clamp(min=1e-12)
        p, q = 1 - a, 1 + a
        mu = 0.1 * scale
        return _State(a, s, mu / s, mu / p, mu / q)

    def select(self, index: Tensor) -> _State:
        return _State(self.a[index], self.s[index], self.y[index], self.u[index], self.v[index])

    def feasible(self, problem: LPBatch) -> Tensor:
        inside = (problem.b - (problem.A @ self.a[:, :, None])[:, :, 0]).amin(1) >= 0
        return inside & (self.a.abs().amax(1) <= 1)

    def step(self, problem: LPBatch) -> None:
        A = problem.A
        a, s, y, u, v = self.a, self.s, self.y, self.u, self.v
        p, q = 1 - a, 1 + a
        slots = s.shape[1] + 2 * a.shape[1]
        mu = ((s * y).sum(1) + (p * u).sum(1) + (q * v).sum(1)) / slots
        residual = problem.objective - _transposed(A, y) - u + v
        solve = factor(A, y / s, u / p + v / q)

        def direction(rs: Tensor, rp: Tensor, rq: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            right = residual - _transposed(A, rs / s) - rp / p + rq / q
            da, w = (part[:, :, 0] for part in solve(right[:, :, None]))
            return da, -(A @ da[:, :, None])[:, :, 0], rs / s + w, rp / p + u / p * da, rq / q - v / q * da

        da, ds, dy, du, dv = direction(-s * y, -p * u, -q * v)
        primal, dual = _lengths((s, p, q), (ds, -da, da)), _lengths((y, u, v), (dy, du, dv))
        p1, d1 = primal[:, None], dual[:, None]
        after = (
            ((s + p1 * ds) * (y + d1 * dy)).sum(1)
            + ((p - p1 * da) * (u + d1 * du)).sum(1)
            + ((q + p1 * da) * (v + d1 * dv)).sum(1)
        ) / slots
        centre = (mu * (after / mu).clamp(0, 1) ** 3)[:, None]
        da, ds, dy, du, dv = direction(centre - s * y - ds * dy, centre - p * u + da * du, centre - q * v - da * dv)
        primal = TO_BOUNDARY * _lengths((s, p, q), (ds, -da, da))[:, None]
        dual = TO_BOUNDARY * _lengths((y, u, v), (dy, du, dv))[:, None]
        ok = (torch.isfinite(da).all(1) & torch.isfinite(dy).all(1))[:, None]
        primal, dual = torch.where(ok, primal, 0.0), torch.where(ok, dual, 0.0)
        zero = torch.nan_to_num
        self.a = a + primal * zero(da)
        self.s = (problem.b - (A @ self.a[:, :, None])[:, :, 0]).clamp(min=1e-15)
        self.y, self.u, self.v = y + dual * zero(dy), u + dual * zero(du), v + dual * zero(dv)


def _transposed(A: Tensor, y: Tensor) -> Tensor:
    return (y[:, None, :] @ A)[:, 0, :]


def _lengths(values: tuple[Tensor, ...], deltas: tuple[Tensor, ...]) -> Tensor:
    """[B] longest step in [0, 1] that keeps every value nonnegative."""
    value, delta = torch.cat(values, 1), torch.cat(deltas, 1)
    ratio = torch.where(delta < 0, -value / delta, torch.inf)
    return ratio.amin(1).clamp(max=1.0)


def factor(A: Tensor, weights: Tensor, diagonal: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Solver r -> (x, w) of D x + A^T w = r, w = E A x, with E = diag(weights), D = diag(diagonal).

    A [B, P, M], weights [B, P] > 0, diagonal [B, M] > 0; r and x [B, M, R], w [B, P, R]: one factorisation
    serves R right-hand sides.
    """
    At = A.transpose(1, 2)
    D, E = diagonal[:, :, None], weights[:, :, None]
    if A.shape[1] < A.shape[2]:  # fewer constraints than variables: eliminate x, factor P x P
        scaled = A / diagonal[:, None, :]
        eliminated = _Scaled(scaled @ At + torch.diag_embed(1 / weights))

        def reduced(r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
            w = eliminated.solve(scaled @ r1 - r2)
            return (r1 - At @ w) / D, w

    else:  # eliminate w, factor M x M
        weighted = (A * E).transpose(1, 2)
        eliminated = _Scaled(weighted @ A + torch.diag_embed(diagonal))

        def reduced(r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
            x = eliminated.solve(r1 + weighted @ r2)
            return x, E * (A @ x - r2)

    def solve(r: Tensor) -> tuple[Tensor, Tensor]:
        x, w = reduced(r, torch.zeros_like(E))
        # Near the optimum D or 1 / E vanish and digits are lost in the elimination; refining the unreduced
        # system, where neither 1 / D nor E appears, restores them.
        for _ in range(REFINEMENTS):
            dx, dw = reduced(r - D * x - At @ w, w / E - A @ x)
            x, w = x + dx, w + dw
        return x, w

    return solve


class _Scaled:
    """Cholesky factor of a positive definite batch, scaled to a unit diagonal and kept off singularity.

    Entries span twenty orders of magnitude near an optimum where many constraints meet; without the scaling
    the factorisation breaks down there.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.scale = matrix.diagonal(dim1=1, dim2=2).rsqrt()[:, :, None]
        unit = self.scale * matrix * self.scale.transpose(1, 2)
        unit.diagonal(dim1=1, dim2=2).add_(REGULARISATION)
        self.factor = torch.linalg.cholesky_ex(unit).L

    def solve(self, right: Tensor) -> Tensor:
        return self.scale * torch.cholesky_solve(self.scale * right, self.factor)


def interior(A: Tensor, b: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Deep points of the sets {A a <= b, |a| <= 1}, or proof that there are none.

    Maximises the margin t with A a + |A_p| t <= b by `maximize`, from a = 0.

    Args: A [B, P, M], b [B, P]; rows may be zero. tolerance: margin below which a set counts as flat.

    Returns: (point [B, M], depth [B], empty [B]). depth is the margin of `point`: positive for sets with
        interior. `empty` is certified: the margin of every point of the box is below -tolerance.
    """
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
        torch.cat((A, ones * radius[:, None, None]), 2),
        b - middle[:, None],
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


def centre(A: Tensor, b: Tensor, start: Tensor, steps: int) -> Tensor:
    """Points [B, M] nearer the analytic centre: damped Newton steps on -sum log of all slacks.

    start: [B, M] strictly interior; every step stays strictly interior.
    """
    a = start
    for _ in range(steps if start.shape[1] else 0):
        s = b - (A @ a[:, :, None])[:, :, 0]
        p, q = 1 - a, 1 + a
        gradient = _transposed(A, 1 / s) + 1 / p - 1 / q
        da = torch.nan_to_num(factor(A, s**-2, p**-2 + q**-2)(-gradient[:, :, None])[0][:, :, 0])
        decrement = (-gradient * da).sum(1).clamp(min=0).sqrt()
        # the damped step of self-concordant analysis, or most of the way to the boundary if that is longer
        ds = -(A @ da[:, :, None])[:, :, 0]
        longest = 0.9 * _longest((s, p, q), (ds, -da, da))
        length = torch.where(decrement < 0.25, torch.ones_like(decrement), longest)
        a = a + length.minimum(longest).clamp(max=1.0)[:, None] * da
    return a


def _longest(values: tuple[Tensor, ...], deltas: tuple[Tensor, ...]) -> Tensor:
    value, delta = torch.cat(values, 1), torch.cat(deltas, 1)
    return torch.where(delta < 0, -value / delta, torch.inf).amin(1).clamp(max=1e6)
