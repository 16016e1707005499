"""What one factorisation at the analytic centre of a set says about many linear programs over it.

At the centre the barrier's gradient vanishes, so for the Newton direction x = H^-1 g of an objective g both
a + t x (a point, while inside) and w = A x / s^2 (multipliers, where nonnegative) come
without further solves; H is the barrier's Hessian and s the slacks.

Reference: Nesterov, Nemirovskii, Interior-Point Polynomial Algorithms in Convex Programming, SIAM 1994.

Axis letters: B sets, R questions per set, E questions still open, M variables, P constraints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreach.core.clock import NO_LIMIT, Clock
from torchreach.core.memory import batch_size
from torchreach.lp.halfspaces import Sets
from torchreach.lp.interior_point import factor, maximize
from torchreach.lp.problem import LPBatch, LPSolution, for_each

# Numbers per tensor in one batch: large enough to hide the cost of a call, small enough to stay in cache.
NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}
# Polyak's step is longer than it need be by this factor: multipliers only have to get below the level.
RELAXED = 1.5
# Multipliers at the centre are too small for the optimum by about this factor.
START = 1.3
STEPS = 10


@dataclass(frozen=True)
class Answer:
    """Certified bounds `upper`, and `value` at `point`, of each question [B, R]; points [B, R, M].

    Bounds are infinite where the point answered the question.
    """

    upper: Tensor
    value: Tensor
    point: Tensor


def look(rows: Tensor, asked: Tensor, sets: Sets, a: Tensor, tolerance: float, clock: Clock = NO_LIMIT) -> Answer:
    """Does max row . (1, a) exceed `tolerance`? By a point beyond it or a dual bound below it, where one is found.

    Args:
        rows: [B, R, 1 + M] objectives with their constants; asked: [B, R] which of them matter.
        a: [B, M] points near the analytic centres.

    Raises: OutOfTime.
    """
    parts = [
        _look(rows[i], asked[i], sets.select(i), a[i], tolerance, clock)
        for i in slices(len(rows), rows[0].numel(), rows.device)
    ]
    return parts[0] if len(parts) == 1 else Answer(*(torch.cat([getattr(p, n) for p in parts]) for n in _FIELDS))


_FIELDS = ("upper", "value", "point")


def _look(rows: Tensor, asked: Tensor, sets: Sets, a: Tensor, tolerance: float, clock: Clock) -> Answer:
    clock.check()
    g, constant = rows[:, :, 1:], rows[:, :, 0]
    x, w, s = _newton(g, sets, a)
    pace = torch.maximum(x / (1 - a)[:, None], x / -(1 + a)[:, None]).amax(2)
    if sets.constraints:
        pace = pace.maximum((sets.dot(x) / s[:, None]).amax(2))
    length = 0.99 / pace.clamp(min=1e-12)
    point = a[:, None] + length[:, :, None] * x
    value = constant + torch.linalg.vecdot(g, point)
    upper = torch.full_like(value, torch.inf)
    star, question = (asked & (value <= tolerance)).nonzero(as_tuple=True)
    if len(star):
        problem = LPBatch(g[star, question], constant[star, question], sets.select(star))
        y = w[star, question].clamp(min=0)
        if sets.constraints:
            # Nearly equal networks cut twice along nearly one plane: the best single constraint alone, rows being
            # of unit length or absent. Its bound is the tightest there, and excursions add up.
            along = problem.sets.dot(problem.objective[:, None])[:, 0]
            single = torch.where(along == along.amax(1, keepdim=True), along, 0.0).clamp(min=0)
            y = torch.where((problem.bound(single) <= tolerance)[:, None], single, y)
        upper[star, question] = refute(problem, y, tolerance, STEPS, clock)
    return Answer(upper, value, point)


def refute(problem: LPBatch, y: Tensor, below: Tensor | float, steps: int, clock: Clock = NO_LIMIT) -> Tensor:
    """Certified bounds [E], with an end as soon as they are at most `below`.

    Dual descent with Polyak's step, which needs a level to aim at: here it is known. A direction is turned away
    from the one before where they form an obtuse angle, which keeps it from zigzagging (Camerini, Fratta,
    Maffioli, Math. Programming Study 3, 1975).

    Args:
        y: [E, P] multipliers >= 0 to start from; below: [E] or a number.

    Raises: OutOfTime.
    """
    below = for_each(below, y)
    best = y.new_full((len(y),), torch.inf)
    todo = torch.arange(len(y), device=y.device)
    way = torch.zeros_like(y)
    for step in range(steps + 1):
        clock.check()
        bound, corner = problem.bound_and_corner(y)
        best[todo] = best[todo].minimum(bound)
        left = (best[todo] > below).nonzero().flatten()
        if len(left) == 0 or step == steps or problem.sets.constraints == 0:
            break
        if 4 * len(left) < 3 * len(todo):
            todo, problem, below = todo[left], problem.select(left), below[left]
            y, bound, corner, way = y[left], bound[left], corner[left], way[left]
        slope = problem.sets.room(corner)
        slope = torch.where((y <= 0) & (slope > 0), 0.0, slope)  # such multipliers cannot shrink
        dots = torch.linalg.vecdot
        turn = (-dots(slope, way) / dots(way, way).clamp(min=1e-300)).clamp(min=0)
        way = torch.addcmul(slope, turn[:, None], way)
        length = RELAXED * (bound - below).clamp(min=0) / dots(way, way).clamp(min=1e-300)
        y = torch.addcmul(y, length[:, None], way, value=-1).clamp(min=0).nan_to_num()
    return best


def multipliers(objective: Tensor, sets: Sets, a: Tensor) -> Tensor:
    """What constraints hold of each objective [B, R, M] at the centre a [B, M]: [B, R, P], of either sign.

    Its positive part is a good start for `refute`; that of its negative belongs to minus the objective.
    """
    return START * _newton(objective, sets, a)[1]


def _newton(g: Tensor, sets: Sets, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = H^-1 g [B, R, M], w = A x / s^2 [B, R, P] of the barrier at a [B, M], and its slacks s [B, P]."""
    p, q, s = 1 - a, 1 + a, sets.room(a).clamp(min=1e-15)
    x, w = factor(sets, s**-2, p**-2 + q**-2, 0)(g)
    return torch.nan_to_num(x), torch.nan_to_num(w), s


def solve(
    problem: LPBatch,
    start: Tensor,
    *,
    gap: float,
    above: float = torch.inf,
    below: Tensor | float = -torch.inf,
    clock: Clock = NO_LIMIT,
) -> LPSolution:
    """`maximize` in batches of bounded memory. Raises OutOfTime."""
    below = for_each(below, start)
    parts = [
        maximize(problem.select(i), start[i], gap=gap, above=above, below=below[i], clock=clock)
        for i in slices(len(start), problem.sets.variables + problem.sets.row_numbers, start.device)
    ]
    if len(parts) == 1:
        return parts[0]
    joined = (torch.cat([getattr(p, n) for p in parts]) for n in ("lower", "upper", "point", "dual"))
    return LPSolution(*joined, iterations=max(p.iterations for p in parts))


def slices(count: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Slices of a batch of `count` elements of `numbers` numbers each."""
    size = max(1, batch_size(NUMBERS, device) // max(1, numbers))
    return (slice(i, i + size) for i in range(0, max(count, 1), size))
